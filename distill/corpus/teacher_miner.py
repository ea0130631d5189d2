"""Triplets from the teacher itself: it fills a JSON schema, and what the text doesn't say is dropped."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from distill.config import Settings
from distill.corpus.inflect import content_stems, grounded
from distill.corpus.traces import Trace
from distill.corpus.triplets import LENSES, MAX_CHARACTERS, MAX_WORDS, Mined, Triplet, clean_phrase, fits
from distill.events import Event, Listener, silent
from distill.teacher.protocol import GenerateOptions, Teacher

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
    known = content_stems([trace.prompt, trace.response.text])
    sound = [step for step in proposed if all(fits(p) and grounded(p, known) for p in step[1:])]
    triplets: list[Triplet] = []
    for lens in LENSES:
        chain = list(dict.fromkeys(step for step in sound if step[0] == lens))[:steps]
        triplets += [
            Triplet(what, action, result, lens, number, trace.key, -1, "teacher")
            for number, (_, what, action, result) in enumerate(chain)
        ]
    return Mined(triplets, len(proposed), len(sound))


def ask(teacher: Teacher, trace: Trace, steps: int, seed: int) -> Mined:
    """Mine one response. Raises TeacherError where the teacher fails, not where its answer is broken."""
    prompt = INSTRUCTION.format(words=MAX_WORDS, steps=steps, question=trace.prompt, answer=trace.response.text)
    limit = len(LENSES) * steps * ANSWER_TOKENS
    options = GenerateOptions(max_tokens=limit, temperature=0.0, seed=seed, top_logprobs=0)
    return parse_answer(teacher.generate_json(prompt, schema(steps), options), trace, steps)


def mine_traces(
    traces: Sequence[Trace], settings: Settings, listen: Listener = silent, teachers: Sequence[Teacher] | None = None
) -> Iterator[Mined]:
    """Mine all traces, in order, as many at once as the teachers serve; opens the settings' teacher if given none."""
    from distill.teacher import open_teacher

    opened = list(teachers) if teachers is not None else open_teacher(settings.teacher, listen)
    try:
        # One pool a teacher: a slow host gets its share and no more than it serves at once.
        slots = [teacher for teacher in opened for _ in range(settings.teacher.in_flight or teacher.slots or 1)]
        steps, seed = settings.mine.steps, settings.seed
        listen(Event("mine", "note", f"asking the teacher, {len(slots)} at a time"))
        with ThreadPoolExecutor(len(slots)) as pool:
            jobs = [pool.submit(ask, slots[i % len(slots)], trace, steps, seed) for i, trace in enumerate(traces)]
            try:
                for job in jobs:
                    yield job.result()
            finally:
                for job in jobs:
                    job.cancel()
    finally:
        if teachers is None:
            for teacher in opened:
                teacher.close()
