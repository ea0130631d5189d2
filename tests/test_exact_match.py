"""Exact match against a dataset's true answers, on a student trained for a moment."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.ablation_run import small_world
from support.examples import load_examples

from distill.backbone.generate import generate
from distill.backbone.model import load_backbone
from distill.corpus.datasets.stage import dataset_file
from distill.corpus.traces import TraceStore
from distill.corpus.truth import Truth, read_truths, same_answer, spread
from distill.errors import CorruptFile
from distill.exam.examine import dream_tokens_of
from distill.exam.questions import load_exam
from distill.report.evaluate import evaluate
from distill.report.page import render_markdown
from distill.run import Run
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import think_block
from distill.tokens.image_tokens import Codebook, load_codes
from distill.training.checkpoint import best
from distill.training.loop import train

SPLITS = ("combination", "depth")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Evaluated by no test: those that evaluate take a copy."""
    run = small_world(tmp_path_factory.mktemp("exact") / "run")
    run.settings.evaluate.prompts, run.settings.evaluate.max_tokens = 0, 8
    train(run)
    return run


@pytest.fixture
def run(plain: Run, tmp_path: Path) -> Run:
    shutil.copytree(plain.path, tmp_path / "run")
    return Run(tmp_path / "run", plain.settings)


def write_truths(run: Run, answers: dict[str, str]) -> None:
    """A dataset's file: held-out traces in turns of two splits, with these true answers."""
    lines: list[dict[str, Any]] = []
    with TraceStore(run.traces, readonly=True) as store:
        for i, trace in enumerate(store.traces()):
            split = SPLITS[i % 2] if trace.held_out else "train"
            lines.append({"key": trace.key, "split": split, "answer": answers.get(trace.key, "no"), "depth": 1 + i % 3})
    dataset_file(run).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def said_greedily(run: Run) -> dict[str, str]:
    """Trace key → dream and answer at temperature 0, one prompt at a time."""
    words = best(run) / "tokenizer"
    tokenizer, model = StudentTokenizer.load(words), load_backbone(best(run)).eval()
    dream_tokens, said = dream_tokens_of(run), dict[str, str]()
    codes = load_codes(words, Codebook.load(words))
    for example in load_examples(run, tokenizer, codes, model.config.context, dream_tokens + 4)[0]:
        start = [*example.header, tokenizer.think_id, tokenizer.newline_id]
        stops = [tokenizer.end_think_id, tokenizer.eos_id]
        (dream,) = generate(model, [start], max_tokens=dream_tokens, stop_ids=stops)
        dream = [id for id in dream if id not in stops]
        dream = dream[:-1] if dream[-1:] == [tokenizer.newline_id] else dream
        context = [*example.header, *think_block(tokenizer, dream)]
        (answer,) = generate(model, [context], max_tokens=8, stop_ids=[tokenizer.eos_id])
        said[example.key] = tokenizer.decode([id for id in answer if id != tokenizer.eos_id])
    return said


def test_exact_match_counts_what_is_said_greedily(run: Run) -> None:
    said = said_greedily(run)
    # Every other true answer is what the student says, with other white space around it.
    keys = sorted(said)
    write_truths(run, {key: f" {said[key]}\n" if i % 2 else f"{said[key]} not" for i, key in enumerate(keys)})
    truths = read_truths(run)
    summary = evaluate(run)
    hits = {key: said[key].split() == truths[key].answer.split() for key in keys}
    assert 0 < sum(hits.values()) < len(hits)
    assert summary["exact_match"] == pytest.approx(sum(hits.values()) / len(hits), abs=1e-4)
    for split in SPLITS:
        inside = [hits[key] for key in keys if truths[key].split == split]
        assert summary[f"exact_match_{split}"] == pytest.approx(sum(inside) / len(inside), abs=1e-4)

    results = json.loads((run.evaluation / "results.json").read_text(encoding="utf-8"))
    samples = [json.loads(line) for line in (run.evaluation / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    entry = results["systems"]["student"]["metrics"]["exact_match"]
    assert 0 <= entry["low"] <= entry["value"] <= entry["high"] <= 1
    for sample in samples:
        truth = truths[sample["key"]]
        assert (sample["split"], sample["expected"], sample["depth"]) == (truth.split, truth.answer, truth.depth)
        assert sample["systems"]["student"][0]["metrics"]["exact_match"] == hits[sample["key"]]
    assert "exact match, combination ↑" in render_markdown(results)


def test_without_true_answers_nothing_is_said_of_them(run: Run) -> None:
    dataset_file(run).unlink()
    summary = evaluate(run)
    assert not [name for name in summary if name.startswith("exact")]
    assert "xact match" not in (run.evaluation / "report.md").read_text(encoding="utf-8")
    assert "split" not in json.loads((run.evaluation / "samples.jsonl").read_text(encoding="utf-8").splitlines()[0])


def test_few_prompts_are_spread_over_the_splits(run: Run) -> None:
    write_truths(run, {})
    run.settings.evaluate.prompts = 2
    exam = load_exam(run)
    assert Counter(q.truth.split for q in exam.questions if q.truth) == dict.fromkeys(SPLITS, 1)


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(0, 30))
def test_however_many_are_taken_splits_differ_by_one_while_they_last(splits: list[str], taken: int) -> None:
    traces: Any = [SimpleNamespace(key=str(i)) for i in range(len(splits))]
    order = spread(traces, {str(i): Truth(split, "", 1) for i, split in enumerate(splits)})
    assert sorted(order, key=lambda trace: int(trace.key)) == traces
    counts = Counter(splits[int(trace.key)] for trace in order[:taken])
    for split, there in Counter(splits).items():
        assert counts[split] >= min(there, max(counts.values(), default=0) - 1)


def test_white_space_alone_may_differ() -> None:
    assert same_answer(" it  falls\n", "it falls")
    assert not same_answer("it falls.", "it falls")
    assert not same_answer("It falls", "it falls")


@pytest.mark.parametrize("line", ["{", '{"key": "k"}', '{"key": "k", "split": "depth", "answer": 3, "depth": 1}', "[]"])
def test_a_broken_line_is_named(run: Run, line: str) -> None:
    dataset_file(run).write_text(
        '{"key": "k", "split": "train", "answer": "yes", "depth": 1}\n' + line + "\n", encoding="utf-8"
    )
    with pytest.raises(CorruptFile, match=r"dataset\.jsonl:2: not a question with its true answer"):
        read_truths(run)
