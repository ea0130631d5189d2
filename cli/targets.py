"""What the commands that examine several targets have in common: how targets, systems and exams are named."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import FOLDER, all_of
from cli.output import table
from cli.runs import nearest_run, resolve, runs_dir
from distill.errors import BadInput

if TYPE_CHECKING:
    from distill.config import Settings
    from distill.exam.questions import Exam
    from distill.exam.targets import Target


READ = ("evaluate.", "seed", "train.device", "teacher.")
"""Settings, or beginnings of their names, that an evaluation of several targets reads."""

exam_options = all_of(
    click.option("--on", metavar="RUN", help="Whose held-out prompts are asked [of the run that the targets are of]."),
    click.option("--prompts", metavar="N|FILE", help="Only the first N of them; or a file of prompts nobody answered."),
    click.option("--host", default="", metavar="URL", help="Ollama server of targets (and judge) [$OLLAMA_HOST]."),
    click.option("--out", type=FOLDER, metavar="FOLDER", help="Of the report."),
    click.option("--force", is_flag=True, help="Measure everything again."),
)
"""What is asked of targets, and where the results go."""


def find(spec: str, host: str = "") -> "Target":
    """The target of one name; runs are looked up in --runs-dir. Raises BadInput."""
    from distill.exam.targets import find_target

    if spec.startswith(("ollama:", "embedded:")):
        return find_target(spec, None, host)
    folder = runs_dir(click.get_current_context())
    # A run's name, a path, or NAME/bundle/model.gguf, NAME/checkpoints/step-000100.
    for path in (resolve(spec, folder), Path(spec), folder / spec):
        if path.exists():
            return find_target(spec, path, host)
    near = nearest_run(folder / spec)
    hint = "check the path" if "/" in spec else f"a model of Ollama is named ollama:{spec}"
    raise BadInput(
        f"{spec}: no such run, checkpoint, bundle, GGUF or folder; {f'did you mean {near}?' if near else hint}"
    )


def find_systems(specs: Sequence[str], host: str = "") -> "dict[str, list[Target]]":
    """`TARGET` or `NAME=TARGET,TARGET…` (trainings of one recipe with several seeds) → name → targets.

    Two that would be called alike get numbers. Raises BadInput, also for one target twice in a system: a seed that
    counts twice makes intervals too narrow.
    """
    systems: dict[str, list[Target]] = {}
    for spec in specs:
        name, equals, rest = spec.partition("=")
        named = bool(equals and name and not _is_there(spec))
        targets = [find(part, host) for part in (_parts(rest) if named else [spec])]
        if not targets:
            raise BadInput(f"{spec}: names no target; write {name}=TARGET or {name}=TARGET,TARGET for several seeds")
        _all_different(spec, targets)
        label = wanted = name if named else targets[0].name
        if named and wanted in systems:
            raise BadInput(f"{spec}: there is a system {wanted} already; give it another name")
        numbers = itertools.count(2)
        while label in systems:
            label = f"{wanted} {next(numbers)}"
        systems[label] = targets
    return systems


def _is_there(name: str) -> bool:
    """Whether it is a path, or a run in --runs-dir."""
    return Path(name).exists() or (runs_dir(click.get_current_context()) / name).exists()


def _parts(listed: str) -> list[str]:
    """`A,B` → A and B; what is there under a name that holds commas itself, as a sweep's cells do, stays whole."""
    left, found = [part.strip() for part in listed.split(",")], list[str]()
    while left:
        whole = (n for n in range(len(left), 1, -1) if _is_there(",".join(left[:n])))
        size = next(whole, 1)
        if any(left[:size]):
            found.append(",".join(left[:size]))
        left = left[size:]
    return found


def _all_different(spec: str, targets: "Sequence[Target]") -> None:
    from distill.teacher.names import name_key

    known: dict[object, str] = {}
    for target in targets:
        key = (name_key(target.model), target.host) if target.path is None else target.path.resolve()
        if key in known:
            twice = target.spec if known[key] == target.spec else f"{known[key]} and {target.spec} are one target: it"
            raise BadInput(f"{spec}: {twice} is named twice; name each training of a system once")
        known[key] = target.spec


def report_text(results: dict[str, Any]) -> str:
    """What a terminal is told of results: tables, a line for each pair of systems, and what to be careful about."""
    from distill.report.doubts import cautions
    from distill.report.findings import headlines, missing_reasons
    from distill.report.tables import cost_rows, difference_rows, metric_rows

    tables = ([*metric_rows(results), *cost_rows(results)[1:]], difference_rows(results))
    parts = [table(rows, heading) for heading, *rows in tables if rows]
    parts.append("\n".join([*headlines(results), *missing_reasons(results), *cautions(results)]))
    return "\n\n".join(filter(None, parts))


def exam_for(
    targets: "Sequence[Target]",
    on: str | None,
    prompts: str | None,
    out: Path | None,
    overrides: Sequence[str] = (),
    config: Path | None = None,
) -> "tuple[Exam, Settings]":
    """The held-out prompts of --on (or of the run that the targets come from), or a prompt file; and the settings of
    that run (or the defaults), changed by --config and --set.

    --prompts N asks the first N of them; without it their `evaluate.prompts` says how many. Raises BadInput, also for a
    setting that no evaluation reads.
    """
    from cli.progress import Progress
    from distill.config import Settings
    from distill.corpus.prompts import load_prompts
    from distill.exam.questions import exam_of_prompts, load_exam
    from distill.exam.targets import common_run
    from distill.run import Run
    from distill.settings import load_settings

    for override in overrides:
        if "=" in override and not override.startswith(READ):
            raise BadInput(f"--set {override}: nothing reads it here; {', '.join(READ)} can be set")
    if prompts is not None and not prompts.isdigit():
        if prompts.lstrip("-").isdigit():
            raise BadInput(f"--prompts {prompts}: is no number of prompts; give 1 or more, or a file")
        if on is not None:
            raise BadInput(f"--on {on} and --prompts {prompts}: choose one (a number of prompts goes with --on)")
        load_prompts([prompts], 0.0, listen=Progress())  # whether there is such a file is to be known first
        if out is None:
            raise BadInput(f"--prompts {prompts}: says no place for the results; give one with --out FOLDER")
        settings = load_settings(config, list(overrides), base=Settings())
        return exam_of_prompts(prompts, out / "targets"), settings
    if on is None:
        run = common_run(targets)
    else:
        path = resolve(on, runs_dir(click.get_current_context()))
        if not (path / "config.yaml").is_file():
            raise BadInput(f"--on {on}: is no run folder; give the run whose held-out prompts are asked")
        run = Run.open(path)
    if prompts == "0":
        raise BadInput("--prompts 0: is no prompt; leave it out for all that evaluate.prompts allows")
    settings = load_settings(config, list(overrides), base=run.settings)
    return load_exam(run, int(prompts) if prompts else settings.evaluate.prompts), settings
