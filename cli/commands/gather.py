"""`dream gather`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import config_options, runs_dir_option, setting
from cli.output import command_line
from cli.progress import Progress
from cli.runs import RunName, open_run, undone_on_failure

if TYPE_CHECKING:
    from distill.address import Address
    from distill.run import Run
    from distill.serve.cascade import Cascade
    from distill.serve.gathering import Keeper

CONSENT = """\
What programs ask {model} at {url} goes to {upstream}, and is kept:
  kept      questions, with what was said before them, and their answers, in {traces}, to train a student
  not kept  pictures, tools, formats, raw prompts, other models
  replaced  mail addresses, phone numbers, keys and tokens, card numbers; names and all else stay as they are
  off       a program that asks at {url}/off, or sends `X-Dream-Gather: off`, is only passed on
Whoever uses these programs should know. Everything stays on this machine; delete {run} and it is gone."""


@click.command()
@click.option("--to", "run_path", required=True, type=RunName(), help="The run that what is gathered goes to.")
@setting("--teacher", "teacher.model", "Whose answers are kept; others pass.", metavar="ollama:NAME")
@setting("--ollama", "teacher.hosts", "Where the Ollama is.", multiple=True, metavar="URL")
@click.option("--port", default=11436, show_default=True, type=click.IntRange(0, 65535), help="0: any that is free.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Beyond this machine only with --token.")
@click.option("--token", envvar="DREAM_TOKEN", default="", metavar="TOKEN", help="Ask it of everybody [$DREAM_TOKEN].")
@click.option("--origin", "origins", multiple=True, metavar="URL", help="A site whose pages may ask; repeatable.")
@click.option(
    "--cascade", "student", type=RunName(), metavar="RUN", help="Its student answers where it is sure enough."
)
@click.option(
    "--agreement",
    default=0.95,
    show_default=True,
    type=click.FloatRange(0.5, 1, max_open=True),
    help="Share of the student's answers that are its teacher's, word for word.",
)
@click.option("--yes", is_flag=True, help="What is kept was read before: don't ask.")
@config_options
@runs_dir_option
def gather(
    run_path: Path,
    port: int,
    host: str,
    token: str,
    origins: tuple[str, ...],
    student: Path | None,
    agreement: float,
    yes: bool,
    config: Path | None,
    overrides: tuple[str, ...],
    **values: Any,
) -> None:
    """Stand before your Ollama, and keep what programs ask it, and what it answers, to train a student with.

    Programs get what Ollama answers, less logprobs that they didn't ask for; with --cascade the student answers where
    it is sure. What is personal is replaced before anything is written, and a program may ask that nothing is kept.

    \b
    Examples:
      dream gather --to my-run --teacher ollama:llama3.2:1b
      OLLAMA_HOST=127.0.0.1:11436 ollama run llama3.2:1b
      dream train my-run
      dream gather --to my-run --cascade my-run --agreement 0.95
    """
    from distill.serve.gathering import Keeper
    from distill.serve.guard import Allowed
    from distill.serve.listen import bind, serve, url_of
    from distill.serve.relay import Relay

    flags = {name.replace("__", "."): value for name, value in values.items() if value}
    flags = {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}
    allowed = Allowed(token, origins)
    with bind(host, port, bool(allowed.token)) as listening, undone_on_failure(run_path), Progress() as listen:
        run = open_run(run_path, config, list(overrides), {**flags, "capture.gathered": True}, create=True)
        upstream, model = _whose(run, url_of(listening))
        text = CONSENT.format(model=model, url=url_of(listening), upstream=upstream, traces=run.traces, run=run.path)
        click.echo(text, err=True)
        if not yes:
            _ask()
        from distill.teacher.ollama import OllamaTeacher

        with Keeper(run, OllamaTeacher(model, host=upstream, listen=listen), listen) as keeper:
            cascade = None if student is None else _cascade(student, agreement, run)
            click.echo("Gathering (Ctrl-C ends).", err=True)
            try:
                serve(Relay(upstream, keeper, allowed, cascade).app(), listening)
            finally:  # a signal that ended it goes on from here
                _tell(run, keeper)
                if cascade is not None:
                    cascade.served.scheduler.close()
                    click.echo(cascade.report(run), err=True)


def _whose(run: "Run", url: str) -> "tuple[Address, str]":
    """The Ollama, and the model whose answers are kept. Raises BadInput."""
    from distill.address import Address, default_host
    from distill.errors import BadInput
    from distill.teacher.ollama_client import OllamaClient

    kind, _, model = run.settings.teacher.model.partition(":")
    hosts = run.settings.teacher.hosts
    if run.settings.capture.dataset:
        raise BadInput(f"{run.path}: is a run of dataset {run.settings.capture.dataset}; gather --to another")
    if len(hosts) > 1:
        raise BadInput(f"--ollama: {len(hosts)} of them; one proxy stands before one Ollama")
    upstream = hosts[0] if hosts else default_host()
    if upstream.url == Address(url).url:
        raise BadInput(f"{upstream}: is where the proxy itself listens; name the Ollama with --ollama")
    if kind == "ollama":
        return upstream, model
    with OllamaClient(upstream, retries=1) as client:
        names = [str(entry["name"]) for entry in client.models()]
    raise BadInput(f"say whose answers are kept, --teacher ollama:NAME (installed: {', '.join(names) or 'none'})")


def _cascade(student: Path, agreement: float, to: "Run") -> "Cascade":
    """Raises BadInput where the student learned from somebody else, or agrees with its teacher too seldom."""
    import asyncio

    from bundle.serving import offer
    from distill.corpus.traces import TraceStore
    from distill.errors import BadInput
    from distill.run import Run
    from distill.serve.cascade import Cascade, calibrated
    from distill.serve.shelf import Shelf

    run = Run.open(student)
    with TraceStore(run.traces, readonly=True) as store, TraceStore(to.traces, readonly=True) as ours:
        theirs, here = store.teacher(), ours.teacher()
    if (theirs.digest, theirs.template_digest) != (here.digest, here.template_digest):
        raise BadInput(
            f"--cascade {student}: learned from {theirs.spec}; how often it agrees with {here.spec} isn't known"
        )
    shelf = Shelf([offer(student)])
    try:
        (served,) = shelf.students.values()
        found = asyncio.run(calibrated(served, run, agreement))
        if found.sure > 1:
            raise BadInput(f"--cascade {student}: is never sure enough for an agreement of {agreement:g}; train it on")
    except BaseException:
        shelf.close()
        raise
    click.echo(f"{served.name}: {found}", err=True)
    return Cascade(served, found)


def _ask() -> None:
    from distill.errors import BadInput

    if not _watched():
        raise BadInput("nobody is there to agree; say --yes")
    try:
        agreed = click.confirm("Go on?", err=True)
    except click.Abort:  # Ctrl-C is no, too
        agreed = False
    if not agreed:  # an error, so that the run's settings are put back
        raise BadInput("not agreed: nothing is gathered")


def _watched() -> bool:
    return sys.stdin.isatty()


def _tell(run: "Run", keeper: "Keeper") -> None:
    passed = "".join(f"\n  {count} passed: {why}" for why, count in keeper.passed.most_common())
    click.echo(f"{keeper.kept} answers kept in {run.traces}{passed}\nNext: {command_line('train', run.path)}", err=True)
