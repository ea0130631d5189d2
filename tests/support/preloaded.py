"""The process from which the tests' commands are forked (support/disturbed.py): it has loaded the parser, and waits for
no disk (see conftest.py) and knows nothing of the terminal that the tests are called from."""

import contextlib
import os

from distill.errors import MissingDependency
from distill.learning import consult, keeping, polish
from distill.mining.syntax_miner import load_parser

with contextlib.suppress(MissingDependency):
    load_parser()
os.fsync = lambda fd: None
consult.ON = polish.ON = consult.TRIAL = 8  # words that a teacher says, and answers that a Fisher reads: seconds
keeping.FISHED = 32
os.environ["TERM"] = "xterm"
for name in ("COLUMNS", "LINES", "NO_COLOR"):
    os.environ.pop(name, None)
