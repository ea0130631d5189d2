"""The `dream` command: which commands there are, and what becomes of an error.

A command's module is imported when it is called, not before, so that `dream --help` is as fast as click.
"""

import codecs
import errno
import importlib
import io
import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

import click
from click.exceptions import NoSuchCommand

from distill.errors import DistillError
from distill.stopping import Terminated, terminable

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMMANDS: dict[str, dict[str, str]] = {
    "From a teacher to a student": {
        "run": "Do all of the below, from a teacher to a verified bundle.",
        "capture": "Ask the teacher and keep its answers with soft targets.",
        "mine": "Find (what, action, result) triplets in the answers.",
        "tokenize": "Build the tokenizer and the image tokens.",
        "sizes": "Show what a student of each size would begin as.",
        "train": "Train the student.",
        "redream": "Choose its own best dreams to train it on.",
        "see": "Let it learn to read pictures, for Ollama, too.",
        "polish": "Let it learn from its own answers.",
        "learn": "Let it learn from your feedback.",
        "reward": "Let it learn by what its answers are worth.",
        "evaluate": "Measure it, or any model, on held-out prompts.",
        "export": "Write the bundle: transformers, GGUF, Modelfile.",
    },
    "Using a student": {
        "verify": "Check that a bundle answers as its student does.",
        "install": "Create the student in Ollama.",
        "push": "Give it to others: the Hugging Face hub, ollama.com.",
        "chat": "Talk to a student, dreams shown.",
        "watch": "Watch a student dream, then answer.",
        "simulate": "Roll a prompt out several times, and choose.",
        "serve": "Answer programs that speak Ollama's API or OpenAI's.",
        "gather": "Learn from what programs ask your Ollama.",
    },
    "Looking around": {
        "status": "What a run has, and what is stale.",
        "tokens": "List a run's image tokens, or show them on a page.",
        "traces": "Export captured answers, or count them.",
        "prompts": "List the prompt sets that ship with us.",
        "teachers": "List the teachers that can be asked.",
        "settings": "Print every setting with its meaning.",
        "doctor": "Check Ollama, models, devices and disk.",
    },
    "Comparing": {
        "compare": "Compare students, files and models of Ollama.",
        "ablate": "Measure what dreaming is worth.",
        "sweep": "Train many settings and compare them.",
        "bench": "Measure how fast the parts are, or any Ollama model.",
    },
}
"""Section → command → short help."""

STAGES = ("capture", "mine", "tokenize", "train", "redream", "see", "polish", "learn", "reward", "export")
MODULES = dict.fromkeys(STAGES, "stages") | dict.fromkeys(COMMANDS["Looking around"], "looking")
"""Command NAME is the function NAME in cli/commands/NAME.py, but for these."""
RESUMED = ("run", "evaluate", "ablate", "compare", "sweep")
"""Besides stages, what goes on where it was stopped."""

SPINS = "20000"
"""How often a thread of torch or llama.cpp looks whether the others are ready before it sleeps (GOMP_SPINCOUNT). A
fifteenth of what libgomp chooses: as quick on an idle machine, and more than twice as quick where others compute."""

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes after Ctrl-C and SIGTERM, as shells count them: 128 and the signal's number."""


