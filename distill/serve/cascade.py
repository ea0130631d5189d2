"""A student in its teacher's place, where it is sure enough that the teacher would say the same.

How sure it is, is the probability, at temperature 1, of all that it writes greedily: dream and answer. How sure it must
be is found on answers of the teacher that it never learned from, so that of those it gives a wanted share are the
teacher's own words.
"""

import asyncio
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np
from scipy.stats import beta
from starlette.responses import Response

from distill.corpus.traces import TraceStore
from distill.errors import BadInput
from distill.run import Run, write_atomic
from distill.serve.exchange import CHAT, Question
from distill.serve.fields import Fields
from distill.serve.http import NDJSON, answer, dumps
from distill.serve.ollama_api import Shape
from distill.serve.pieces import Pieces, said
from distill.serve.reply import Options, attempt
from distill.serve.shelf import Served
from distill.tokens.chat import Message
from distill.turns import turns

LEAST = 0.01
"""An answer of which it is less sure is given up at once; none lower is ever let stand."""
TRUST = 0.9
"""Chance, at least, that the wanted agreement is reached on questions like those."""
STARTS = (30, 10)
"""Percent of the questions, the surest, that are tried first: many, whose few errors weigh little, or else fewer."""
ERROR = (1 - TRUST) / len(STARTS)
MOST, AT_ONCE = 1000, 128
"""Held-out questions that are asked at most, in the order of their keys, which is none; and so many at once."""
GREEDY = Options(temperature=0.0)


@dataclass(frozen=True)
class Answered:
    """text: without the dream. sure: 0 to 1. tokens: written, dream and all."""

    text: str
    sure: float
    tokens: int


@dataclass(frozen=True)
class Calibration:
    """Chosen on every second held-out question, shown on the others: how many there are, the share that the student
    answers, and how often its answer is the teacher's. sure: it must be; above 1: nothing is sure enough."""

    wanted: float
    sure: float
    questions: int
    share: float
    agreement: float

    def __str__(self) -> str:
        return (
            f"answers where it is {self.sure:.3g} sure: {self.share:.0%} of {self.questions} held-out questions, "
            f"{self.agreement:.1%} of them as its teacher"
        )


async def answered(served: Served, prompt: str, sure: float = LEAST) -> Answered | None:
    """The student's answer to a prompt, if it is so sure of it. Raises what went wrong with the student."""
    loaded = await served.acquire()
    try:
        student, dreams = loaded.student, served.offer.dreams
        asked = [Message(role=role, content=text) for role, text in turns(prompt)]
        ids = student.prompt_ids(asked, None if dreams else False)
        written = await attempt(served, loaded, ids, served.context - len(ids), GREEDY, max(sure, LEAST), dreams)
        if not written:
            return None
        pieces = Pieces(student.tokenizer, (), dreams, None)
        found = [piece for piece in (*map(pieces.push, written), pieces.rest()) if piece is not None]
        return Answered(said(found)[0].strip(), math.exp(sum(one.logprob for one in written)), len(written))
    finally:
        served.release(None)


def threshold(sure: Sequence[float], agrees: Sequence[bool], wanted: float) -> float:
    """How sure an answer must be: the least of which, with chance TRUST, `wanted` of all that are surer agree.

    Larger and larger shares of the surest are tested, each by Clopper and Pearson's lower bound, until one fails. As
    their order is fixed beforehand, a sequence of tests errs no oftener than one (arXiv:2110.01052, fixed sequence
    testing with several starts). Above 1 where no start holds.
    """
    order = np.argsort(-np.asarray(sure, float), kind="stable")
    ranked, hits = np.asarray(sure, float)[order], np.cumsum(np.asarray(agrees, bool)[order])
    found = 2.0
    for start in STARTS:
        for percent in range(start, 101):
            count = len(ranked) * percent // 100
            if count < math.log(ERROR) / math.log(wanted):
                continue  # so few can't show it, all agreeing
            right = int(hits[count - 1])
            if not right or ranked[count - 1] < LEAST or beta.ppf(ERROR, right, count - right + 1) < wanted:
                break
            found = min(found, float(ranked[count - 1]))
    return found


