"""Being asked to stop: by Ctrl-C, or by SIGTERM, which `kill`, `docker stop` and schedulers that want the machine send.

Whatever holds for KeyboardInterrupt holds for both: what is done is kept, files are whole, the same command goes on.
"""

import contextlib
import signal
from collections.abc import Generator
from typing import Any, NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextlib.contextmanager
def terminable() -> Generator[None]:
    """Within it SIGTERM raises Terminated, as Ctrl-C raises KeyboardInterrupt."""

    def stop(*_: object) -> NoReturn:
        raise Terminated

    with _handled({signal.SIGTERM: stop}):
        yield


class Interrupt:
    """Within it the first Ctrl-C or SIGTERM only asks. A second Ctrl-C is a KeyboardInterrupt at once; a second SIGTERM
    is not, as one may come from the scheduler and one from the process that started this one.

    asked: what to raise once things are in order; None as long as nobody asked.
    """

    def __init__(self) -> None:
        self.asked: type[KeyboardInterrupt] | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Interrupt":
        self._stack.enter_context(_handled({signal.SIGINT: self._ask, signal.SIGTERM: self._ask}))
        return self

    def _ask(self, number: int, _: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = Terminated if number == signal.SIGTERM else KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        self._stack.close()


@contextlib.contextmanager
def _handled(handlers: dict[int, Any]) -> Generator[None]:
    before: dict[int, Any] = {}
    try:
        for number, handler in handlers.items():
            with contextlib.suppress(ValueError):  # signals belong to the main thread; elsewhere there is none to catch
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
