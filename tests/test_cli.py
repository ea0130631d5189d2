"""The command line: what it accepts, what it says of what it doesn't, and how it ends."""

import errno
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.fake_ollama import replay

from cli import main as entry
from cli.main import COMMANDS, dream
from cli.options import SettingsFile, as_text
from cli.output import command_line, emit_json, facts, install_lines, table
from cli.progress import Progress, duration, shown
from cli.repl import Chat, Piece, converse, show
from cli.runs import resolve
from distill.config import Settings
from distill.documented import documented_yaml
from distill.errors import BadInput
from distill.events import Event, Listener
from distill.learning.feedback import FEEDBACK, read_feedback
from distill.run import Run
from distill.settings import load_settings
from distill.shipped import shipped

NAMES = [name for section in COMMANDS.values() for name in section]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]):
    """Run the command in this process → (exit code, stdout, stderr)."""

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            entry.main([str(arg) for arg in args])
        code = ended.value.code
        assert isinstance(code, int)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DREAM_RUNS", raising=False)
    return tmp_path


def new_run(path: Path) -> Run:
    return Run.create(path, Settings())


def commands(group=dream, path=()):  # type: ignore[no-untyped-def]
    """Every command and subcommand with its path."""
    import click

    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


# Help.


def test_every_command_has_a_paragraph_and_an_example() -> None:
    seen = set()
    for path, command in commands():
        seen.add(path[0])
        assert command is not None, path
        help = command.help or ""
        assert len(help.splitlines()[0]) > 20, path
        assert "Example" in help, path
        assert f"dream {path[0]}" in help, path
    assert seen == set(NAMES)


def test_help_lists_every_command(call) -> None:
    code, out, _ = call("--help")
    assert code == 0
    assert all(f"\n  {name} " in out for name in NAMES)
    assert "Example" in call("train", "-h")[1]
    assert call("--version")[:2] == (0, "dream 0.1.0\n")


# What the user gets wrong.


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train"], "Missing argument 'RUN'"),
        (["train", "x", "--preset", "huge"], "'huge' is not one of 'nano', 'micro', 'small'"),
        (["train", "x", "--minutes", "-1"], "-1"),
        (["train", "x", "--nonsense"], "No such option"),
        (["evaluate", "x", "--baselines", "soft"], "'soft' is no baseline"),
        (["mine", "x", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["mine", "x", "--config", "nowhere/demo.yaml"], "nowhere/demo.yaml"),
        (["chat", "x", "--json"], "--json needs --prompt"),
        (["status", ""], "the name is empty"),
    ],
)
def test_usage_errors_exit_2(call, folder: Path, args: list[str], says: str) -> None:
    code, out, err = call(*args)
    assert code == 2
    assert out == ""
    assert says in err
    assert list(folder.iterdir()) == []


def one_line(err: str) -> str:
    assert err.count("\n") == 1, err
    assert err.startswith("Error: ")
    return err


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("train.lrr=1", "Did you mean: 'lr'?"),
        ("train.steps=many", "train.steps=many"),
        ("train", "write it as section.key=value"),
        ("nothing.at=all", "nothing"),
        ("capture.prompts={a: 1}", "capture.prompts"),
        ("export.dtype=q8", "choose one of f32"),
        ("evaluate.temperature=-1", "must be at least 0"),
    ],
)
def test_bad_settings_are_one_line_and_change_nothing(call, folder: Path, setting: str, says: str) -> None:
    new_run(folder / "runs" / "one")
    before = (folder / "runs" / "one" / "config.yaml").read_text(encoding="utf-8")
    code, out, err = call("train", "one", "--set", setting)
    assert (code, out) == (1, "")
    assert says in one_line(err)
    assert (folder / "runs" / "one" / "config.yaml").read_text(encoding="utf-8") == before


def test_broken_files_are_named(call, folder: Path) -> None:
    run = new_run(folder / "runs" / "one")
    (folder / "mine.yaml").write_text("train: {lr: [", encoding="utf-8")
    (run.path / "run.json").write_text('{"stages": {"capture": {', encoding="utf-8")
    for command, named in (("train", "mine.yaml"), ("status", "run.json")):
        code, _, err = call(command, "one", *(("--config", named) if command == "train" else ()))
        assert code == 1
        assert named in one_line(err)


def test_an_unknown_run_names_the_nearest(call, folder: Path) -> None:
    new_run(folder / "runs" / "first-student")
    code, _, err = call("status", "first-studnet")
    assert code == 1
    assert "did you mean runs/first-student?" in one_line(err)
    assert "dream run --name" in one_line(call("status", "x")[2])


def test_folders_that_are_no_runs(call, folder: Path) -> None:
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("a", encoding="utf-8")
    assert "not a run folder" in one_line(call("status", "./notes")[2])
    code, _, err = call("capture", folder / "notes")
    assert code == 1
    assert "is not empty and not a run folder" in one_line(err)
    assert [path.name for path in (folder / "notes").iterdir()] == ["a.txt"]
    (folder / "file").write_text("", encoding="utf-8")
    assert "is a file" in one_line(call("capture", folder / "file")[2])
    for command in (["capture", "x"], ["run", "--name", "x"], ["status", "x"]):
        code, _, err = call(*command, "--runs-dir", "file")
        assert code == 1
        assert "file/x" in one_line(err)