def same(ours: str, theirs: str) -> bool:
    """Whether two answers are word for word the same."""
    return ours.split() == theirs.split()


async def calibrated(served: Served, run: Run, wanted: float) -> Calibration:
    """How sure the student of a run must be. Raises BadInput for a share that is none, or too few held-out answers."""
    if not 0.5 <= wanted < 1:
        raise BadInput(f"--agreement {wanted:g}: is a share of at least 0.5, and below 1")
    with TraceStore(run.traces, readonly=True) as store:
        asked = [(trace.prompt, trace.response.text) for trace in islice(store.traces(held_out=True), MOST)]
    least = 2 * math.ceil(math.log(ERROR) / math.log(wanted))
    if len(asked) < least:
        raise BadInput(f"{run.path}: has {len(asked)} held-out answers; an agreement of {wanted:g} needs {least}")
    tries = list[Answered | None]()
    for start in range(0, len(asked), AT_ONCE):
        tries += await asyncio.gather(*(answered(served, prompt) for prompt, _ in asked[start : start + AT_ONCE]))
    sure = [0.0 if one is None else one.sure for one in tries]
    agrees = [one is not None and same(one.text, text) for one, (_, text) in zip(tries, asked, strict=True)]
    found = threshold(sure[::2], agrees[::2], wanted)
    given = [agree for value, agree in zip(sure[1::2], agrees[1::2], strict=True) if value >= found]
    count = len(sure[1::2])
    return Calibration(wanted, found, count, len(given) / count, sum(given) / len(given) if given else 1.0)


class Cascade:
    """Answers as calibrated. given: how many; written: tokens of them; tried: questions."""

    def __init__(self, served: Served, calibration: Calibration) -> None:
        self.served, self.calibration = served, calibration
        self.given = self.tried = self.written = 0

    async def answer(self, path: str, body: Fields, question: Question) -> Response | None:
        """What the student says, in the words of Ollama, if it is sure enough, was trained with that system message and
        keeps to the limit. Raises what went wrong with it."""
        started, options = time.monotonic(), question.options
        if options.system != self.served.system:  # without one, a teacher isn't told the student's
            return None
        self.tried += 1
        found = await answered(self.served, question.prompt, self.calibration.sure)
        if found is None or not found.text or found.tokens > options.max_tokens:
            return None
        self.given, self.written = self.given + 1, self.written + found.tokens
        taken = max(1, int((time.monotonic() - started) * 1e9))
        end = {"done_reason": "stop", "total_duration": taken, "eval_count": found.tokens, "eval_duration": taken}
        shape, streams = Shape(body.text("model"), path == CHAT), body.flag("stream", True)
        if not streams:
            return answer({**shape.head(found.text, "", True), **end})
        lines = shape.head(found.text, "", False), {**shape.head("", "", True), **end}
        return Response(b"".join(dumps(line) + b"\n" for line in lines), 200, {"content-type": NDJSON})

    def report(self, run: Run) -> str:
        """What was saved, in words; also kept in the run's cascade.json. The teacher's tokens are those that its kept
        answers have on average."""
        with TraceStore(run.traces, readonly=True) as store:
            stats = store.stats(whole=True)
        each = stats.tokens / stats.responses if stats.responses else 0.0
        found = {"asked": self.tried, "answered": self.given, "own_tokens": self.written}
        found |= {"teacher_tokens_saved": round(self.given * each), **asdict(self.calibration)}
        write_atomic(run.path / "cascade.json", json.dumps(found, indent=2) + "\n")
        share = self.given / self.tried if self.tried else 0.0
        return (
            f"The student answered {self.given} of {self.tried} questions ({share:.0%}); that spared the teacher about "
            f"{found['teacher_tokens_saved']} tokens"
        )
