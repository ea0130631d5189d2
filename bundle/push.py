"""Give a bundle to others: to a repository of the Hugging Face hub, or through an Ollama to ollama.com."""

import re
from pathlib import Path
from typing import Any

from bundle.install import follow, install
from bundle.manifest import GGUF, NAME, check_file, read_manifest
from distill.address import Address, default_host
from distill.errors import BadInput, DistillError
from distill.events import Event, Listener, silent
from distill.teacher.licenses import License
from distill.teacher.ollama_client import OllamaClient
from distill.vision import PROJECTOR

HUB, OLLAMA = "hf:", "ollama:"
OWNED = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
"""user/name, and in Ollama a tag."""


def push(
    bundle_dir: Path,
    to: str,
    host: str | None = None,
    quantize: str | None = None,
    listen: Listener = silent,
    *,
    public: bool = False,
    dry_run: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Check the bundle's files against its manifest and send them to `hf:USER/NAME` or `ollama:USER/NAME`.

    host, quantize, force: as `install` takes them, which is how the model comes into Ollama first.
    public: of a new repository of the hub, which is private otherwise; Ollama's are always public.
    dry_run: say what would be sent, and send nothing.
    Returns to, files (name → bytes, before Ollama quantizes them), bytes, license, quantize where it does, and url
    where something was sent. Raises BadInput, CorruptFile, DistillError (refused by the hub, or unreachable), and what
    `install` raises.
    """
    place, name = next(((kind, to[len(kind) :]) for kind in (HUB, OLLAMA) if to.startswith(kind)), ("", to))
    if not place or not OWNED.fullmatch(name) or (place == HUB and ":" in name):
        raise BadInput(f"{to}: give hf:USER/NAME or ollama:USER/NAME[:TAG]")
    if place == HUB and (host or quantize or force):
        raise BadInput(f"{to}: --host, --quantize and --force are of ollama:USER/NAME alone")
    if place == OLLAMA and public:
        raise BadInput(f"{to}: --public is of hf:USER/NAME alone; what ollama.com gets is public always")
    manifest = read_manifest(bundle_dir)
    for file in manifest.files:
        check_file(bundle_dir, manifest, file)
    sent = {GGUF, PROJECTOR} if place == OLLAMA else manifest.files.keys()
    files = {file: int(entry["bytes"]) for file, entry in manifest.files.items() if file in sent}
    if place == HUB:
        files[NAME] = (bundle_dir / NAME).stat().st_size
    license = License.from_json(manifest.provenance.get("license"))
    if manifest.provenance.get("began_as") and not license.name:
        listen(
            Event("push", "note", "nobody says which licence its weights are under; find out before others see them")
        )
    result: dict[str, Any] = {"to": to, "files": files, "bytes": sum(files.values()), "license": str(license)}
    result |= {"quantize": quantize} if quantize else {}
    if dry_run:
        return {**result, "sent": False}
    listen(Event("push", "start", f"{manifest.name} to {to}"))
    if place == HUB:
        url = _to_hub(bundle_dir, name, sorted(files), private=not public)
    else:
        install(bundle_dir, name, host, quantize, listen, force=force)
        asker = OllamaClient(Address(host) if host else default_host(), timeout=300.0)
        try:
            follow(asker, "/api/push", name, {}, "push", listen)
        finally:
            asker.close()
        url = f"https://ollama.com/{name}"
    listen(Event("push", "done", url))
    return {**result, "sent": True, "url": url}


def _to_hub(folder: Path, name: str, files: list[str], *, private: bool) -> str:
    """One commit with all files; the repository is made where there is none. Returns its page's address."""
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise BadInput(f"{HUB}{name}: there is no token that the hub knows you by; `hf auth login`, or set $HF_TOKEN")
    from bundle.export import MADE, PICTURES
    from distill.dream.pretrained import READ

    hub = HfApi(library_name="dreaming-student")
    try:
        url = hub.create_repo(name, private=private, exist_ok=True)
        # What isn't in the manifest isn't part of the bundle: notes of the user's own, say. What the bundle that was
        # there before had besides would be read with this one.
        hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=files,
            delete_patterns=[*MADE, *READ, PROJECTOR, f"{PICTURES}/*"],  # but for what is uploaded
            commit_message="Add the student",
        )
    except Exception as error:  # of whichever HTTP library this version of huggingface_hub stands on
        reason = " ".join(str(error).split())
        raise DistillError(f"{HUB}{name}: the hub at {hub.endpoint} didn't take it: {reason}") from error
    return str(url)
