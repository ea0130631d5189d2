"""Where a teacher's own weights lie, for a student to begin with: a GGUF or a folder of safetensors."""

import contextlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from distill.address import Address, default_host
from distill.config import Settings, TeacherSettings
from distill.errors import BadInput, DistillError, TeacherError
from distill.events import Event, Listener, silent
from distill.run import sha256_file
from distill.teacher.gguf_file import read_metadata
from distill.teacher.gguf_tokenizer import UNUSED
from distill.teacher.licenses import License
from distill.teacher.protocol import TeacherInfo, TeacherTokenizer
from distill.teacher.weights import cached_smollm2, smollm2

if TYPE_CHECKING:
    from distill.teacher.source import Source

ELSE = "name a GGUF or a folder of safetensors with --teacher-weights FILE|DIR"
"""What helps wherever the weights aren't found."""

BLOB = re.compile(r"sha256-([0-9a-f]{64})")
"""How Ollama calls the file of a model's weights: by its content."""


@dataclass(frozen=True)
class TeacherWeights:
    """Where they lie. path None: there are none, and `reason` says in one line why, and what would change it."""

    path: Path | None
    reason: str = ""
    license: License = field(default_factory=License)


def wants_teacher(settings: Settings) -> bool:
    """Whether a student shall begin as its teacher: it has none of the teacher's sizes otherwise. A dataset has no
    teacher but the one whose weights are named."""
    student = settings.student
    if settings.capture.dataset and not settings.teacher.weights:
        return False
    return student.init == "teacher" and not any((student.preset, student.hidden, student.kv_heads))


def find_weights(
    settings: TeacherSettings,
    answered: TeacherInfo | None = None,
    tokenizer: TeacherTokenizer | None = None,
    listen: Listener = silent,
) -> TeacherWeights:
    """`settings.weights`, or what the teacher's name leads to: the embedded teacher's GGUF, or the blob of a model in
    an Ollama on this machine.

    answered, tokenizer: who gave the answers, as the traces tell it: the weights must be its. What can't be told, such
    as whether another quantization is of the same training, is said in a note.
    Raises BadInput or CorruptFile where `settings.weights` can't be read or is another model; what is found by itself
    and can't be used becomes a reason.
    """
    license = license_of(settings, answered)
    if settings.weights:
        path = Path(settings.weights).expanduser()
        _check(path, open_given(path), answered, tokenizer, listen, given=True)
    else:
        try:
            path = _own(settings, answered, listen)
            _check(path, open_given(path), answered, tokenizer, listen, given=False)
        except DistillError as error:
            return TeacherWeights(None, f"{error}; or {ELSE}", license)
    return TeacherWeights(path, license=license if license.name else License.of_weights(path))


def license_of(settings: TeacherSettings, answered: TeacherInfo | None) -> License:
    """The teacher's, as its server or file told when it answered, else as the weights at hand do. Asks no server."""
    if answered is not None and (told := answered.details.get("license")):
        return License.from_json(told)
    kind, _, model = settings.model.partition(":")
    own = cached_smollm2() if model == "smollm2" else Path(model).expanduser() if kind == "embedded" else None
    for path in (Path(settings.weights).expanduser() if settings.weights else None, own):
        if path is not None and (answered is None or not answered.is_dataset):
            with contextlib.suppress(DistillError, OSError):
                if (found := License.of_weights(path)).name:
                    return found
    return License()


def check_given(settings: TeacherSettings) -> None:
    """Raises BadInput or CorruptFile where `settings.weights` names what can't be read."""
    if settings.weights:
        open_given(settings.weights)


def open_given(weights: str | Path) -> "Source":
    """Raises BadInput, CorruptFile."""
    from distill.teacher.open_source import open_source

    path = Path(weights).expanduser()
    try:
        if path.is_dir():
            next(path.iterdir(), None)
        else:
            path.open("rb").close()
    except OSError as error:
        raise BadInput(
            f"{path}: the teacher's weights can't be read ({error.strerror}); check the path, and that you may read it"
        ) from error
    return open_source(path)


# Where they are.


def _own(settings: TeacherSettings, answered: TeacherInfo | None, listen: Listener) -> Path:
    """Raises BadInput, and what a silent server raises."""
    if answered is not None and answered.is_dataset:
        raise BadInput(f"{answered.spec}: no model gave the answers, so there are no weights to begin with")
    kind, _, model = settings.model.partition(":")
    if kind == "embedded":
        return smollm2(listen) if model == "smollm2" else Path(model).expanduser()
    if kind != "ollama":
        raise BadInput(f"{settings.model}: the weights of such a teacher can't be had")
    return _blob(settings, model, answered)


