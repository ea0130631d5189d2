"""The run folder: nothing half-written, nothing lost, whatever was killed when."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from distill.config import Settings
from distill.errors import CorruptFile, DistillError, MissingStage, RunMismatch
from distill.run import Run, fingerprint, fingerprint_of, publish_folder, write_atomic


def dead_process() -> int:
    """A process number that no process has."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_published_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "there"
    with publish_folder(final) as folder:
        (folder / "a").write_text("1", encoding="utf-8")

    def fail() -> None:
        with publish_folder(final) as folder:
            (folder / "a").write_text("2", encoding="utf-8")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert (final / "a").read_text(encoding="utf-8") == "1"
    assert names(tmp_path) == ["there"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error")])
def test_a_full_disk_is_one_line_and_keeps_what_was_there(error: Exception, tmp_path: Path) -> None:
    final = tmp_path / "there"
    with publish_folder(final) as folder:
        (folder / "a").write_text("1", encoding="utf-8")
    with pytest.raises(DistillError, match="free some space") as caught, publish_folder(final):
        raise error
    assert "\n" not in str(caught.value)
    assert (final / "a").read_text(encoding="utf-8") == "1"


def test_what_a_killed_process_left_is_cleared_and_put_back(tmp_path: Path) -> None:
    """Killed between the two renames: the old folder is aside, the new one too, and none in place."""
    dead = dead_process()
    old, partial = (tmp_path / f".there.{dead}.{kind}" for kind in ("old", "partial"))
    old.mkdir()
    (old / "a").write_text("kept", encoding="utf-8")
    partial.mkdir()
    with publish_folder(tmp_path / "there") as folder:
        assert (tmp_path / "there" / "a").read_text(encoding="utf-8") == "kept"
        assert not partial.exists()
        (folder / "a").write_text("new", encoding="utf-8")
    assert (tmp_path / "there" / "a").read_text(encoding="utf-8") == "new"
    assert names(tmp_path) == ["there"]


def test_a_living_process_keeps_its_folder(tmp_path: Path) -> None:
    other = tmp_path / f".there.{os.getppid()}.partial"
    other.mkdir()
    with publish_folder(tmp_path / "there"):
        pass
    assert other.exists()


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomic(path, "one")
    path.with_name(".file.99999999.partial").write_text("of a process that was killed", encoding="utf-8")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["file"]
    with pytest.raises(DistillError, match="page: can't write it"):
        write_atomic(path / "page", "in a file")


def test_a_run_whose_making_was_killed_is_made(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.99999999.partial").write_text("seed", encoding="utf-8")
    assert names(Run.create(tmp_path, Settings()).path) == ["config.yaml"]


def test_a_stage_is_fresh_until_something_it_depends_on_changes(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", Settings())
    run.traces.write_text("x", encoding="utf-8")
    run.record("capture", {"limit": 1}, {"traces.db": "digest"}, {"responses": 3}, 1.0)
    assert run.fresh("capture", {"limit": 1}) is not None
    assert run.fresh("capture", {"limit": 2}) is None
    run.record("mine", {}, {}, {}, 0.1)
    assert run.fresh("mine", {}) is not None
    run.record("capture", {"limit": 1}, {"traces.db": "other"}, {}, 1.0)
    assert run.fresh("mine", {}) is None
    run.traces.unlink()
    assert run.fresh("capture", {"limit": 1}) is None
    with pytest.raises(MissingStage, match="dream train"):
        run.require("train")
    with pytest.raises(RunMismatch, match=r"train\.lr \(1 there, 2 now\)"):
        run.check_same("train", {"lr": 2, "x": 0}, {"lr": 1, "x": 0})
    for content in ("{", '{"stages": []}', "[]", '{"stages": {"mine": {"odd": 1}}}'):
        (run.path / "run.json").write_text(content, encoding="utf-8")
        with pytest.raises(CorruptFile, match=r"run\.json"):
            run.records()


@pytest.mark.parametrize("values", [[], ["ä"], [{"b": 1, "a": [None, 0.5]}, "x", ["y", True]]])
def test_a_list_has_one_fingerprint_however_it_is_spelled(values: list[object]) -> None:
    assert fingerprint_of(iter(values)) == fingerprint(values)


def test_one_command_at_a_time_works_on_a_run(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", Settings())
    command = [sys.executable, "-m", "cli.main", "mine", str(run.path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with run.working():
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 1
    assert "another dream command is working on this run" in done.stderr
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=120)
    assert "no finished capture stage" in done.stderr
