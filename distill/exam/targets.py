"""What a user can have examined: a run, a checkpoint, a bundle, a GGUF, a transformers folder, an Ollama model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distill.address import Address
from distill.backbone.device import pick_device
from distill.errors import BadInput, CorruptFile
from distill.run import Run, fingerprint, sha256_file
from distill.student.grammar import steps_within
from distill.teacher import weights
from distill.teacher.protocol import TeacherTokenizer
from distill.training.checkpoint import STEP, best, list_checkpoints, weights_of

Kind = Literal["run", "checkpoint", "bundle", "gguf", "transformers", "ollama"]


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """An object in a JSON file; {} where it can't be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for key in keys:
            found = found[key]
        return dict(found)
    except (OSError, ValueError, KeyError, TypeError):
        return {}


@dataclass(frozen=True)
class Target:
    """A thing to be examined, found but not loaded.

    spec: as it was named. path: of the weights' folder (a run's best checkpoint) or file; None for Ollama, whose
    `model` is at `host` ("": the default address). run: the run that it came out of, where that is known.
    """

    spec: str
    kind: Kind
    path: Path | None = None
    model: str = ""
    host: str = ""
    run: Run | None = None

    @property
    def name(self) -> str:
        """Short, for the heading of a column."""
        if self.kind == "run" and self.run is not None:
            return self.run.name
        if self.path is None:
            return self.model
        if self.kind == "gguf" and self.run is not None:
            return f"{self.run.name}/{self.path.name}"
        folder = self.path.parent if self.path.name in ("bundle", "model.gguf") else self.path
        return folder.resolve().name if folder is self.path else f"{folder.resolve().name}/{self.path.name}"

    @property
    def provenance(self) -> dict[str, Any]:
        """Where a bundle says that it comes from; {} of anything else."""
        if self.kind != "bundle" or self.path is None:
            return {}
        return read_object(self.path / "bundle.json", "provenance")

    @property
    def _bundle(self) -> Path | None:
        """The run's bundle that it is, or is the GGUF of."""
        if self.kind == "gguf" and self.path is not None:
            return self.path.parent
        return self.path if self.kind == "bundle" else None

    @property
    def checkpoint(self) -> Path | None:
        """The folder that training left; of a run's bundle the one that it was made of, by its name."""
        if self._bundle is None:
            return self.path
        name = str(read_object(self._bundle / "bundle.json", "provenance").get("checkpoint", ""))
        return self.run.checkpoints / name if self.run is not None and STEP.match(name) else None

    @property
    def trained_in(self) -> Run | None:
        """The run, where it can tell how these weights were trained: not of a bundle whose checkpoint has given way to
        another. Bundles of before tell no weights, and a run without checkpoints can't compare them."""
        told = read_object(self._bundle / "bundle.json", "provenance") if self._bundle is not None else {}
        if self.run is None or "weights" not in told or not list_checkpoints(self.run):
            return self.run
        try:
            same = self.checkpoint is not None and weights_of(self.checkpoint) == told["weights"]
        except CorruptFile:  # also where there is none
            return None
        return self.run if same else None

    @property
    def sure(self) -> float:
        """How sure it must be of an answer not to dream first (`dreaming.sure`)."""
        if self.kind == "bundle":
            return float(self.provenance.get("sure", 1.0))
        return self.run.settings.dreaming.sure if self.run is not None else 1.0

    def digest(self) -> str:
        """Of the weights, of what words they know and of when they dream; of an Ollama model, the server's own."""
        if self.path is None:
            from distill.teacher.ollama import model_digest

            return model_digest(self.model, self.host)
        found = self._digest(self.path)
        return found if self.sure == 1 else fingerprint([found, self.sure])

    def _digest(self, path: Path) -> str:
        if path.is_file():
            return sha256_file(path)
        files = sorted(file for file in path.rglob("*") if file.is_file() and self._is_read(file))
        return fingerprint({str(file.relative_to(path)): sha256_file(file) for file in files})

    def _is_read(self, file: Path) -> bool:
        if file.name in NOT_READ or file.name.startswith("shard-"):  # of a sharded student's optimizer
            return False
        if self.kind == "transformers":  # every tokenizer has files of its own names
            return file.suffix in OF_A_MODEL
        return file.suffix == ".safetensors" or file.name in WORDS


