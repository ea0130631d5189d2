"""Triplets of a dataset's answers: the true dreams that it brings with it, nothing is looked for."""

from collections.abc import Iterable, Iterator

from distill.corpus.datasets.questions import Step
from distill.corpus.datasets.stage import facts, info, questions
from distill.corpus.traces import Trace, TraceStore
from distill.mining.triplets import FACT, LENSES, Mined, Triplet, by_trace, clean_phrase, fits
from distill.run import Run
from distill.teacher.protocol import GenerateOptions


def mine_dataset(run: Run, traces: Iterable[Trace]) -> Iterator[Mined]:
    """Of each trace, its question's true dream."""
    found = by_trace(_true_triplets(run))
    for trace in traces:
        triplets = found.get(trace.key, [])
        yield Mined(triplets, len(triplets), len(triplets))


def known_facts(run: Run) -> Iterator[Triplet]:
    """What the graph knows besides what answers say."""
    for number, chain in enumerate(facts(run)):
        yield from _triplets(chain, "abstract", f"{FACT}{number}")


def _true_triplets(run: Run) -> Iterator[Triplet]:
    """The steps of every question's true dream, by lens; those of users' files are as long as phrases may be."""
    about, options = info(run), GenerateOptions(temperature=0.0, system=run.settings.capture.system)
    for question in questions(run):
        key = TraceStore.key(about, question.prompt, options)
        for lens in LENSES:
            yield from _triplets(question.dream.get(lens, ()), lens, key)


def _triplets(steps: Iterable[Step], lens: str, key: str) -> Iterator[Triplet]:
    for number, step in enumerate(steps):
        what, action, result = map(clean_phrase, (step.what, step.action, step.result))
        if fits(what) and fits(action) and fits(result):
            yield Triplet(what, action, result, lens, number, key, -1, "dataset")
