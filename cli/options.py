"""What the commands that work on a run have in common: its name, settings, --force, --json, --quiet."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cli.runs import RUNS_DIR, RunName, open_run, undone_on_failure

Function = Callable[..., Any]


class _File(click.Path):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(value, param, ctx) if value else self.fail("give a file's name", param, ctx)


FILE: Any = _File(dir_okay=False, path_type=Path)
FOLDER: Any = click.Path(file_okay=False, path_type=Path)


def as_text(given: str) -> str:
    """Text that came from outside. Python keeps bytes that are none in the terminal's encoding as halves of surrogate
    pairs: they are read as UTF-8, and what is none there either becomes U+FFFD."""
    return given.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class Text(click.ParamType[str]):
    """An argument that a model will read."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return as_text(value)


def setting(flag: str, key: str, help: str, **options: Any) -> Callable[[Function], Function]:
    """A flag, or two of one meaning, short for `--set KEY=…`. Its kind is taken from `options`, as click has them."""
    options.setdefault("multiple", False)
    return click.option(*flag.split(), key.replace(".", "__"), default=None, help=f"{help} [{key}]", **options)


def all_of(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """Several options as one, in this order."""
    return lambda function: functools.reduce(lambda done, option: option(done), reversed(options), function)


_WEIGHTS = setting(
    "--teacher-weights",
    "teacher.weights",
    "What the teacher is, a GGUF or a folder of safetensors: the student begins with it.",
    metavar="FILE|DIR",
)
_NUMBER: dict[str, Any] = {"type": click.IntRange(1), "metavar": "N"}
CLUSTER = "Machines that share the work, by Ray: local, auto, HOST:PORT or ray://HOST:PORT."
cluster_option = setting("--cluster", "runtime.cluster", CLUSTER, metavar="ADDRESS")
teacher_options = all_of(
    setting(
        "--teacher",
        "teacher.model",
        "ollama:NAME, openai:NAME, embedded:smollm2 or embedded:FILE.gguf.",
        metavar="SPEC",
    ),
    _WEIGHTS,
    setting("--host --base-url", "teacher.hosts", "Its server; repeatable: shared work.", multiple=True, metavar="URL"),
    setting(
        "--preview/--no-preview",
        "runtime.enable_gpt51_codex_preview",
        "Of openai:gpt-5.1-codex: let it answer, or runtime.fallback_model.",
        is_flag=True,
    ),
    setting(
        "--prompts", "capture.prompts", "Prompt file, folder or set; repeatable.", multiple=True, metavar="FILE|SET"
    ),
    setting(
        "--answers",
        "capture.answers",
        "Whose: `given`, beside the prompts, asks nobody.",
        type=click.Choice(["teacher", "given"]),
    ),
    setting("--limit", "capture.limit", "Prompts taken at most.", type=click.IntRange(0), metavar="N"),
    setting("--dataset", "capture.dataset", "Ask no teacher: take a dataset, such as causal-world.", metavar="NAME"),
)
"""Who is asked what."""
size_options = all_of(
    setting("--layers", "student.layers", "Of the teacher's layers, keep so many.", **_NUMBER),
    setting("--ffn", "student.ffn", "Of each layer's neurons, keep so many.", **_NUMBER),
    setting("--heads", "student.heads", "Of each layer's heads, keep so many.", **_NUMBER),
    setting("--init", "student.init", "Begin so, or as another model.", metavar="teacher|chance|PATH"),
    setting(
        "--preset",
        "student.preset",
        "Of this size, from chance.",
        type=click.Choice(["nano", "micro", "small", "large"]),
    ),
    setting("--steps", "train.steps", "Optimizer steps.", **_NUMBER),
    setting("--minutes", "train.minutes", "Train so long instead.", type=click.FloatRange(0), metavar="M"),
)
student_options = all_of(size_options, _WEIGHTS)
"""What is trained, and how long."""


def _keep_runs_dir(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    ctx.meta[RUNS_DIR] = value


def runs_dir_option(function: Function) -> Function:
    """--runs-dir, read before the run's name is looked up in it."""
    return click.option(
        "--runs-dir",
        envvar="DREAM_RUNS",
        default="runs",
        metavar="DIR",
        is_eager=True,
        expose_value=False,
        callback=_keep_runs_dir,
        help="Folder that run names are looked up in [$DREAM_RUNS, else runs].",
    )(function)


def run_argument(function: Function) -> Function:
    """RUN → `run_path`, a Path, and --runs-dir."""
    return runs_dir_option(click.argument("run_path", metavar="RUN", type=RunName())(function))


def image_option(function: Function) -> Function:
    """--image, as `images`."""
    path = click.Path(exists=True, dir_okay=False)
    help = "Show it this picture with the prompt; repeatable."
    return click.option("--image", "images", multiple=True, metavar="FILE", type=path, help=help)(function)


def retrieve_option(function: Function) -> Function:
    """--retrieve, None where nothing is retrieved."""
    help = (
        "Put what the knowledge graph knows of the prompt after it, found in this way. A run learns attention when it "
        "is first asked for."
    )
    ways = click.Choice(["neighbourhood", "walk", "sample", "attention"])  # RETRIEVALS, and what imports them is slow
    return click.option("--retrieve", type=ways, help=help)(function)


def json_option(function: Function) -> Function:
    """--json → `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(function)


def quiet_option(function: Function) -> Function:
    """--quiet → `quiet`."""
    return click.option("-q", "--quiet", is_flag=True, help="No progress on stderr; warnings stay.")(function)


class SettingsFile(click.Path):
    """A path, or the name of a settings file that ships with us."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from distill.shipped import shipped

        name = Path(value)
        if (
            not name.exists()
            and name.name == str(value)
            and (file := shipped("configs") / name.with_suffix(".yaml")).is_file()
        ):
            value = file
        return super().convert(value, param, ctx)


config_options = all_of(
    click.option(
        "--config",
        type=SettingsFile(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Settings to merge in (YAML), or those that ship: demo, causal-world, hearsay-world, emoji-scenes.",
    ),
    click.option(
        "--set",
        "overrides",
        multiple=True,
        type=Text(),
        metavar="KEY=VALUE",
        help="Change one setting, such as train.lr=3e-4. Repeatable; configs/default.yaml lists them.",
    ),
)
"""--config → `config` and --set → `overrides`."""
common_options = all_of(runs_dir_option, quiet_option, json_option)
"""--runs-dir, --quiet → `quiet`, --json → `as_json`."""


def settings_options(create: bool = False) -> Callable[[Function], Function]:
    """--config, --set and every `setting` of a command, applied to the run at `run_path` → `run`.

    With `create` the run is made where there is none.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def with_run(*, run_path: Path, config: Path | None, overrides: tuple[str, ...], **values: Any) -> Any:
            flags: dict[str, Any] = {}
            for name in [name for name in values if "__" in name]:
                value = values.pop(name)
                if value not in (None, ()):
                    flags[name.replace("__", ".")] = list(value) if isinstance(value, tuple) else value
            with undone_on_failure(run_path):
                run = open_run(run_path, config, list(overrides), flags, create=create)
                return function(run=run, **values)

        return config_options(with_run)

    return decorate


def stage_options(create: bool = False) -> Callable[[Function], Function]:
    """All that a stage command takes: RUN, settings, --force, --json, --quiet."""

    def decorate(function: Function) -> Function:
        function = settings_options(create)(function)
        function = click.option("--force", is_flag=True, help="Do it again even where nothing changed.")(function)
        return run_argument(quiet_option(json_option(function)))

    return decorate
