"""docs/from-scripts.md: every command, option and setting that it names is one."""

import re
import shlex
from operator import attrgetter
from pathlib import Path

import click
import pytest

from cli.main import dream
from distill.config import Settings
from distill.settings import load_settings

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "from-scripts.md").read_text(encoding="utf-8")
ROWS = [re.split(r"(?<!\\)\|", line)[1:-1] for line in TEXT.splitlines() if line.startswith("| `")]
COMMANDS = sorted({span for span in re.findall(r"`([^`]+)`", TEXT) if re.match(r"dream [a-z]", span)})

SCRIPTS = {
    "create_pretrained_model.py": ("--teacher", "--prompts", "--output", "--device"),
    "image_token_llm.knowledge_transfer": ("--teacher_model", "--output_dir", "--num_epochs", "--batch_size"),
    "image_token_llm.trainer": (
        *("--config", "--dataset", "--epochs", "--batch_size", "--batch-size", "--learning_rate", "--max-samples"),
        *("--use-distillation", "--teacher-model", "--resume", "--device"),
    ),
    "train_input_tokenizer.py": (),
    "train_dream_generator.py": (),
    "train_dreaming_model.py": ("--data", "--epochs", "--num_dreams", "--dream_length", "--output", "--device"),
    "test_pretrained.py": (),
    "interactive_demo.py": (),
    "llm_chat.py": ("--model", "--prompt", "--temp"),
    "demo_dream_viewer.py": ("--watch", "--export", "--visualize", "--model-path"),
    "image_token_llm.cli": ("--branches",),
    "online_rl_inference.py": (),
    "benchmark_model.py": (),
    "compare_models.py": ("--prompts",),
}
"""What the users' descriptions name, with its options; the phases' scripts share a table."""


def parsed(line: str) -> tuple[click.Command, dict[str, object]]:
    """The command that a line calls and its options, as click reads them, without running anything."""
    command: click.Command = dream
    _, *words = shlex.split(line)
    context = click.Context(command, info_name="dream")
    while isinstance(command, click.Group) and words:
        found = command.get_command(context, words[0])
        assert found is not None, f"{line}: there is no command {words[0]}"
        command, words = found, words[1:]
        context = click.Context(command, parent=context, info_name=command.name)
    options, left, _ = command.make_parser(context).parse_args(list(words))
    assert not left, f"{line}: takes no {left}"
    return command, dict(options)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_one(line: str) -> None:
    command, options = parsed(line)
    for parameter in command.params:
        value = options.get(str(parameter.name))
        if isinstance(parameter.type, click.Choice) and value is not None:
            assert value in parameter.type.choices, f"{line}: {value}"
    for override in options.get("overrides") or ():
        key, _, value = str(override).partition("=")
        assert attrgetter(key)(load_settings(None, [str(override)])) is not None
        assert value


@pytest.mark.parametrize(
    "line",
    ["dream fly", "dream run --fast", "dream train my_model --phaze end", "dream bench fly", "dream status a b"],
)
def test_a_wrong_one_would_be_seen(line: str) -> None:
    with pytest.raises((AssertionError, click.UsageError)):
        parsed(line)


def test_every_script_and_option_has_its_row() -> None:
    script = ""
    found: dict[str, set[str]] = {}
    for left, right in ROWS:
        named = [name for name in SCRIPTS if name in left]
        script = named[0] if named else script
        assert "`dream " in right or "nothing:" in right or "the same" in right, left
        if script:
            found.setdefault(script, set()).update(re.findall(r"--[\w-]+", left))
    assert set(found) == set(SCRIPTS)
    missing = {name: set(options) - found[name] for name, options in SCRIPTS.items()}
    assert not any(missing.values()), missing


def test_what_it_says_of_settings_is_so() -> None:
    for name in re.findall(r"`(train|student|dreaming|capture)\.(\w+)`", TEXT):
        section, key = name
        assert hasattr(getattr(Settings(), section), key)


def test_the_chats_own_commands_are_there() -> None:
    from cli.repl import HELP

    commands = re.findall(r"/(\w+)", next(left for left, right in ROWS if "within `dream chat" in right))
    assert commands == ["temp", "tokens", "stream", "help", "quit"]
    assert all(f"/{command}" in HELP for command in commands)