class LazyGroup(click.Group):
    """Knows its commands by name and imports one only to call it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for section in COMMANDS.values() for name in section]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            if ctx.resilient_parsing:
                return None
            raise NoSuchCommand(cmd_name, possibilities=self.list_commands(ctx), ctx=ctx)
        module = importlib.import_module(f"cli.commands.{MODULES.get(cmd_name, cmd_name)}")
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem]":
        from click.shell_completion import CompletionItem

        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        table = [pair for section in COMMANDS.values() for pair in section.items()]
        return [CompletionItem(name, help=help) for name, help in table if name.startswith(incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(len(name) for name in self.list_commands(ctx))
        for section, commands in COMMANDS.items():
            with formatter.section(section):
                formatter.write_dl([(name.ljust(width), help) for name, help in commands.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="dreaming-student", prog_name="dream", message="%(prog)s %(version)s")
def dream() -> None:
    """Distill a teacher into a small student that dreams before it answers.

    \b
    The whole way, with a teacher that needs nothing but this package:
      dream run --name my-student
    With a model of your own Ollama:
      dream run --teacher ollama:llama3.2:1b --prompts everyday --name my-student
      dream install runs/my-student && ollama run my-student

    \b
    Completion in bash (zsh and fish likewise):
      eval "$(_DREAM_COMPLETE=bash_source dream)"
    """


def _forgive() -> None:
    """What a terminal can't show is replaced, what isn't text is kept for `as_text`; neither ends a command. A stream
    that calls itself ASCII is taken for UTF-8, as click does for what it prints."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            is_ascii = codecs.lookup(stream.encoding).name == "ascii"
            stream.reconfigure(encoding="utf-8" if is_ascii else stream.encoding, errors=errors)


def _fail(message: str, code: int = 1) -> NoReturn:
    """Say it, an error in one line whatever it quotes, and end."""
    click.echo(" ".join(message.splitlines()) if message.startswith("Error") else message, err=True)
    sys.exit(code)


def _interrupted(args: list[str], code: int) -> NoReturn:
    """Ctrl-C, or SIGTERM: every stage keeps what it finished, so the same command, less --force, goes on. Learning from
    feedback keeps nothing before its end."""
    from cli.output import command_line

    again = command_line(*(arg for arg in args if arg != "--force"))
    if not args or args[0] not in (*STAGES, *RESUMED):
        text = ""
    elif args[0] == "learn" and not any(arg.startswith(("--from", "--follow")) for arg in args):
        text = f" The student is as it was; `{command_line(*args)}` begins anew."
    elif "--force" in args:
        text = f" `{again}` goes on from here; what --force hadn't come to stays as it was, and needs it again."
    else:
        text = f" Nothing is lost; `{again}` goes on from here."
    _fail(f"\nStopped.{text}", code)


def _open_closed() -> None:
    """Where a standard stream is closed (`dream … >&-`), let it lead nowhere: the next file opened would be taken for
    it, and what libraries print would be written there."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: PTH123, SIM115
            if name == "stdout":
                click.echo("warning: stdout is closed; what would be printed there is lost", err=True)


def main(args: list[str] | None = None) -> NoReturn:
    """Entry point. User errors are one line and exit 1, usage errors exit 2; a bug keeps its traceback."""
    _open_closed()
    _forgive()
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is imported
    try:
        _main(sys.argv[1:] if args is None else args)
    finally:
        if args is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            # All is said and done. Taking leave of libraries may last seconds: Ctrl-C ends that without a traceback.
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _main(args: list[str]) -> NoReturn:
    try:
        with terminable():
            result = dream.main(args, prog_name="dream", standalone_mode=False)
            sys.stdout.flush()
        sys.exit(result if isinstance(result, int) else 0)
    except DistillError as error:
        _fail(f"Error: {error}")
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        asked = error.__cause__ if isinstance(error, click.Abort) else error  # click wraps it
        _interrupted(args, TERMINATED if isinstance(asked, Terminated) else INTERRUPTED)
    except BrokenPipeError:  # the reader (head, less) has gone: what is left to say interests nobody
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            name = f"{str(error.filename)[:60]}…"
            _fail(f"Error: {name}: the name is too long for this file system; choose a shorter one")
        if error.errno in (errno.EBADF, errno.EIO) and error.filename is None:
            _fail("Error: stdout can't be written; say where it goes, as in `dream … > FILE`")
        if error.errno == errno.EACCES and error.filename is not None:
            _fail(f"Error: {error.filename}: {error.strerror}; see to its rights, or give another place")
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _fail(f"Error: {error.filename or 'disk'}: no space left; free some and run the same command again")


if __name__ == "__main__":
    main()
