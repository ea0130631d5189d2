"""Events drawn on stderr: bars on a terminal, a plain line now and then elsewhere. stdout is for results."""

import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from distill.events import Event

if TYPE_CHECKING:
    from tqdm import tqdm

DRAWN_ALREADY = ("eta", "step")
"""Data that a bar, or a line, says in its own way."""

PLAIN_INTERVAL = 10.0
"""Seconds between two progress lines of a stage where stderr is no terminal."""


def shown(value: Any) -> str:
    """A number as a person reads it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """41 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _told(event: Event) -> list[str]:
    """An event's data, as "loss 2.5"."""
    return [
        f"{key.replace('_per_second', '/s').replace('_', ' ')} {shown(value)}"
        for key, value in event.data.items()
        if value is not None and key not in DRAWN_ALREADY
    ]


class Progress:
    """A `Listener`; a context manager, so that no bar is left open. Threads may call it at once."""

    def __init__(self, quiet: bool = False, bars: bool | None = None) -> None:
        self.quiet = quiet
        self.bars = sys.stderr.isatty() if bars is None else bars
        self._lock = threading.Lock()
        self._bar: tqdm[Any] | None = None
        self._stage = ""
        self._first: tuple[float, float] | None = None
        self._said = 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_error: object) -> None:
        with self._lock:
            self._close()

    def __call__(self, event: Event) -> None:
        with self._lock:
            if event.kind == "start":
                self._open(event)
            if event.kind == "warning":
                self._line(f"{event.stage}: warning: {event.message}")
            elif event.kind in ("start", "note") and event.message and not self.quiet:
                self._line(f"{event.stage}: {event.message}")
            if event.kind == "progress" and not self.quiet:
                (self._draw if self.bars else self._say)(event)
            elif event.kind == "done":
                self._close()

    def _open(self, event: Event) -> None:
        self._close()
        self._stage = event.stage
        self._said = time.monotonic()
        self._first = None

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _line(self, text: str) -> None:
        """One line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def _draw(self, event: Event) -> None:
        from tqdm import tqdm

        if event.stage != self._stage:
            self._open(event)
        if self._bar is not None and self._bar.unit != f" {event.unit}":  # another count: another bar
            self._close()
        if self._bar is None:
            how: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True, "mininterval": 0.2, "smoothing": 0.1}
            self._bar = tqdm(total=event.total, initial=event.done, unit=f" {event.unit}", desc=event.stage, **how)
        bar = self._bar
        bar.total = event.total
        if parts := [*filter(None, [event.message]), *_told(event)]:
            bar.set_postfix_str(", ".join(parts), refresh=False)
        if event.done < bar.n:
            bar.n = event.done
            bar.refresh()
        bar.update(event.done - bar.n)

    def _say(self, event: Event) -> None:
        now = time.monotonic()
        if event.stage != self._stage:
            self._open(event)
        begun = self._first
        if begun is None or begun[0] > event.done:
            self._first = begun = (event.done, now)
        if now - self._said < PLAIN_INTERVAL:
            return
        self._said = now
        parts = [f"{shown(event.done)}{f'/{shown(event.total)}' if event.total else ''} {event.unit}".strip()]
        if event.total and begun[0] < event.done < event.total:
            # Counted from the first event: what came before it (compiling, what was there already) is no pace.
            left = (now - begun[1]) * (event.total - event.done) / (event.done - begun[0])
            if event.data.get("eta") is not None:  # it may know of a limit
                left = min(left, event.data["eta"])
            parts.append(f"about {duration(left)} left")
        parts += _told(event)
        self._line(f"{event.stage}: {', '.join(parts)}")