@pytest.mark.parametrize("stage", ["mine", "tokenize", "train", "redream", "evaluate", "export"])
def test_a_stage_before_its_upstream_names_what_to_run(call, folder: Path, stage: str) -> None:
    new_run(folder / "runs" / "one")
    code, out, err = call(stage, "one")
    assert (code, out) == (1, "")
    assert "first" in one_line(err)
    assert "runs/one" in err


# Names and settings of runs.


def test_names_are_looked_up_in_the_runs_folder(call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_run(folder / "runs" / "one")
    new_run(folder / "other" / "two")
    new_run(folder / "here")
    assert call("status", "one")[0] == call("status", "runs/one")[0] == call("status", "here")[0] == 0
    assert call("status", "two")[0] == 1
    assert call("status", "two", "--runs-dir", "other")[0] == 0
    monkeypatch.setenv("DREAM_RUNS", "other")
    assert call("status", "two")[0] == 0
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("DREAM_RUNS", "~/other")
    assert call("status", "two")[0] == 0
    assert "no finished train stage" in call("learn", "two", "--from", "two")[2]
    code, _, err = call("learn", "two", "--from", "one")
    assert (code, "'one': no such file, folder or run" in err) == (2, True)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training that does nothing, and well."""
    monkeypatch.setattr("distill.training.loop.train", lambda run, listen, force: {})
    monkeypatch.setattr("distill.training.engine.phases.train_engine", lambda run, listen, force, phase: {})


@pytest.mark.usefixtures("trained")
def test_settings_are_merged_and_saved(call, folder: Path) -> None:
    run = new_run(folder / "runs" / "one")
    (folder / "mine.yaml").write_text("train: {steps: 7, lr: 0.5}\n", encoding="utf-8")
    flags = [
        "--config",
        "mine.yaml",
        "--set",
        "train.lr=0.25",
        "--set",
        "seed=3",
        "--minutes",
        "1.5",
        "--init",
        "a,b=c",
    ]
    assert call("train", "one", *flags)[0] == 0
    settings = load_settings(run.path / "config.yaml")
    assert (settings.train.steps, settings.train.lr, settings.seed) == (7, 0.25, 3)
    assert (settings.train.minutes, settings.student.init) == (1.5, "a,b=c")
    call("train", "one", "--set", "train.clip=2")
    settings = load_settings(run.path / "config.yaml")
    assert (settings.train.clip, settings.train.steps) == (2.0, 7)
    call("train", "one", "--set", "evaluate.baselines=[hard]", "--minutes", "2")
    settings = load_settings(run.path / "config.yaml")
    assert (settings.evaluate.baselines, settings.train.minutes) == (["hard"], 2.0)


def test_train_goes_through_the_phases_that_it_is_told(call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_run(folder / "runs" / "one")
    done: list[tuple[str, bool]] = []

    def backbone(run: Run, listen: Listener, force: bool) -> dict[str, Any]:
        done.append(("backbone", force))
        return {"steps": 7}

    def engine(run: Run, listen: Listener, force: bool, phase: str) -> dict[str, Any]:
        done.append((phase, force))
        return {"skipped": "no dreams were mined"}

    monkeypatch.setattr("distill.training.loop.train", backbone)
    monkeypatch.setattr("distill.training.engine.phases.train_engine", engine)
    code, out, _ = call("train", "one")
    assert code == 0
    assert "steps  7" in out
    assert "engine: skipped, no dreams were mined" in out
    call("train", "one", "--phase", "backbone", "--force")
    found = json.loads(call("train", "one", "--phase", "dream", "--force", "--json")[1])
    assert found["stages"]["train"]["summary"] == {"steps": 7}
    assert set(found["stages"]) == {"train", "engine"}
    assert done == [("backbone", False), ("all", False), ("backbone", True), ("backbone", False), ("dream", True)]
    assert call("train", "one", "--phase", "dreams")[0] == 2


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("flags", "minutes"),
    [([], 0.0), (["--minutes", "3"], 3.0), (["--set", "train.steps=5", "--set", "train.minutes=9"], 9.0)],
)
def test_steps_count_where_minutes_were_set(call, folder: Path, flags: list[str], minutes: float) -> None:
    run = new_run(folder / "runs" / "one")
    (folder / "five.yaml").write_text("train: {steps: 5}", encoding="utf-8")
    for steps in (["--steps", "5"], ["--set", "train.steps=5"], ["--config", str(folder / "five.yaml")]):
        call("train", "one", "--minutes", "9", "--set", "train.steps=6")
        assert call("train", "one", *steps, *flags)[0] == 0
        train = load_settings(run.path / "config.yaml").train
        assert (train.steps, train.minutes) == (5, minutes)


def test_a_failed_command_leaves_the_settings_as_they_were(call, folder: Path) -> None:
    run = new_run(folder / "runs" / "one")
    before = (run.path / "config.yaml").read_bytes()
    code, _, err = call("capture", "one", "--prompts", "nope.txt")
    assert code == 1
    assert "nope.txt" in one_line(err)
    assert (run.path / "config.yaml").read_bytes() == before
    assert call("capture", "two", "--prompts", "nope.txt")[0] == 1
    assert not (folder / "runs" / "two").exists()


def test_nothing_else_is_asked_where_questions_are_gathered(call, folder: Path) -> None:
    new_run(folder / "runs" / "one")
    gathered, given = folder / "gathered.yaml", ["--limit", "1", "--prompts", "everyday"]
    gathered.write_text("capture: {gathered: true}", encoding="utf-8")
    code, _, err = call("capture", "one", *given, "--config", str(gathered))
    assert (code, "fills it, so capture.limit isn't used; --set capture.gathered=false" in one_line(err)) == (1, True)


@pytest.mark.parametrize(("left", "error"), [("run.json", BadInput), ("config.yaml", KeyboardInterrupt)])
def test_settings_that_something_was_done_with_stay(
    call, folder: Path, monkeypatch: pytest.MonkeyPatch, left: str, error: type[BaseException]
) -> None:
    """A stage has finished with them, or the user stopped it and will go on."""

    def half(run: Run, listen, force: bool) -> None:  # type: ignore[no-untyped-def]
        with (run.path / left).open("a", encoding="utf-8"):
            raise error("later")

    run = new_run(folder / "runs" / "one")
    monkeypatch.setattr("distill.training.loop.train", half)
    assert call("train", "one", "--set", "seed=7")[0] in (1, 130)
    assert load_settings(run.path / "config.yaml").seed == 7


@pytest.mark.usefixtures("trained")
def test_files_are_found_from_another_folder(call, folder: Path) -> None:
    run = new_run(folder / "runs" / "one")
    for name in ("mine.txt", "teacher.gguf", "teacher"):
        (folder / name).write_text("What is rain?\n", encoding="utf-8")
    prompts = [f"{stage}.prompts=[everyday,mine.txt,nowhere.txt]" for stage in ("capture", "polish")]
    sets = [*prompts, "teacher.model=embedded:teacher.gguf", "capture.dataset_files=runs", "vision.weights=a/hub"]
    call("train", "one", "--init", "runs", *(f"--set={each}" for each in [*sets, "tokenize.encoder=clip:runs"]))
    settings = load_settings(run.path / "config.yaml")
    assert settings.capture.prompts == ["everyday", str(folder / "mine.txt"), "nowhere.txt"]
    assert settings.polish.prompts == settings.capture.prompts
    assert settings.student.init == str(folder / "runs")
    assert settings.teacher.model == f"embedded:{folder / 'teacher.gguf'}"
    assert settings.capture.dataset_files == str(folder / "runs")
    assert settings.tokenize.encoder == f"clip:{folder / 'runs'}"
    assert settings.vision.weights == "a/hub"
    call("train", "one", "--init", "teacher")
    assert load_settings(run.path / "config.yaml").student.init == "teacher"


def test_a_student_here_needs_no_path(folder: Path) -> None:
    for name, mark in (("a", "bundle.json"), ("b", "config.json"), ("c", "other.json")):
        (folder / name).mkdir()
        (folder / name / mark).touch()
    runs = Path("runs")
    assert [resolve(name, runs) for name in (".", "..", "a", "b", "c")] == [
        Path(),
        Path(".."),
        Path("a"),
        Path("b"),
        Path("runs/c"),
    ]


# Status.


def test_status_of_a_new_run(call, folder: Path) -> None:
    new_run(folder / "runs" / "one")
    code, out, err = call("status", "one")
    assert (code, err) == (0, "")
    assert out.count("missing") == 7
    assert "dream capture runs/one" in out
    assert out.count("dream train runs/one") == 2  # the backbone and its engine
    found = json.loads(call("status", "one", "--json")[1])
    assert found["traces"] is None
    assert {stage["state"] for stage in found["stages"].values()} == {"missing"}


def test_status_says_what_is_stale_and_why(call, folder: Path) -> None:
    run = new_run(folder / "runs" / "one")
    run.knowledge.write_text("graph", encoding="utf-8")
    run.record("capture", {"top_k": 40, "teacher": {"model": "embedded:smollm2"}}, {}, {"responses": 3}, 61.0)
    run.record("mine", {"steps": 5, "version": 1}, {"knowledge.graphml": "0"}, {"triplets": 9}, 1.0)

    def change(*overrides: str) -> None:
        Run.create(run.path, load_settings(run.path / "config.yaml", list(overrides)))

    def states() -> dict[str, tuple[str, list[str]]]:
        stages = json.loads(call("status", "one", "--json")[1])["stages"]
        return {name: (stage["state"], stage.get("why", [])) for name, stage in stages.items()}

    assert states()["capture"] == states()["mine"] == ("done", [])
    assert "1 min 01 s" in call("status", "one")[1]
    change("mine.steps=3", "mine.graph_nodes=1")  # the stage never looked at graph_nodes
    assert states()["mine"] == ("stale", ["mine.steps was 5, is 3"])
    change("mine.steps=5")
    run.knowledge.unlink()
    assert states()["mine"] == ("stale", ["knowledge.graphml is missing"])
    run.knowledge.write_text("graph", encoding="utf-8")
    run.record("capture", {"top_k": 40, "teacher": {"model": "embedded:smollm2"}}, {"config.yaml": "new"}, {}, 1.0)
    assert states()["mine"] == ("stale", ["an earlier stage has run again"])
    run.record("export", {"sure": 1.0}, {}, {}, 1.0)
    assert states()["export"] == ("done", [])
    change("dreaming.sure=0.5")
    assert states()["export"] == ("stale", ["dreaming.sure was 1.0, is 0.5"])
    change("dreaming.sure=1")
    run.record("polish", {}, {"config.yaml": "of another student"}, {}, 1.0)
    assert states()["export"] == ("stale", ["an earlier stage has run again"])
    change("teacher.model=ollama:other")
    assert states()["capture"] == ("stale", ["teacher.model was 'embedded:smollm2', is 'ollama:other'"])


def test_status_tells_of_stages_that_were_asked_for(call, folder: Path) -> None:
    run = new_run(folder / "runs" / "one")
    run.settings.polish.prompts = ["everyday"]
    Run.create(run.path, run.settings)
    for stage in ("redream", "polish", "reward"):
        run.record(stage, {"texts": "a digest"} if stage == "polish" else {}, {}, {"answers": 7}, 1.0)
    found = json.loads(call("status", "one", "--json")[1])["stages"]
    asked = [(stage, state["state"]) for stage, state in found.items() if state["state"] != "missing"]
    assert asked == [("redream", "done"), ("polish", "done"), ("reward", "done")]
    assert [*found][:5] == ["capture", "mine", "tokenize", "redream", "train"]
    assert "answers 7" in call("status", "one")[1]


# Environments.


@pytest.mark.parametrize(
    "variables",
    [
        {"NO_PROXY": "localhost,127.0.0.0/8,::1/128"},
        {"ALL_PROXY": "socks://127.0.0.1:7890"},
        {"ALL_PROXY": "socks5h://127.0.0.1:7890"},
        {"HTTP_PROXY": "bad:proxy:url"},
        {"HTTP_PROXY": "http://127.0.0.1:9", "SSL_CERT_FILE": "/nowhere"},
        {"OLLAMA_HOST": "localhost:abc"},
        {"OLLAMA_HOST": "::1"},
    ],
)
def test_no_variable_matters_to_a_server_that_is_named(
    call, folder: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with replay() as server:
        code, out, err = call("teachers", "--host", server.url)
    assert (code, err) == (0, "")
    assert "ollama:smollm2:135m" in out
    assert call("doctor", "--json")[0] == 0  # Ollama is looked for at the default address, and not needed


def test_a_bad_address_in_the_environment_is_one_line(call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "me:secret@localhost:abc")
    (folder / "plain.txt").write_text("Why?", encoding="utf-8")
    code, _, err = call("capture", "r", "--teacher", "ollama:m", "--prompts", "plain.txt")
    assert code == 1
    assert "OLLAMA_HOST='me:***@localhost:abc': is no server's address: 'abc' is no port" in one_line(err)
    assert "'abc' is no port" in call("doctor")[1] + call("teachers")[1]
    with replay() as server:
        monkeypatch.setenv("OLLAMA_HOST", f' "{server.url.removeprefix("http://")}" ')
        assert "ollama:smollm2:135m" in call("teachers")[1]


def test_a_password_is_told_nowhere(call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = "http://me:secret@127.0.0.1:9"
    monkeypatch.setattr(Run, "working", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
    (folder / "plain.txt").write_text("Why?", encoding="utf-8")
    code, out, err = call("capture", "r", "--teacher", "ollama:m", "--prompts", "plain.txt", "--host", host)
    assert code == 130
    assert "--host http://me:***@127.0.0.1:9" in err.replace("'", "")
    kept = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*") if path.is_file())
    assert "secret" not in out + err + kept + call("teachers", "--host", host)[1] + call("doctor", "--host", host)[1]
    code, _, err = call("capture", "r", "--set", f"teacher.hosts=[{host}:x]")
    assert "secret" not in one_line(err)


@pytest.mark.parametrize("name", ["a\nb", "a\x1bb", "a" * 300, "a/" * 3000])
def test_impossible_names_are_one_line(call, folder: Path, name: str) -> None:
    for command in (["status"], ["chat"], ["capture"], ["run", "--name"]):
        code, out, err = call(*command, name)
        assert (code, out) == (1, "")
        assert len(one_line(err)) < 300
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("end", "code"), [(">&-", 0), ("<&- >&-", 0), ("1</dev/null", 1), (">/dev/full", 1)])
def test_a_closed_stdout_is_one_line(end: str, code: int) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", f"{sys.executable} -m cli.main settings {end}"],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == code
    assert done.stderr.count("\n") == 1
    assert "stdout" in done.stderr or "no space left" in done.stderr


def test_advice_on_installing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    assert install_lines(Path("runs/x"), "x")[1] == "ollama run x"
    command, run = install_lines(Path("runs/Mein Schüler!"), "Mein Schüler!")
    assert command.endswith("install 'runs/Mein Schüler!' --name Mein-Schuler")
    assert run == "ollama run Mein-Schuler"


# Endings.


def test_interrupt_names_the_command_that_goes_on(call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_args: object, **_more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(entry.dream, "invoke", interrupted)
    code, out, err = call("train", "my run", "--force", "--set", "seed=1")
    assert (code, out) == (130, "")
    on = "`dream train 'my run' --set seed=1` goes on from here"
    assert err.strip() == f"Stopped. {on}; what --force hadn't come to stays as it was, and needs it again."
    assert call("train", "my run", "--set", "seed=1")[2].strip() == f"Stopped. Nothing is lost; {on}."
    assert "Nothing is lost; " in call("learn", "x", "--from", "new.jsonl")[2]
    anew = "Stopped. The student is as it was; `dream learn x --force` begins anew."
    assert call("learn", "x", "--force")[2].strip() == anew, "feedback is kept when all of it is learned"


def test_commands_to_paste_are_called_as_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [".venv/bin/dream"])
    monkeypatch.setattr("cli.output.shutil.which", lambda name: None)
    assert command_line("chat", Path("my run")) == ".venv/bin/dream chat 'my run'"
    monkeypatch.setattr("cli.output.shutil.which", lambda name: f"/usr/bin/{name}")
    assert command_line("chat", "x") == "dream chat x"
    monkeypatch.setattr("sys.argv", ["-c"])
    assert command_line("chat", "x") == "dream chat x"


def test_a_full_disk_is_one_line(call, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "data/x.bin")

    monkeypatch.setattr(entry.dream, "invoke", full)
    code, _, err = call("train", "x")
    assert code == 1
    assert "data/x.bin: no space left" in one_line(err)


def test_what_may_not_be_read_is_one_line(call, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_args: object, **_more: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a/model.safetensors")

    monkeypatch.setattr(entry.dream, "invoke", denied)
    code, _, err = call("chat", "x")
    assert code == 1
    assert "a/model.safetensors: Permission denied; see to its rights" in one_line(err)


@pytest.mark.parametrize("error", [ZeroDivisionError(), PermissionError(1, "not permitted", "x")])
def test_a_bug_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_args: object, **_more: object) -> None:
        raise error

    monkeypatch.setattr(entry.dream, "invoke", bug)
    with pytest.raises(type(error)):
        entry.main(["train", "x"])


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_real_ctrl_c(tmp_path: Path, number: signal.Signals, exit_code: int) -> None:
    """The whole process: SIGINT, or SIGTERM, while it works. It sleeps in pieces, as a signal that comes just before a
    sleep is heard after it."""
    code = "import time, cli.main as m\n"
    code += "m.dream.invoke = lambda ctx: print('working', flush=True) or [time.sleep(0.1) for _ in range(600)]\n"
    code += "m.main(['train', 'x'])"
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, **streams)
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == exit_code
    assert "Traceback" not in err
    assert "`dream train x` goes on" in err


@pytest.mark.parametrize("encoding", ["cp1252", "iso-8859-1", "ascii", "utf-8"])
def test_what_a_terminal_cannot_show_is_replaced(encoding: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table, and JSON, which loses nothing; what calls itself ASCII is taken for UTF-8."""
    question = "Fällt ⟨a ball⟩ — 🙂?"
    (folder / "mine.jsonl").write_text(json.dumps(question), encoding="utf-8")
    shown = encoding if encoding != "ascii" else "utf-8"
    for how in ([], ["--json"]):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        with pytest.raises(SystemExit) as ended:
            entry.main(["prompts", "mine.jsonl", "--show", "1", *how])
        assert ended.value.code == 0
        assert isinstance(sys.stdout.buffer, io.BytesIO)
        out = sys.stdout.buffer.getvalue().decode(shown)
        if how:
            assert json.loads(out)["shown"] == [question]
        else:
            assert question.encode(shown, "replace").decode(shown) in out


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("Fällt ⟨a ball⟩?", "Fällt ⟨a ball⟩?"),
        ("Fällt ⟨a ball⟩?".encode().decode("ascii", "surrogateescape"), "Fällt ⟨a ball⟩?"),
        (b"F\xe4llt?".decode("utf-8", "surrogateescape"), "F\ufffdllt?"),
    ],
)
def test_bytes_that_are_no_text_are_taken_as_such(given: str, text: str) -> None:
    assert as_text(given) == text


