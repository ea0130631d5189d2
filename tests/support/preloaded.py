"""The parser, loaded once in the process from which the tests' commands are forked (support/disturbed.py)."""

import contextlib

from distill.errors import MissingDependency
from distill.mining.syntax_miner import load_parser

with contextlib.suppress(MissingDependency):
    load_parser()
