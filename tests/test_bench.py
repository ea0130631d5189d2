"""Benchmarks of writing and dreaming: tiny ones run through and say what they measured. How fast is not tested."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.bench_command import Run, bench

from bench.generation import bench_dreams, bench_generate
from bench.stopwatch import Stopwatch
from distill.dream.model import DreamingReasoningLLM
from distill.errors import BadInput


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return partial(bench, capsys)


def by_name(out: str) -> dict[str, Any]:
    """The printed series, each checked to be a spread of so many repetitions."""
    series = {one["name"]: one for one in json.loads(out)["series"]}
    for one in series.values():
        assert 0 < one["min"] <= one["interval"][0] <= one["median"] <= one["interval"][1] <= one["max"]
        assert one["better"] == (1 if one["unit"] == "tokens/s" or " over " in one["name"] else -1)
    return series


def test_writing_is_measured_beside_transformers(run: Run) -> None:
    size = ("--vocab", 300, "--tokens", 6)
    code, out, err = run("generate", *size, "--context", "5,9", "--batch", 1, "--batch", 3, "--repeat", 2, "--json")
    assert code == 0, err
    result, series = json.loads(out), by_name(out)
    assert (result["settings"]["tokens"], result["settings"]["vocab_size"], result["warmup"]) == (6, 300, 1)
    assert len(series) == 2 * 2 * 5
    for batch, length in ((1, 5), (3, 5), (1, 9), (3, 9)):
        label = f"batch {batch}, prompt {length}"
        ours, theirs = (series[f"{name}, writing, {label}"]["values"] for name in ("ours", "transformers"))
        assert series[f"ours over transformers, {label}"]["values"] == [
            a / b for a, b in zip(ours, theirs, strict=True)
        ]
        first = series[f"ours, first token, {label}"]
        assert first["setting"] == {"batch": batch, "prompt_tokens": length}
        assert len(first["values"]) == len(ours) == 2
        assert min(first["values"]) < batch * 6 / min(ours), "one token takes less than an answer"
        identical = result["about"]["identical_rows"][label]
        assert identical == batch, "they wrote something else: their speeds don't compare"


def test_a_training_step_of_any_size_is_measured_and_compared(run: Run, tmp_path: Path) -> None:
    sizes = {"layers": 1, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 64}
    flags = [part for name, size in sizes.items() for part in (f"--{name.replace('_', '-')}", size)]
    fixed = ("--set", "train.precision=float32", "--set", "train.compile=never")
    command = ("train", *flags, "--vocab", 128, "--rows", 1, "--context", 128, "--repeat", 2, *fixed, "--json")
    code, out, err = run(*command, "--out", tmp_path / "before.json")
    assert code == 0, err
    result, series = json.loads(out), by_name(out)
    assert result["settings"] == {"preset": "nano", **sizes, "vocab_size": 128, "rows": 1, "context": 128}
    assert result["about"]["parameters"] == 128 * 32 + 32 * (2 * 32 + 2 * 16 + 3 * 64 + 2) + 32
    assert (result["about"]["trial"], result["about"]["why"]) == ({}, "as set")
    assert set(series) == {"ours", "transformers", "ours over transformers"}
    rates = [series[name]["values"] for name in ("ours", "transformers")]
    assert series["ours over transformers"]["values"] == pytest.approx([a / b for a, b in zip(*rates, strict=True)])
    code, out, err = run(*command, "--against", tmp_path / "before.json", "--threshold", 1000)
    assert code == 0, err
    changes = {change["name"]: change["saved"] for change in json.loads(out)["against"]["changes"]}
    assert changes == {name: one["median"] for name, one in series.items()}


def test_dreams_are_measured_of_a_saved_student(run: Run, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="untrained"):
        DreamingReasoningLLM(seed=3, device="cpu").save_pretrained(tmp_path / "student")
    code, out, err = run("dreams", tmp_path / "student", "--repeat", 1, "--prompt", "Why?")
    assert code == 0, err
    for words in ("engine's dream", "backbone's dream", "ratio", "paths 4, steps 5"):
        assert words in out


def test_benches_refuse_what_they_cannot_measure(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="untrained"):
        student = DreamingReasoningLLM(seed=3, device="cpu")
    with pytest.raises(BadInput, match="context"):
        bench_dreams(Stopwatch(1, 0), student, prompt="word " * 5000)
    student.parts.engine = None
    with pytest.raises(BadInput, match="no dream engine"):
        bench_dreams(Stopwatch(1, 0), student)
    with pytest.raises(BadInput, match=r"student\.preset"):
        bench_generate(Stopwatch(), preset="tiny")
