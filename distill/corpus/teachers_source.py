"""The weights of the teacher that gave a run's answers, or that a student of given ones begins as."""

from distill.corpus.traces import TraceStore
from distill.events import Listener
from distill.run import Run
from distill.teacher.find_weights import find_weights
from distill.teacher.open_source import open_source
from distill.teacher.source import Source


def teachers_source(run: Run, listen: Listener) -> Source | str:
    """The teacher's weights, or why they can't be read, with what would change it."""
    with TraceStore(run.traces, readonly=True) as store:
        teacher, words = store.teacher(), store.tokenizer()
    found = find_weights(run.settings.teacher, None if teacher.is_given else teacher, words, listen)
    return found.reason if found.path is None else open_source(found.path)
