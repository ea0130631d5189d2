"""The chat at the terminal: settings changed by /commands, history kept, dreams shown in grey."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from cli.options import as_text
from distill.dream.record import CUT
from distill.errors import BadInput, DistillError
from distill.learning.feedback import VERDICTS, Feedback, keep
from distill.stopping import Terminated

if TYPE_CHECKING:
    from bundle.load import Student
    from distill.tokens.chat import Message

Part = Literal["thinking", "content"]
Piece = tuple[Part, str]

HELP = """\
/temp T       temperature, 0 for the likeliest answer
/tokens N     tokens of an answer at most
/stream on|off   print while it is being written
/dreams on|off   show the dream
/think on|off    let it dream before it answers
/dream        the last dream, its tokens numbered
/dream 3 ⟨water⟩   replace token 3 of it, and answer again
/dream ⟨causal⟩⟨a⟩⟨b⟩⟨c⟩   answer again from this dream (none: from no dream)
/good, /bad   keep what you think of the last answer, for `dream learn`
/better TEXT  keep what it should have said
/reset        forget the conversation
/help         this
/quit         leave (or Ctrl-D)"""


@dataclass
class Chat:
    """A conversation and how it is held. `seed` grows by one a turn, so that a session can be repeated.

    dream: the last turn's, as text; what is answered again keeps the turn's seed. cut: its answer didn't end by itself.
    stopped: an answer was begun since, and is forgotten. feedback: the file that keeps what is said of answers, None
    where nothing learns from it. recall: puts after a prompt what is known of it, by a seed. notes: what was left out
    or cut in the last turn.
    """

    student: "Student"
    temperature: float = 0.7
    max_tokens: int = 256
    stream: bool = True
    dreams: bool = True
    think: bool = True
    seed: int = 0
    messages: "list[Message]" = field(default_factory=list[Any])
    dream: str = ""
    cut: bool = False
    stopped: bool = False
    feedback: Path | None = None
    recall: Callable[[str, int], str] = lambda prompt, _seed: prompt
    notes: list[str] = field(default_factory=list[str])

    def pieces(self, prompt: str) -> Iterator[Piece]:
        """Ask; yields what comes as it comes. The turn joins the history once it is complete."""
        yield from self._turn(self.messages, {"role": "user", "content": self.recall(prompt, self.seed)}, self.seed)
        self.seed += 1

    def again(self, change: str) -> Iterator[Piece]:
        """The last turn anew, its dream changed as `DreamEditor.changed` says. Raises BadInput as it does."""
        if not self.messages:
            raise BadInput("/dream: nothing was asked yet")
        editor = self.student.editor
        dream = editor.changed(editor.said(self.dream), change)
        return self._turn(self.messages[:-2], self.messages[-2], self.seed - 1, dream=dream)

    def _turn(self, before: "list[Message]", turn: "Message", seed: int, **given: Any) -> Iterator[Piece]:
        said: dict[Part, str] = {"thinking": "", "content": ""}
        how: dict[str, Any] = {"think": self.think, "temperature": self.temperature, "max_tokens": self.max_tokens}
        self.notes = []
        for kind, text in self.student.chat([*before, turn], **how, seed=seed, note=self.notes.append, **given):
            said[kind] += text
            yield kind, text
        # The dream of a turn is not part of what the next turn sees.
        answer: Message = {"role": "assistant", "content": said["content"].strip()}
        self.messages, self.dream, self.stopped = [*before, turn, answer], said["thinking"], False
        self.cut = CUT in self.notes

    def command(self, line: str) -> str | Iterator[Piece] | None:
        """Carry out a /command; what to say of it, an answer, or None to leave. Raises BadInput."""
        name, _, value = line[1:].strip().partition(" ")
        value = value.strip()
        if name in ("quit", "exit", "bye"):
            return None
        if name == "help":
            return HELP
        if name == "reset":
            self.messages, self.dream = [], ""
            return "The conversation starts anew."
        if name in VERDICTS:
            return self._keep(name, value)
        if name == "dream":
            return self.again(value) if value else self._numbered()
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

    def _keep(self, verdict: Any, better: str) -> str:
        if self.feedback is None:
            raise BadInput(f"/{verdict}: only a run keeps feedback, and a bundle is none")
        if not self.messages:
            raise BadInput(f"/{verdict}: nothing was answered yet")
        if self.stopped:
            raise BadInput(f"/{verdict}: the last answer was stopped, and is forgotten; ask again")
        if (verdict == "better") != bool(better):
            raise BadInput("/better: say what it should have said" if not better else f"/{verdict} takes nothing more")
        system: list[Message] = [{"role": "system", "content": self.student.system}] if self.student.system else []
        answer = self.messages[-1]["content"]
        keep(self.feedback, Feedback([*system, *self.messages[:-1]], self.dream, answer, verdict, better, self.cut))
        return f"kept; `dream learn {self.feedback.parent}` learns from it"

    def _numbered(self) -> str:
        editor = self.student.editor
        return editor.numbered(editor.said(self.dream)) or "no dream yet, or an empty one"

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


def together(pieces: Iterable[Piece]) -> dict[Part, str]:
    """One whole answer: {"thinking", "content"}."""
    said: dict[Part, str] = {"thinking": "", "content": ""}
    for kind, text in pieces:
        said[kind] += text
    return {kind: text.strip() for kind, text in said.items()}


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
        try:
            said = chat.command(line) if line.startswith("/") else chat.pieces(line) if line else ""
            if said is None:
                return
            if not isinstance(said, str):
                show(chat, said)
            elif said:
                click.echo(said)
        except Terminated:
            raise
        except KeyboardInterrupt:
            chat.stopped = True
            click.echo("\n(stopped; this turn is forgotten)", err=True)
        except DistillError as error:  # such as a message that is longer than the context
            click.echo(f"Error: {error}", err=True)


def show(chat: Chat, pieces: Iterable[Piece]) -> None:
    """Print one answer, with its dream in grey above it if dreams are on; on stderr, what was left out or cut."""
    if not chat.stream:
        pieces = list(together(pieces).items())
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
    for note in chat.notes:
        click.echo(click.style(f"({note})", dim=True), err=True)
