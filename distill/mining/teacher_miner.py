"""Triplets from the teacher itself: it fills a JSON schema, and what the text doesn't say is dropped."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.config import Settings
from distill.corpus.traces import Trace
from distill.errors import DistillError, PromptRefused
from distill.events import Event, Listener, silent
from distill.journal import append_line
from distill.mining.inflect import content_stems, grounded
from distill.mining.triplets import LENSES, MAX_CHARACTERS, MAX_WORDS, Mined, Triplet, clean_phrase, fits
from distill.run import fingerprint
from distill.teacher.crew import AT_ONCE, MANY_LISTED, Crew, Outcome
from distill.teacher.protocol import GenerateOptions, Teacher
from distill.turns import transcript, words

INSTRUCTION = """\
Read the question and the answer. Write down what the answer says as short steps, each with
"what" (a thing), "action" (what it does or what is done to it) and "result" (what comes of it or where).
spatial: where things are or move. temporal: what comes first and next. causal: what causes what. abstract: all else.
Use only words of the question and the answer, at most {words} words in each part, at most {steps} steps in each list.

Question: {question}
Answer: {answer}
"""
ANSWER_TOKENS = 60
"""Room for one step in JSON: three short phrases, keys and quotes."""


def schema(steps: int) -> dict[str, Any]:
    """JSON schema of an answer: for each lens at most `steps` objects of three short strings."""
    part = {"type": "string", "minLength": 1, "maxLength": MAX_CHARACTERS}
    roles = ("what", "action", "result")
    step = {"type": "object", "properties": dict.fromkeys(roles, part), "required": list(roles)}
    chain = {"type": "array", "items": step, "maxItems": steps}
    return {"type": "object", "properties": dict.fromkeys(LENSES, chain), "required": list(LENSES)}


def parse_answer(answer: str, trace: Trace, steps: int) -> Mined:
    """Triplets of the teacher's JSON, the ungrounded left out. An answer that is no such JSON is `broken`."""
    try:
        lenses = json.loads(answer)
        proposed = [
            (lens, *(clean_phrase(item[role]) for role in ("what", "action", "result")))
            for lens in LENSES
            for item in lenses.get(lens, [])
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        return Mined([], 0, 0, broken=True)
    known = content_stems([words(trace.prompt), trace.response.text])
    sound = [step for step in proposed if all(fits(p) and grounded(p, known) for p in step[1:])]
    triplets: list[Triplet] = []
    for lens in LENSES:
        chain = list(dict.fromkeys(step for step in sound if step[0] == lens))[:steps]
        triplets += [
            Triplet(what, action, result, lens, number, trace.key, -1, "teacher")
            for number, (_, what, action, result) in enumerate(chain)
        ]
    return Mined(triplets, len(proposed), len(sound))


def answer_limit(steps: int) -> int:
    """Tokens that an answer may have."""
    return len(LENSES) * steps * ANSWER_TOKENS


def ask(teacher: Teacher, trace: Trace, steps: int, seed: int) -> Mined:
    """Mine one response. Raises TeacherError where the teacher fails, not where its answer is broken."""
    asked, said = transcript(trace.prompt), trace.response.text
    prompt = INSTRUCTION.format(words=MAX_WORDS, steps=steps, question=asked, answer=said)
    options = GenerateOptions(max_tokens=answer_limit(steps), temperature=0.0, seed=seed, top_logprobs=0)
    return parse_answer(teacher.generate_json(prompt, schema(steps), options), trace, steps)


class PartialMine:
    """What an unfinished mining has found, one response a line, appended as it comes.

    A response is known again by its text and by all that its mining depends on, so other settings find nothing.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self._found: dict[str, Mined] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in path.read_bytes().split(b"\n"):
                # A line cut by a crash is asked again.
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    value = json.loads(line)
                    triplets = [Triplet(**triplet) for triplet in value["triplets"]]
                    mined = Mined(triplets, value["proposed"], value["grounded"], value["broken"])
                    self._found[value["key"]] = mined

    def _key(self, trace: Trace) -> str:
        return fingerprint([self.settings, trace.key, trace.prompt, trace.response.text])

    def get(self, trace: Trace) -> Mined | None:
        return self._found.get(self._key(trace))

    def put(self, trace: Trace, mined: Mined) -> None:
        """Append, and reach the disk. Raises DistillError where it can't be written."""
        append_line(self.path, {"key": self._key(trace), **asdict(mined)})


def mine_traces(
    traces: Sequence[Trace],
    settings: Settings,
    listen: Listener = silent,
    teachers: Sequence[Teacher] | None = None,
    partial: PartialMine | None = None,
) -> Iterator[Mined]:
    """Mine all traces, in order, as many at once as the teachers serve; opens the settings' teacher if given none.

    A response that no host mines counts as broken, and, unless it was refused, as failed: it may be mined another time.
    Raises what `Crew` raises. What `partial` holds is not asked again, and what is found, or refused, is put there.
    """
    from distill.teacher import opened, room_for

    known = [partial.get(trace) if partial else None for trace in traces]
    if all(known):
        yield from (found for found in known if found)
        return
    limit = answer_limit(settings.mine.steps)
    context = room_for((INSTRUCTION + trace.prompt + trace.response.text for trace in traces), limit)
    theirs = opened(settings.teacher, listen, context, settings.runtime)
    with theirs if teachers is None else contextlib.nullcontext(teachers) as asked:
        yield from _ask_all(traces, known, asked, settings, listen, partial)


def _ask_all(
    traces: Sequence[Trace],
    known: Sequence[Mined | None],
    teachers: Sequence[Teacher],
    settings: Settings,
    listen: Listener,
    partial: PartialMine | None,
) -> Iterator[Mined]:
    """In order, as soon as all before it are there."""

    def work(teacher: Teacher, i: int) -> Mined:
        return ask(teacher, traces[i], settings.mine.steps, settings.seed)

    def keep(outcome: Outcome[int, Mined]) -> Mined:
        mined = outcome.answer or lost(outcome)
        if partial and not mined.failed:
            partial.put(traces[outcome.what], mined)
        return mined

    def lost(outcome: Outcome[int, Mined]) -> Mined:
        nonlocal told
        trace, told = traces[outcome.what], told + 1
        if told <= MANY_LISTED:
            listen(Event("mine", "warning", f"nothing mined from the answer to {trace.prompt!r}: {outcome.problem}"))
        return Mined([], 0, 0, broken=True, failed=not isinstance(outcome.problem, PromptRefused))

    told = 0
    crew = Crew(teachers, work, stage="mine", listen=listen, fixed=settings.teacher.in_flight, at_once=AT_ONCE)
    found, ready = list(known), 0
    missing = [i for i, mined in enumerate(known) if mined is None]
    listen(Event("mine", "note", f"asking the teacher about {len(missing)} responses"))
    try:
        for outcome in crew.run(missing, some=len(missing) < len(known)):
            if outcome is not None:
                found[outcome.what] = keep(outcome)
            while ready < len(found) and (mined := found[ready]) is not None:
                ready += 1
                yield mined
    finally:
        crew.stop()
        with contextlib.suppress(DistillError):
            for outcome in crew.rescue():
                keep(outcome)
    if told > MANY_LISTED:
        listen(Event("mine", "warning", f"nothing mined from {told} answers in all"))
    for mined in found[ready:]:
        assert mined is not None
        yield mined
