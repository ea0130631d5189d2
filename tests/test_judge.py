"""A judge behind a real socket: one that is of one mind, one that likes what stands first, one that talks nonsense."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom
from support.fake_ollama import FakeOllama, Reply, Request, error, reply, serve, timed
from support.recorded import Replay, exchange

from distill.config import TeacherSettings
from distill.errors import BadInput, TeacherError
from distill.events import Event, silent
from distill.exam.questions import Question
from distill.report.judge import Verdict as Said
from distill.report.judge import context_for, judge, outcome_of, read
from distill.teacher import opened

MODEL = "smollm2:135m"
SHOWN = re.compile(r"### Question\n(.*?)\n\n### Answer A\n(.*?)\n\n### Answer B\n(.*?)\n\n### Verdict", re.DOTALL)

Decide = Callable[[str, str, str, dict[str, Any]], str]
"""(question, answer A, answer B, options) → what the judge says."""


class Court:
    """/api/generate as recorded with a schema, but for what is said; all else is replayed."""

    def __init__(self, decide: Decide) -> None:
        self.decide = decide
        self.known = Replay([exchange(name) for name in ("tags", "version", "show")])

    def answer(self, request: Request) -> Reply:
        if request.path != "/api/generate":
            return self.known.answer(request)
        recorded = exchange("generate_format_schema")["response"]["json"]
        found = SHOWN.search(request.json["prompt"])
        assert found
        return reply({**recorded, "response": self.decide(*found.groups(), request.json["options"])})

    def knows_blob(self, path: str) -> bool:
        return False

    def close(self) -> None:
        pass


def says(choice: str, reason: str = "So it is.") -> str:
    return json.dumps({"verdict": choice, "reason": reason})


def fair(question: str, first: str, second: str, options: dict[str, Any]) -> str:
    """More stars are better."""
    a, b = first.count("*"), second.count("*")
    return says("A" if a > b else "B" if b > a else "tie")


def questions(count: int) -> list[Question]:
    return [Question(f"k{i:02}", f"What is {i}?") for i in range(count)]


def held(
    server: FakeOllama,
    folder: Path,
    answers: dict[str, list[str | None]],
    listen: Callable[[Event], None] = silent,
    force: bool = False,
    hosts: list[str] | None = None,
) -> dict[str, Any]:
    settings = TeacherSettings(model=f"ollama:{MODEL}", hosts=hosts or [server.url], retries=0)
    asked = questions(len(next(iter(answers.values()))))
    with opened(settings) as teachers:
        return judge(
            answers, asked, teachers, baseline="base", folder=folder, resamples=400, seed=3, listen=listen, force=force
        )


def stars(counts: list[int], mark: str) -> list[str | None]:
    return [f"{mark} {'*' * count}" for count in counts]


def test_a_fair_judge_against_counting_by_hand(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    base, one, two = (rng.integers(0, 4, 30).tolist() for _ in range(3))
    two = [b + (i % 3 > 0) for i, b in enumerate(base)]
    answers = {"one": stars(one, "x"), "base": stars(base, "y"), "two": stars(two, "z")}
    with serve(Court(fair)) as server:
        found = held(server, tmp_path, answers)
        bodies = server.asked("/api/generate")
    assert found["model"] == f"ollama:{MODEL}"
    assert [(pair["system"], pair["against"]) for pair in found["pairs"]] == [("one", "base"), ("two", "base")]
    for pair, stars_of in zip(found["pairs"], (one, two), strict=True):
        wins = sum(a > b for a, b in zip(stars_of, base, strict=True))
        losses = sum(a < b for a, b in zip(stars_of, base, strict=True))
        ties = 30 - wins - losses
        assert (pair["wins"], pair["ties"], pair["losses"]) == (wins, ties, losses)
        assert (pair["nonsense"], pair["disagreed"], pair["identical"], pair["prompts"]) == (0, 0, 0, 30)
        assert pair["win_rate"] == pytest.approx((wins + ties / 2) / 30)
        assert pair["low"] < pair["win_rate"] < pair["high"]
        n, least = wins + losses, min(wins, losses)
        assert pair["p"] == pytest.approx(min(1.0, 2 * binom.cdf(least, n, 0.5)))
        assert pair["agreement"] == 1.0
    ordered = sorted(pair["p"] for pair in found["pairs"])
    corrected = {ordered[0]: min(1.0, 2 * ordered[0]), ordered[1]: min(1.0, max(2 * ordered[0], ordered[1]))}
    assert [pair["p_corrected"] for pair in found["pairs"]] == [corrected[pair["p"]] for pair in found["pairs"]]
    assert len(bodies) == len({body["prompt"] for body in bodies}) == 120
    assert all(body["options"]["temperature"] == 0 and body["options"]["seed"] == 3 for body in bodies)
    assert all(body["format"]["required"] == ["verdict"] for body in bodies)
    assert found["warnings"] == []


def test_one_that_likes_what_stands_first_is_found_out(tmp_path: Path) -> None:
    with serve(Court(lambda *_: says("A"))) as server:
        found = held(server, tmp_path, {"base": stars([1] * 8, "x"), "new": stars([2] * 8, "y")})
    [pair] = found["pairs"]
    assert (pair["wins"], pair["ties"], pair["losses"], pair["disagreed"]) == (0, 8, 0, 8)
    assert (pair["win_rate"], pair["p"], pair["agreement"]) == (0.5, 1.0, 0.0)
    [warning] = found["warnings"]
    assert "on 8 of 8 prompts it changed its mind with the order" in warning


def test_nonsense_counts_for_nobody(tmp_path: Path) -> None:
    def babble(question: str, first: str, second: str, options: dict[str, Any]) -> str:
        number = int(question.split()[2][:-1])
        if number < 3:
            return says("A" if first.startswith("new") else "B")
        return ["no JSON", '{"verdict": "C"}', '{"reason": "x"}', '["A"]', '{"verdict": "A"'][number % 5]

    with serve(Court(babble)) as server:
        found = held(server, tmp_path, {"base": stars([1] * 10, "old"), "new": stars([1] * 10, "new")})
        asked = len(server.asked("/api/generate"))
    [pair] = found["pairs"]
    assert (pair["wins"], pair["ties"], pair["losses"], pair["nonsense"]) == (3, 0, 0, 7)
    assert (pair["win_rate"], pair["agreement"], pair["prompts"]) == (1.0, 1.0, 10)
    assert pair["p"] == pytest.approx(0.25)
    [warning] = found["warnings"]
    assert "can't be used as a judge: on 7 of 10 prompts" in warning
    assert asked == 6 + 2 * 14


def test_what_can_not_be_read_is_asked_once_more(tmp_path: Path) -> None:
    def hesitant(question: str, first: str, second: str, options: dict[str, Any]) -> str:
        return "Hm." if options["temperature"] == 0 else fair(question, first, second, options)

    with serve(Court(hesitant)) as server:
        found = held(server, tmp_path, {"base": stars([1, 2], "x"), "new": stars([2, 1], "y")})
        seeds = {(body["options"]["temperature"], body["options"]["seed"]) for body in server.asked("/api/generate")}
    [pair] = found["pairs"]
    assert (pair["wins"], pair["losses"], pair["nonsense"]) == (1, 1, 0)
    assert seeds == {(0, 3), (0.7, 4)}
    assert read('{"verdict": "A", "reason": "So \\ud83d"}') == Said("A", "So \ufffd"), "cut between two escapes"


def test_equal_answers_are_not_asked_about_and_missing_ones_not_judged(tmp_path: Path) -> None:
    with serve(Court(fair)) as server:
        found = held(
            server,
            tmp_path,
            {"base": ["same", "b *", None, ""], "new": ["same", "n", "n", "n *"], "mute": [], "out": [None] * 4},
        )
        bodies = server.asked("/api/generate")
    new, out = found["pairs"]
    assert (new["wins"], new["ties"], new["losses"], new["identical"], new["prompts"]) == (1, 1, 1, 1, 3)
    assert new["agreement"] == 1.0
    assert len(bodies) == 4
    assert any("### Answer A\n(no answer)\n" in body["prompt"] for body in bodies)
    assert (out["prompts"], out["win_rate"], out["agreement"], out["p"], out["p_corrected"]) == (
        0,
        None,
        None,
        None,
        None,
    )


def test_blanks_around_an_answer_make_no_other_answer(tmp_path: Path) -> None:
    with serve(Court(lambda *_: says("A"))) as server:
        found = held(server, tmp_path, {"base": ["same", " "], "new": [" same\n", ""]})
        assert server.asked("/api/generate") == []
    [pair] = found["pairs"]
    assert (pair["identical"], pair["disagreed"], pair["prompts"]) == (2, 0, 2)


def test_a_broken_off_judging_goes_on(tmp_path: Path) -> None:
    answers = {"base": stars([1, 0, 2, 1, 3, 1], "x"), "new": stars([2, 1, 1, 1, 0, 4], "y")}
    with serve(Court(fair)) as server:
        whole = held(server, tmp_path / "whole", answers)
    heard = 0

    def dies(question: str, first: str, second: str, options: dict[str, Any]) -> str:
        nonlocal heard
        heard += 1
        if heard > 5:
            raise ConnectionResetError
        return fair(question, first, second, options)

    with serve(Court(dies)) as server, pytest.raises(TeacherError):
        held(server, tmp_path / "parts", answers)
    [kept] = (tmp_path / "parts").glob("*.jsonl")
    lines = kept.read_text(encoding="utf-8").splitlines()
    assert 1 <= len(lines) <= 5
    kept.write_text(
        kept.read_text(encoding="utf-8") + '{"key": "half', encoding="utf-8"
    )  # killed in the middle of a line
    events: list[Event] = []
    with serve(Court(fair)) as server:
        assert held(server, tmp_path / "parts", answers, events.append) == whole
        assert len(server.asked("/api/generate")) == 12 - len(lines)
        asked = len(server.requests)
        assert held(server, tmp_path / "parts", answers) == whole
        assert [request.path for request in server.requests[asked:]].count("/api/generate") == 0
    progress = [event for event in events if event.kind == "progress"]
    assert [event.done for event in progress] == list(range(1, 13 - len(lines)))
    assert progress[-1].total == progress[-1].done


def test_a_verdict_that_cannot_be_had_is_nobodys_and_asked_for_again(tmp_path: Path) -> None:
    answers = {"base": stars([1] * 12, "x"), "new": stars([2] * 12, "y")}
    patient = {"What is 3?": error(400, "the input length exceeds the context length")}

    class Refusing(Court):
        def answer(self, request: Request) -> Reply:
            asked = SHOWN.search((request.json or {}).get("prompt", ""))
            refusal = patient.get(asked.group(1)) if asked else None
            return refusal or super().answer(request)

    events: list[Event] = []
    with serve(Refusing(fair)) as server, timed(1, 0) as gone:
        gone.fail("drop", times=999, path="/api/version")
        found = held(server, tmp_path, answers, events.append, hosts=[gone.url, server.url])
        [pair] = found["pairs"]
        assert (pair["wins"], pair["nonsense"]) == (11, 1)
        assert sum("no verdict" in event.message for event in events) == 2
        assert any("going on without it" in event.message for event in events)
        patient.clear()
        [pair] = held(server, tmp_path, answers)["pairs"]
        assert (pair["wins"], pair["nonsense"]) == (12, 0)
        assert len(server.asked("/api/generate")) == 26


def test_another_answer_or_system_message_is_another_verdict(tmp_path: Path) -> None:
    with serve(Court(fair)) as server:
        held(server, tmp_path, {"base": ["x *"], "new": ["y"]})
        held(server, tmp_path, {"base": ["x *"], "new": ["y **"]})
        assert len(server.asked("/api/generate")) == 4
        held(server, tmp_path, {"base": ["y **"], "new": ["x *"]})  # the same two texts, seen from the other side
        assert len(server.asked("/api/generate")) == 4


def test_forced_verdicts_are_asked_for_again_and_others_kept(tmp_path: Path) -> None:
    with serve(Court(fair)) as server:
        held(server, tmp_path, {"base": ["x *"], "new": ["y"]})
        held(server, tmp_path, {"base": ["x *"], "new": ["z"]})
        held(server, tmp_path, {"base": ["x *"], "new": ["y"]}, force=True)
        assert len(server.asked("/api/generate")) == 6
        held(server, tmp_path, {"base": ["x *"], "new": ["z"]})
        assert len(server.asked("/api/generate")) == 6


def test_an_embedded_judge_has_room_for_the_longest_prompt() -> None:
    assert context_for({"base": ["a"], "new": ["b"]}, questions(1), "base") == 1024
    answers = {"base": ["a " * 9000, None], "new": ["b", "b " * 90_000], "mute": []}
    assert 9000 < context_for(answers, questions(2), "base") < 10_000


def test_every_combination_of_two_orders() -> None:
    meant = {("A", "B"): "win", ("B", "A"): "loss", ("tie", "tie"): "tie"}
    for first in ("A", "B", "tie", None):
        for second in ("A", "B", "tie", None):
            wanted = "nonsense" if None in (first, second) else meant.get((first, second), "disagreed")
            assert outcome_of([Said(first), Said(second)]) == wanted
    assert outcome_of([]) == "identical"
    assert read('{"verdict": "A", "reason": 3}') == Said("A", "")
    assert read("{}") is None
    assert read('{"verdict": null}') is None


def test_who_is_unknown_is_named(tmp_path: Path) -> None:
    with serve(Court(fair)) as server, pytest.raises(BadInput, match="baseline='base': is none of a, b"):
        held(server, tmp_path, {"a": ["x"], "b": ["y"]})


def test_the_embedded_model_judges(smollm2: Path, tmp_path: Path) -> None:
    asked = [Question("k", "What happens when you drop a ball?", system="Answer in one sentence.")]
    answers = {"base": ["The ball falls to the floor."], "new": ["The the the the."]}
    with opened(TeacherSettings(model=f"embedded:{smollm2}", threads=1)) as teachers:
        found = judge(answers, asked, teachers, baseline="base", folder=tmp_path, resamples=50)
    [pair] = found["pairs"]
    assert pair["prompts"] == 1
    assert pair["wins"] + pair["ties"] + pair["losses"] + pair["nonsense"] == 1
    assert len((next(tmp_path.glob("*.jsonl"))).read_text(encoding="utf-8").splitlines()) == 2
