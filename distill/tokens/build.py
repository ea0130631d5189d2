"""The `tokenize` stage: the corpus' traces and triplets become a codebook and a tokenizer."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distill.corpus.datasets.questions import PICTURED
from distill.corpus.traces import Trace, TraceStore
from distill.errors import BadInput
from distill.events import Event, Listener, silent
from distill.mining.triplets import read_triplets
from distill.run import Run, publish_folder, sha256_file
from distill.teacher.protocol import TeacherTokenizer
from distill.tokens.aligned import CHAT_WORDS, AlignedCut, why_not
from distill.tokens.bpe import ADDED, StudentTokenizer
from distill.tokens.shown import words_around
from distill.turns import turns

if TYPE_CHECKING:
    from distill.tokens.image_tokens import Codebook

VERSION = 1
"""Raised when the stage makes something else of the same input, so that finished runs notice."""

See = Callable[[Path, "Codebook"], dict[str, Any]]

KINDS = ("auto", "aligned", "sentencepiece")


@dataclass(frozen=True)
class Corpus:
    """What a tokenizer is built from."""

    traces: list[Trace]
    system: str
    teacher: TeacherTokenizer | None
    teacher_digest: str
    dataset: str = ""

    @property
    def answers(self) -> list[str]:
        return [trace.response.text for trace in self.traces]

    @property
    def prompts(self) -> list[str]:
        return list(dict.fromkeys(words_around(text) for trace in self.traces for _, text in turns(trace.prompt)))


def stage_settings(run: Run) -> dict[str, Any]:
    """All that tokenizing depends on, besides traces and triplets."""
    vision = {"vision": asdict(run.settings.vision)} if run.settings.capture.dataset in PICTURED else {}
    return {**asdict(run.settings.tokenize), "seed": run.settings.seed, "version": VERSION, **vision}


def build_tokenizer(run: Run, listen: Listener = silent, force: bool = False, see: See | None = None) -> dict[str, Any]:
    """Write tokenizer/: the student's tokenizer, the codebook and each phrase's code. Returns the summary.

    see: adds how pictures are read in the codebook to the folder, and what is worth saying of it to the summary.
    Raises MissingStage without traces or triplets, BadInput where `tokenize.kind` is unknown or can't be had.
    """
    from distill.tokens.image_tokens import build_codebook, save_codes

    options = run.settings.tokenize
    if options.kind not in KINDS:
        raise BadInput(f"tokenize.kind={options.kind}: choose one of {', '.join(KINDS)}")
    run.require("capture")
    run.require("mine")
    settings = stage_settings(run)
    record = None if force else run.fresh("tokenize", settings)
    if record is not None:
        listen(Event("tokenize", "done", "nothing changed: kept", data=record.summary))
        return record.summary
    started = time.monotonic()
    corpus = read_corpus(run)
    listen(Event("tokenize", "start", f"{len(corpus.traces)} responses"))
    codebook, codes = build_codebook(
        read_triplets(run.triplets),
        size=options.image_tokens,
        encoder=options.encoder,
        seed=run.settings.seed,
        texts=corpus.prompts + corpus.answers,
        teacher=run.settings.teacher,
    )
    room = options.vocab_size - ADDED - len(codebook.labels)
    tokenizer, summary = _tokenizer(corpus, options.kind, room, codebook.labels, listen)
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


def read_corpus(run: Run) -> Corpus:
    """The run's selected traces and whose they are. Raises BadInput where there is none."""
    with TraceStore(run.traces, readonly=True) as store:
        traces = list(store.traces())
        if not traces:
            raise BadInput(f"{run.traces}: holds no response; run `dream capture {run.path}` again")
        return Corpus(
            traces, run.settings.capture.system, store.tokenizer(), store.teacher().digest, run.settings.capture.dataset
        )