WORDS = (
    *("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"),
    *("dream_tokenizer.json", "codebook.json"),
)
OF_A_MODEL = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken")
"""Endings of weights, settings, vocabularies and templates in a transformers folder."""
NOT_READ = (
    *("optimizer.safetensors", "raw.safetensors", "drafts.safetensors", "engine.safetensors", "trainer_state.json"),
    "retrieval.safetensors",
    "results.json",  # of an evaluation that was written there
)


@dataclass(frozen=True)
class How:
    """How examinees are opened. seed: of all samples. dream_tokens: a dream has at most so many; thinking_tokens: room
    for the thoughts in words of a model of Ollama. device: of torch. timeout: seconds for each request to a server.
    vocabulary: what the ids of the exam's soft targets mean, None where it has none."""

    seed: int = 0
    dream_tokens: int = 66
    thinking_tokens: int = 1024
    device: str = "auto"
    timeout: float = 300.0
    vocabulary: TeacherTokenizer | None = None

    @property
    def steps(self) -> int:
        """Triplets that a lens has at most in a dream of that length."""
        return steps_within(self.dream_tokens)


def find_target(spec: str, path: Path | None = None, host: str = "") -> Target:
    """What `spec` names. path: where a name without a folder was found. Raises BadInput, MissingStage (a run without
    a student), and what Ollama's client raises only when it is opened."""
    if spec.startswith("ollama:"):
        model = spec.removeprefix("ollama:")
        if not model:
            raise BadInput(f"{spec!r}: names no model; write ollama:NAME (`ollama list` shows the names)")
        return Target(spec, "ollama", model=model, host=Address(host) if host else "")
    if spec.startswith("embedded:"):
        name = spec.removeprefix("embedded:")
        return _gguf(spec, weights.smollm2() if name == "smollm2" else Path(name).expanduser())
    path = Path(spec) if path is None else path
    if path.is_file():
        return _gguf(spec, path)
    if (path / "bundle.json").is_file():
        return Target(spec, "bundle", path, run=_run_at(path.parent) if path.name == "bundle" else None)
    if run := _run_at(path):
        return Target(spec, "run", best(run), run=run)
    if (path / "config.json").is_file():
        own = any((path / name / "dream_tokenizer.json").is_file() for name in ("tokenizer", ""))
        parent = path.resolve().parent
        run = _run_at(parent.parent) if parent.name == "checkpoints" else None
        return Target(spec, "checkpoint" if own else "transformers", path, run=run)
    if path.exists():
        raise BadInput(
            f"{path}: nothing that can be examined (no config.yaml, bundle.json or config.json); give a run, a "
            "checkpoint, a bundle, a .gguf file, a transformers folder or ollama:NAME"
        )
    raise BadInput(f"{path}: no such run, checkpoint, bundle, GGUF or folder; a model of Ollama is named ollama:{spec}")


def _run_at(folder: Path) -> Run | None:
    return Run.open(folder) if (folder / "config.yaml").is_file() else None


def _gguf(spec: str, path: Path) -> Target:
    """A file; in a run's bundle it is the run's."""
    if path.suffix != ".gguf":
        raise BadInput(f"{path}: is a file but no .gguf; give a GGUF, or the folder of a student")
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    bundle = path.absolute().parent
    return Target(spec, "gguf", path, run=_run_at(bundle.parent) if bundle.name == "bundle" else None)


def device_of(target: Target, device: str) -> str:
    """Where torch computes it, "auto" resolved; "" for those that others compute. Raises BadInput."""
    return "" if target.kind in ("ollama", "gguf") else str(pick_device(device))


def common_run(targets: Sequence[Target]) -> Run:
    """The run whose held-out prompts all are asked where none was named: that of the targets which came out of one.

    Raises BadInput where there is none, or where their held-out sets differ.
    """
    from distill.exam.questions import load_exam

    found = {target.run.path.resolve(): (target.spec, target.run) for target in targets if target.run is not None}
    if not found:
        raise BadInput(
            f"{targets[0].spec}: did not come out of a run here, so there are no held-out prompts to ask; name a run "
            "with --on RUN, or a prompt file with --prompts FILE"
        )
    (spec, first), *others = found.values()
    if not others:
        return first
    exam = load_exam(first, 0, mined=False)
    for other_spec, run in others:
        other = load_exam(run, 0, mined=False)
        if other.answers_digest != exam.answers_digest:
            shared = {q.prompt for q in exam.questions} & {q.prompt for q in other.questions}
            raise BadInput(
                f"{spec} and {other_spec}: their held-out sets differ ({len(exam.questions)} and "
                f"{len(other.questions)} prompts, {len(shared)} in both); choose one for all with --on RUN"
            )
    return first
