"""What is kept of the exchanges that pass: traces in a run, without personal data, there before an answer's end is."""

import asyncio
import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from distill.corpus.private import masked
from distill.corpus.prompts import is_held_out
from distill.corpus.traces import Trace, TraceStore
from distill.events import Event, Listener
from distill.run import Run
from distill.serve.exchange import Question
from distill.teacher.ollama import OllamaTeacher

LONGEST = 30.0
"""Seconds that the end of an answer waits to be kept; then the program gets it all the same."""


class Keeper:
    """Keeps answers of one model in a run. A context manager; used in one loop.

    kept: answers in the store. passed: why → how many exchanges weren't kept.
    Raises what asking the teacher who it is raises, and RunMismatch where the run has another.
    """

    def __init__(self, run: Run, teacher: OllamaTeacher, listen: Listener) -> None:
        self.run, self.teacher, self.kept, self.passed = run, teacher, 0, Counter[str]()
        self._listen, self._info = listen, teacher.describe()
        self.model = self._info.name
        self._store = TraceStore(run.traces)
        try:
            self._store.put_teacher(self._info, teacher.tokenizer())
        except BaseException:
            self._store.close()
            raise
        self._writer = ThreadPoolExecutor(1, "keeper")

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, *_error: object) -> None:
        self._writer.shutdown()
        self._store.close()

    async def keep(self, question: Question, told: dict[str, Any]) -> None:
        """When this returns the answer survives a kill, unless one line has said why not."""
        work = asyncio.get_running_loop().run_in_executor(self._writer, self._keep, question, told)
        try:
            await asyncio.wait_for(asyncio.shield(work), LONGEST)
        except Exception as error:
            self.lose(error)

    def lose(self, error: Exception) -> None:
        """An answer that should be kept isn't: each reason is told once."""
        why = f"can't be kept: {error or type(error).__name__}"
        if not self.passed[why]:
            self._listen(Event("gather", "warning", f"an answer {why}"))
        self.passed[why] += 1

    def _keep(self, question: Question, told: dict[str, Any]) -> None:
        if told["done_reason"] not in ("stop", "length") or not told["response"].strip():
            self.passed["without an answer in text"] += 1
            return
        response = self.teacher.heard(told, question.options)
        text, thinking, prompt = masked(response.text), masked(response.thinking), masked(question.prompt)
        response = replace(
            response,
            text=text,
            thinking=thinking,
            tokens=response.tokens if text == response.text else None,
            thought=response.thought if thinking == response.thinking else None,
        )
        options = replace(question.options, system=masked(question.options.system))
        if not question.seeded:  # the same answer again is the same trace, another one isn't
            digest = hashlib.sha256(f"{prompt}\0{text}\0{thinking}".encode()).digest()
            options = replace(options, seed=int.from_bytes(digest[:4], "big") & 0x7FFFFFFF)
        key = TraceStore.key(self._info, prompt, options)
        held_out = is_held_out(prompt, self.run.settings.capture.held_out)
        # Selected by the next capture: a mining or a training beside this reads what there was when it began.
        self._store.put(Trace(key, prompt, held_out, response, options, self._info.digest), chosen=False)
        self.kept += 1
