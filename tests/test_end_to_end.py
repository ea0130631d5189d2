"""The whole way with the embedded teacher, on the smallest student: every stage, twice, as a user runs it.

The first time, and what a user does next, where files are ASCII unless one says otherwise and the terminal is Windows':
no locale may make a difference.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.disturbed import WANTED, begin_after_capture, call, contents, disturb

from distill.run import Run, sha256_file
from distill.settings import load_settings

PROMPTS = [f"What happens when you {action} {thing}?" for action in ("drop", "heat", "throw")
           for thing in ("a ball", "a glass", "an egg à la coque 🥚", "some paper")]  # fmt: skip
SETTINGS = """
teacher: {threads: 1, engine: llama.cpp}
capture: {max_tokens: 24, held_out: 0.25}
tokenize: {image_tokens: 16}
student: {hidden: 64, layers: 2, heads: 4, kv_heads: 2, ffn: 128, context: 256}
train: {steps: 30, batch_rows: 2, strict: 0, warmup: 0.2, checkpoint_every: 20, validate_every: 20,
        compile: never, precision: float32}
dreaming: {input_steps: 2, dream_steps: 4, end_steps: 2}
evaluate: {prompts: 4, dreams: 2, max_tokens: 16, bootstrap: 100}
export: {dtype: f32}
"""
STAGES = ("capture", "mine", "tokenize", "train", "engine", "evaluate", "export")


def dream(folder: Path, *args: str, stdin: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    done = call(folder, args, stdin)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


EVERYTHING = """
import sys
from cli.main import main

for line in sys.argv[1:]:
    try:
        main(line.split("|"))
    except SystemExit as end:
        print(line, "ends with", end.code)
"""
NEXT = ["verify|tiny", f"chat|tiny|--prompt|{PROMPTS[2]}|--tokens|20", f"watch|tiny|{PROMPTS[2]}|--max-tokens|8"]
NEXT += [f"chat|tiny|--json|--prompt|{PROMPTS[2]}|--tokens|4"]
"""What is called after `dream run`, in the same process."""
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "cp1252"}


@pytest.fixture(scope="module")
def finished(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a finished run in runs/tiny, and what `dream run` printed, and NEXT."""
    folder = tmp_path_factory.mktemp("end_to_end")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    (folder / "tiny.yaml").write_text(SETTINGS, encoding="utf-8")
    first = f"run|--teacher|embedded:{smollm2}|--prompts|prompts.txt|--config|tiny.yaml|--name|tiny"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **ASCII}
    environment.pop("DREAM_RUNS", None)
    command = [sys.executable, "-c", EVERYTHING, first, *NEXT]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=500)
    out, said = done.stdout.decode("cp1252"), done.stderr.decode("cp1252")
    assert out.count(" ends with 0") == len(NEXT) + 1, out + said
    assert "Traceback" not in said
    return folder, out


@pytest.fixture
def run(finished: tuple[Path, str]) -> Run:
    return Run.open(finished[0] / "runs" / "tiny")


def test_it_says_what_it_did(finished: tuple[Path, str]) -> None:
    out = finished[1]
    assert all(f"{stage}: done in " in out for stage in STAGES)
    assert "Question, never trained on:  What happens when you" in out
    assert "Answer:  " in out
    assert "bits per byte" in out
    assert "Bundle: runs/tiny/bundle" in out
    assert "dream install runs/tiny" in out


def test_every_stage_left_its_files(run: Run) -> None:
    records = run.records()
    assert tuple(records) == STAGES
    for stage, record in records.items():
        assert record.outputs, stage
        assert all((run.path / output).exists() for output in record.outputs), stage
        assert run.stale(stage) == []
    assert records["capture"].summary["responses"] == len(PROMPTS)
    assert 0 < records["capture"].summary["bytes_per_token"] <= 90
    assert records["mine"].summary["triplets"] > 0
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    assert max(line.get("step", 0) for line in lines) == 30
    results = json.loads((run.evaluation / "results.json").read_text(encoding="utf-8"))["systems"]
    start, end = (results[name]["metrics"]["bits_per_byte"]["value"] for name in ("start", "student"))
    assert end < start
    run.settings.teacher.model = "ollama:other"
    assert "is 'ollama:other'" in run.stale("capture")[0]


