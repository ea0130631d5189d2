"""Selecting a run's answers anew: the record of its capture must not outlive what it tells of."""

import contextlib
from collections.abc import Generator

from distill.corpus.traces import TraceStore
from distill.errors import DistillError
from distill.run import Run

STAGE = "capture"


@contextlib.contextmanager
def selecting(run: Run, store: TraceStore, others: bool = True) -> Generator[None]:
    """Where what is within fails, a recorded capture is as it was, and what was selected too. others: other answers
    come to be selected than were recorded; so the record is gone from now on, and stays so after a stop or a kill: what
    is selected then would be taken for what it tells of."""
    records = run.records()
    before = store.selected() if STAGE in records else {}
    if others:
        run.forget(STAGE)
    try:
        yield
    except (DistillError, OSError):
        with contextlib.suppress(DistillError):  # what is to be told is the first error
            if STAGE in records:
                store.select(before)
                run.keep(records)
        raise
