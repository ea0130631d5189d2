"""A student ready to talk: from a run, a checkpoint or a bundle."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bundle.manifest import NAME, NATIVE, check_file, read_manifest
from distill.backbone.generate import stream
from distill.backbone.model import Backbone, load_backbone
from distill.backbone.session import Session
from distill.config import DreamingConfig, Settings
from distill.dream.editor import DreamEditor
from distill.dream.output_decoder import OutputDecoder, Part, Sampling, Speaker, Splitter, is_sure
from distill.dream.record import CUT
from distill.errors import BadInput, MissingStage
from distill.events import Listener, silent
from distill.run import Run
from distill.student.grammar import ROOM, DreamGrammar, longest_path, reply_room, think_size
from distill.student.made_with import made_with
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import PICTURE, Dream, Message, picture_ids, render, think_ids, with_context, with_steps
from distill.tokens.image_tokens import Codebook
from distill.vision import PROJECTOR, SEEING

if TYPE_CHECKING:
    from distill.dream.model import DreamingReasoningLLM
    from distill.vision.codebook import PictureCodebook
    from distill.vision.pictures import Picture


@dataclass(frozen=True)
class Answer:
    """One answer. `dream_text` is the dream as printed."""

    text: str
    dream_text: str


def unheard(note: str) -> None:
    """Takes notes for whoever needs none."""


@dataclass(frozen=True)
class Student:
    """A student in memory. `system` is said before every conversation that has no system message of its own.

    steps: triplets that a lens of its dreams has at most. What it says is held to the form of a dream and an answer.
    sure: an answer that is so sure without a dream stands, and it doesn't dream; 1: it always does.
    folder: of its tokenizer and codebook. pictures: ids that stand before what is asked next: see `shown`.
    """

    name: str
    model: Backbone
    tokenizer: StudentTokenizer
    system: str = ""
    steps: int = DreamingConfig.dream_length
    folder: Path | None = None
    sight: Path | None = None
    pictures: tuple[range, ...] = ()
    sure: float = 1.0

    def shown(self, images: "Sequence[Picture]") -> "Student":
        """It, with these images before its eyes: one that reads pictures themselves reads them before the last question
        that it is asked. Raises BadInput for one that can't be read, and for more than its context holds."""
        if not images or self.sight is None:
            return self
        from distill.vision.sight import Sight, showing

        sight, first, context = Sight.load(self.sight), self.model.config.vocab_size, self.model.config.context
        if (size := len(images) * sight.patches) + ROOM >= context:
            count = f"{len(images)} picture{'s take' if len(images) > 1 else ' takes'} {size} tokens"
            raise BadInput(f"--image: {count} of a context of {context}; show fewer, or train with a longer context")
        ends = [first + place * sight.patches for place in range(len(images) + 1)]
        pictures = tuple(range(start, end) for start, end in pairwise(ends))
        return replace(self, model=showing(self.model, sight.rows(images)), pictures=pictures)

    def asked(self, prompt: str, images: "Sequence[Picture]") -> str:
        """The prompt and what is seen in images. Raises BadInput where it can't see, or an image can't be read."""
        from distill.vision.seeing import with_images

        return with_images(self._eyes, prompt, images) if images else prompt

    @property
    def sees(self) -> bool:
        """Whether it was trained on pictures."""
        return self.folder is not None and (self.folder / SEEING[0]).is_file()

    @cached_property
    def _eyes(self) -> "PictureCodebook | None":
        """What its folder (tokenizer and codebook) holds to see with."""
        from distill.vision.codebook import PictureCodebook

        if self.folder is None or not self.sees:
            return None
        return PictureCodebook.load(self.folder, Codebook.load(self.folder))

    @cached_property
    def _grammar(self) -> DreamGrammar:
        return DreamGrammar(self.tokenizer, self.steps)

    @property
    def editor(self) -> DreamEditor:
        """Of dreams that a user writes."""
        return DreamEditor(self.tokenizer, self.steps)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        think: bool | None = True,
        temperature: float = 0.7,
        top_k: int = 40,
        top_p: float = 0.95,
        max_tokens: int = 256,
        seed: int = 0,
        dream: Dream | None = None,
        note: Callable[[str], None] = unheard,
    ) -> Iterator[tuple[Part, str]]:
        """The next turn as it comes: pieces of the dream ("thinking"), then of the answer ("content"), which has
        `max_tokens` at most.

        dream: read in the place of one of its own; the answer is drawn as after its own, so that it differs by the
        dream alone. note: gets a line on whatever was left out or cut. Raises BadInput where even the last question
        alone doesn't fit the context.
        """
        if dream is not None:
            sampling = Sampling(max_tokens, temperature, top_k, top_p, seed)
            yield from self._answer_to(self.prompt_ids(messages, None, note=note), with_steps(dream), sampling, note)
            return
        dreams = _dreams(messages, think)
        if dreams and self.sure < 1:
            drawn = Sampling(max_tokens, temperature, top_k, top_p, seed)
            how = drawn, self._grammar.answering, self.tokenizer.eos_id, self.sure
            if is_sure(self.model, self.prompt_ids(messages, False), *how):
                think, dreams = False, False
        splitter, sampling = Splitter(self.tokenizer), {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        ids, token = self.prompt_ids(messages, think, note=note), self.tokenizer.eos_id
        for token in self._tokens(ids, dreams, max_tokens, seed=seed, **sampling):
            if piece := splitter.push(token):
                yield piece
        self._cut(token, note)

    def answer(self, prompt: str, **how: Any) -> Answer:
        """Dream and answer to one question, whole. how: as in `chat`."""
        said: dict[Part, str] = {"thinking": "", "content": ""}
        for part, text in self.chat([{"role": "user", "content": prompt}], **how):
            said[part] += text
        return Answer(said["content"], said["thinking"])

    def prompt_ids(
        self,
        messages: Sequence[Message],
        think: bool | None,
        context: int = 0,
        whole: bool = False,
        note: Callable[[str], None] = unheard,
    ) -> list[int]:
        """Ids of a conversation; the oldest turns are left out where all don't fit the context (0: the model's) beside
        a dream and the beginning of an answer, but for `whole`. note: gets a line on those."""
        head: list[Message] = [message for message in messages[:1] if message["role"] == "system"]
        turns = list(messages[len(head) :])
        if not head and self.system:
            head = [{"role": "system", "content": self.system}]
        asked = max((place for place, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
        if self.pictures and asked >= 0:
            turns[asked] = {**turns[asked], "content": PICTURE * len(self.pictures) + turns[asked]["content"]}

        size = context or self.model.config.context
        # Half of a small context is for what was said.
        room = max(ROOM, min(reply_room(self.steps, _dreams(messages, think)), size // 2))

        def ids(start: int) -> list[int]:
            return picture_ids(self.tokenizer, render([*head, *turns[start:]], think), self.pictures)

        def fits(start: int) -> bool:
            return whole or len(ids(start)) + room <= size

        last = asked if asked >= 0 else max(0, len(turns) - 1)  # the question stays, whatever was begun to say to it
        starts = [*range(0, last, 2), last]  # a question goes with its answer
        if left := starts[bisect_left(starts[:-1], True, key=fits)]:
            note(f"the first {left} messages are left out: all don't fit a context of {size} tokens")
        return ids(left)

    def _answer_to(
        self, prompt: list[int], dream: Dream | None, sampling: Sampling, note: Callable[[str], None]
    ) -> Iterator[tuple[Part, str]]:
        """A given dream, and the answer to a prompt's ids from it."""
        length = min(self.model.config.context, len(prompt) + think_size(self.steps) + sampling.max_tokens)
        speaker = Speaker(Session(self.model, 1, length), sampling)
        speaker.read(prompt)
        speaker.read(think_ids(self.tokenizer, dream), as_drawn=dream is not None)
        speaker.obey(self._grammar.answering)
        if dream is not None:
            yield "thinking", self.editor.text(dream)
        for piece in OutputDecoder.text(speaker, self.tokenizer, sampling.max_tokens):
            yield "content", piece
        self._cut(speaker.peek(), note)

    def _cut(self, last: int, note: Callable[[str], None]) -> None:
        """Say so where an answer whose last token this is didn't end by itself."""
        if last != self.tokenizer.eos_id:
            note(CUT)

    def _tokens(self, ids: list[int], dreams: bool, max_tokens: int, **sampling: Any) -> Iterator[int]:
        """Up to `max_tokens` of the answer; those of the dream and its tags come besides."""
        written = stream(
            self.model,
            ids,
            max_tokens=max_tokens + (think_size(self.steps) if dreams else 0),
            stop_ids=[self.tokenizer.eos_id],
            grammar=self._grammar if dreams else self._grammar.answering,
            **sampling,
        )
        if dreams:
            for token in written:
                yield token
                if token == self.tokenizer.end_think_id:
                    break
            yield from islice(written, 1)  # the tag's line break
        yield from islice(written, max_tokens)


def _dreams(messages: Sequence[Message], think: bool | None) -> bool:
    """Whether a dream comes first: a turn of its own that is gone on with has had its dream."""
    return think is not False and messages[-1]["role"] != "assistant"


def load_student(path: Path) -> Student:
    """From a run folder (its best checkpoint, else its bundle), a checkpoint folder or a bundle.

    Raises BadInput where it is none of these, MissingStage for a run without either, CorruptFile for altered
    files, RunMismatch for a tokenizer that doesn't fit the weights.
    """
    kind = _kind(path)
    if kind == "folder":
        run = run_of(path)
        return load_checkpoint(path) if run is None else _load_of_run(run, path, path.name)
    if kind == "run":
        run = Run.open(path)
        if (checkpoint := _best(run)) is not None:
            return _load_of_run(run, checkpoint, run.name)
        path = run.bundle
    manifest = read_manifest(path)
    for name in NATIVE:
        check_file(path, manifest, name)
    steps = manifest.provenance.get("dream_steps", DreamingConfig.dream_length)
    student = _assemble(path, StudentTokenizer.load(path), manifest.name, manifest.ollama.get("system", ""), steps)
    return replace(student, sure=manifest.provenance.get("sure", 1.0))


def run_of(checkpoint: Path) -> Run | None:
    """The run that a checkpoint lies in, and is asked as; None where it lies elsewhere."""
    folder = checkpoint.resolve().parent
    is_its = folder.name == "checkpoints" and (folder.parent / KINDS["run"]).is_file()
    return Run.open(folder.parent) if is_its else None


def _load_of_run(run: Run, checkpoint: Path, name: str) -> Student:
    settings = made_with(run)
    how = system_message(settings), longest_path(settings)
    return replace(load_checkpoint(checkpoint, name, *how), sure=settings.dreaming.sure)


def _best(run: Run) -> Path | None:
    """A run's best checkpoint; None where there is none, and a bundle. Raises MissingStage where neither is there."""
    from distill.training.checkpoint import best

    try:
        return best(run)
    except MissingStage:
        if not (run.bundle / NAME).exists():
            raise
        return None


def load_dreaming(
    path: str | Path, device: str = "auto", *, enable_dream_viewer: bool = False, listen: Listener = silent
) -> "DreamingReasoningLLM":
    """The whole dreaming model: from a run folder (its best checkpoint and that one's engine, else its bundle), a
    checkpoint, a bundle, or a folder of `save_pretrained`.

    listen: hears of retrieval by attention, which a run learns when it is first asked for. Raises as `load_student`
    does, and RunMismatch for a codebook or an engine that doesn't fit the weights.
    """
    from distill.dream.model import DreamingReasoningLLM
    from distill.dream.pretrained import READ

    path = Path(path)
    kind = _kind(path)
    if kind == "run":
        return _load_dreaming_run(Run.open(path), device, enable_dream_viewer, listen)
    if kind == "bundle":
        manifest = read_manifest(path)
        for name in READ:
            if name in NATIVE or (path / name).exists():
                check_file(path, manifest, name)
    made = made_with(run) if kind == "folder" and (run := run_of(path)) is not None else None
    model = DreamingReasoningLLM.load_pretrained(
        path,
        device,
        config=made and made.dreaming,
        enable_dream_viewer=enable_dream_viewer,
        system=made and system_message(made),
    )
    if made is not None:
        return _as_trained(model, made.dreaming.sure, longest_path(made), made.train.retrieve_limit)
    if kind != "bundle":
        return model
    told = read_manifest(path).provenance
    facts = told.get("facts", model.parts.facts)
    return _as_trained(model, told.get("sure", 1.0), told.get("dream_steps", 0), facts)


def _as_trained(model: "DreamingReasoningLLM", sure: float, steps: int, facts: int) -> "DreamingReasoningLLM":
    """With its run's `dreaming.sure`, as an engine keeps that which it was trained with, dreams as long as those that
    it learned, and as many facts after a prompt."""
    model.parts.config, model.parts.steps, model.parts.facts = replace(model.parts.config, sure=sure), steps, facts
    return model


def _load_dreaming_run(run: Run, device: str, viewer: bool, listen: Listener) -> "DreamingReasoningLLM":
    from distill.dream.model import DreamingReasoningLLM
    from distill.tokens.packing import learned_retrieval
    from distill.training.engine.plan import engine_of
    from distill.vision.album import Album

    checkpoint = _best(run)
    if checkpoint is None:
        return load_dreaming(run.bundle, device, enable_dream_viewer=viewer)
    engine, settings = engine_of(run, checkpoint / "model.safetensors"), made_with(run)
    model = DreamingReasoningLLM.load_pretrained(
        checkpoint,
        device,
        engine=engine,
        config=None if engine else settings.dreaming,
        enable_dream_viewer=viewer,
        system=system_message(settings),
    )
    model.album = Album.of(run, model.parts.codebook)
    if run.knowledge.exists():
        # One that came without its answers has what it learned beside the graph, or nothing.
        learn = partial(learned_retrieval, run, listen) if run.traces.exists() and run.triplets.exists() else None
        model.know(run.knowledge, learn)
    return _as_trained(model, settings.dreaming.sure, longest_path(settings), settings.train.retrieve_limit)


def recalling(path: Path, how: str, listen: Listener = silent) -> Callable[[str, int], str]:
    """(prompt, seed) → the prompt and what the knowledge graph there knows of it, found in this way. Raises BadInput
    where there is no graph, and as `load_dreaming`."""
    model = load_dreaming(path, "cpu", listen=listen)
    model.memory.retriever()
    return lambda prompt, seed: with_context(prompt, model.memory.recall(model.parts, prompt, how, seed))


Kind = Literal["bundle", "run", "folder"]
KINDS: dict[Kind, str] = {"bundle": NAME, "run": "config.yaml", "folder": "config.json"}
"""What lies in a folder → the file by which it is known."""


def _kind(path: Path) -> Kind:
    """What lies there. Raises BadInput where it is nothing of ours."""
    for kind, mark in KINDS.items():
        if (path / mark).exists():
            return kind
    is_no = "is a file, and no" if path.is_file() else "is no" if path.exists() else "no such"
    raise BadInput(f"{path}: {is_no} run, checkpoint or bundle; give the folder of one (`dream run` makes it)")


def system_message(settings: Settings) -> str:
    """What a run's student is told first: as it was trained, unless the export asks for another."""
    return settings.export.system or settings.capture.system


def load_checkpoint(path: Path, name: str = "", system: str = "", steps: int = DreamingConfig.dream_length) -> Student:
    """From a checkpoint folder: config.json, model.safetensors, tokenizer/."""
    if not (path / "tokenizer").is_dir():
        raise BadInput(f"{path}: has no tokenizer/; give a checkpoint of a run, or a bundle")
    if (path / "checksums.json").exists():
        from distill.training.checkpoint import verify_checkpoint

        verify_checkpoint(path)
    return _assemble(path, StudentTokenizer.load(path / "tokenizer"), name or path.name, system, steps)


def _assemble(path: Path, tokenizer: StudentTokenizer, name: str, system: str, steps: int) -> Student:
    model = load_backbone(path)
    tokenizer.check_rows(model.config.vocab_size, str(path))
    words, sight = path / "tokenizer", path / PROJECTOR
    folder = words if words.is_dir() else path
    return Student(name, model, tokenizer, system, steps, folder, sight if sight.is_file() else None)
