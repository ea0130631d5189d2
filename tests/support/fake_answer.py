"""One completion in Ollama's words: whole or in chunks, thinking and content apart."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from support.fake_models import Model

from distill.teacher.llama_cpp import Completion, LlamaCpp


class Answer:
    """One completion in Ollama's words."""

    old = False
    load_ns = 0
    arrived = 0

    def __init__(
        self,
        asked: dict[str, Any],
        model: Model,
        engine: LlamaCpp,
        prompt: str,
        done: Completion,
        *,
        think: bool,
        chat: bool,
    ) -> None:
        self.asked, self.engine, self.prompt, self.done, self.chat = asked, engine, prompt, done, chat
        self.tags = model.tags if think else None
        # EOS never has an entry.
        self.entries = done.entries[:-1] if done.stop_type == "eos" else done.entries

    def whole(self) -> dict[str, Any]:
        pieces = list(self.split(iter([self.done.text])))
        thinking = "".join(piece for kind, piece in pieces if kind == "thinking")
        content = "".join(piece for kind, piece in pieces if kind == "content")
        answer = {**self.head(), **self.say(content, thinking), **self.tail()}
        if self.wants_logprobs:
            answer["logprobs"] = [self.entry(entry) for entry in self.entries]
        return answer

    def chunks(self) -> Iterator[dict[str, Any]]:
        for entry in self.entries:
            for kind, piece in self.split(iter([entry["token"]])):
                said = self.say("", piece) if kind == "thinking" else self.say(piece, "")
                chunk = {**self.head(), **said, "done": False}
                yield {**chunk, "logprobs": [self.entry(entry)]} if self.wants_logprobs else chunk
        yield {**self.head(), **self.say("", ""), **self.tail()}

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.asked.get("logprobs")) and not self.old

    def head(self) -> dict[str, Any]:
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e9):09d}Z"
        return {"model": self.asked["model"], "created_at": stamp}

    def say(self, content: str, thinking: str) -> dict[str, Any]:
        thought = {"thinking": thinking} if thinking else {}
        if self.chat:
            return {"message": {"role": "assistant", "content": content, **thought}}
        return {"response": content, **thought}

    def tail(self) -> dict[str, Any]:
        timings = self.done.timings
        tail: dict[str, Any] = {"done": True, "done_reason": "length" if self.done.stop_type == "limit" else "stop"}
        if not self.chat and not self.asked.get("raw"):
            # Ollama too tokenizes the text again rather than keep the ids.
            tail["context"] = self.engine.tokenize(self.prompt + self.done.text)
        return tail | {
            "total_duration": time.perf_counter_ns() - self.arrived,
            "load_duration": self.load_ns,
            "prompt_eval_count": int(timings["prompt_n"]),
            "prompt_eval_duration": int(timings["prompt_ms"] * 1e6),
            "eval_count": int(timings["predicted_n"]),
            "eval_duration": int(timings["predicted_ms"] * 1e6),
        }

    def entry(self, entry: Any) -> dict[str, Any]:
        told = self.token(entry)
        if wanted := self.asked.get("top_logprobs", 0):
            told["top_logprobs"] = [self.token(other) for other in entry["top_logprobs"][:wanted]]
        return told

    @staticmethod
    def token(entry: Any) -> dict[str, Any]:
        text = entry["token"]
        told: dict[str, Any] = {"token": text, "logprob": entry["logprob"]}
        return {**told, "bytes": list(text.encode())} if text else told

    # Thinking.
    _stage = "opening"
    _held = ""
    _begun = False

    def split(self, pieces: Iterator[str]) -> Iterator[tuple[str, str]]:
        """("thinking" or "content", text) of each piece; what may be part of a tag is held back.

        As in Ollama, white space after either tag is dropped, and white space before the closing one kept.
        """
        if self.tags is None:
            yield from (("content", piece) for piece in pieces)
            return
        opening, closing = self.tags
        for piece in pieces:
            self._held += piece
            if self._stage == "opening":
                text = self._held.lstrip()
                if opening.startswith(text) and text != opening:
                    continue
                self._stage = "thinking" if text.startswith(opening) else "content"
                self._held = text.removeprefix(opening).lstrip() if self._stage == "thinking" else self._held
            if self._stage == "thinking":
                self._held = self._held.lstrip() if not self._begun else self._held
                before, tag, after = self._held.partition(closing)
                kept = 0 if tag else _overlap(before, closing)
                said, self._held = before[: len(before) - kept], after.lstrip() if tag else before[len(before) - kept :]
                self._begun = self._begun or bool(said)
                if said:
                    yield "thinking", said
                if not tag:
                    continue
                self._stage = "after"
            if self._stage == "after":
                self._held = self._held.lstrip()
                self._stage = "content" if self._held else "after"
            if self._stage == "content" and self._held:
                yield "content", self._held
                self._held = ""


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of `text` could begin `tag`."""
    with contextlib.suppress(StopIteration):
        return next(n for n in range(min(len(text), len(tag)), 0, -1) if tag.startswith(text[-n:]))
    return 0
