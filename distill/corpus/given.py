"""What the capture stage does with answers that stand beside their prompts: they become traces without soft targets."""

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from distill.corpus.prompts import Prompt
from distill.corpus.selecting import selecting
from distill.corpus.traces import Trace, TraceStore
from distill.events import Event, Listener
from distill.run import Run, fingerprint
from distill.teacher.find_weights import find_weights, wants_teacher
from distill.teacher.protocol import GIVEN, GenerateOptions, Response, TeacherInfo, TeacherTokenizer
from distill.teacher.targets import apart

STAGE = "capture"
OFTEN = 1000

INFO = TeacherInfo(GIVEN, GIVEN, digest=GIVEN, template_digest="", version="", logprobs=False)
"""Whoever gave them."""


def keep_given(run: Run, prompts: Sequence[Prompt], listen: Listener) -> tuple[dict[str, Any], str]:
    """Store the prompts' answers, several of one prompt as its samples, and select them: the summary, and the digest of
    what is stored.

    An answer that opens with `<think>` has its thinking put apart, where it is mined. Raises RunMismatch where a
    teacher gave the run's answers.
    """
    listen(Event(STAGE, "start", "taking the answers that are given", total=len(prompts), unit="answers"))
    started = time.monotonic()
    words = _words(run, listen)
    with TraceStore(run.traces) as store, selecting(run, store):
        store.put_teacher(INFO, words)
        store.select({})
        several = Counter[str]()
        for done, prompt in enumerate(prompts, 1):
            trace = _trace(run, prompt, several[prompt.text])
            if trace.response.text.strip():
                several[prompt.text] += 1
                store.put(trace)
            if done % OFTEN == 0 or done == len(prompts):
                listen(Event(STAGE, "progress", done=done, total=len(prompts), unit="answers"))
        stats = store.stats()
        summary = {
            "prompts": stats.prompts,
            "responses": stats.responses,
            "held_out": stats.held_out,
            "given": len(prompts),
            "empty": len(prompts) - stats.responses,
            "seconds": round(time.monotonic() - started, 2),
        }
        digest = store.content_digest()
        # What is made of them in another vocabulary is another's.
        return summary, digest if words is None else fingerprint([digest, words.tokens, words.merges])


def _trace(run: Run, prompt: Prompt, sample: int) -> Trace:
    """No token was ever asked for so, and an altered answer is another: the seed stands for its text."""
    digest = hashlib.sha256(prompt.answer.encode()).digest()
    options = GenerateOptions(
        max_tokens=0,
        temperature=0.0,
        top_logprobs=0,
        seed=int.from_bytes(digest[:4], "big") & 0x7FFFFFFF,
        system=run.settings.capture.system,
    )
    thinking, text = apart(prompt.answer)
    response = Response(text, None, "stop", thinking=thinking)
    key = TraceStore.key(INFO, prompt.text, options)
    return Trace(key, prompt.text, prompt.held_out, response, options, INFO.digest, sample)


def _words(run: Run, listen: Listener) -> TeacherTokenizer | None:
    """The vocabulary of the weights that the student shall begin with."""
    if not wants_teacher(run.settings):
        return None
    found = find_weights(run.settings.teacher, listen=listen)
    if found.path is None:
        listen(Event(STAGE, "note", f"the student begins from chance, with words of its own: {found.reason}"))
        return None
    from distill.teacher.open_source import open_source

    return open_source(found.path).tokenizer