def test_settings_are_a_file_in_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="iso-8859-1"))
    with pytest.raises(SystemExit):
        entry.main(["settings"])
    assert isinstance(sys.stdout.buffer, io.BytesIO)
    assert sys.stdout.buffer.getvalue().decode() == documented_yaml()


def test_ctrl_c_after_all_is_said(tmp_path: Path) -> None:
    """As in the last second of `verify`, when libraries take leave: here a thread that isn't done."""
    code = "import signal, sys, threading, time; sys.argv = ['dream', '--version']; from cli.main import main\n"
    code += "def last():\n while signal.getsignal(signal.SIGINT) is not signal.SIG_DFL: time.sleep(0.01)\n"
    code += " print('leaving', flush=True); time.sleep(20)\n"
    code += "threading.Thread(target=last).start(); main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("dream ")
    assert process.stdout.readline() == "leaving\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=15)
    assert (process.returncode, err) == (-signal.SIGINT, "")


def test_sigterm_ends_a_chat_that_ctrl_c_does_not(tmp_path: Path) -> None:
    code = "import cli.repl as repl; from distill.stopping import terminable; read = input\n"
    code += "repl.input = lambda prompt: print('ready', flush=True) or read(prompt)\n"
    code += "with terminable(): repl.converse(repl.Chat(None))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "ready\n", "it asks again"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "/quit or Ctrl-D leaves." in err
    assert "Terminated" in err


