"""The parts of a dreaming student, and folders of them: those of `save_pretrained`, checkpoints and bundles.

A folder holds config.json and model.safetensors (as transformers reads them), the tokenizer and the codebook (a
checkpoint has both in tokenizer/), and where there are such, the dream engine and knowledge.graphml. `dreaming.json`
says the rest: system message, settings, and the SHA-256 of every other file.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from distill.backbone.model import Backbone, load_backbone, save_backbone
from distill.config import DreamingConfig
from distill.dream.editor import DreamEditor
from distill.dream.engine import ABOUT, WEIGHTS, DreamEngine, codebook_digest
from distill.dream.policy import PolicyNetwork
from distill.dream.record import Slot, Step
from distill.errors import BadInput, CorruptFile, RunMismatch
from distill.knowledge.graph import Graph, save_graph
from distill.knowledge.graph_rag import RETRIEVAL
from distill.run import publish_folder, sha256_file, write_atomic
from distill.student.grammar import DreamGrammar
from distill.tokens.bpe import FILES, StudentTokenizer, image_text
from distill.tokens.chat import Triple
from distill.tokens.image_tokens import Codebook
from distill.vision import SEEING
from distill.vision.codebook import PictureCodebook

NAME, KNOWLEDGE, POLICY = "dreaming.json", "knowledge.graphml", "policy.safetensors"
VERSION = 1
CODEBOOK = ("codebook.json", "codebook.safetensors", "encoder.json", "encoder.safetensors")
READ = (
    "config.json",
    "model.safetensors",
    *FILES,
    "dream_tokenizer.json",
    *CODEBOOK,
    *SEEING,
    WEIGHTS,
    ABOUT,
    KNOWLEDGE,
    POLICY,
    RETRIEVAL,
)
"""What is read of a folder, so what is checked."""
SHAPES = ("num_dream_sequences", "dream_length", "graph_reasoning_hops")
"""Settings that an engine is made for."""


@dataclass
class Parts:
    """Who dreams and answers. codebook and engine may be missing: such a student dreams by itself alone; without eyes
    it sees no pictures, without a policy the arbiter alone chooses among its engine's paths. steps: of a dream of its
    own at most, a lens, where it learned longer ones than its engine drafts (`mine.steps`). facts: triplets put after a
    prompt at most, where some are retrieved."""

    model: Backbone
    tokenizer: StudentTokenizer
    codebook: Codebook | None = None
    engine: DreamEngine | None = None
    config: DreamingConfig = field(default_factory=DreamingConfig)
    system: str = ""
    eyes: PictureCodebook | None = None
    policy: PolicyNetwork | None = None
    steps: int = 0
    facts: int = 4

    @property
    def longest(self) -> int:
        """Steps of a lens at most."""
        return max(self.steps, self.config.dream_length)

    def check(self, where: str) -> "Parts":
        """Itself; raises RunMismatch, beginning with `where`, unless all parts fit each other."""
        self.tokenizer.check_rows(self.model.config.vocab_size, where)
        if self.codebook is not None and self.codebook.labels != self.labels:
            self._refuse_codebook(where, self.codebook)
        if self.engine is not None:
            self._check_engine(where, self.engine)
        return self

    def _check_engine(self, where: str, engine: DreamEngine) -> None:
        for name in SHAPES:
            if (theirs := getattr(engine.config, name)) != (wanted := getattr(self.config, name)):
                raise RunMismatch(
                    f"{where}: its engine was made for dreaming.{name}={theirs}, not {wanted}; give the engine's own "
                    "settings, or train one with these"
                )
        if engine.hidden != (hidden := self.model.config.hidden):
            raise RunMismatch(
                f"{where}: its engine reads a backbone of hidden size {engine.hidden}, this one has {hidden}; use the "
                "one it came with"
            )
        # Without a codebook, the labels' number is all that can be compared.
        fits = self.codebook is None or engine.codebook == codebook_digest(self.codebook)
        if engine.codes != len(self.labels) or not fits:
            raise RunMismatch(
                f"{where}: its engine was trained with another codebook of {engine.codes} image tokens (here "
                f"{len(self.labels)}); use the one it came with"
            )

    def _refuse_codebook(self, where: str, codebook: Codebook) -> None:
        """Raise RunMismatch, saying where its labels are not the tokenizer's."""
        remedy = "put back the codebook that it was trained with"
        if len(codebook) != len(self.labels):
            counts = f"{len(codebook)} image tokens, the tokenizer {len(self.labels)}"
            raise RunMismatch(f"{where}: the codebook has {counts}; {remedy}")
        code = next(i for i, label in enumerate(self.labels) if label != codebook.labels[i])
        theirs, ours = image_text(codebook.labels[code]), image_text(self.labels[code])
        raise RunMismatch(f"{where}: the codebook's image token {code} is {theirs}, the tokenizer's {ours}; {remedy}")

    @cached_property
    def labels(self) -> list[str]:
        """Of the image tokens, by code."""
        return self.tokenizer.labels

    @cached_property
    def grammar(self) -> DreamGrammar:
        """Of its replies."""
        return DreamGrammar(self.tokenizer, self.longest)

    @cached_property
    def editor(self) -> DreamEditor:
        """Of dreams that a user writes."""
        return DreamEditor(self.tokenizer, self.longest, self.codebook)

    @property
    def device(self) -> torch.device:
        return self.model.cos.device

    def to(self, device: torch.device) -> "Parts":
        self.model.to(device)
        for own in (self.engine, self.policy):
            if own is not None:
                own.to(device)
        return self

    def codes(self, ids: Sequence[int], places: Triple) -> Triple:
        """The codes of the image tokens that stand at three places."""
        first = int(self.tokenizer.image_ids[0])
        what, action, result = (ids[place] - first for place in places)
        return what, action, result

    def step(self, codes: Sequence[int], sure: Sequence[float], importance: float = 0.0) -> Step:
        """A step as it is recorded. sure: probability of each of its three image tokens."""
        what, action, result = (Slot(self.labels[c], c, p) for c, p in zip(codes, sure, strict=True))
        return Step(what, action, result, importance)


