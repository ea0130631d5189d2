"""The chat at the terminal: settings changed by /commands, history kept, dreams shown in grey."""

import contextlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import click

from cli.options import as_text
from distill.errors import DistillError
from distill.stopping import Terminated

if TYPE_CHECKING:
    from distill.tokens.chat import Message

Piece = tuple[Literal["thinking", "content"], str]

HELP = """\
/temp T       temperature, 0 for the likeliest answer
/tokens N     tokens of an answer at most
/stream on|off   print while it is being written
/dreams on|off   show the dream
/think on|off    let it dream before it answers
/reset        forget the conversation
/help         this
/quit         leave (or Ctrl-D)"""


class Student(Protocol):
    """Who answers (bundle.load.Student)."""

    def chat(
        self,
        messages: "list[Message]",
        *,
        think: bool = True,
        temperature: float = 0.7,
        max_tokens: int = 256,
        seed: int = 0,
    ) -> Iterable[Piece]: ...


@dataclass
class Chat:
    """A conversation and how it is held. `seed` grows by one a turn, so that a session can be repeated."""

    student: Student
    temperature: float = 0.7
    max_tokens: int = 256
    stream: bool = True
    dreams: bool = True
    think: bool = True
    seed: int = 0
    messages: "list[Message]" = field(default_factory=list[Any])

    def pieces(self, prompt: str) -> Iterable[Piece]:
        """Ask; yields what comes as it comes. The turn joins the history once it is complete."""
        turn: Message = {"role": "user", "content": prompt}
        said: dict[str, str] = {"thinking": "", "content": ""}
        for kind, text in self.student.chat(
            [*self.messages, turn],
            think=self.think,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            seed=self.seed,
        ):
            said[kind] += text
            yield kind, text
        self.seed += 1
        # The dream of a turn is not part of what the next turn sees, as in Ollama.
        answer: Message = {"role": "assistant", "content": said["content"].strip()}
        self.messages += [turn, answer]

    def ask(self, prompt: str) -> dict[str, str]:
        """One whole answer: {"thinking", "content"}."""
        said = {"thinking": "", "content": ""}
        for kind, text in self.pieces(prompt):
            said[kind] += text
        return {kind: text.strip() for kind, text in said.items()}

    def command(self, line: str) -> str | None:
        """Carry out a /command; what to say of it, or None to leave."""
        name, _, value = line[1:].strip().partition(" ")
        value = value.strip()
        if name in ("quit", "exit", "bye"):
            return None
        if name == "help":
            return HELP
        if name == "reset":
            self.messages.clear()
            return "The conversation starts anew."
        if name == "temp":
            return self._number("temperature", value, float, 0.0, 5.0)
        if name == "tokens":
            return self._number("max_tokens", value, int, 1, 100_000)
        if name in ("stream", "dreams", "think"):
            if value not in ("on", "off", ""):
                return f"/{name} takes on or off, not {value!r}"
            now = (value == "on") if value else not getattr(self, name)
            setattr(self, name, now)
            return f"{name} {'on' if now else 'off'}"
        return f"no command /{name}; /help lists them"

    def _number(self, what: str, value: str, kind: type[int] | type[float], low: float, high: float) -> str:
        if not value:
            return f"{what} {getattr(self, what)}"
        try:
            number = kind(value)
        except ValueError:
            return f"{value!r} is not a number"
        if not low <= number <= high:
            return f"{what} goes from {low:g} to {high:g}"
        setattr(self, what, number)
        return f"{what} {number}"


def converse(chat: Chat) -> None:
    """Read, answer, repeat, until /quit or the end of input. Ctrl-C stops an answer, not the chat."""
    with contextlib.suppress(ImportError):
        # Line editing and history, where the platform has it.
        import readline  # noqa: F401  # pyright: ignore[reportUnusedImport]
    prompt = ">>> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = as_text(input(prompt)).strip()
        except EOFError:
            return
        except Terminated:
            raise
        except KeyboardInterrupt:
            click.echo("\n/quit or Ctrl-D leaves.", err=True)
            continue
        if line.startswith("/"):
            said = chat.command(line)
            if said is None:
                return
            click.echo(said)
        elif line:
            try:
                show(chat, line)
            except Terminated:
                raise
            except KeyboardInterrupt:
                click.echo("\n(stopped; this turn is forgotten)", err=True)
            except DistillError as error:  # such as a message that is longer than the context
                click.echo(f"Error: {error}", err=True)


def show(chat: Chat, prompt: str) -> None:
    """Print one answer, with its dream in grey above it if dreams are on."""
    pieces = chat.pieces(prompt) if chat.stream else list(chat.ask(prompt).items())
    last, started = "", False
    for kind, text in pieces:
        if kind == "thinking" and not chat.dreams:
            continue
        if kind != last:
            if started:
                click.echo()
            last, started = kind, False
        text = text if started else text.lstrip()
        if text:
            started = True
            click.echo(click.style(text, dim=True) if kind == "thinking" else text, nl=False)
    if started:
        click.echo()
