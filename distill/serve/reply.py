"""One answer of a student, as it comes."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from starlette.types import Receive

from distill.errors import BadInput
from distill.serve.fields import ApiError, Fields
from distill.serve.form import MISSING, Form, Schema, schema_of
from distill.serve.http import while_there
from distill.serve.pieces import Piece, Pieces
from distill.serve.scheduler import Job, Wrote
from distill.serve.shelf import Served
from distill.serve.student import Loaded, Student
from distill.student.grammar import reply_room
from distill.student.sure import LONGEST, Trial
from distill.teacher.protocol import MAX_TOP_LOGPROBS
from distill.tokens.chat import STOP, Message

LONG = 20_000
"""Characters of a prompt that are split into tokens beside the loop: others are served meanwhile."""

PICTURES = 16
"""Of a request, at most."""


@dataclass(frozen=True)
class Options:
    """How an answer is drawn. limit: tokens of dream and answer at most; None: as the context has room for. context:
    tokens that prompt and answer may fill. logprobs: they are wanted, with `top_logprobs` alternatives. schema: of JSON
    that the answer is held to."""

    temperature: float
    top_k: int = 40
    top_p: float = 0.9
    seed: int = 0
    limit: int | None = None
    context: int = 0
    stop: tuple[str, ...] = STOP
    logprobs: bool = False
    top_logprobs: int = 0
    schema: Schema | None = None

    @classmethod
    def read(cls, options: Fields, body: Fields, temperature: float) -> "Options":
        """Ollama's `options`, and what stands beside them. Raises ApiError 400."""
        warm, top_k, top_p = options.number("temperature"), options.whole("top_k"), options.number("top_p")
        stop, limit = options.texts("stop"), options.whole("num_predict")
        return cls(
            min(max(temperature if warm is None else warm, 0.0), 100.0),
            cls.top_k if top_k is None else max(top_k, 0),
            cls.top_p if top_p is None else min(max(top_p, 0.0), 1.0),
            seed_of(options),
            None if limit is None or limit < 0 else limit,
            max(options.whole("num_ctx") or 0, 0),
            STOP if stop is None else tuple(stop),
            *logprobs_of(body),
            schema_of(body.values.get("format")),
        )


def seed_of(fields: Fields) -> int:
    """None, or less than 0, is a new one each time."""
    seed = fields.whole("seed")
    return random.getrandbits(32) if seed is None or seed < 0 else seed


def logprobs_of(body: Fields) -> tuple[bool, int]:
    top = body.whole("top_logprobs") or 0
    if not 0 <= top <= MAX_TOP_LOGPROBS:
        raise ApiError(400, f"top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}")
    logprobs = body.flag("logprobs", False)
    return logprobs, top if logprobs else 0


@dataclass(frozen=True)
class Asked:
    """What is to be answered: a conversation, or a raw prompt that no template is put around. before: tokens of an
    earlier conversation that the prompt goes on with. think: whether it shall dream. truncate: what doesn't fit the
    context is cut at its beginning; else it is refused. pictures: files of each message, or nothing."""

    messages: Sequence[Message] = ()
    raw: str | None = None
    before: Sequence[int] = ()
    think: bool = True
    truncate: bool = True
    pictures: Sequence[Sequence[bytes]] = ()


class Reply:
    """Whoever begins it closes it. tokens: what was written so far. reason: why it ended, once it has. notes: what of
    the prompt was left out."""

    def __init__(self, served: Served, loaded: Loaded, prompt: list[int], job: Job | None, pieces: Pieces) -> None:
        self.served, self.prompt, self.tokens, self.reason = served, prompt, list[int](), ""
        self._job, self._pieces, self._stops = job, pieces, {loaded.student.tokenizer.eos_id}
        self.started = self.ready = self.ended = time.monotonic()
        self.notes = list[str]()
        self._released = False

    @classmethod
    async def begin(cls, served: Served, asked: Asked, options: Options) -> "Reply":
        """Raises ApiError 400 for a prompt that can't be, Busy where too many wait."""
        started = time.monotonic()
        loaded = await served.acquire()
        try:
            ready = time.monotonic()
            tokenizer = loaded.student.tokenizer
            context = min(options.context or served.context, served.context)
            # Another may have been read than there was when `think` was.
            dreams = asked.raw is None and asked.think and served.offer.dreams
            dreams = dreams and asked.messages[-1]["role"] != "assistant"
            how, notes = (context, options.limit), list[str]()
            prompt = await _prompt_ids(loaded, asked, dreams, *how, notes.append)
            if any(not 0 <= id < tokenizer.vocab_size for id in prompt):
                raise ApiError(400, "context: holds no tokens of this model")
            if dreams and loaded.student.sure < 1 and options.schema is None:
                less = list[str]()
                silent = await _prompt_ids(loaded, asked, False, *how, less.append)
                room, sure = min(LONGEST, context - len(silent)), loaded.student.sure
                if await attempt(served, loaded, silent, room, options, sure):
                    prompt, dreams, notes = silent, False, less
            room = context - len(prompt) if options.limit is None else min(options.limit, context - len(prompt))
            state = None if asked.raw is not None else (loaded.grammar if dreams else loaded.grammar.answering).start
            form = None if options.schema is None else await asyncio.to_thread(_form, loaded, options.schema)
            end = frozenset([tokenizer.eos_id])
            job = Job(prompt, room, options, state, form=form, stop_ids=end) if room > 0 else None
            pieces = Pieces(tokenizer, options.stop, dreams, options.top_logprobs if options.logprobs else None)
            reply = cls(served, loaded, prompt, job, pieces)
            reply.started, reply.ready, reply.notes = started, ready, notes
            if job is None:
                reply.reason, reply.ended = "length", time.monotonic()
            else:
                served.scheduler.submit(loaded.lane, job)
            return reply
        except BaseException:
            served.release(None)
            raise

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """All that came meanwhile, together. Raises what went wrong with the student."""
        job = self._job
        while not self.reason and job is not None:
            await job.arrived.wait()
            job.arrived.clear()
            found: list[Piece | None] = []
            while job.events and not self.reason:
                event = job.events.popleft()
                if isinstance(event, BaseException):
                    raise event
                if event is None:
                    if isinstance(job.form, Form) and job.form.error:
                        raise ApiError(500, f"format: {job.form.error}")
                    self.reason = "stop" if self.tokens[-1] in self._stops else "length"
                    found.append(self._pieces.rest())
                    continue
                self.tokens.append(event.token)
                found.append(self._pieces.push(event))
                if self._pieces.stopped:
                    self.reason = "stop"
            self.ended = time.monotonic()
            if came := [piece for piece in found if piece is not None]:
                yield came

    async def whole(self, receive: Receive, keep: float | None = None) -> list[Piece]:
        """All of it at once, then it is closed. Raises as `pieces` does, and Gone where the client goes before."""

        async def heard() -> list[Piece]:
            return [piece async for pieces in self.pieces() for piece in pieces]

        try:
            return await while_there(receive, heard())
        finally:
            self.close(keep)

    def close(self, keep: float | None = None) -> None:
        """Nobody listens any more. keep: how long the student stays in memory."""
        if not self._released:
            self._released = True
            if self._job is not None:
                self.served.scheduler.cancel(self._job)
            self.served.release(keep)

    @property
    def context(self) -> list[int]:
        """Tokens of the whole conversation, to go on with."""
        return [*self.prompt, *(token for token in self.tokens if token not in self._stops)]

    @property
    def durations(self) -> dict[str, int]:
        """Ollama's counts, and durations in ns."""
        job = self._job
        taken, begun = (job.taken, job.begun) if job is not None and job.begun else (self.ended, self.ended)
        return {
            "total_duration": _ns(time.monotonic() - self.started),
            "load_duration": _ns(self.ready - self.started),
            "prompt_eval_count": len(self.prompt),
            "prompt_eval_duration": _ns(begun - taken),
            "eval_count": len(self.tokens),
            "eval_duration": _ns(self.ended - begun),
        }


