"""Imported once, in the process from which those that train are forked (`distributed.context`)."""

import signal

_interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the business of whoever started it
from distill.training import loop  # noqa: E402

__all__ = ["loop"]

signal.signal(signal.SIGINT, _interrupted)
# Who tells a whole group of processes to end tells this one too: it outlives those that still save.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