@pytest.mark.parametrize("does", ["pass", "m.dream.invoke = lambda ctx: print('not yet written')"])
def test_a_closed_pipe_is_quiet(does: str) -> None:
    code = f"import sys, cli.main as m; sys.argv = ['dream', 'settings']; {does}; m.main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(30) == 1


# Completion.


def complete(words: str) -> list[str]:
    environment = {"_DREAM_COMPLETE": "bash_complete", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(len(words.split(" ")) - 1)
    done = CliRunner().invoke(dream, [], prog_name="dream", env=environment)
    assert done.stderr == ""
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]


def test_completion(folder: Path) -> None:
    new_run(folder / "runs" / "alpha")
    new_run(folder / "runs" / "beta")
    assert complete("dream tr") == ["train", "traces"]
    assert complete("dream train a") == ["alpha"]
    assert complete("dream status runs/") == ["runs/alpha", "runs/beta"]
    assert complete("dream train --preset m") == ["micro"]
    assert "--minutes" in complete("dream train --")
    assert "--version" in complete("dream --")
    assert complete("dream nothing of ours") == []


def test_completion_script() -> None:
    environment = {**os.environ, "_DREAM_COMPLETE": "zsh_source"}
    done = subprocess.run(
        [sys.executable, "-c", "from cli.main import main; main([])"],
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )
    assert "compdef" in done.stdout