def save_parts(parts: Parts, folder: Path, knowledge: Graph | None = None, attention: Path | None = None) -> None:
    """Publish a folder that `load_parts` reads, whole or not at all, in the place of one saved before.

    knowledge: a graph to go with it; attention: the file of what retrieves from it, where there is one. Raises BadInput
    where the folder holds anything else than a saved student.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (folder / NAME).is_file():
        raise BadInput(f"{folder}: holds something else than a saved student; give a new folder")
    with publish_folder(folder) as aside:
        save_backbone(parts.model, aside)
        # Without the map of the teacher's ids, which only training reads.
        StudentTokenizer(parts.tokenizer.hf, parts.tokenizer.origin).save(aside, parts.model.config.context)
        if parts.codebook is not None:
            parts.codebook.save(aside)
        for own in (parts.engine, parts.eyes):
            if own is not None:
                own.save(aside)
        if parts.policy is not None:
            save_file({name: one.cpu() for name, one in parts.policy.state_dict().items()}, aside / POLICY)
        if knowledge is not None:
            save_graph(knowledge, aside / KNOWLEDGE, max(1, len(knowledge)))
        if attention is not None and attention.is_file():
            shutil.copyfile(attention, aside / RETRIEVAL)
        about = {
            "version": VERSION,
            "system": parts.system,
            "steps": parts.longest,
            "facts": parts.facts,
            "config": asdict(parts.config),
            "files": {path.name: sha256_file(path) for path in sorted(aside.iterdir())},
        }
        write_atomic(aside / NAME, json.dumps(about, indent=2, ensure_ascii=False) + "\n")


def load_parts(folder: Path, device: torch.device, engine: Path | None = None) -> Parts:
    """The parts in a folder of `save_parts`, of a checkpoint or of a bundle; what was read is checked.

    engine: where the dream engine lies, if not in the folder itself. Raises BadInput where it is no such folder,
    CorruptFile for missing or altered files, RunMismatch for parts that don't fit each other.
    """
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder}: is no saved student, checkpoint or bundle (no config.json)")
    about = _about(folder)
    words = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    if not (words / "dream_tokenizer.json").is_file():
        raise BadInput(f"{folder}: has no tokenizer; give a checkpoint of a run, a bundle, or a saved student")
    tokenizer = StudentTokenizer.load(words)
    codebook = Codebook.load(words) if (words / CODEBOOK[0]).is_file() else None
    config = _config(folder, about.get("config"))
    parts = Parts(load_backbone(folder), tokenizer, codebook, None, config, str(about.get("system", "")))
    parts.steps, parts.facts = int(about.get("steps", 0)), int(about.get("facts", parts.facts))
    parts.check(str(folder))
    parts.eyes = PictureCodebook.of(words, codebook)
    source = engine or folder
    if codebook is not None and len(codebook) and (source / ABOUT).is_file():
        parts.engine = DreamEngine.load(source, codebook, parts.model.config.hidden)
        parts.config = config if "config" in about else parts.engine.config
        parts.check(str(folder))
    if (folder / POLICY).is_file():
        parts.policy = PolicyNetwork()
        parts.policy.load_state_dict(load_file(folder / POLICY))
    return parts.to(device)


def _config(folder: Path, written: dict[str, Any] | None) -> DreamingConfig:
    try:
        return DreamingConfig(**(written or {}))
    except TypeError as error:
        raise CorruptFile(f"{folder / NAME}: holds unknown settings ({error}); save the student again") from error


def _about(folder: Path) -> dict[str, Any]:
    """What the folder says of itself, its files checked: dreaming.json, or a bundle's or checkpoint's list.

    Raises CorruptFile.
    """
    for name, remedy in (
        (NAME, "save the student again"),
        ("bundle.json", "export the run again"),
        ("checksums.json", "use the checkpoint before it"),
    ):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            files: dict[str, Any] = content if name == "checksums.json" else content["files"]
            digests = {key: entry if isinstance(entry, str) else str(entry["sha256"]) for key, entry in files.items()}
            about = {"system": content.get("ollama", {}).get("system", "")} if name == "bundle.json" else content
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFile(f"{path}: can't be read ({error}); {remedy}") from error
        for file, digest in digests.items():
            if Path(file).name in READ and (not (folder / file).is_file() or sha256_file(folder / file) != digest):
                state = "was altered" if (folder / file).is_file() else "is missing"
                raise CorruptFile(f"{folder / file}: {state} since it was written; {remedy}")
        return about if name != "checksums.json" else {}
    return {}
