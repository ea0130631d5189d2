"""Turns traces, triplets and the tokenizer into training documents on disk, memory-mapped when read.

A document is prompt · think block · answer. Its three parts are stored apart, because the think block changes
from one epoch to the next: the mined dream, an empty one, or the student's own draft.

Shape legend: n documents, A answer tokens of all documents, S = 1 + K target slots (slot 0 is the token that the
teacher sampled, then its top alternatives that are in the student's vocabulary).
"""

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from distill.corpus.traces import Trace, TraceStore
from distill.errors import BadInput, CorruptFile
from distill.events import Event, Listener, silent
from distill.knowledge.retrieval import ATTENTION, Attention
from distill.mining.triplets import Triplet, TripletFile
from distill.run import Run, fingerprint, publish_folder, sha256_file
from distill.settings import load_settings
from distill.spread import spread, worth
from distill.teacher.gguf_tokenizer import Vocabulary
from distill.tokens.aligner import Aligned, Aligner, to_last_sentence
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import dream_ids, prompt_ids
from distill.tokens.growing import Growing
from distill.tokens.image_tokens import Codebook, dream_of, load_codes
from distill.tokens.recall import Recall, kept_attention, training_recall
from distill.turns import opening

VERSION = 2
VALIDATION_SHARE = 0.05
VALIDATION_MOST = 64
"""Training prompts kept back, by hash and with all their answers and later turns, to choose the best checkpoint.
Held-out prompts stay out of that too."""

TOGETHER = 1024
"""Documents that are made together."""

ARRAYS = (
    "prompt_ids",
    "prompt_ends",
    "dream_ids",
    "dream_ends",
    "answer_ids",
    "answer_ends",
    "slot_ids",
    "slot_logprobs",
    "chunk_ids",
    "chunk_logprobs",
    "answer_bytes",
)


@dataclass(frozen=True)
class Documents:
    """The stored parts of n documents. `*_ends` (n,) int64: where each document's part ends in the flat array.

    prompt_ids, dream_ids, answer_ids   flat ids; a document without a mined dream has an empty one
    slot_ids       (A, K) ids of the alternatives; unused slots hold the label
    slot_logprobs  (A, 1 + K) float16; column 0 is the label's, NaN where hard-only; −inf in unused slots
    chunk_ids      (A,) int32: number of the byte-aligned chunk that a token belongs to, −1 where none does
    chunk_logprobs (chunks,) float32: the teacher's logprob of each chunk (sentencepiece kind only)
    answer_bytes   (n,) int64: UTF-8 length of each answer
    begun          (n,) tokens of each answer that are only read, because the student began it itself; None: none are
    """

    prompt_ids: NDArray[Any]
    prompt_ends: NDArray[np.int64]
    dream_ids: NDArray[Any]
    dream_ends: NDArray[np.int64]
    answer_ids: NDArray[Any]
    answer_ends: NDArray[np.int64]
    slot_ids: NDArray[Any]
    slot_logprobs: NDArray[np.float16]
    chunk_ids: NDArray[np.int32]
    chunk_logprobs: NDArray[np.float32]
    answer_bytes: NDArray[np.int64]
    begun: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.answer_ends)

    @staticmethod
    def span(ends: NDArray[np.int64], i: int) -> slice:
        """Where document i's part lies."""
        return slice(int(ends[i - 1]) if i else 0, int(ends[i]))

    def prompt(self, i: int) -> NDArray[Any]:
        return self.prompt_ids[self.span(self.prompt_ends, i)]

    def dream(self, i: int) -> NDArray[Any]:
        return self.dream_ids[self.span(self.dream_ends, i)]

    def answer(self, i: int) -> NDArray[Any]:
        return self.answer_ids[self.span(self.answer_ends, i)]

    @classmethod
    def load(cls, folder: Path) -> "Documents":
        """Memory-mapped. Raises CorruptFile."""
        try:
            return cls(**{name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS})
        except (OSError, ValueError) as error:
            raise CorruptFile(f"{folder}: can't be read ({error}); delete {folder.parent} and train again") from error