async def attempt(
    served: Served, loaded: Loaded, prompt: list[int], room: int, options: Options, sure: float, dreams: bool = False
) -> list[Wrote]:
    """What the student writes to its end after a prompt: its dream and answer, or the answer to one that ends in an
    empty dream. Nothing where it isn't so sure of all of it, or doesn't come to an end in its room."""
    end, trial, written = loaded.student.tokenizer.eos_id, Trial(sure, room), list[Wrote]()
    if room < 1:
        return []
    state = (loaded.grammar if dreams else loaded.grammar.answering).start
    job = Job(prompt, room, options, state, stop_ids=frozenset([end]))
    served.scheduler.submit(loaded.lane, job)
    try:
        while True:
            await job.arrived.wait()
            job.arrived.clear()
            while job.events:
                event = job.events.popleft()
                if isinstance(event, BaseException):
                    raise event
                if event is None or not trial.add(event.logprob):
                    return []
                written.append(event)
                if event.token == end:
                    return written
    finally:
        served.scheduler.cancel(job)


def _form(loaded: Loaded, schema: Schema) -> Form:
    try:
        return loaded.forms.of(schema)
    except ImportError as error:
        raise ApiError(400, f"format: {MISSING}") from error


def _ns(seconds: float) -> int:
    return max(1, int(seconds * 1e9))


async def _prompt_ids(
    loaded: Loaded, asked: Asked, dreams: bool, context: int, limit: int | None, note: Callable[[str], None]
) -> list[int]:
    """Tokens up to where the student goes on, as many as fit. note: gets a line on what is left out. Raises ApiError
    400 where nothing may be, and all doesn't fit."""
    student = loaded.student

    def split() -> list[int]:
        if asked.raw is not None:
            return student.tokenizer.encode(asked.raw, special=True)
        turns = as_read(student, asked.messages, asked.pictures)
        return student.prompt_ids(turns, None if dreams else False, context, not asked.truncate, note)

    pictures = any(asked.pictures)
    characters = len(asked.raw or "") + sum(len(message["content"]) for message in asked.messages)
    ids = await asyncio.to_thread(split) if pictures or characters + 40 * len(asked.messages) > LONG else split()
    ids = [*asked.before, *ids] or [student.tokenizer.newline_id]
    if len(ids) < context:
        return ids
    if not asked.truncate:
        raise ApiError(400, f"the prompt's {len(ids)} tokens exceed the context length of {context}")
    room = reply_room(student.steps, dreams)
    kept = max(context - min(room, context // 2, max(limit or room, 1)), 1)
    left = f"the first {len(ids) - kept} tokens, with any system message, are left out"
    note(f"{left}: all don't fit a context of {context} tokens")
    return ids[-kept:]


def as_read(student: Student, messages: Sequence[Message], pictures: Sequence[Sequence[bytes]]) -> Sequence[Message]:
    """Turns, each with what the student sees in its pictures. Raises ApiError 400."""
    if not (count := sum(map(len, pictures))):
        return messages
    if count > PICTURES:
        raise ApiError(400, f"images: {count} of them; a request has {PICTURES} at most")
    try:
        pairs = zip(messages, pictures, strict=True)
        return [{**message, "content": student.asked(message["content"], own)} for message, own in pairs]
    except BadInput as error:
        raise ApiError(400, f"images: {error}") from error
