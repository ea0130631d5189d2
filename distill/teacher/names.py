"""Names of models as Ollama reads them: [HOST/][NAMESPACE/]MODEL[:TAG], in any case, the defaults left out or not."""

import re
import unicodedata

DEFAULTS = ("registry.ollama.ai", "library", "", "latest")
LONGEST = 80


def name_key(name: str) -> tuple[str, str, str, str]:
    """Host, namespace, model and tag, by which Ollama tells models apart."""
    name = name.strip().lower()
    name = name.partition("://")[2] or name
    path, tag = name, ""
    if name.rfind(":") > name.rfind("/"):
        path, _, tag = name.rpartition(":")
    rest, _, model = path.rpartition("/")
    host, _, namespace = rest.rpartition("/")
    found = (host, namespace, model, tag)
    return tuple(part or default for part, default in zip(found, DEFAULTS, strict=True))  # pyright: ignore[reportReturnType]


def is_name(name: str) -> bool:
    """Whether Ollama takes it for a new model."""
    host, namespace, model, tag = name_key(name)
    parts = [
        (host, r"[\w.:-]", 350),
        (namespace, r"[\w-]", LONGEST),
        (model, r"[\w.-]", LONGEST),
        (tag, r"[\w.-]", LONGEST),
    ]
    return (
        name == name.strip()
        and not re.search(r"^/|//|[:/]$", name)
        and all(re.fullmatch(rf"\w{allowed}{{0,{most - 1}}}", part, re.ASCII) for part, allowed, most in parts)
    )


def fitting_name(name: str) -> str:
    """The name itself where Ollama takes it, else one near it that it takes."""
    if is_name(name):
        return name
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^\w.-]+", "-", plain, flags=re.ASCII).strip("-.")[:LONGEST].rstrip("-.") or "student"