def is_validation(prompt: str) -> bool:
    """Whether a training prompt is kept back to choose the best checkpoint."""
    digest = hashlib.sha256(b"validation\0" + opening(prompt).encode()).digest()
    return int.from_bytes(digest[:8]) < VALIDATION_SHARE * 2**64


class Asked(NamedTuple):
    """Whose document it is: `Trace.key` and its prompt."""

    key: str
    prompt: str


def _sides(store: TraceStore) -> Iterator[tuple[Asked, bool]]:
    """What isn't held out, in the order of its documents, and whether it is kept back for validation."""
    chosen: set[str] = set()
    for key, prompt, _ in store.answers(held_out=False):
        first = opening(prompt)
        if is_validation(first) and len(chosen) < VALIDATION_MOST:
            chosen.add(first)
        yield Asked(key, prompt), first in chosen


def split_traces(store: TraceStore) -> tuple[list[Asked], list[Asked]]:
    """Of training and of validation, in the order of their documents. Raises BadInput where all are held out."""
    sides: tuple[list[Asked], list[Asked]] = [], []
    for asked, validation in _sides(store):
        sides[validation].append(asked)
    if not sides[0]:
        raise _nothing(store.path)
    return sides[0], sides[1] or sides[0][:1]


def _nothing(path: Path) -> BadInput:
    return BadInput(f"{path}: no prompt to train on (all are held out); capture more, or lower capture.held_out")


def pack(run: Run, listen: Listener = silent) -> dict[str, Any]:
    """Write data/ (train, validation) where it is missing or stale; returns its counts. Warns where triplets or tokens
    are of other answers.

    Raises BadInput where nothing is left to train on.
    """
    if old := [stage for stage in ("mine", "tokenize") if run.superseded(stage)]:
        mends = " && ".join(f"dream {stage} {run.path}" for stage in old)
        text = f"an earlier stage has run again since {' and '.join(old)}: what is new has no dreams, or unfit tokens"
        listen(Event("pack", "warning", f"{text}; `{mends}` first"))
    inputs: dict[str, Any] = {
        "version": VERSION,
        "inputs": [run.require(stage).outputs for stage in ("capture", "mine", "tokenize")],
        "system": run.settings.capture.system,
    }
    if chosen_dreams(run):
        inputs["dreams"] = sha256_file(run.dreams)
    how = run.settings.train
    if how.retrieve:
        inputs["retrieve"] = [how.retrieve, how.retrieve_limit, run.settings.seed]
    key = fingerprint(inputs)
    described = run.data / "data.json"
    if described.exists():
        content = json.loads(described.read_text(encoding="utf-8"))
        if content["fingerprint"] == key:
            return content["counts"]
    if how.retrieve == ATTENTION:
        learned_retrieval(run, listen, keep=True)  # other processes read it
    with TraceStore(run.traces, readonly=True) as store, publish_folder(run.data) as folder:
        counts = _write(run, store, folder, listen)
        asked = {"system": run.settings.capture.system, "steps": run.settings.mine.steps}
        described = json.dumps({"fingerprint": key, "counts": counts, "made": asked}, indent=2) + "\n"
        (folder / "data.json").write_text(described, encoding="utf-8")
    return counts


@contextmanager
def packing(about: tuple[str, dict[str, Any]]) -> Generator[Callable[[tuple[int, list[str]]], bytes]]:
    """Documents of traces by their keys, as safetensors. about: a run's folder and its settings."""
    run = Run(Path(about[0]), load_settings(values=about[1]))
    tokenizer = StudentTokenizer.load(run.tokenizer)
    codes, chosen = load_codes(run.tokenizer, Codebook.load(run.tokenizer, run.settings.teacher)), chosen_dreams(run)
    with TraceStore(run.traces, readonly=True) as store, closing(TripletFile(run.triplets)) as triplets:
        teacher = store.tokenizer()
        train = split_traces(store)[0] if run.settings.train.retrieve else []
        recall = training_recall(run, train, triplets, codes, tokenizer.labels)
        aligner = Aligner(tokenizer, Vocabulary(teacher).bytes_of if teacher is not None else None)
        width = store.alternatives() if tokenizer.kind == "aligned" else 0

        def documents(task: tuple[int, list[str]]) -> bytes:
            traces, system = [store.get(key) for key in task[1]], run.settings.capture.system
            made = build_documents(traces, triplets, codes, tokenizer, aligner, system, recall, chosen, width)
            return save({name: getattr(made, name) for name in ARRAYS})

        yield documents


