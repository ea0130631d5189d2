"""What is served: a student, how it is opened, and how it lies in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from distill.backbone.model import Backbone
from distill.backbone.prepared import prepared
from distill.serve.form import Forms
from distill.serve.scheduler import Lane
from distill.student.grammar import DreamGrammar
from distill.teacher.memory import available_memory
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import Message

SHARE = 0.4
"""Of the memory that is free once the weights are there, for what the rows of all students have read."""
SOME = 1 << 30
"""Bytes for it where what is free isn't known."""


class Student(Protocol):
    """As `bundle.load.load_student` gives one."""

    @property
    def name(self) -> str: ...
    @property
    def model(self) -> Backbone: ...
    @property
    def tokenizer(self) -> StudentTokenizer: ...
    @property
    def system(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def sure(self) -> float: ...
    @property
    def sees(self) -> bool: ...
    def asked(self, prompt: str, images: Sequence[bytes]) -> str: ...
    def prompt_ids(
        self,
        messages: Sequence[Message],
        think: bool | None,
        context: int = 0,
        whole: bool = False,
        note: Callable[[str], None] = ...,
    ) -> list[int]: ...


Keep = Callable[[list[Message], str, str, str, str, bool], None]
"""Keeps messages, dream, answer, verdict, what was better, and whether the answer was cut. Raises BadInput for a
verdict that is none."""


@dataclass(frozen=True)
class Offer:
    """A student to be served. load: reads it. dreams: it was taught to. temperature: where a request says none.
    modified: when it was made, seconds since 1970. keep: what its users say of answers; None: nobody learns from it.
    source: where it lies. rename: how it gets another name, if it can. stamp: path, size and time (ns) of files
    that `load` reads; while it is the same, so is the digest. renew: the offer as it is then, when it is read again."""

    load: Callable[[], Student]
    dreams: bool = True
    temperature: float = 0.7
    modified: float = 0.0
    keep: Keep | None = None
    source: str = ""
    rename: str = ""
    stamp: tuple[tuple[str, int, int], ...] = ()
    renew: "Callable[[], Offer] | None" = None


class Loaded:
    """A student in memory, one of `many` that share it."""

    def __init__(self, student: Student, slots: int, many: int) -> None:
        self.student = student
        self.forms = Forms(student.tokenizer)
        self.grammar = DreamGrammar(student.tokenizer, student.steps)
        weights = prepared(student.model)
        memory = int((available_memory() or SOME / SHARE) * SHARE / many)
        self.lane = Lane(weights, slots, memory, self.grammar)
