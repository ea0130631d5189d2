"""`dream status`, `tokens`, `traces`, `prompts`, `teachers`, `settings` and `doctor`: looking around."""

import sys
from dataclasses import asdict
from pathlib import Path

import click

from cli.options import FILE, json_option, run_argument, runs_dir_option
from cli.output import answer, facts, table
from cli.overview import overview, render
from cli.progress import Progress
from cli.runs import open_run, runs_dir

host_option = click.option("--host", "hosts", multiple=True, metavar="URL", help="Ollama server; repeatable.")


@click.command()
@run_argument
@json_option
def status(run_path: Path, as_json: bool) -> None:
    """Say what RUN has: each stage done, stale or missing, its counts, checkpoints and the bundle.

    \b
    Example:
      dream status my-student --json
    """
    found = overview(open_run(run_path, None, [], {}))
    answer(as_json, found, render(found))


@click.command()
@run_argument
@click.option("--html", metavar="FILE", type=FILE, help="Write a page of them, with phrases and pictures.")
@click.option("--most", default=20, show_default=True, type=click.IntRange(0), help="Print so many, the most used.")
@json_option
def tokens(run_path: Path, html: Path | None, most: int, as_json: bool) -> None:
    """List RUN's image tokens: how often its dreams use each, which phrases it stands for, and pictures of it.

    \b
    Example:
      dream tokens seer --html tokens.html
    """
    from distill.run import write_atomic
    from distill.vision.gallery import gallery, image_tokens

    run = open_run(run_path, None, [], {})
    found = sorted(image_tokens(run), key=lambda token: -token.used)
    if html is not None:
        write_atomic(html, gallery(run.name, found))
    rows = [
        (f"⟨{token.label}⟩", token.used, len(token.pictures), ", ".join(token.phrases)[:60]) for token in found[:most]
    ]
    listed = [
        {"label": t.label, "code": t.code, "used": t.used, "pictures": len(t.pictures), "phrases": t.phrases}
        for t in found
    ]
    text = table(rows, ("image token", "used", "pictures", "phrases"))
    told = {"run": str(run.path), "html": str(html) if html else None, "tokens": listed}
    answer(as_json, told, f"{text}\n{html}" if html else text)


@click.group()
def traces() -> None:
    """Export a run's captured answers, or count them.

    \b
    Example:
      dream traces export my-student traces.parquet
    """


@traces.command()
@run_argument
@json_option
def stats(run_path: Path, as_json: bool) -> None:
    """Count RUN's answers, tokens and soft targets, and their bytes on disk.

    \b
    Example:
      dream traces stats my-student --json
    """
    from distill.corpus.traces import TraceStore

    run = open_run(run_path, None, [], {})
    with TraceStore(run.traces, readonly=True) as store:
        found = asdict(store.stats(whole=run.settings.capture.gathered))
    answer(as_json, found, table(facts(found)))


@traces.command()
@run_argument
@click.argument("file", type=FILE)
@click.option("--shards", default=1, metavar="N", type=click.IntRange(1), help="To N files: FILE-00000-of-0000N.")
@json_option
def export(run_path: Path, file: Path, shards: int, as_json: bool) -> None:
    """Write RUN's answers to FILE: Parquet or JSON lines, by its name (.parquet, .jsonl).

    \b
    Example:
      dream traces export my-student traces.jsonl
    """
    from distill.corpus.export_traces import export_traces

    with Progress() as listen:
        path, format = open_run(run_path, None, [], {}).traces, file.suffix.removeprefix(".")
        count = export_traces(path, file, format, listen, shards)
    told = f"{file}: {count:,} responses" + (f", in {shards} files" if shards > 1 else "")
    answer(as_json, {"file": str(file), "responses": count, "shards": shards}, told)


@click.command()
@click.argument("names", metavar="[FILE|SET]...", nargs=-1)
@click.option("--show", default=0, metavar="N", type=click.IntRange(0), help="Also print N of them, spread evenly.")
@json_option
def prompts(names: tuple[str, ...], show: int, as_json: bool) -> None:
    """List the prompt sets that ship with us, or check and count the files and sets named.

    \b
    Examples:
      dream prompts
      dream prompts my-prompts.yaml --show 10
      dream prompts chats.jsonl:question,answer
    """
    from distill.config import CaptureSettings
    from distill.corpus.prompts import load_prompts, prompt_sets
    from distill.turns import transcript

    share = CaptureSettings().held_out
    with Progress() as listen:
        found = {name: load_prompts([name], share, listen=listen) for name in names or prompt_sets()}
    some = load_prompts(list(found), share, show) if show else []
    held = {name: sum(prompt.held_out for prompt in entries) for name, entries in found.items()}
    sets = {name: {"prompts": len(entries), "held_out": held[name]} for name, entries in found.items()}
    lines = [
        f"{'held out' if prompt.held_out else '':10}{transcript(prompt.text)}".replace("\n", "\n" + " " * 10)
        for prompt in some
    ]
    rows = [(name, len(entries), held[name]) for name, entries in found.items()]
    text = "\n".join([table(rows, ("set", "prompts", "held out")), *lines])
    answer(as_json, {"sets": sets, "shown": [prompt.text for prompt in some]}, text)


@click.command()
@host_option
@json_option
def teachers(hosts: tuple[str, ...], as_json: bool) -> None:
    """List the teachers that can be asked: the embedded one, and the models of the Ollama servers.

    \b
    Example:
      dream teachers --host http://gpu-box:11434
    """
    from distill.teacher.doctor import list_teachers

    found = list_teachers(list(hosts))
    answer(as_json, found, table([(entry["spec"], entry["detail"]) for entry in found], ("teacher", "")))


@click.command()
def settings() -> None:
    """Print every setting, its default and its meaning, as YAML that --config takes.

    \b
    Example:
      dream settings > mine.yaml
    """
    from distill.documented import documented_yaml

    text = documented_yaml()
    click.echo(text if sys.stdout.isatty() else text.encode(), nl=False)  # a file of settings is UTF-8


@click.command()
@host_option
@runs_dir_option
@json_option
@click.pass_context
def doctor(ctx: click.Context, hosts: tuple[str, ...], as_json: bool) -> None:
    """Check what the pipeline needs, and say which command mends what is missing. Exit 1 if it can't work.

    \b
    Example:
      dream doctor --host http://gpu-box:11434
    """
    from distill.teacher.doctor import diagnose

    findings = diagnose(list(hosts), runs_dir(ctx))
    text = table([(finding.name, finding.state, finding.detail) for finding in findings])
    if mend := [(finding.name, finding.remedy) for finding in findings if finding.remedy]:
        text += f"\n\nTo mend:\n{table(mend)}"
    answer(as_json, [asdict(finding) for finding in findings], text)
    ctx.exit(0 if all(finding.ok for finding in findings if finding.needed) else 1)