def _write(run: Run, store: TraceStore, folder: Path, listen: Listener) -> dict[str, Any]:
    """Both parts into a folder, some documents at a time; their counts. Attention has threads of its own."""
    about, settings, stats, done = [str(run.path), asdict(run.settings)], run.settings, store.stats(), 0
    several = 1 if settings.train.retrieve == ATTENTION else worth(settings.mine.processes, stats.responses)
    with (
        closing(_Part(folder / "train")) as train,
        closing(_Part(folder / "validation")) as validation,
        closing(spread(packing, about, _tasks(store), several)) as made,
    ):
        for (kept_back, keys), documents in made:
            (validation if kept_back else train).append(Documents(**load(documents)))
            done += len(keys)
            if stats.responses > TOGETHER:
                listen(Event("pack", "progress", done=done, total=stats.responses - stats.held_out, unit="document"))
        if not train.rows["answer_ends"]:
            raise _nothing(store.path)
        if not validation.rows["answer_ends"]:
            ((_, documents),) = spread(packing, about, [(1, [next(_sides(store))[0].key])], 1)
            validation.append(Documents(**load(documents)))
    return {"train": train.counts(), "validation": validation.counts()}


def _tasks(store: TraceStore) -> Iterator[tuple[int, list[str]]]:
    """Keys of documents that are made together, and whether they are kept back."""
    asked = _sides(store)
    while some := list(islice(asked, TOGETHER)):
        for kept_back in (0, 1):
            if these := [one.key for one, back in some if back == kept_back]:
                yield kept_back, these


