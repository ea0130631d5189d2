"""Put a bundle into Ollama through its HTTP API, and see that it dreams there."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from bundle.manifest import GGUF, LICENSE, Manifest, check_file, read_manifest
from bundle.modelfile import license_text
from distill.address import Address, default_host
from distill.errors import BadInput, DistillError, ModelNotFound, TeacherError
from distill.events import Event, Listener, silent
from distill.teacher.licenses import License
from distill.teacher.names import fitting_name, is_name
from distill.teacher.ollama_client import OllamaClient
from distill.turns import apart_from_system, messages
from distill.vision import PROJECTOR

THINKING = "thinking"
"""The capability that Ollama gives a model whose template writes `.Thinking` between two tags."""

FIRST_TOKENS = 128
"""Of the answer that an installed model is asked for."""


def install(
    bundle_dir: Path,
    name: str | None = None,
    host: str | None = None,
    quantize: str | None = None,
    listen: Listener = silent,
    *,
    force: bool = False,
) -> dict[str, Any]:
    """Create the model `name` (the bundle's own, if None) at an Ollama `host` (the default one, if None).

    quantize: a type that Ollama knows, such as `q8_0` or `q4_K_M`; the bundle must then hold f32, f16 or bf16.
    Returns model, host, capabilities and one question with the dream and answer that it gave there.
    Raises BadInput (name taken, unless `force`), CorruptFile, TeacherUnavailable, TeacherError (refused), and
    DistillError where the installed model can't think.
    """
    manifest = read_manifest(bundle_dir)
    files = [GGUF, *([PROJECTOR] if PROJECTOR in manifest.files else [])]
    for file in files:
        check_file(bundle_dir, manifest, file)
    name, host = name or manifest.name, Address(host) if host else default_host()
    if not is_name(name):
        raise BadInput(f"{name}: Ollama takes no such name for a model; --name {fitting_name(name)} would do")
    if quantize and manifest.dtype not in ("f32", "f16", "bf16"):
        raise BadInput(f"quantize: Ollama can't quantize a {manifest.dtype} file again; export with --dtype f16 first")
    asker = OllamaClient(host, retries=2)
    listen(Event("install", "start", f"{name} at {host}"))
    if not manifest.provenance.get("importable", True):
        listen(Event("install", "note", f"from {GGUF}: from the folder's safetensors Ollama would read other tokens"))
    try:
        _check_free(asker, name, host, force)
        digests = {file: f"sha256:{manifest.files[file]['sha256']}" for file in files}
        size = sum(manifest.files[file]["bytes"] for file in files)
        listen(Event("install", "progress", "uploading", done=0, total=size, unit="B"))
        for file, digest in digests.items():
            asker.send_blob(digest, bundle_dir / file)
        listen(Event("install", "progress", "uploaded", done=size, total=size, unit="B"))
        told = {**manifest.ollama, "license": _license(bundle_dir, manifest), "quantize": quantize}
        what = {"files": digests, **{key: value for key, value in told.items() if value}}
        follow(asker, "/api/create", name, what, "install", listen)
        result = {"model": name, "host": host, "quantize": quantize, **_try_out(asker, name, host, manifest)}
    finally:
        asker.close()
    listen(Event("install", "done", f"ollama run {name}", data=result))
    return result


def _check_free(asker: OllamaClient, name: str, host: str, force: bool) -> None:
    try:
        asker.show(name)
    except ModelNotFound:
        return
    if not force:
        raise BadInput(f"{name}: is in Ollama at {host} already; --force replaces it, another name leaves it alone")


def _license(folder: Path, manifest: Manifest) -> str:
    """The terms of the weights, as far as the bundle tells them."""
    known = License.from_json(manifest.provenance.get("license"))
    if LICENSE in manifest.files:
        check_file(folder, manifest, LICENSE)
        known = replace(known, text=(folder / LICENSE).read_text(encoding="utf-8"))
    return license_text(known, manifest.provenance.get("sees", ""))


def follow(asker: OllamaClient, path: str, name: str, what: dict[str, Any], stage: str, listen: Listener) -> None:
    """Ask Ollama to do something with a model, and tell what it says meanwhile. Raises TeacherError where it ends
    without success."""
    status = ""
    for line in asker.lines(path, {"model": name, "stream": True, **what}):
        status = str(line.get("status") or "")
        if total := line.get("total"):
            listen(Event(stage, "progress", status, done=line.get("completed") or 0, total=total, unit="B"))
        else:
            listen(Event(stage, "note", f"Ollama: {status}"))
    if status != "success":
        raise TeacherError(f"{name}: Ollama stopped at {status!r} without an error; see the server's log")


def _try_out(asker: OllamaClient, name: str, host: str, manifest: Manifest) -> dict[str, Any]:
    """Capabilities, and a first question with its dream and answer."""
    capabilities: list[str] = asker.show(name).get("capabilities") or []
    if THINKING not in capabilities:
        raise DistillError(
            f"{name}: installed at {host}, but this Ollama doesn't see that it thinks (capabilities: "
            f"{', '.join(capabilities) or 'none'}); update Ollama to 0.12.11 or later"
        )
    prompt = (manifest.verification_prompts or ["What happens when you drop a ball?"])[0]
    answer = asker.post(
        "/api/chat",
        {
            "model": name,
            "messages": messages(prompt),
            "think": True,
            "stream": False,
            "options": {"temperature": 0, "seed": 0, "num_predict": FIRST_TOKENS},
        },
    )
    message: dict[str, str] = answer.get("message") or {}
    # Ollama leaves the line break before the closing tag on the dream.
    thinking, content = ((message.get(key) or "").strip() for key in ("thinking", "content"))
    return {"capabilities": capabilities, "prompt": prompt, "thinking": thinking, "answer": content}


def ids_of_prompts(
    name: str, host: str | None, conversations: Sequence[tuple[str, str, bool]], context: int
) -> list[list[int]]:
    """What an installed model makes of (system, question, think): the ids of the prompt and of a one-token reply, as
    `context` tells them (of a `raw` prompt it tells nothing). Raises ModelNotFound, TeacherUnavailable …, and
    TeacherError where an Ollama doesn't tell them."""
    asked = [
        {"prompt": prompt, "system": own, "think": think, **_options(1, context)}
        for system, question, think in conversations
        for prompt, own in [apart_from_system(question, system)]
    ]
    found = [answer.get("context") for answer in _asked(name, host, asked)]
    if not all(isinstance(ids, list) for ids in found):
        raise TeacherError(f"{host or default_host()}: doesn't tell a prompt's ids (no `context` in its reply)")
    return cast("list[list[int]]", found)


def raw_answers(name: str, host: str | None, prompts: Sequence[str], max_tokens: int, context: int) -> list[str]:
    """Greedy continuations of rendered prompts by an installed model. Raises ModelNotFound, TeacherUnavailable …"""
    asked = [{"prompt": prompt, "raw": True, **_options(max_tokens, context)} for prompt in prompts]
    return [f"{reply.get('thinking') or ''} {reply.get('response') or ''}" for reply in _asked(name, host, asked)]


def _options(max_tokens: int, context: int) -> dict[str, Any]:
    return {"options": {"temperature": 0, "seed": 0, "num_predict": max_tokens, "num_ctx": context, "stop": []}}


def _asked(name: str, host: str | None, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    asker = OllamaClient(host or default_host(), timeout=120.0, retries=2)
    try:
        return [asker.post("/api/generate", {"model": name, "stream": False, **body}) for body in bodies]
    finally:
        asker.close()