# Settings and prompts.


def test_settings_that_ship_are_known_by_name() -> None:
    kind = SettingsFile(exists=True, path_type=Path)
    assert kind.convert("causal-world", None, None) == shipped("configs") / "causal-world.yaml"


def test_settings_can_be_read_back(call, folder: Path) -> None:
    (folder / "all.yaml").write_text(call("settings")[1], encoding="utf-8")
    assert load_settings(folder / "all.yaml") == Settings()


def test_prompts_are_listed_and_checked(call, folder: Path) -> None:
    sets = json.loads(call("prompts", "--json")[1])["sets"]
    assert "everyday" in sets
    assert sum(entry["prompts"] for entry in sets.values()) >= 2000
    (folder / "mine.txt").write_text("Why is the sky blue?\nWhat is rain?\n", encoding="utf-8")
    out = call("prompts", "mine.txt", "--show", "2")[1]
    assert "Why is the sky blue?" in out
    (folder / "bad.jsonl").write_text('"fine"\n{"prompt": 3}\n', encoding="utf-8")
    assert "bad.jsonl:2" in one_line(call("prompts", "bad.jsonl")[2])


# Progress and output.


def test_progress_lines_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("cli.progress.time.monotonic", lambda: now[0])
    with Progress(bars=False) as listen:
        listen(Event("train", "start", "nano"))
        for step in range(1, 31):
            now[0] += 1.0
            listen(Event("train", "progress", done=step, total=40, unit="step", data={"loss": 2.5}))
        now[0] += 10.0
        listen(Event("train", "progress", done=31, total=40, unit="step", data={"eta": 3.0}))
        listen(Event("train", "warning", "slow"))
        listen(Event("train", "done", "finished"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "train: nano",
        "train: 10/40 step, about 30 s left, loss 2.5",
        "train: 20/40 step, about 20 s left, loss 2.5",
        "train: 30/40 step, about 10 s left, loss 2.5",
        "train: 31/40 step, about 3.0 s left",
        "train: warning: slow",
    ]


def test_progress_bars(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(bars=True) as listen:
        for done in (0, 3, 7):
            listen(Event("capture", "progress", done=done, total=7, unit="answer", data={"tokens/s": 12345.6}))
        listen(Event("capture", "note", "a note"))
        listen(Event("capture", "done"))
    out, err = capsys.readouterr()
    assert out == ""
    assert "7/7" in err
    assert "tokens/s 12,346" in err
    assert "capture: a note\n" in err


def test_a_bar_goes_back_and_another_count_has_another_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(bars=True) as listen:
        for stage, done, unit in (("train", 5, "step"), ("train", 2, "step"), ("train", 1, "row"), ("mine", 3, "text")):
            listen(Event(stage, "progress", done=done, total=9, unit=unit))
    bars = [re.sub(r" *\d+%.*\| ", " ", bar) for bar in re.split("[\r\n]+", capsys.readouterr().err) if "/9" in bar]
    assert any(bar.startswith("train: 2/9") for bar in bars)
    assert [bar[:10] for bar in bars if "row" in bar][-1] == "train: 1/9"
    assert bars[-1].startswith("mine: 3/9")


def test_quiet_keeps_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(quiet=True, bars=True) as listen:
        listen(Event("mine", "start", "begins"))
        listen(Event("mine", "progress", done=1, total=2, unit="x"))
        listen(Event("mine", "note", "a note"))
        listen(Event("mine", "warning", "look"))
    assert capsys.readouterr().err == "mine: warning: look\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (41.2, "41 s"), (185, "3 min 05 s"), (7800, "2 h 10 min"), (59.9, "1 min 00 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers_and_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert [shown(value) for value in (3, 12345, 0.123456, 98765.4, True, "x")] == [
        "3",
        "12,345",
        "0.1235",
        "98,765",
        "True",
        "x",
    ]
    assert table([("a", 1), ("bbb", 1000)], ("name", "n")) == "name      n\na         1\nbbb   1,000"
    assert facts({"a": 1, "b": {"c_d": 0.5}, "e": [1, 2], "f": None}) == [("a", "1"), ("b.c d", "0.5"), ("e", "1, 2")]
    emit_json({"nan": float("nan"), "path": Path("a"), "text": "⟨a⟩"})
    assert json.loads(capsys.readouterr().out) == {"nan": None, "path": "a", "text": "⟨a⟩"}


# Chat.


class Parrot:
    """Answers with what it was asked and how; a student's protocol."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[dict[str, str]], dict[str, object]]] = []

    def chat(self, messages, **options):  # type: ignore[no-untyped-def]
        note = options.pop("note")
        self.asked.append((list(messages), options))
        pieces: list[Piece] = [("thinking", "\n⟨causal⟩"), ("thinking", "⟨a ball⟩\n")] if options["think"] else []
        yield from [*pieces, ("content", "you said "), ("content", messages[-1]["content"])]
        if messages[-1]["content"] == "four":
            note("cut: enough")


def test_chat_remembers_until_reset(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = iter(["one", "", "/temp 0", "/tokens 9", "two", "/reset", "/think off", "three", "/dreams", "/stream off"])
    more = iter(["four", "/temp hot", "/tokens 0", "/nothing", "/help", "/good", "/quit", "never"])
    lines = itertools.chain(first, more)
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))
    parrot = Parrot()
    converse(Chat(parrot))
    out, err = capsys.readouterr()
    assert err == "(cut: enough)\nError: /good: only a run keeps feedback, and a bundle is none\n"
    assert [[message["content"] for message in messages] for messages, _ in parrot.asked] == [
        ["one"],
        ["one", "you said one", "two"],
        ["three"],
        ["three", "you said three", "four"],
    ]
    assert parrot.asked[0][1] == {"think": True, "temperature": 0.7, "max_tokens": 256, "seed": 0}
    assert parrot.asked[1][1] == {"think": True, "temperature": 0.0, "max_tokens": 9, "seed": 1}
    assert parrot.asked[2][1]["think"] is False
    assert out.startswith("⟨causal⟩⟨a ball⟩\n\nyou said one\n")
    assert "'hot' is not a number" in out
    assert "max_tokens goes from 1 to 100000" in out
    assert "no command /nothing" in out
    assert "/reset" in out
    hidden = Chat(parrot, dreams=False)
    show(hidden, hidden.pieces("hello"))
    assert capsys.readouterr().out == "you said hello\n"
    show(hidden, [("content", "\n"), ("content", " ")])
    assert capsys.readouterr().out == "", "an empty answer"
    assert next(lines) == "never"


def test_chat_answers_again_from_a_changed_dream(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student that learned one dream; each line says what comes of it. Words are drawn: the dream alone differs."""
    from support.dreaming_student import PROMPTS, parts

    from bundle.load import Student

    backbone, tokenizer, _ = parts()
    dream = "⟨spatial⟩⟨a ball⟩⟨release⟩⟨falls to the floor⟩⟨temporal⟩⟨causal⟩⟨abstract⟩"
    lines = ["/dream", "/dream 1 a cup", PROMPTS[0], "/dream", f"/dream {dream}", "/dream 2=⟨push⟩ 3 ⟨the rain⟩"]
    lines += ["/dream", "/dream 2 ⟨pusch⟩", "/dream 13 ⟨a cup⟩", f"/dream {dream}", "/dream none", "/dream"]
    said: list[tuple[str, str]] = []

    def told(_prompt: str) -> str:
        said.append(capsys.readouterr())
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr("builtins.input", told)
    chat = Chat(Student("small", backbone, tokenizer), max_tokens=20, seed=6, temperature=0.6)
    converse(chat)
    nothing, unasked, own, shown, same, other, changed, near, far, back, none, empty = said[1:]
    assert own[0].startswith(f"{dream}\n")
    assert same == own == back
    assert shown[0] == "spatial   1 ⟨a ball⟩  2 ⟨release⟩  3 ⟨falls to the floor⟩\n"
    assert other[0].startswith("⟨spatial⟩⟨a ball⟩⟨push⟩⟨the rain⟩⟨temporal⟩")
    assert changed[0] == "spatial   1 ⟨a ball⟩  2 ⟨push⟩  3 ⟨the rain⟩\n"
    assert near[1] == "Error: token 2: ⟨pusch⟩ is no image token; the nearest are ⟨push⟩\n"
    assert far[1] == "Error: token 13: there is none to replace; the dream has the tokens 1 to 3\n"
    assert unasked[1] == "Error: /dream: nothing was asked yet\n"
    assert nothing[0] == empty[0] == "no dream yet, or an empty one\n"
    assert "⟨" not in none[0]
    stock = Student("small", backbone, tokenizer).answer(
        PROMPTS[0], think=False, seed=6, max_tokens=20, temperature=0.6
    )
    assert none[0].strip() == stock.text
    assert [message["content"] for message in chat.messages] == [PROMPTS[0], stock.text]


def test_chat_survives_ctrl_c_and_what_is_too_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Parrot):
        system = ""

        def chat(self, messages, **options):  # type: ignore[no-untyped-def]
            if len(messages[-1]["content"]) > 5:
                raise BadInput("no room")
            if messages[-1]["content"] == "mute":
                raise KeyboardInterrupt
            yield "content", "half"
            if messages[-1]["content"] == "stop":
                raise KeyboardInterrupt

    lines = iter(["stop", "far too long", "go", "far too long", "/good", "stop", "/bad", "on", "/bad"])
    lines = itertools.chain(lines, ["mute", "/bad", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))
    chat = Chat(Stopped(), feedback=tmp_path / FEEDBACK)
    converse(chat)
    assert [message["content"] for message in chat.messages] == ["go", "half", "on", "half"]
    stopped, room, _, again, other, mute, last = filter(None, capsys.readouterr().err.splitlines())
    assert stopped == again == mute == "(stopped; this turn is forgotten)"
    assert room == "Error: no room"
    assert other == last == "Error: /bad: the last answer was stopped, and is forgotten; ask again"
    kept = read_feedback(tmp_path / FEEDBACK)
    assert [(line.messages[-1]["content"], line.verdict) for line in kept] == [("go", "good"), ("on", "bad")]


def test_stage_commands_report_and_skip(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage's summary on stdout, its progress on stderr, and one line where nothing changed."""

    def stage(run: Run, listen, force: bool) -> dict[str, object]:  # type: ignore[no-untyped-def]
        settings = {"steps": run.settings.mine.steps}
        record = None if force else run.fresh("mine", settings)
        if record:
            return record.summary
        listen(Event("mine", "note", "working"))
        return run.record("mine", settings, {}, {"triplets": 1234, "lenses": {"causal": 3}}, 2.0).summary

    monkeypatch.setattr("distill.knowledge.mine.mine", stage)
    engine = new_run(folder / "runs" / "one").engine
    engine.mkdir()
    (engine / "loop.json").touch()
    os.utime(engine / "loop.json", (2**32, 2**32))  # by a clock that was ahead
    runner = CliRunner()
    first = runner.invoke(dream, ["mine", "one"])
    assert first.stdout == "mine: done in 2.0 s\ntriplets       1,234\nlenses.causal  3\n"
    assert first.stderr == "mine: working\n"
    second = runner.invoke(dream, ["mine", "one", "--json"])
    assert second.stderr == ""
    found = json.loads(second.stdout)
    assert (found["skipped"], found["summary"]["triplets"], found["run"]) == (True, 1234, "runs/one")
    assert "up to date" in runner.invoke(dream, ["mine", "one"]).stdout
    assert json.loads(runner.invoke(dream, ["mine", "one", "--json", "--force", "-q"]).stdout)["skipped"] is False
    before = (folder / "runs" / "one" / "config.yaml").read_bytes()
    refused = runner.invoke(dream, ["reward", "one", "--set", "train.lr=0.5"])
    assert (refused.exit_code, "--by is missing" in refused.stderr) == (2, True)
    assert (folder / "runs" / "one" / "config.yaml").read_bytes() == before, "a command that is refused changes nothing"