class _Part(Growing):
    """Documents that are written some at a time."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, ARRAYS)
        self._soft = self._dreams = 0

    def append(self, documents: Documents) -> None:
        """Of the same vocabulary as those before, and with as many alternatives."""
        chunked, rows = documents.chunk_ids >= 0, dict(self.rows)
        soft = chunked if len(documents.chunk_logprobs) else ~np.isnan(documents.slot_logprobs[:, 0])
        self._soft += int(soft.sum())
        self._dreams += int((np.diff(documents.dream_ends, prepend=0) > 0).sum())
        for name in ARRAYS:
            part: NDArray[Any] = getattr(documents, name)
            if name.endswith("_ends"):
                part = part + rows[name.replace("_ends", "_ids")]
            elif name == "chunk_ids":
                part = np.where(chunked, part + rows["chunk_logprobs"], -1).astype(part.dtype)
            self.add(name, part)

    def counts(self) -> dict[str, Any]:
        tokens = self.rows["answer_ids"]
        return {
            "documents": self.rows["answer_ends"],
            "dreams": self._dreams,
            "prompt_tokens": self.rows["prompt_ids"],
            "dream_tokens": self.rows["dream_ids"],
            "answer_tokens": tokens,
            "soft_share": round(self._soft / tokens, 4) if tokens else 0.0,
        }


def chosen_dreams(run: Run) -> dict[str, str]:
    """Trace → the dream that `dream redream` chose for it, as text; nothing where triplets or tokens changed since."""
    record = run.records().get("redream")
    if record is None or run.fresh("redream", record.settings) is None:
        return {}
    lines = [json.loads(line) for line in run.dreams.read_text(encoding="utf-8").split("\n") if line]
    return {line["trace"]: line["dream"] for line in lines}


def recall_of(
    run: Run, codes: Mapping[str, int], labels: Sequence[str], listen: Listener = silent, keep: bool = True
) -> Recall:
    """`training_recall` of a run that is mined."""
    with closing(TraceStore(run.traces, readonly=True)) as store:
        train = split_traces(store)[0]
    with closing(TripletFile(run.triplets)) as triplets:
        return training_recall(run, train, triplets, codes, labels, listen, keep)


def learned_retrieval(run: Run, listen: Listener = silent, keep: bool = False) -> Attention:
    """The run's retrieval by attention; learned now where it is missing, or where answers or triplets changed since.
    keep: raise DistillError where it can't be written, and don't only warn of it."""
    how = replace(run.settings, train=replace(run.settings.train, retrieve=ATTENTION))
    found = kept_attention(run) or recall_of(Run(run.path, how), {}, [], listen, keep).retriever.attention
    assert found is not None, "it is retrieved by"
    return found


def build_documents(
    traces: Sequence[Trace],
    triplets: Mapping[str, list[Triplet]],
    codes: dict[str, int],
    tokenizer: StudentTokenizer,
    aligner: Aligner,
    system: str,
    recall: Recall,
    chosen: Mapping[str, str],
    width: int = 0,
) -> Documents:
    """Documents of traces, in their order. chosen: trace → the dream that it has in the place of the mined one.
    width: alternatives that there is room for at least."""
    prompts: list[list[int]] = []
    dreams: list[list[int]] = []
    answers: list[Aligned] = []
    for trace in traces:
        prompts.append(prompt_ids(tokenizer, recall.prompt(trace.prompt), system=system))
        if trace.key in chosen:
            dreams.append(tokenizer.encode(chosen[trace.key], special=True))
        else:
            dreams.append(dream_ids(tokenizer, dream_of(triplets.get(trace.key, []), codes)))
        answer = aligner.align(trace.response.text, trace.response.tokens, trace.response.done_reason)
        answers.append(answer if trace.response.done_reason == "stop" else to_last_sentence(answer, tokenizer))
    return documents_of(tokenizer, prompts, dreams, answers, width=width)


def documents_of(
    tokenizer: StudentTokenizer,
    prompts: Sequence[Sequence[int]],
    dreams: Sequence[Sequence[int]],
    answers: Sequence[Aligned],
    begun: NDArray[np.int64] | None = None,
    width: int = 0,
) -> Documents:
    """Documents of their parts, in their order; begun as there, width as of `build_documents`."""
    small = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    width = max([width, *(answer.slot_ids.shape[1] for answer in answers)])
    chunk_starts = np.cumsum([0, *(len(answer.chunk_logprobs) for answer in answers)])
    chunks = [
        np.where(answer.chunk_ids >= 0, answer.chunk_ids + start, -1)
        for answer, start in zip(answers, chunk_starts, strict=False)
    ]
    return Documents(
        prompt_ids=_flat(prompts, small),
        prompt_ends=_ends(prompts),
        dream_ids=_flat(dreams, small),
        dream_ends=_ends(dreams),
        answer_ids=_flat([answer.ids for answer in answers], small),
        answer_ends=_ends([answer.ids for answer in answers]),
        slot_ids=np.concatenate([_widen(a.slot_ids, width, a.ids) for a in answers]).astype(small),
        slot_logprobs=np.concatenate([_widen_logprobs(a.slot_logprobs, width + 1) for a in answers]),
        chunk_ids=np.concatenate(chunks).astype(np.int32),
        chunk_logprobs=np.concatenate([answer.chunk_logprobs for answer in answers]).astype(np.float32),
        answer_bytes=np.array([spelled_bytes(answer.ids, tokenizer) for answer in answers], np.int64),
        begun=begun,
    )


def spelled_bytes(ids: NDArray[np.int64], tokenizer: StudentTokenizer) -> int:
    """UTF-8 length of an answer; its end token has none."""
    return int(tokenizer.byte_lengths[ids[ids != tokenizer.eos_id].astype(np.int64)].sum())


def _flat(rows: Iterable[Sequence[int] | NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(row, dtype) for row in rows)])


def _ends(rows: Iterable[Sequence[int] | NDArray[Any]]) -> NDArray[np.int64]:
    return np.cumsum([len(row) for row in rows], dtype=np.int64)


def _widen(slots: NDArray[Any], width: int, labels: NDArray[Any]) -> NDArray[Any]:
    if slots.shape[1] == width:
        return slots
    filler = np.repeat(np.asarray(labels).reshape(-1, 1), width - slots.shape[1], axis=1)
    return np.concatenate([slots, filler], axis=1)


def _widen_logprobs(values: NDArray[np.float16], width: int) -> NDArray[np.float16]:
    if values.shape[1] == width:
        return values
    return np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=-np.inf)