def test_a_second_time_skips_everything(finished: tuple[Path, str], run: Run) -> None:
    def files() -> dict[str, str]:
        paths = (path for path in run.path.rglob("*") if path.is_file() and "tensorboard" not in path.parts)
        return {str(path): sha256_file(path) for path in paths}

    before = files()
    done = dream(finished[0], "run", "--name", "tiny", "--json", "--quiet")
    found = json.loads(done.stdout)
    assert done.stderr == ""
    assert [stage for stage in found["stages"] if found["stages"][stage]["skipped"]] == list(STAGES)
    assert found["verified"] is True
    assert files() == before


@pytest.mark.timeout(3600)  # with DREAM_MOMENTS; else it takes seconds
def test_killed_at_random_moments_it_leaves_the_same_files(
    finished: tuple[Path, str], run: Run, tmp_path: Path
) -> None:
    """By SIGTERM and SIGKILL: a few times after the capture; with DREAM_MOMENTS=100 so often within whole runs."""
    expected, args = contents(run.path), ["run", "--teacher", run.settings.teacher.model, "--prompts", "prompts.txt"]
    seed = done = 0
    while done < (WANTED or 2):
        draw = random.Random(seed)
        moments = [draw.uniform(0.5, 9.0 if WANTED else 3.0) for _ in range(min(WANTED - done, 10) if WANTED else 2)]
        folder = tmp_path / str(seed)
        folder.mkdir()
        for name in ("prompts.txt", "tiny.yaml"):
            shutil.copyfile(finished[0] / name, folder / name)
        if not WANTED:
            begin_after_capture(run.path, folder / "runs" / "tiny")
        codes = disturb(folder, [*args, "--config", "tiny.yaml", "--name", "tiny"], moments, seed)
        said = (folder / "output.txt").read_text(encoding="utf-8")
        assert codes[-1] == 0, said
        assert set(codes) <= {0, 143, -signal.SIGKILL}, (codes, said)
        assert "Traceback" not in said
        assert contents(folder / "runs" / "tiny") == expected, (seed, codes)
        seed, done = seed + 1, done + sum(code != 0 for code in codes)


def test_status(finished: tuple[Path, str]) -> None:
    found = json.loads(dream(finished[0], "status", "tiny", "--json").stdout)
    assert {name: stage["state"] for name, stage in found["stages"].items()} == dict.fromkeys(STAGES, "done")
    assert found["traces"]["responses"] == len(PROMPTS)
    assert "step-000030" in [checkpoint["name"] for checkpoint in found["checkpoints"]]
    assert found["bundle"] == "runs/tiny/bundle"
    text = dream(finished[0], "status", "tiny").stdout
    assert all(words in text for words in ("bytes a token", "bits per byte at start", "largest difference"))


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_traces_export(finished: tuple[Path, str], format: str) -> None:
    folder = finished[0]
    out = folder / f"traces.{format}"
    assert json.loads(dream(folder, "traces", "export", "tiny", out.name, "--json").stdout)["responses"] == len(PROMPTS)
    rows: list[dict[str, Any]]
    if format == "jsonl":
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    else:
        import pyarrow.parquet as pq

        rows = pq.read_table(out).to_pylist()
    assert {row["prompt"] for row in rows} == set(PROMPTS)


