"""Benchmarks of writing and dreaming: tiny ones run through and say what they measured. How fast is not tested."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli import main as entry
from distill.errors import BadInput
from distill.student.generation_bench import bench_dreams, bench_generate, untrained
from distill.tokens.chat import parse_dream

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            entry.main(["bench", *map(str, args)])
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return call


def ordered(spread: dict[str, float]) -> bool:
    return 0 < spread["min"] <= spread["median"] <= spread["max"]


def test_writing_is_measured_beside_transformers(run: Run) -> None:
    code, out, err = run(
        "generate",
        "--vocab",
        300,
        "--tokens",
        6,
        "--prompt-tokens",
        5,
        "--batch",
        1,
        "--batch",
        3,
        "--rounds",
        2,
        "--json",
    )
    assert code == 0, err
    result = json.loads(out)
    assert (result["tokens"], result["prompt_tokens"], result["vocab_size"], result["rounds"]) == (6, 5, 300, 2)
    assert set(result["batches"]) == {"1", "3"}
    for batch, found in result["batches"].items():
        assert ordered(found["ratio"])
        for name in ("ours", "transformers"):
            assert ordered(found["first_token_seconds"][name])
            assert ordered(found["tokens_per_second"][name])
        assert found["identical"] == int(batch), "they wrote something else: their speeds don't compare"


def test_dreams_are_measured_of_an_untrained_student(run: Run) -> None:
    code, out, err = run("dreams", "--rounds", 2, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["paths"], result["steps"], result["rounds"]) == (4, 5, 2)
    assert result["dream_tokens"] == 4 * (1 + 5 * 3) + 5  # and two tags with three line breaks
    assert ordered(result["ratio"])
    assert all(ordered(result["seconds"][name]) for name in ("prompt", "engine", "backbone"))


def test_dreams_are_measured_of_a_saved_student(run: Run, tmp_path: Path) -> None:
    from distill.student.dreaming_model import DreamingReasoningLLM

    with pytest.warns(UserWarning, match="untrained"):
        DreamingReasoningLLM(seed=3, device="cpu").save_pretrained(tmp_path / "student")
    code, out, err = run("dreams", tmp_path / "student", "--rounds", 1, "--prompt", "Why?")
    assert code == 0, err
    for words in ("engine's dream", "backbone's dream", "ratio", "4 × 5 steps, 69 tokens"):
        assert words in out


def test_both_dreams_are_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's comes in one piece, the backbone's token by token; both are all steps of all lenses."""
    from distill.student import generation_bench

    parts = untrained(vocab_size=900, codes=70)
    read: dict[bool, list[list[int]]] = {}
    whole = generation_bench._to_first_token  # pyright: ignore[reportPrivateUsage]

    def seen(parts: Any, ids: list[int], pieces: list[list[int]], drafting: bool = False) -> int:
        if pieces:
            read[drafting] = pieces
        return whole(parts, ids, pieces, drafting)

    monkeypatch.setattr(generation_bench, "_to_first_token", seen)
    bench_dreams(parts, rounds=1)
    assert {len(piece) for piece in read[False]} == {1}
    assert len(read[True]) == 1
    assert [id for piece in read[False] for id in piece] == read[True][0]
    assert [len(steps) for steps in parse_dream(parts.tokenizer, read[True][0]).values()] == [5, 5, 5, 5]


def test_benches_refuse_what_they_cannot_measure() -> None:
    parts = untrained(vocab_size=900, codes=70)
    with pytest.raises(BadInput, match=r"takes \d+ tokens of a context of 512"):
        bench_dreams(parts, prompt="word " * 500)
    parts.engine = None
    with pytest.raises(BadInput, match="no dream engine"):
        bench_dreams(parts)
    with pytest.raises(BadInput, match=r"student\.preset"):
        bench_generate("tiny")


def test_a_growing_graph_is_measured_and_stays_within_its_bound(run: Run) -> None:
    code, out, err = run("graph", "--dreams", 40, "--max-nodes", 30, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["nodes_in_file"] == 30 <= result["most_nodes_in_memory"] <= 1.25 * 30
    assert result["kept_nodes_lost_by_reload"] == 0
    assert len(result["mib"]) == 5
    assert result["milliseconds_a_dream"] > 0