def _blob(settings: TeacherSettings, model: str, answered: TeacherInfo | None) -> Path:
    """The file that Ollama runs. Its name carries its SHA-256, so it isn't taken anew."""
    hosts = [Address(host) for host in settings.hosts] or [default_host()]
    host = next((host for host in hosts if host.is_loopback), None)
    if host is None:
        raise BadInput(
            f"{settings.model}: runs at {hosts[0]}, where its file can't be read; run it where Ollama runs, "
            f"or copy the file from there"
        )
    blob = answered.details.get("blob") if answered else None
    if blob is None:  # traces of before it was kept, or none yet
        blob = _asked(settings, model, host, answered)
    elif not os.access(blob, os.F_OK) and (name := BLOB.search(blob)):  # another host may have told its own
        with contextlib.suppress(TeacherError):
            told = _asked(settings, model, host, answered)
            blob = told if told.endswith(name[0]) else blob
    path = Path(blob)
    if not BLOB.fullmatch(path.name):
        raise BadInput(f"{settings.model}: {blob or 'what Ollama names'} is no whole model (an adapter over one?)")
    try:
        path.open("rb").close()
    except FileNotFoundError as error:
        raise BadInput(
            f"{settings.model}: {path} is not on this machine, or no more; is Ollama in a container, or behind a "
            "tunnel? Then run it where Ollama runs"
        ) from error
    except OSError as error:
        raise BadInput(
            f"{settings.model}: {path} can't be read ({error.strerror}); get the right to read Ollama's models folder "
            "(as a member of its group, or as root)"
        ) from error
    return path


def _asked(settings: TeacherSettings, model: str, host: str, answered: TeacherInfo | None) -> str:
    from distill.teacher.ollama import OllamaTeacher

    teacher = OllamaTeacher(model, host=host, timeout=settings.timeout, retries=0)
    try:
        now = teacher.describe()
    finally:
        teacher.close()
    if answered is not None and now.digest != answered.digest:
        raise BadInput(
            f"{settings.model}: another model has that name at {host} now (digest {now.digest[:12]}, the answers are "
            f"of {answered.digest[:12]}); capture again under another --name"
        )
    return str(now.details.get("blob", ""))


# Whose they are.


def _check(
    path: Path,
    source: "Source",
    answered: TeacherInfo | None,
    tokenizer: TeacherTokenizer | None,
    listen: Listener,
    *,
    given: bool,
) -> None:
    """Raises BadInput where the weights are not of the model that answered."""
    if tokenizer is not None and not _same_words(source.tokenizer, tokenizer):
        raise BadInput(
            f"{path}: its vocabulary ({len(source.tokenizer.tokens)} tokens) is not that of the teacher that answered "
            f"({len(tokenizer.tokens)}); give the weights of that model"
        )
    if answered is None or answered.is_dataset:
        return
    details = answered.details
    for key in ("layers", "hidden"):
        theirs, ours = details.get(key), getattr(source.config, key)
        if theirs is not None and theirs != ours:
            raise BadInput(
                f"{path}: is not the model that answered: {key} {ours}, and {answered.spec} has {theirs}; "
                "give the weights of that model"
            )
    known = _digest_of(answered)
    same_type = path.is_file() and read_metadata(path).get("general.file_type") == details.get("file_type")
    if not known or not same_type:
        if given:
            listen(Event("teacher", "note", f"{path}: taken for {answered.spec}; no digest tells whether it is"))
    elif _differs(path, known, details.get("bytes"), hashed=given):
        raise BadInput(
            f"{path}: is not the model that answered ({answered.spec}, whose file has SHA-256 {known[:12]}…); "
            "give that file, or another precision of it"
        )


def _same_words(one: TeacherTokenizer, two: TeacherTokenizer) -> bool:
    """Equal but for unused tokens at the end, which converters pad a vocabulary with."""
    length = min(len(one.tokens), len(two.tokens))
    if one.tokens[:length] != two.tokens[:length]:
        return False
    return all(kind == UNUSED for kind in (*one.types[length:], *two.types[length:]))


def _digest_of(answered: TeacherInfo) -> str:
    """SHA-256 of the file that answered; "" where it isn't known."""
    if answered.spec.startswith("embedded:"):
        return answered.digest
    found = BLOB.search(str(answered.details.get("blob", "")))
    return found[1] if found else ""


def _differs(path: Path, known: str, size: int | None, *, hashed: bool) -> bool:
    """Whether a file has another SHA-256, by its name or size where these tell. hashed: take it, if they don't."""
    if named := BLOB.fullmatch(path.name):
        return named[1] != known
    if size is not None and path.stat().st_size != size:
        return True
    return hashed and sha256_file(path) != known
