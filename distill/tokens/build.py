"""The `tokenize` stage: the corpus' traces and triplets become a codebook and a tokenizer."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from distill.config import TokenizeSettings
from distill.corpus.datasets.questions import PICTURED
from distill.corpus.traces import Trace, TraceStore
from distill.errors import BadInput
from distill.events import Event, Listener, silent
from distill.mining.triplets import each_triplet
from distill.ranges import check_choice
from distill.run import Run, publish_folder, sha256_file
from distill.spread import spread, worth
from distill.teacher.protocol import TeacherTokenizer
from distill.tokens.aligned import CHAT_WORDS, AlignedCut, why_not
from distill.tokens.bpe import ADDED, StudentTokenizer
from distill.tokens.shown import words_around
from distill.turns import turns

if TYPE_CHECKING:
    from distill.tokens.image_tokens import Codebook

VERSION = 1
"""Raised when the stage makes something else of the same input, so that finished runs notice."""

AT_ONCE = 1024
"""Answers that are read together."""
SOFT_AT_ONCE = 64
"""Answers whose alternatives are counted together: they take memory."""
TEXTS = 1_000_000
"""That a BPE is learned from, at most."""

T = TypeVar("T")
See = Callable[[Path, "Codebook"], dict[str, Any]]


@dataclass(frozen=True)
class Corpus:
    """What a tokenizer is built from: the selected traces of a database, read anew each time, never held. By itself it
    is its prompts, then its answers."""

    path: Path
    system: str
    teacher: TeacherTokenizer | None
    teacher_digest: str
    dataset: str = ""
    processes: int = 1
    """That read it: as `mine.processes`."""

    def traces(self) -> Iterator[Trace]:
        with TraceStore(self.path, readonly=True) as store:
            yield from store.traces()

    @property
    def answers(self) -> Iterator[str]:
        with TraceStore(self.path, readonly=True) as store:
            yield from (answer for _, _, answer in store.answers())

    @property
    def prompts(self) -> Iterator[str]:
        """What is said in them, each once."""
        seen: set[int] = set()
        with TraceStore(self.path, readonly=True) as store:
            for text in (words_around(said) for _, prompt, _ in store.answers() for _, said in turns(prompt)):
                if (known := hash(text)) not in seen:
                    seen.add(known)
                    yield text

    def __iter__(self) -> Iterator[str]:
        yield from self.prompts
        yield from self.answers


def stage_settings(run: Run) -> dict[str, Any]:
    """All that tokenizing depends on, besides traces and triplets."""
    vision = {"vision": asdict(run.settings.vision)} if run.settings.capture.dataset in PICTURED else {}
    used = asdict(run.settings.tokenize)
    for name in ("vocab_most", "lenses"):  # as before there were any
        if used[name] == getattr(TokenizeSettings(), name):
            del used[name]
    return {**used, "seed": run.settings.seed, "version": VERSION, **vision}


def build_tokenizer(run: Run, listen: Listener = silent, force: bool = False, see: See | None = None) -> dict[str, Any]:
    """Write tokenizer/: the student's tokenizer, the codebook and each phrase's code. Returns the summary.

    see: adds how pictures are read in the codebook to the folder, and what is worth saying of it to the summary.
    Raises MissingStage without traces or triplets, BadInput where `tokenize.kind` is unknown or can't be had.
    """
    from distill.tokens.image_tokens import SAMPLE, build_codebook, save_codes

    options = run.settings.tokenize
    check_choice("tokenize.kind", options.kind)
    run.require("capture")
    run.require("mine")
    settings = stage_settings(run)
    record = None if force else run.fresh("tokenize", settings)
    if record is not None:
        listen(Event("tokenize", "done", "nothing changed: kept", data=record.summary))
        return record.summary
    started = time.monotonic()
    corpus = read_corpus(run, listen)
    codebook, codes = build_codebook(
        each_triplet(run.triplets),
        size=options.image_tokens,
        encoder=options.encoder,
        seed=run.settings.seed,
        texts=corpus,
        teacher=run.settings.teacher,
    )
    if codebook.report.get("phrases", 0) > SAMPLE:
        note = (
            f"the concept space is learned from the commonest {SAMPLE:,} of {codebook.report['phrases']:,.0f} phrases"
        )
        listen(Event("tokenize", "note", note))
    tokenizer, summary = _tokenizer(corpus, options, codebook.labels, listen)
    summary |= {"image_tokens": len(codebook.labels)}
    summary |= {f"codebook_{name}": value for name, value in codebook.report.items()}
    with publish_folder(run.tokenizer) as folder:
        tokenizer.save(folder)
        codebook.save(folder)
        save_codes(folder, codes)
        summary |= see(folder, codebook) if see is not None else {}
        outputs = {f"{run.tokenizer.name}/{file.name}": sha256_file(file) for file in sorted(folder.iterdir())}
    run.record("tokenize", settings, outputs, summary, time.monotonic() - started)
    listen(Event("tokenize", "done", f"{tokenizer.vocab_size} tokens, {tokenizer.kind}", data=summary))
    return summary


def read_corpus(run: Run, listen: Listener = silent) -> Corpus:
    """The run's selected traces and whose they are. Raises BadInput where there is none."""
    with TraceStore(run.traces, readonly=True) as store:
        if not (responses := store.stats().responses):
            raise BadInput(f"{run.traces}: holds no response; run `dream capture {run.path}` again")
        listen(Event("tokenize", "start", f"{responses} responses"))
        return Corpus(
            run.traces,
            run.settings.capture.system,
            store.tokenizer(),
            store.teacher().digest,
            run.settings.capture.dataset,
            run.settings.mine.processes,
        )


