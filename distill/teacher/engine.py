"""What runs a teacher's file in this process. The embedded teacher has one behind it."""

from typing import Protocol

from distill.teacher.protocol import GenerateOptions, Response


class Engine(Protocol):
    """Thread-safe. Raises TeacherError where it has no answer, TeacherUnavailable where it has none in time."""

    @property
    def slots(self) -> int:
        """Requests that are worth having in flight."""
        ...

    @property
    def version(self) -> str:
        """Its name and version."""
        ...

    def answer(self, prompt: str, options: GenerateOptions) -> Response:
        """Ask one question through the file's chat template, without a default system message."""
        ...

    def close(self) -> None: ...
