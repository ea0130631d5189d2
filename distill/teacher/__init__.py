"""Who is asked. `open_teacher` turns settings into teachers; nothing heavy is imported until then."""

import contextlib
import importlib
from collections.abc import Callable, Generator, Iterable

from distill.config import RuntimeSettings, TeacherSettings
from distill.errors import BadInput
from distill.events import Listener, silent
from distill.teacher.protocol import Teacher
from distill.teacher.thinking import check_thinking

TEACHERS = {kind: f"distill.teacher.{kind}" for kind in ("ollama", "openai", "embedded")}
"""KIND of a teacher's KIND:MODEL → the module whose `open_teachers` opens it."""


LEAST_CONTEXT = 1024
FOR_TEMPLATE = 128
"""Tokens of a chat template around a prompt, amply."""


def room_for(texts: Iterable[str], answer_tokens: int) -> int:
    """Tokens of the longest prompt and its answer: what an embedded teacher needs. Of plain letters two are taken for
    a token, which Polish and Swahili need; of anything else, which its vocabulary may lack, every byte."""
    longest = max(map(_most_tokens, texts), default=0)
    return max(LEAST_CONTEXT, longest + FOR_TEMPLATE + answer_tokens)


def _most_tokens(text: str) -> int:
    plain = sum(letter.isascii() and (letter.isalpha() or letter == " ") for letter in text)
    return plain // 2 + len(text.encode()) - plain


def open_teacher(
    settings: TeacherSettings,
    listen: Listener = silent,
    context: int = LEAST_CONTEXT,
    runtime: RuntimeSettings | None = None,
) -> list[Teacher]:
    """One teacher per host for `ollama:NAME` and `openai:NAME`, one for `embedded:smollm2` or `embedded:/x.gguf`; with
    `runtime.cluster` they are asked from its machines.

    context: tokens of prompt and answer that the embedded engine makes room for, where `teacher.context` doesn't say;
    Ollama decides for itself.
    Raises BadInput where the name can't be read, and what the teacher itself raises where it isn't there.
    """
    check_thinking(settings)
    kind, _, model = settings.model.partition(":")
    if kind not in TEACHERS or not model:
        known = "ollama:NAME, openai:NAME, embedded:smollm2 or embedded:/x.gguf"
        raise BadInput(f"{settings.model!r}: no such teacher; write {known}")
    runtime = runtime or RuntimeSettings()
    if runtime.cluster:
        from distill.teacher.afar import teachers_afar

        return teachers_afar(open_teacher, settings, listen, context, runtime)
    if kind == "openai" and model == runtime.preview_model:
        from distill.teacher import preview

        return preview.open_teachers(model, settings, listen, context, runtime)
    make: Callable[[str, TeacherSettings, Listener, int], list[Teacher]]
    make = importlib.import_module(TEACHERS[kind]).open_teachers
    return make(model, settings, listen, settings.context or context)


@contextlib.contextmanager
def opened(
    settings: TeacherSettings,
    listen: Listener = silent,
    context: int = LEAST_CONTEXT,
    runtime: RuntimeSettings | None = None,
) -> Generator[list[Teacher]]:
    """As `open_teacher`; all are closed in the end."""
    teachers = open_teacher(settings, listen, context, runtime)
    try:
        yield teachers
    finally:
        for teacher in teachers:
            teacher.close()