def _tokenizer(
    corpus: Corpus, options: TokenizeSettings, labels: Sequence[str], listen: Listener
) -> tuple[StudentTokenizer, dict[str, Any]]:
    """The tokenizer of the wanted kind, and what is worth saying about it."""
    room, most = (size - ADDED - len(labels) for size in (options.vocab_size, options.vocab_most))
    reason = why_not(corpus.teacher)
    if options.kind == "aligned" and reason:
        raise BadInput(f"tokenize.kind=aligned: {reason}; use tokenize.kind=sentencepiece")
    if options.kind == "sentencepiece" or corpus.teacher is None or reason:
        if options.kind == "auto" and not corpus.dataset:
            listen(Event("tokenize", "note", f"{reason}: the student gets a sentencepiece BPE of its own"))
        from distill.tokens.sentence_piece import from_model, train_model

        texts = sum(1 for _ in corpus)
        every = -(-texts // TEXTS)
        if every > 1:
            listen(Event("tokenize", "note", f"its BPE is learned from every {every}th of {texts:,} texts"))
        tokenizer = from_model(train_model(islice(corpus, 0, None, every), min(room, most)), labels, options.lenses)
        return tokenizer, summarize(tokenizer, corpus)
    cut = cut_to_corpus(corpus.teacher, corpus, room, most)
    if cut.left_out:
        tokens, share = cut.left_out
        note = (
            f"the corpus needs {tokens:,} of the teacher's tokens more than tokenize.vocab_most={options.vocab_most}: "
            f"the rarest ({share:.2%} of its text) are left out, spelled in smaller ones, and have no soft targets"
        )
        listen(Event("tokenize", "warning", note))
    elif cut.size > room:
        note = f"the corpus needs {cut.size} of the teacher's tokens: kept, past tokenize.vocab_size"
        listen(Event("tokenize", "note", note))
    tokenizer = cut.build(labels, corpus.teacher_digest, options.lenses)
    assert tokenizer.teacher_map is not None
    total, with_ids, different = cut.told["told"].tolist()
    said = float(cut.told["mass"][tokenizer.teacher_map >= 0].sum())
    summary = summarize(tokenizer, corpus, round(said / total, 5) if total else None)
    summary["noncanonical_responses"] = round(different / with_ids, 4) if with_ids else None
    if cut.left_out:
        summary["tokens_left_out"], summary["left_out_share"] = cut.left_out[0], round(cut.left_out[1], 5)
    return tokenizer, summary


def _together(of: Iterable[T], size: int = AT_ONCE) -> Iterator[list[T]]:
    """Some at a time."""
    left = iter(of)
    while some := list(islice(left, size)):
        yield some


@contextmanager
def counting(traces: str) -> Generator[Callable[[Sequence[str]], bytes]]:
    """`_counted` of what a trace database holds between two keys."""
    with TraceStore(Path(traces), readonly=True) as store:
        teacher = store.tokenizer()
        assert teacher is not None
        cut = AlignedCut(teacher)
        yield lambda between: save(_counted(cut, store.traces(between=between)))


def _counted(cut: AlignedCut, traces: Iterable[Trace]) -> dict[str, NDArray[Any]]:
    """In tokens of the teacher, V of them: counts (V,) of how often they are said, as it did and as it spells its text;
    mass (V,), the probability that it gave each as an alternative; told (3,), what it gave in all, unnamed ones
    included, answers whose tokens are known, and those of them that it spells otherwise."""
    size, told = len(cut.teacher.tokens), np.zeros(3)
    counts, mass = np.zeros(size, np.int64), np.zeros(size)
    for some in _together(traces, SOFT_AT_ONCE):
        texts = cut.full.encode_batch([trace.response.text for trace in some], add_special_tokens=False)
        spoken = [_spoken(trace, cut.teacher) for trace in some]
        different = sum(ids is not None and ids != text.ids for ids, text in zip(spoken, texts, strict=True))
        given = [targets for trace in some if (targets := trace.response.tokens) is not None]
        said = np.concatenate([np.zeros(0, np.int32), *(targets.ids for targets in given)])
        counts += np.bincount([id for text in texts for id in text.ids], minlength=size)
        counts += np.bincount(said[(said >= 0) & (said < size)], minlength=size)
        tops = np.concatenate([np.zeros(0, np.int32), *(targets.top_ids[targets.soft].ravel() for targets in given)])
        logprobs = np.concatenate([np.zeros(0), *(targets.top_logprobs[targets.soft].ravel() for targets in given)])
        weights, named = np.exp(logprobs), tops >= 0
        mass += np.bincount(tops[named], weights[named], size)
        told += weights.sum(), len(given), different
    return {"counts": counts, "mass": mass, "told": told}


def count(corpus: Corpus, cut: AlignedCut) -> dict[str, NDArray[Any]]:
    """`_counted` of all answers, and the counts of prompts as well."""
    with TraceStore(corpus.path, readonly=True) as store:
        ranges, several = store.ranges(AT_ONCE), worth(corpus.processes, store.stats().responses)
        if several < 2:
            parts = (_counted(cut, store.traces(between=between)) for between in ranges)
        else:
            parts = (load(part) for _, part in spread(counting, str(corpus.path), ranges, several))
        total = next(parts)
        for part in parts:
            for name, more in part.items():
                total[name] = total[name] + more
    for texts in _together(f"user\n{prompt}" for prompt in corpus.prompts):
        encoded = cut.full.encode_batch(texts, add_special_tokens=False)
        total["counts"] += np.bincount([id for text in encoded for id in text.ids], minlength=len(cut.teacher.tokens))
    return total


def cut_to_corpus(
    teacher: TeacherTokenizer, corpus: Corpus, room: int, most: int = TokenizeSettings.vocab_most
) -> AlignedCut:
    """All that the corpus is written with, then the likeliest alternatives as far as `room` tokens reach.

    Where the corpus needs more than `most` tokens, the commonest; `left_out` of the cut tells.
    """
    cut = AlignedCut(teacher)
    told = count(corpus, cut)
    counts = np.where(cut.normal, told["counts"], 0)
    always = [*CHAT_WORDS, f"system\n{corpus.system}"]
    cut.keep_text(always)
    cut.keep(np.flatnonzero(counts).tolist())
    if cut.size > most:
        cut = AlignedCut(teacher)
        cut.keep_text(always)
        cut.keep_likely(counts.astype(np.float64), most)
        gone = np.setdiff1d(np.flatnonzero(counts), sorted(cut.kept))
        cut.left_out = len(gone), float(counts[gone].sum() / counts.sum())
    cut.keep_likely(told["mass"], min(room, most))
    cut.told = told
    return cut


def _spoken(trace: Trace, teacher: TeacherTokenizer) -> list[int] | None:
    """The ids that the teacher sampled, without the end token; None where it gave none."""
    if trace.response.tokens is None:
        return None
    ids = trace.response.tokens.ids.tolist()
    ends = {teacher.eos_id, *teacher.extra_stop_ids}
    return ids[:-1] if ids and ids[-1] in ends else ids


def summarize(tokenizer: StudentTokenizer, corpus: Corpus, share: float | None = None) -> dict[str, Any]:
    """Counts for run.json. share, `soft_mass_in_vocabulary`: of the probability that the teacher gave its alternatives,
    that of those which the student can say in one token; None where there is no such map."""
    tokens = words = size = 0
    for answers in _together(corpus.answers):
        tokens += sum(map(len, tokenizer.encode_batch(answers)))
        words += sum(len(answer.split()) for answer in answers)
        size += sum(len(answer.encode()) for answer in answers)
    return {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "bpe_tokens": tokenizer.base_size,
        "tokens_a_word": round(tokens / words, 4) if words else 0.0,
        "bytes_a_token": round(size / tokens, 4) if tokens else 0.0,
        "soft_mass_in_vocabulary": share,
    }