def test_chat(finished: tuple[Path, str]) -> None:
    folder = finished[0]
    question = "What happens when you drop a ball?"
    answers = [
        json.loads(dream(folder, "chat", target, "--prompt", question, "--tokens", "40", "--json").stdout)
        for target in ("tiny", "runs/tiny/bundle")
    ]
    assert answers[0] == answers[1]
    assert answers[0]["prompt"] == question
    assert answers[0]["content"] or answers[0]["thinking"]
    here = dream(folder / "runs/tiny/bundle", "chat", ".", "--prompt", question, "--tokens", "40", "--json").stdout
    assert json.loads(here) == answers[0]
    talk = dream(folder, "chat", "tiny", "--tokens", "40", stdin=f"/temp 0\n{question}\n/reset\n/quit\n").stdout
    assert talk.startswith("temperature 0.0\n")
    assert talk.endswith("The conversation starts anew.\n")
    assert len(talk.splitlines()) > 2


def test_no_terminal_makes_a_difference(finished: tuple[Path, str]) -> None:
    """What it can't show is replaced."""
    said = finished[1].partition("--max-tokens|8 ends with 0")[2]
    assert json.loads(said[: said.rindex("}") + 1])["prompt"] == PROMPTS[2]


def test_an_altered_bundle_does_not_verify(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder = finished[0]  # verified as it is above
    copy = tmp_path / "bundle"
    shutil.copytree(folder / "runs" / "tiny" / "bundle", copy)
    with (copy / "model.gguf").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\xff\xff\x7f\x7f")
    failed = dream(folder, "verify", str(copy), code=1)
    assert "model.gguf" in failed.stdout + failed.stderr


def test_bundle_loads_in_transformers(run: Run) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(run.bundle)
    model: Any = AutoModelForCausalLM.from_pretrained(run.bundle, dtype=torch.float32)
    messages = [{"role": "user", "content": "What happens when you drop a ball?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


def test_an_altered_bundle_is_exported_again(finished: tuple[Path, str], run: Run) -> None:
    told = ("bundle.json", "README.md")  # which hold the time, and how fast it was
    before = {path.name: sha256_file(path) for path in run.bundle.iterdir() if path.name not in told}
    with (run.bundle / "model.gguf").open("ab") as file:
        file.write(b"x")
    done = dream(finished[0], "run", "--name", "tiny", "--json", "--quiet")
    stages = json.loads(done.stdout)["stages"]
    assert [name for name, stage in stages.items() if not stage["skipped"]] == ["export"]
    assert done.stderr.count("\n") == 1
    assert "exporting again" in done.stderr
    assert json.loads(dream(finished[0], "verify", "tiny", "--json").stdout)["ok"] is True
    again = {path.name: sha256_file(path) for path in run.bundle.iterdir() if path.name not in told}
    assert again == before, "another locale makes another bundle"


def test_without_held_out_answers_there_is_no_evaluation(finished: tuple[Path, str]) -> None:
    """The answers that are there are taken, all of them to train on."""
    changes = ["--config", "tiny.yaml", "--set", "capture.held_out=0", "--steps", "2"]
    source = Run.open(finished[0] / "runs" / "tiny")
    begin_after_capture(source.path, finished[0] / "runs" / "all")
    teacher = source.settings.teacher.model
    done = dream(finished[0], "run", "--name", "all", "--teacher", teacher, "--prompts", "prompts.txt", *changes)
    assert "evaluate: warning: skipped" in done.stderr
    assert "export: done in" in done.stdout
    assert "bits per byte" not in done.stdout
    assert "Bundle: runs/all/bundle" in done.stdout


def test_a_changed_setting_reruns_only_what_it_reaches(finished: tuple[Path, str], run: Run) -> None:
    """Last, because it changes the run."""
    found = json.loads(dream(finished[0], "run", "--name", "tiny", "--set", "evaluate.dreams=1", "--json", "-q").stdout)
    redone = [name for name, stage in found["stages"].items() if not stage["skipped"]]
    assert redone == ["evaluate", "export"]
    assert load_settings(run.path / "config.yaml").evaluate.dreams == 1
