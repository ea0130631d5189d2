"""A preview model behind OpenAI's API, and the model that answers in its place where it can't, or shall not."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from distill.config import RuntimeSettings, TeacherSettings
from distill.errors import TeacherError
from distill.events import Event, Listener
from distill.run import fingerprint
from distill.teacher import openai
from distill.teacher.protocol import GenerateOptions, Response, Teacher, TeacherInfo, TeacherTokenizer

PAUSE = 60.0
"""Seconds for which a preview that had no room, or refused, isn't asked."""
T = TypeVar("T")


def open_teachers(
    model: str, settings: TeacherSettings, listen: Listener, context: int, runtime: RuntimeSettings
) -> list[Teacher]:
    """One for each host. A preview is asked once, and not waited for: there is somebody else. Raises as `openai`."""
    eager = openai.open_teachers(model, replace(settings, retries=0), listen, context)
    behind = openai.open_teachers(runtime.fallback_model, settings, listen, context)
    on, pairs = runtime.enable_gpt51_codex_preview, zip(eager, behind, strict=True)
    return [PreviewTeacher(model, runtime.fallback_model, *pair, on=on, listen=listen) for pair in pairs]


class PreviewTeacher:
    """Both are one teacher, whose responses tell which model answered. Thread-safe.

    preview: whether the preview is asked first; a session may change it between any two requests.
    """

    slots: int | None = None

    def __init__(
        self, model: str, fallback: str, first: Teacher, second: Teacher, *, on: bool, listen: Listener
    ) -> None:
        self.model, self.fallback, self.preview = model, fallback, on
        self._first, self._second, self._listen = first, second, listen
        self._until, self._warned = 0.0, False

    def _either(self, ask: Callable[[Teacher], T]) -> tuple[T, str]:
        """What the preview says of it, else the other, and which of them did. Raises what the other does."""
        if self.preview and time.monotonic() >= self._until:
            try:
                return ask(self._first), self.model
            except TeacherError as error:
                self._until = time.monotonic() + PAUSE
                if not self._warned:
                    self._warned = True
                    text = f"openai:{self.model}: {self.fallback} answers in its place for a while ({error})"
                    self._listen(Event("teacher", "warning", text))
        return ask(self._second), self.fallback

    def describe(self) -> TeacherInfo:
        """The same whichever of them is asked: a run may go on with the preview on or off."""
        info, _ = self._either(lambda teacher: teacher.describe())
        who = fingerprint({"model": self.model, "fallback": self.fallback, "api": "openai"})
        return replace(info, spec=f"openai:{self.model}", name=self.model, digest=who, template_digest=who)

    def tokenizer(self) -> TeacherTokenizer | None:
        return self._second.tokenizer()

    def generate(self, prompt: str, options: GenerateOptions) -> Response:
        return self._named(lambda teacher: teacher.generate(prompt, options))

    def go_on(self, prompt: str, begun: str, options: GenerateOptions) -> Response:
        return self._named(lambda teacher: teacher.go_on(prompt, begun, options))

    def _named(self, ask: Callable[[Teacher], Response]) -> Response:
        response, model = self._either(ask)
        return replace(response, model=model)

    def generate_json(self, prompt: str, schema: dict[str, Any], options: GenerateOptions) -> str:
        return self._either(lambda teacher: teacher.generate_json(prompt, schema, options))[0]

    def close(self) -> None:
        self._first.close()
        self._second.close()
