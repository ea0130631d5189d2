"""Benchmarks of writing and dreaming: tiny ones run through and say what they measured. How fast is not tested."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.bench_command import Run, bench
from support.dinov2 import dinov2

from bench import figures, gpu, scale, seeing
from bench.flops import model_flops
from bench.generation import bench_dreams, bench_generate
from bench.result import load_result
from bench.stopwatch import Stopwatch, seconds_of
from distill.backbone.attention import Documents
from distill.backbone.model import Backbone, BackboneConfig
from distill.config import Settings, TrainSettings
from distill.corpus.truth import Truth
from distill.dream.model import DreamingReasoningLLM
from distill.errors import BadInput
from distill.exam.questions import Exam, Question
from distill.run import Run as RunFolder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return partial(bench, capsys)


def by_name(out: str) -> dict[str, Any]:
    """The printed series, each checked to be a spread of so many repetitions."""
    series = {one["name"]: one for one in json.loads(out)["series"]}
    for one in series.values():
        assert 0 < one["min"] <= one["interval"][0] <= one["median"] <= one["interval"][1] <= one["max"]
        more = one["unit"] in ("tokens/s", "pictures/s", "% of peak") or " over " in one["name"]
        assert one["better"] == (1 if more else -1)
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
    theirs = ("transformers", "transformers, padded")
    used = "ours, model FLOPs utilization"
    assert set(series) == {"ours", used, *theirs, *(f"ours over {name}" for name in theirs)}
    about, speed = result["about"], series["ours"]["values"]
    assert about["peak from"] == "a float32 product of 1024³ here"
    share = [100 * rate / 128 * about["GFLOP a step"] / (1e3 * about["peak, TFLOP/s"]) for rate in speed]
    assert series[used]["values"] == pytest.approx(share, rel=0.01)
    for name in theirs:
        rates = [series[each]["values"] for each in ("ours", name)]
        assert series[f"ours over {name}"]["values"] == pytest.approx([a / b for a, b in zip(*rates, strict=True)])
    ours = ("ours", used)
    code, out, err = run(*command, "--alone", "--against", tmp_path / "before.json", "--threshold", 1000)
    assert code == 0, err
    changes = {change["name"]: change["saved"] for change in json.loads(out)["against"]["changes"]}
    assert changes == {name: series[name]["median"] for name in ours}


def test_operations_of_a_step_are_counted_one_by_one() -> None:
    config = BackboneConfig(97, 32, 3, 4, 2, 48, 64, pad_id=0, eos_id=2)
    model = Backbone(config)
    spans = Documents(2, 64, [(0, 0, 20), (0, 20, 64), (1, 0, 64)], torch.device("cpu"), {(0, 20, 64): (30, 2, 9)})
    batch: Any = SimpleNamespace(ids=torch.zeros(2, 64), spans=spans, loss_positions=70)
    weights = sum(
        module.weight.numel() * (70 if module is model.lm_head else 128)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    )
    assert model_flops(model, [batch]) == 6 * weights + 3 * 3 * 4 * (2 * 2 * 8) * int(spans.mask.sum())
    assert model_flops(model, [batch, batch]) == 2 * model_flops(model, [batch])


def test_students_for_a_gpu_are_measured_in_one_call(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    heads = {"rows": 2, "length": 128, "heads": 4, "kv_heads": 2, "size": 16}
    plain = TrainSettings(precision="float32", compile="never", device="cpu")
    cases = (gpu.Case("none", 1, 128), gpu.Case("nano", 1, 128))
    assert gpu.main(tmp_path / "found", cases, heads, plain, 2) == 1, "the first fails"
    assert "'none' is none of nano" in caplog.text
    trained, attention = (load_result(tmp_path / "found" / f"{name}.json") for name in ("train-nano", "attention"))
    assert trained.settings == {"preset": "nano", "vocab_size": 8192, "rows": 1, "context": 128}
    assert [one.name for one in trained.series][:2] == ["ours", "ours, model FLOPs utilization"]
    assert {one.name for one in attention.series} == {"ours", "a masked product", "a masked product over ours"}
    assert max(attention.about["apart from float32"]["ours"]) < (2e-2 if torch.cuda.is_available() else 1e-5)


def test_embeddings_of_pictures_are_measured_and_those_of_transformers(run: Run, tmp_path: Path) -> None:
    vision = ("--set", f"vision.weights={dinov2(tmp_path)}", "--set", "vision.image_size=28")
    code, out, err = run("pictures", "--batch", 2, *vision, "--repeat", 2, "--many", 30, "--json")
    assert code == 0, err
    result, series = json.loads(out), by_name(out)
    assert result["settings"] == {"pictures": 4, "side": 256, "batch": 2, "image_size": 28}
    assert result["about"]["apart"] < 1e-4
    rates = [series[name]["values"] for name in ("ours", "transformers")]
    assert series["ours over transformers"]["values"] == [a / b for a, b in zip(*rates, strict=True)]
    least, most = (series[f"memory, {count} pictures"]["median"] for count in (3, 30))
    assert least <= most < least + 64


def test_stages_are_measured_by_the_number_of_answers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    alone: list[tuple[str, int]] = []
    apart = scale._apart

    def here(path: Path, stage: str, processes: int) -> dict[str, float]:
        alone.append((stage, processes))
        return apart(path, stage, processes) if stage == "tokenize" else scale.measure(path, stage, processes)

    monkeypatch.setattr(scale, "_apart", here)
    code, out, err = run("scale", "--answers", "60,80", "--mined", 60, "--processes", 2, "--json")
    assert code == 0, err
    series = by_name(out)
    stages = [(60, name) for name in (scale.ONE, "mine", "tokenize", "pack")] + [(80, "tokenize"), (80, "pack")]
    assert alone == [(name, 2) for _, name in stages]
    labels = [f"{name}, {count} answers" for count, name in stages]
    assert list(series) == [part for label in labels for part in (label, f"{label}, processors", f"{label}, memory")]
    assert all(20 < series[f"{label}, memory"]["median"] < 4096 for label in labels)


def test_a_saved_student_is_measured(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="untrained"):
        model = DreamingReasoningLLM(seed=3, device="cpu")
    model.save_pretrained(tmp_path / "student")
    code, out, err = run("dreams", tmp_path / "student", "--repeat", 1, "--prompt", "Why?", "--prompt", "How?")
    assert code == 0, err
    for words in ("engine's dream", "backbone's dream", "ratio", "prompts 2", "paths 4, steps 5"):
        assert words in out
    student = SimpleNamespace(model=model.parts.model, name="small")
    monkeypatch.setattr("bundle.load.load_student", lambda path: student)
    size = ("--tokens", 2, "--context", 3, "--batch", 1, "--repeat", 1, "--warmup", 0)
    code, out, err = run("generate", tmp_path / "student", *size)
    assert code == 0, err
    assert "student small, parameters " in out


def test_benches_refuse_what_they_cannot_measure(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="untrained"):
        student = DreamingReasoningLLM(seed=3, device="cpu")
    with pytest.raises(BadInput, match="context"):
        bench_dreams(Stopwatch(1, 0), student, ["word " * 5000])
    student.parts.engine = None
    with pytest.raises(BadInput, match="no dream engine"):
        bench_dreams(Stopwatch(1, 0), student)
    with pytest.raises(BadInput, match=r"student\.preset"):
        bench_generate(Stopwatch(), preset="tiny")
    with pytest.raises(BadInput, match=r"a prompt of 64 and 9000 new tokens don't fit a context of \d+"):
        bench_generate(Stopwatch(), student.parts.model, tokens=9000)


def test_a_job_on_a_gpu_takes_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr("torch.cuda.synchronize", lambda: done.append("synchronized"))
    for device in ("cpu", "cuda:0"):
        assert seconds_of(lambda: done.append("told"), device) > 0
    assert done == ["told", "told", "synchronized"]


ANSWERS = {
    "What is in this picture?": (
        "An owl above a birthday cake.",
        "An owl below a birthday cake.",
        "A cat above an owl.",
    ),
    "Where is the owl?": ("The owl is above the cake.", "The owl is below the cake.", "The owl is above the cat."),
    "Is there an owl in this picture?": ("Yes, there is an owl.", "Yes, there is an owl.", "No, there is no owl."),
}
"""Question → the true answer, what one who takes above for below says, and what it says without the picture."""


def test_what_is_told_of_pictures_and_without_them_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(name: str, questions: list[Question], **_: Any) -> list[Any]:
        said = [ANSWERS[question.prompt.partition(" ⟨")[0]] for question in questions]
        places = [(0 if name == "sure" else 1) if "⟨" in question.prompt else 2 for question in questions]
        return [SimpleNamespace(answer=answers[place]) for answers, place in zip(said, places, strict=True)]

    questions = [
        Question(f"{split} {prompt}", f"{prompt} ⟨owl⟩⟨cake⟩", truth=Truth(split, true, 1))
        for split in seeing.SPLITS
        for prompt, (true, *_) in ANSWERS.items()
    ]
    for name in ("sure", "mixed"):
        RunFolder.create(tmp_path / name, Settings())
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setattr(seeing, "load_exam", lambda run, limit: Exam("", run.path, questions))
    monkeypatch.setattr(seeing, "find_target", lambda spec: Path(spec).name)
    monkeypatch.setattr(seeing, "open_examinee", lambda name, how: SimpleNamespace(answer=partial(answer, name)))
    monkeypatch.setattr(figures.subprocess, "check_output", lambda *_, **__: "0123abc\n")
    with_picture = {"names": [1.0, 1.0, 1.0], "relation": [0.5, 0.0, 1.0], "whether": [1.0, 1.0, 1.0]}
    without = {"names": [0.5, 0.5, 0.5], "relation": [1.0, 1.0, 1.0], "whether": [0.0, 0.0, 0.0], "exact": [0.0] * 3}
    seeing.main([str(tmp_path / "sure"), str(tmp_path / "mixed")])
    found = json.loads((tmp_path / "seeing.json").read_text(encoding="utf-8"))
    assert found["commit"] == "0123abc"
    assert "2 seeds of" in found["machine"]
    assert "9 questions; mean, least and most" in found["machine"]
    for label, row, blind in zip(seeing.SPLITS.values(), found["rows"][:3], found["rows"][3:], strict=True):
        assert row.pop("exact") == pytest.approx([2 / 3, 1 / 3, 1])
        assert row == {"name": label, **with_picture}
        assert blind == {"name": f"{label}, without the picture", **without}
    seeing.main([str(tmp_path / "mixed")])
    (one, *_) = json.loads((tmp_path / "seeing.json").read_text(encoding="utf-8"))["rows"]
    assert one == {"name": "unseen pairs", "names": 1.0, "relation": 0.0, "whether": 1.0, "exact": pytest.approx(1 / 3)}