def _tokenizer(
    corpus: Corpus, kind: str, room: int, labels: Sequence[str], listen: Listener
) -> tuple[StudentTokenizer, dict[str, Any]]:
    """The tokenizer of the wanted kind with at most `room` BPE tokens, and what is worth saying about it."""
    reason = why_not(corpus.teacher)
    if kind == "aligned" and reason:
        raise BadInput(f"tokenize.kind=aligned: {reason}; use tokenize.kind=sentencepiece")
    if kind == "sentencepiece" or corpus.teacher is None or reason:
        if kind == "auto" and not corpus.dataset:
            listen(Event("tokenize", "note", f"{reason}: the student gets a sentencepiece BPE of its own"))
        from distill.tokens.sentence_piece import from_model, train_model

        tokenizer = from_model(train_model(corpus.prompts + corpus.answers, room), labels)
        return tokenizer, summarize(tokenizer, corpus)
    cut = cut_to_corpus(corpus.teacher, corpus, room)
    if cut.size > room:
        note = f"the corpus needs {cut.size} of the teacher's tokens: kept, past tokenize.vocab_size"
        listen(Event("tokenize", "note", note))
    tokenizer = cut.build(labels, corpus.teacher_digest)
    summary = summarize(tokenizer, corpus)
    texts = cut.full.encode_batch(corpus.answers, add_special_tokens=False)
    with_ids = [
        (sampled, text.ids)
        for trace, text in zip(corpus.traces, texts, strict=True)
        if (sampled := _spoken(trace, corpus.teacher)) is not None
    ]
    different = sum(sampled != canonical for sampled, canonical in with_ids)
    summary["noncanonical_responses"] = round(different / len(with_ids), 4) if with_ids else None
    return tokenizer, summary


def cut_to_corpus(teacher: TeacherTokenizer, corpus: Corpus, room: int) -> AlignedCut:
    """All that the corpus is written with, then the likeliest alternatives as far as `room` tokens reach."""
    cut = AlignedCut(teacher)
    mass = np.zeros(len(teacher.tokens))
    for trace in corpus.traces:
        if (targets := trace.response.tokens) is not None:
            cut.keep(np.unique(targets.ids).tolist())
            ids, weights = _alternatives(trace)
            mass += np.bincount(ids[ids >= 0], weights[ids >= 0], len(mass))
    cut.keep_text([*CHAT_WORDS, f"system\n{corpus.system}", *corpus.answers])
    cut.keep_text([f"user\n{prompt}" for prompt in corpus.prompts])
    cut.keep_likely(mass, room)
    return cut


def _alternatives(trace: Trace) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Ids and probabilities of all alternatives at soft positions, flat; -1 where unnamed."""
    targets = trace.response.tokens
    assert targets is not None
    probabilities = np.exp(targets.top_logprobs[targets.soft].astype(np.float64))
    return targets.top_ids[targets.soft].ravel(), probabilities.ravel()


def _spoken(trace: Trace, teacher: TeacherTokenizer) -> list[int] | None:
    """The ids that the teacher sampled, without the end token; None where it gave none."""
    if trace.response.tokens is None:
        return None
    ids = trace.response.tokens.ids.tolist()
    ends = {teacher.eos_id, *teacher.extra_stop_ids}
    return ids[:-1] if ids and ids[-1] in ends else ids


def summarize(tokenizer: StudentTokenizer, corpus: Corpus) -> dict[str, Any]:
    """Counts for run.json. `soft_mass_in_vocabulary`: the share of the probability that the teacher gave its
    alternatives whose alternative the student can say in one token; None where there is no such map."""
    encoded = tokenizer.encode_batch(corpus.answers)
    tokens = sum(map(len, encoded))
    words = sum(len(answer.split()) for answer in corpus.answers)
    share = None
    if tokenizer.teacher_map is not None:
        said = total = 0.0
        for trace in corpus.traces:
            if trace.response.tokens is not None:
                ids, weights = _alternatives(trace)
                known = (ids >= 0) & (tokenizer.teacher_map[ids] >= 0)
                said, total = said + float(weights[known].sum()), total + float(weights.sum())
        share = round(said / total, 5) if total else None
    return {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "bpe_tokens": tokenizer.base_size,
        "tokens_a_word": round(tokens / words, 4) if words else 0.0,
        "bytes_a_token": round(sum(len(answer.encode()) for answer in corpus.answers) / tokens, 4) if tokens else 0.0,
        "soft_mass_in_vocabulary": share,
    }
