import heapq
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.capture import bench_capture
from bench.stopwatch import Stopwatch
from distill.config import Settings
from distill.corpus.asked import changed
from distill.corpus.capture import MISSING, capture
from distill.corpus.prompts import evenly
from distill.corpus.traces import Trace, TraceStore
from distill.errors import (
    BadInput,
    DistillError,
    MissingStage,
    ModelNotFound,
    PromptRefused,
    RunMismatch,
    TeacherError,
    TeacherUnavailable,
)
from distill.events import Event
from distill.exam import questions as exam_questions
from distill.exam.questions import load_exam
from distill.mining.triplets import Triplet, read_triplets, write_triplets
from distill.run import Run
from distill.sweep.cells import best_source
from distill.teacher.crew import TRIES
from distill.teacher.in_flight import InFlight
from distill.teacher.protocol import GenerateOptions, Response, TeacherInfo, TeacherTokenizer
from distill.tokens import packing
from distill.tokens.packing import split_traces
from tests.support.stub_teacher import StubTeacher

ROOT = Path(__file__).parents[1]


def make_run(tmp_path: Path, prompts: int, name: str = "run", **capture_settings: object) -> Run:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"What is number {i}?\n" for i in range(prompts)), encoding="utf-8")
    settings = Settings()
    settings.capture.prompts = [str(file)]
    for key, value in capture_settings.items():
        setattr(settings.capture, key, value)
    return Run.create(tmp_path / name, settings)


def digest(run: Run) -> str:
    with TraceStore(run.traces, readonly=True) as store:
        return store.content_digest()


# How many requests to keep in flight.


def simulate(
    slots: Callable[[float], int], requests: int, *, overhead: float = 0.0, jitter: float = 0.0
) -> tuple[float, InFlight, int]:
    """A server of one second a request, in simulated time: (time / ideal time, the bound, most in flight)."""
    bound, noise = InFlight(), random.Random(0)
    now = work = 0.0
    ends: list[float] = []  # of what is in service
    waiting: list[tuple[float, float, float]] = []  # arrives, sent, service
    flight: list[tuple[float, float, float]] = []  # answered, sent, service
    sent = most = 0
    while sent < requests or waiting or flight:
        while sent < requests and len(waiting) + len(flight) < bound.limit:
            service = 1 + jitter * noise.uniform(-1, 1)
            heapq.heappush(waiting, (now + overhead / 2, now, service))
            work += service
            sent += 1
        most = max(most, len(waiting) + len(flight))
        while waiting and len(ends) < slots(now):
            arrives, asked, service = heapq.heappop(waiting)
            end = max(now, arrives) + service
            heapq.heappush(ends, end)
            heapq.heappush(flight, (end + overhead / 2, asked, service))
        moments = [*(ends[:1]), *([flight[0][0]] if flight else [])]
        now = min(moments)
        while ends and ends[0] <= now:
            heapq.heappop(ends)
        while flight and flight[0][0] <= now:
            answered, asked, service = heapq.heappop(flight)
            bound.completed(answered, answered - asked, service)
    return now / (work / slots(0)), bound, most


@pytest.mark.parametrize("slots", [1, 2, 4, 7, 16, 32])
def test_in_flight_finds_the_slots(slots: int):
    ratio, bound, most = simulate(lambda now: slots, 40 * slots)
    assert bound.slots == slots
    assert slots < bound.limit <= slots + 3
    assert ratio <= 1.05
    assert most <= max(16 + slots, 3 * slots) + slots


@pytest.mark.parametrize("slots", [1, 4, 7, 16])
@pytest.mark.parametrize("overhead", [0.1, 0.4])
def test_in_flight_is_robust_to_answers_of_unequal_length_over_a_slow_network(slots: int, overhead: float):
    ratio, bound, _ = simulate(lambda now: slots, 60 * slots, overhead=overhead, jitter=0.5)
    assert ratio <= 1.15
    assert bound.limit > slots


def test_in_flight_follows_a_server_that_gets_more_slots():
    _, bound, _ = simulate(lambda now: 4 if now < 40 else 12, 1500)
    assert 11 <= bound.slots <= 13
    assert bound.limit >= 12


def test_in_flight_takes_what_is_known():
    known, fixed = InFlight(slots=8), InFlight(slots=8, fixed=3)
    for bound in (known, fixed):
        for i in range(100):
            bound.completed(i, 50.0, 1.0)
    assert (known.limit, fixed.limit) == (9, 3)


# The stage.


def test_a_capture_stores_every_answer_and_is_then_skipped(tmp_path: Path):
    run, teacher = make_run(tmp_path, 50), StubTeacher()
    events: list[Event] = []
    summary = capture(run, events.append, teachers=[teacher])
    assert summary["prompts"] == summary["responses"] == 50
    assert summary["failed"] == 0
    assert sorted(teacher.asked) == sorted(f"What is number {i}?" for i in range(50))
    with TraceStore(run.traces, readonly=True) as store:
        stats = store.stats()
        assert {t.prompt for t in store.traces()} == set(teacher.asked)
        assert len({t.options.seed for t in store.traces()}) == 50
    assert summary["held_out"] == stats.held_out > 0
    assert summary["tokens"] == stats.tokens
    assert 0.8 < summary["soft_share"] < 1
    assert summary["answered_by"] == [teacher.describe().version]
    assert run.records()["capture"].outputs == {"traces.db": digest(run)}
    last = [event for event in events if event.kind == "progress"][-1]
    assert (last.done, last.total, last.unit) == (50, 50, "prompts")
    assert last.data["tokens"] == stats.tokens
    assert events[0].kind == "start"
    assert events[-1].kind == "done"

    assert capture(run, teachers=[teacher]) == summary
    assert len(teacher.asked) == 50


@pytest.mark.parametrize(("slots", "requests", "seconds"), [(4, 100, 0.1), (7, 140, 0.1), (32, 320, 0.3)])
def test_capture_takes_about_the_ideal_time(tmp_path: Path, slots: int, requests: int, seconds: float):
    started = time.monotonic()
    capture(make_run(tmp_path, requests), teachers=[StubTeacher(slots, seconds)])
    ideal = seconds * -(-requests // slots)
    # `dream bench capture` measures it on a quiet machine; here others may compute beside us.
    assert time.monotonic() - started <= 1.3 * ideal + 0.5


def test_the_benchmark_goes_through_the_whole_client():
    result = bench_capture(Stopwatch(1, 0), slots=5, seconds=0.2, requests=60)
    assert result.about["answered"] == 60
    assert result.about["slots_found"] in (4, 5)
    assert result.about["ideal_seconds"] == 2.4
    assert 1 <= result.named("over the ideal time").median < 3
    assert result.named("on disk").median < 90


def test_known_slots_bound_the_requests_in_flight(tmp_path: Path):
    teacher = StubTeacher(3, 0.005, known=True)
    capture(make_run(tmp_path, 40), teachers=[teacher])
    assert teacher.most_waiting == 4


def test_the_setting_overrides_what_would_be_found(tmp_path: Path):
    run, teacher = make_run(tmp_path, 30), StubTeacher(3, 0.005)
    run.settings.teacher.in_flight = 2
    assert capture(run, teachers=[teacher])["in_flight"] == [2]
    assert teacher.most_waiting == 2


def test_two_hosts_share_the_work(tmp_path: Path):
    hosts = [StubTeacher(2, 0.01), StubTeacher(2, 0.01)]
    summary = capture(make_run(tmp_path, 120), teachers=list(hosts))
    assert summary["responses"] == 120
    assert sum(len(host.asked) for host in hosts) == 120
    assert all(len(host.asked) > 20 for host in hosts)


def test_two_hosts_with_other_models_are_refused(tmp_path: Path):
    with pytest.raises(RunMismatch, match="host 2: has another stub"):
        capture(make_run(tmp_path, 5), teachers=[StubTeacher(), StubTeacher(digest="e" * 64)])


class Down(StubTeacher):
    """Isn't there the first `times` that it is asked who it is."""

    times = math.inf

    def describe(self) -> TeacherInfo:
        self.times -= 1
        if self.times >= 0:
            raise TeacherUnavailable("http://down: no Ollama answers there")
        return super().describe()


def test_twenty_hosts_some_of_which_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One is down at the start, two die and come back, and five prompts are answered by nobody."""
    monkeypatch.setattr("distill.teacher.crew.FIRST_REST", 0.4)
    slots, seconds, prompts = 2, 0.2, 300
    poison = {f"What is number {i}?" for i in (3, 100, 150, 200, 290)}

    def captured(name: str, hosts: list[StubTeacher]) -> tuple[Run, dict[str, Any], float]:
        run = make_run(tmp_path, prompts, name)
        run.settings.teacher.in_flight = slots + 1
        began = time.monotonic()
        summary = capture(run, teachers=list(hosts))
        last = max(when for host in hosts for _, when in host.answered)
        return run, summary, summary["responses"] / (last - began)

    _, _, healthy = captured("healthy", [StubTeacher(slots, seconds) for _ in range(17)])
    started = time.monotonic()

    def fate(since: float, until: float) -> Callable[[str], Exception | None]:
        def fail(prompt: str) -> Exception | None:
            dead = since <= time.monotonic() - started < until
            return TeacherUnavailable("no answer") if dead or prompt in poison else None

        return fail

    dying = [StubTeacher(slots, seconds, fail=fate(0.2, 0.5)), StubTeacher(slots, seconds, fail=fate(0.3, 0.8))]
    hosts = [Down(), *dying, *(StubTeacher(slots, seconds, fail=fate(0, 0)) for _ in range(17))]
    run, summary, rate = captured("run", hosts)
    assert (summary["responses"], summary["failed"]) == (prompts - len(poison), len(poison))
    answered = Counter(prompt for host in hosts for prompt, _ in host.answered)
    assert answered == dict.fromkeys({f"What is number {i}?" for i in range(prompts)} - poison, 1), "none twice"
    asked = Counter(prompt for host in hosts for prompt in host.asked)
    assert all(asked[prompt] <= 2 * TRIES for prompt in poison), "each by three hosts, and such as were dead"
    assert {
        json.loads(line)["prompt"] for line in (run.path / MISSING).read_text(encoding="utf-8").splitlines()
    } == poison
    assert not hosts[0].asked
    assert all(host.answered[-1][1] > started + 0.8 for host in dying), "they are asked again"
    assert rate >= 0.9 * healthy


def test_prompts_that_time_out_everywhere_take_no_host_along(tmp_path: Path):
    """The answers that come do so while the others are waited for, and at the end nothing but them is asked."""
    poison = {f"What is number {i}?" for i in range(10)}
    silent = TeacherUnavailable("no answer within 300 s")
    hosts = [StubTeacher(2, 0.005, fail=lambda prompt: silent if prompt in poison else None) for _ in range(20)]
    run, events = make_run(tmp_path, 100), list[Event]()
    summary = capture(run, events.append, teachers=list(hosts))
    assert (summary["responses"], summary["failed"]) == (90, 10)
    assert Counter(prompt for host in hosts for prompt in host.asked if prompt in poison) == dict.fromkeys(
        poison, TRIES
    )
    assert not any("given up" in event.message for event in events)
    again = [StubTeacher() for _ in range(2)]
    assert capture(run, teachers=list(again))["responses"] == 100
    assert {prompt for host in again for prompt in host.asked} == poison


def test_a_host_that_is_down_at_the_start_is_asked_once_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("distill.teacher.crew.FIRST_REST", 0.1)
    down, other = Down(2, 0.01), StubTeacher(2, 0.02)
    down.times = 1
    events: list[Event] = []
    summary = capture(make_run(tmp_path, 100), events.append, teachers=[down, other])
    assert summary["responses"] == 100
    assert len(down.asked) > 3
    assert [e.message for e in events if e.kind == "warning"] == [
        "going on without it for now: http://down: no Ollama answers there"
    ]
    wrong = Down(2, 0.01, digest="e" * 64)
    wrong.times = 1
    assert capture(make_run(tmp_path, 100, "two"), teachers=[other, wrong])["responses"] == 100
    assert not wrong.asked, "it has another model of that name"
    wrong.times = 1
    assert capture(make_run(tmp_path, 100, "first"), teachers=[wrong, other])["responses"] == 100
    assert not wrong.asked, "nor where it is the first in the list"
    with pytest.raises(TeacherUnavailable, match="http://down"):
        capture(make_run(tmp_path, 5, "three"), teachers=[Down(), Down()])


def test_a_host_that_hangs_delays_nobodys_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("distill.teacher.crew.GREETING", 0.1)
    wakes = threading.Event()

    class Hangs(StubTeacher):
        def describe(self) -> TeacherInfo:
            assert wakes.wait(60)
            return super().describe()

    def wake_at_the_30th(prompt: str) -> None:
        if next(count) == 30:
            wakes.set()

    count, events = itertools.count(1), list[Event]()
    hangs, other = Hangs(2, 0.01), StubTeacher(2, 0.01, fail=wake_at_the_30th)
    summary = capture(make_run(tmp_path, 150), events.append, teachers=[hangs, other])
    assert (summary["responses"], summary["failed"]) == (150, 0)
    assert 3 < len(hangs.asked) <= 120, "asked once it says who it is"
    assert [e.message for e in events if e.kind == "warning"] == [
        "going on without it for now: host 1: doesn't say who it is within 0.1 s"
    ]


def test_when_all_hosts_fall_silent_they_are_waited_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    since = time.monotonic()
    away = lambda prompt: TeacherUnavailable("gone") if 0.1 < time.monotonic() - since < 0.4 else None  # noqa: E731
    monkeypatch.setattr("distill.teacher.crew.FIRST_REST", 0.2)
    assert capture(make_run(tmp_path, 150), teachers=[StubTeacher(2, 0.01, fail=away) for _ in "ab"])["failed"] == 0
    monkeypatch.setattr("distill.teacher.crew.PATIENCE", 0.1)
    with pytest.raises(TeacherUnavailable, match="given up after 8 failures in a row"):
        capture(
            make_run(tmp_path, 400, "two"),
            teachers=[StubTeacher(2, 0.01, fail=lambda prompt: TeacherUnavailable("gone")) for _ in "ab"],
        )


class Mute(StubTeacher):
    """Says nothing to some, whether it thinks or not."""

    def __init__(self, mute: Callable[[str], bool], thinking: str = ""):
        super().__init__()
        self.mute, self.thinking = mute, thinking

    def generate(self, prompt: str, options: GenerateOptions) -> Response:
        found = super().generate(prompt, options)
        return replace(found, text=" \n", tokens=None, thinking=self.thinking) if self.mute(prompt) else found


def test_answers_without_text_are_listed_and_no_answers(tmp_path: Path):
    run, events = make_run(tmp_path, 40), list[Event]()
    mute = Mute(lambda prompt: prompt.endswith("1?"))
    summary = capture(run, events.append, teachers=[mute])
    assert (summary["responses"], summary["empty"], summary["failed"], summary["thought"]) == (36, 4, 0, 0)
    assert any("4 prompts have no answer (4 without text)" in event.message for event in events)
    assert capture(run, teachers=[mute]) == summary
    with TraceStore(run.traces) as store:  # as an earlier version left it
        trace = next(store.traces())
        store.put(replace(trace, response=replace(trace.response, text="")))
        assert not store.has(trace.key)
        assert store.select({trace.key: False}) == 0
    assert capture(run, force=True, teachers=[StubTeacher()])["responses"] == 40


@pytest.mark.parametrize("thinking", ["", "Okay, so"])
def test_a_capture_without_any_usable_answer_fails(tmp_path: Path, thinking: str):
    run = make_run(tmp_path, 40)
    told = "it thinks first: raise capture.max_tokens=96" if thinking else "the rest not$"
    with pytest.raises(TeacherError, match=rf"stub:dddd: 40 of 40 prompts were answered without any text.*{told}"):
        capture(run, teachers=[Mute(lambda prompt: True, thinking)])
    assert "capture" not in run.records()


def test_refused_prompts_are_no_hosts_fault(tmp_path: Path):
    refusal = PromptRefused("the input length exceeds the context length")
    hosts = [StubTeacher(2, 0.001, fail=lambda prompt: refusal if "1" in prompt else None) for _ in range(2)]
    run = make_run(tmp_path, 100)
    summary = capture(run, teachers=list(hosts))
    assert (summary["responses"], summary["refused"], summary["failed"]) == (81, 19, 0)
    assert sum(len(host.asked) for host in hosts) == 119, "those that one refuses are asked the other, once"
    assert capture(run, teachers=list(hosts)) == summary
    run.settings.teacher.context = 8192
    assert capture(run, teachers=[StubTeacher()])["responses"] == 100


def test_a_host_that_refuses_everything_leaves_it_to_the_others(tmp_path: Path):
    refusal = PromptRefused("http://small: refuses /api/generate (400): no room")
    small, other = StubTeacher(2, fail=lambda prompt: refusal), StubTeacher(2, 0.002)
    summary = capture(make_run(tmp_path, 100), teachers=[small, other])
    assert (summary["responses"], summary["refused"], summary["failed"]) == (100, 0, 0)
    many = [StubTeacher(2, fail=lambda prompt: refusal) for _ in range(TRIES + 2)]
    with pytest.raises(TeacherError, match="answered none of 60 prompts"):
        capture(make_run(tmp_path, 60, "none"), teachers=list(many))
    assert sum(len(host.asked) for host in many) == 60 * TRIES


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_dozen_prompts_that_nobody_answers_do_not_end_the_capture(tmp_path: Path, hosts: int):
    """They come last, so failures in a row are theirs, not the host's."""
    poison = {f"What is number {i}?" for i in list(evenly(60))[-12:]}

    def fail(prompt: str) -> Exception | None:
        if prompt not in poison:
            return None
        time.sleep(0.05)
        return TeacherUnavailable("no answer within 300 s")

    run = make_run(tmp_path, 60)
    summary = capture(run, teachers=[StubTeacher(2, 0.002, fail=fail) for _ in range(hosts)])
    assert (summary["responses"], summary["failed"]) == (48, 12)
    listed = [json.loads(line) for line in (run.path / MISSING).read_text(encoding="utf-8").splitlines()]
    assert {line["prompt"]: line["why"] for line in listed} == dict.fromkeys(poison, "no answer within 300 s")
    assert capture(run, force=True, teachers=[StubTeacher(2, fail=fail)])["failed"] == 12, "nothing else is asked"
    again = StubTeacher()
    assert capture(run, teachers=[again])["responses"] == 60
    assert set(again.asked) == poison


def test_an_embedded_teacher_makes_room_for_the_longest_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rooms: list[int] = []

    def opened(settings: object, listen: object, context: int, runtime: object) -> list[StubTeacher]:
        rooms.append(context)
        return [StubTeacher()]

    monkeypatch.setattr("distill.teacher.open_teacher", opened)
    capture(make_run(tmp_path, 5, "short"))
    capture(make_run(tmp_path, 5, "long", max_tokens=2000, system="x" * 3000))
    assert rooms[0] == 1024
    assert 3600 < rooms[1] < 3700


def test_a_host_that_goes_leaves_its_prompts_to_the_other(tmp_path: Path):
    gone = StubTeacher(2, 0.001, fail=lambda prompt: TeacherUnavailable("http://gone: no answer"))
    summary = capture(make_run(tmp_path, 60), teachers=[gone, StubTeacher(2, 0.005)])
    assert (summary["responses"], summary["failed"]) == (60, 0)


def test_a_host_that_lost_the_model_is_asked_again_once_it_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("distill.teacher.crew.LONGEST_REST", 0.2)
    since = time.monotonic()

    def fail(prompt: str) -> Exception | None:
        return ModelNotFound("http://x: has no model 'y'") if 0.05 < time.monotonic() - since < 0.3 else None

    hosts = [StubTeacher(2, 0.005, fail=fail), StubTeacher(2, 0.02)]  # the first of them, whom others are compared with
    summary = capture(make_run(tmp_path, 150), teachers=list(hosts))
    assert (summary["responses"], summary["failed"]) == (150, 0)
    assert hosts[0].answered[-1][1] > since + 0.3
    assert Counter(prompt for host in hosts for prompt, _ in host.answered).most_common(1)[0][1] == 1


def test_a_host_that_has_another_model_is_asked_anew_who_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("distill.teacher.crew.LONGEST_REST", 0.05)

    class Swapped(StubTeacher):
        """Knows what it said of itself until it shall forget it, as one in Ollama."""

        said: TeacherInfo | None = None
        digests = iter(["d" * 64, "e" * 64, "d" * 64])

        def describe(self) -> TeacherInfo:
            if self.said is None:
                self.digest = next(self.digests)
                self.said = super().describe()
            return self.said

        def forget(self) -> None:
            self.said = None

        def generate(self, prompt: str, options: GenerateOptions) -> Response:
            if len(self.asked) == 5:
                self.forget()
                self.asked.append(prompt)
                raise ModelNotFound("http://x: has no model 'y'")
            return super().generate(prompt, options)

    swapped = Swapped(1, 0.002, known=True)
    summary = capture(make_run(tmp_path, 80), teachers=[StubTeacher(1, 0.01, known=True), swapped])
    assert (summary["responses"], summary["failed"]) == (80, 0)
    assert len(swapped.answered) > 10
    assert not [*swapped.digests], "nor is it taken for what it was since it answers what was in flight then"


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("then", ["gone", "another"])
def test_a_host_that_lost_the_model_meanwhile_spoils_no_complete_capture(tmp_path: Path, place: int, then: str):
    class Lost(StubTeacher):
        def describe(self) -> TeacherInfo:
            if len(self.asked) >= 5 and then == "gone":
                raise ModelNotFound("http://x: has no model 'y'")
            self.digest = "d" * 64 if len(self.asked) < 5 else "e" * 64
            return super().describe()

        def tokenizer(self) -> TeacherTokenizer | None:
            self.describe()
            return super().tokenizer()

    lost = Lost(2, fail=lambda _: ModelNotFound("http://x: has no model 'y'") if len(lost.asked) >= 5 else None)
    hosts = [StubTeacher(2, 0.002), lost] if place else [lost, StubTeacher(2, 0.002)]
    run = make_run(tmp_path, 40)
    summary = capture(run, teachers=list(hosts))
    assert (summary["responses"], summary["answered_by"]) == (40, ["1", "1"])
    assert run.require("capture").outputs == {"traces.db": digest(run)}


def test_one_teacher_per_run(tmp_path: Path):
    run = make_run(tmp_path, 5)
    capture(run, teachers=[StubTeacher()])
    with pytest.raises(RunMismatch, match=r"traces\.db: holds answers of stub:dddd .* not of stub:eeee"):
        capture(run, force=True, teachers=[StubTeacher(digest="e" * 64)])


def test_the_result_does_not_depend_on_the_order(tmp_path: Path):
    one, two = make_run(tmp_path, 40, "one"), make_run(tmp_path, 40, "two")
    capture(one, teachers=[StubTeacher(1)])
    lines = (tmp_path / "prompts.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "prompts.txt").write_text("\n".join(reversed(lines)), encoding="utf-8")
    capture(two, teachers=[StubTeacher(8, 0.001)])
    assert digest(one) == digest(two)


def test_more_prompts_ask_only_the_new_ones_and_fewer_ask_none(tmp_path: Path):
    teacher = StubTeacher()
    few = make_run(tmp_path, 60, limit=20)
    capture(few, teachers=[teacher])
    before = digest(few)
    capture(make_run(tmp_path, 60, limit=60), teachers=[teacher])
    assert len(teacher.asked) == len(set(teacher.asked)) == 60
    summary = capture(make_run(tmp_path, 60, limit=20), teachers=[teacher])
    assert summary["responses"] == 20
    assert digest(few) == before
    assert len(teacher.asked) == 60
    capture(make_run(tmp_path, 60, limit=20, temperature=0.0), teachers=[teacher])
    assert len(teacher.asked) == 80


def check_sides(run: Run, traces: list[Trace], monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt is trained on, kept for validation or examined with all its answers; an exam asks it once."""
    monkeypatch.setattr(packing, "VALIDATION_SHARE", 0.9)
    monkeypatch.setattr(packing, "VALIDATION_MOST", 4)
    with TraceStore(run.traces, readonly=True) as store:
        sides = [*split_traces(store), list(store.traces(held_out=True))]
    prompts = [Counter(trace.prompt for trace in side) for side in sides]
    assert sum(prompts, Counter()) == Counter(trace.prompt for trace in traces), "no prompt on two sides"
    assert set(sum(prompts, Counter()).values()) == {3}
    assert len(prompts[1]) == 4
    last = {trace.prompt: trace for trace in traces if trace.sample == 2}
    mined = [Triplet("a ball", "falls", "down", "causal", 0, trace.key, 0, "syntax") for trace in last.values()]
    write_triplets(run.triplets, mined)
    questions = load_exam(run).questions
    assert sorted(question.prompt for question in questions) == sorted(prompts[2])
    first = {trace.prompt: trace for trace in traces if trace.sample == 0}
    for question in questions:
        assert (question.key, question.text) == (first[question.prompt].key, first[question.prompt].response.text)
        assert question.sibling is not None
        assert question.sibling.text == last[question.prompt].response.text, "one that something was mined from"
        assert question.after_sibling.triplets[0].trace == last[question.prompt].key
    read = list[set[bytes]]()
    monkeypatch.setattr(
        exam_questions, "read_triplets", lambda path, keys: read.append(keys) or read_triplets(path, keys)
    )
    assert [(q.key, q.sibling) for q in load_exam(run, 2).questions] == [(q.key, q.sibling) for q in questions[:2]]
    two = {question.prompt for question in questions[:2]}
    assert read == [{trace.key.encode() for trace in traces if trace.prompt in two}], "of no others"


def test_several_answers_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From 1 to 3 only what is missing is asked, broken off in the middle too; back at 2 the third are left out."""
    run, teacher, events = make_run(tmp_path, 30, held_out=0.3), StubTeacher(), list[Event]()
    assert capture(run, teachers=[teacher])["responses"] == 30
    with TraceStore(run.traces, readonly=True) as store:
        first = {trace.prompt: trace.response.text for trace in store.traces()}
    more, count = make_run(tmp_path, 30, samples=3, held_out=0.3), itertools.count(1)
    ill = {f"What is number {evenly(30)[-1]}?"}

    def fail(prompt: str) -> Exception | None:
        return ModelNotFound("gone") if next(count) > 25 else None

    with pytest.raises(ModelNotFound):
        capture(more, teachers=[StubTeacher(1, fail=fail)])
    ailing = StubTeacher(fail=lambda prompt: TeacherError("ill") if prompt in ill else None)
    summary = capture(more, events.append, teachers=[ailing])
    assert [summary[name] for name in ("prompts", "samples", "responses", "failed")] == [30, 3, 88, 2]
    listed = [json.loads(line) for line in (run.path / MISSING).read_text(encoding="utf-8").splitlines()]
    assert sorted(line["sample"] for line in listed) == [1, 2]
    assert {line["prompt"] for line in listed} == ill
    assert any("2 answers are missing (2 failed)" in event.message for event in events)
    again = StubTeacher()
    assert capture(more, teachers=[again])["responses"] == 90
    assert again.asked == [*ill] * 2
    with TraceStore(run.traces, readonly=True) as store:
        traces = list(store.traces())
        assert (store.stats().prompts, store.stats().responses) == (30, 90)
    assert {trace.prompt: trace.response.text for trace in traces if trace.sample == 0} == first
    assert len({trace.response.text for trace in traces}) == 90
    assert len({(trace.prompt, trace.held_out) for trace in traces}) == 30, "held out with all its answers"
    assert sorted(trace.sample for trace in traces) == [0] * 30 + [1] * 30 + [2] * 30
    check_sides(more, traces, monkeypatch)
    assert capture(make_run(tmp_path, 30, samples=2, held_out=0.3), events.append, teachers=[again])["responses"] == 60
    assert len(again.asked) == 2
    assert any(event.message.startswith("30 answers are kept, but left out") for event in events)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"samples": 0}, r"capture\.samples=0: must be at least 1"),
        ({"samples": 4, "temperature": 0.0}, r"capture\.samples=4: at capture\.temperature=0 all answers .* alike"),
        ({"samples": 4, "dataset": "causal-world"}, r"capture\.samples=4: a dataset has one answer"),
    ],
)
def test_several_answers_that_cannot_be(tmp_path: Path, settings: dict[str, Any], told: str):
    with pytest.raises(BadInput, match=told):
        capture(make_run(tmp_path, 3, **settings), teachers=[StubTeacher()])


def test_failed_prompts_are_counted_warned_of_and_asked_again(tmp_path: Path):
    bad = {"What is number 3?", "What is number 30?"}
    run, events = make_run(tmp_path, 40), list[Event]()
    failing = StubTeacher(fail=lambda prompt: TeacherError("too long") if prompt in bad else None)
    summary = capture(run, events.append, teachers=[failing])
    assert (summary["responses"], summary["failed"]) == (38, 2)
    warnings = [event.message for event in events if event.kind == "warning"]
    assert sorted(warnings[:2]) == sorted(f"skipped {prompt!r}: too long" for prompt in bad)
    [told] = warnings[2:]
    assert told.startswith(f"2 prompts have no answer (2 failed): {run.path / MISSING} lists them; the same command")
    listed = [json.loads(line) for line in (run.path / MISSING).read_text(encoding="utf-8").splitlines()]
    assert {line["prompt"] for line in listed} == bad
    assert capture(run, teachers=[Down()]) == summary, "where nobody is there, it goes on with what it has"
    again = StubTeacher()
    assert capture(run, teachers=[again])["responses"] == 40
    assert set(again.asked) == bad
    assert not (run.path / MISSING).exists()


def test_what_was_answered_before_the_teacher_went_again_is_counted(tmp_path: Path):
    """At first it fails at half of the prompts, then it answers ten of those and is gone."""
    run, count = make_run(tmp_path, 120), itertools.count(1)
    refuses = {f"What is number {i}?" for i in range(0, 120, 2)}
    first = [StubTeacher(2, 0.001, fail=lambda p: TeacherError("bad day") if p in refuses else None) for _ in range(3)]
    assert capture(run, teachers=list(first))["failed"] == 60

    def fail(prompt: str) -> Exception | None:
        return ModelNotFound("http://x: has no model 'y'") if next(count) > 10 else None

    events: list[Event] = []
    summary = capture(run, events.append, teachers=[StubTeacher(1, fail=fail)])
    assert (summary["responses"], summary["failed"]) == (70, 50)
    assert run.records()["capture"].outputs == {"traces.db": digest(run)}
    assert len((run.path / MISSING).read_text(encoding="utf-8").splitlines()) == 50
    assert any(event.message.startswith("going on with what was answered: http://x") for event in events)
    assert capture(run, teachers=[StubTeacher()])["responses"] == 120


def test_what_a_context_cut_is_asked_again_in_a_larger_one(tmp_path: Path):
    class Cut(StubTeacher):
        def generate(self, prompt: str, options: GenerateOptions) -> Response:
            return replace(super().generate(prompt, options), done_reason="length" if prompt in self.cut else "stop")

        cut = ("What is number 3?", "What is number 4?")

    run, teacher = make_run(tmp_path, 20), Cut()
    assert capture(run, teachers=[teacher])["done_reasons"] == {"length": 2, "stop": 18}
    run.settings.teacher.context = 8192
    teacher.asked, teacher.cut = [], ("What is number 3?",)
    summary = capture(run, teachers=[teacher])
    assert (summary["done_reasons"], summary["responses"]) == ({"length": 1, "stop": 19}, 20)
    assert sorted(teacher.asked) == ["What is number 3?", "What is number 4?"]
    assert capture(run, teachers=[teacher]) == summary
    capture(run, force=True, teachers=[teacher])
    assert len(teacher.asked) == 2, "in the same context it would be cut again"
    run.settings.teacher.context, teacher.cut = 0, ()
    assert capture(run, teachers=[teacher])["done_reasons"] == {"stop": 20}
    assert teacher.asked[2:] == ["What is number 3?"]


def test_many_answers_cut_short_are_warned_of_once(tmp_path: Path):
    class Talker(StubTeacher):
        def generate(self, prompt: str, options: GenerateOptions) -> Response:
            cut = int(prompt.removeprefix("What is number ").removesuffix("?")) % 4 < self.cut
            return replace(super().generate(prompt, options), done_reason="length" if cut else "stop")

        cut = 0

    for cut, share in ((0, 0.0), (1, 0.25), (4, 1.0)):
        teacher, events = Talker(), list[Event]()
        teacher.cut = cut
        run = make_run(tmp_path, 40, f"run-{cut}", max_tokens=7)
        assert capture(run, events.append, teachers=[teacher])["cut_share"] == share
        warnings = [event.message for event in events if event.kind == "warning"]
        assert len(warnings) == (share > 0.2)
        for warning in warnings:
            assert warning.startswith(f"{share:.0%} of the answers were cut by capture.max_tokens=7")
            assert "raise capture.max_tokens" in warning
            assert "capture.system" in warning
        again: list[Event] = []
        capture(run, again.append, teachers=[teacher])
        assert [event.kind for event in again] == ["done"]


@pytest.mark.parametrize("error", [TeacherUnavailable("http://x: no answer"), TeacherError("HTTP 500")])
def test_a_teacher_that_is_gone_ends_the_capture(tmp_path: Path, error: DistillError):
    teacher = StubTeacher(4, 0.02, fail=lambda prompt: error)
    with pytest.raises(type(error), match=r"given up after 8 failures in a row"):
        capture(make_run(tmp_path, 200), teachers=[teacher])
    assert len(teacher.asked) < 100


def test_a_model_that_is_not_there_ends_the_capture_at_once(tmp_path: Path):
    teacher = StubTeacher(fail=lambda prompt: ModelNotFound("http://x: has no model 'y'"))
    with pytest.raises(ModelNotFound, match=r"has no model 'y'$"):
        capture(make_run(tmp_path, 200), teachers=[teacher])


def test_what_was_answered_before_the_server_went_is_kept(tmp_path: Path):
    count = itertools.count()
    run = make_run(tmp_path, 200)
    teacher = StubTeacher(fail=lambda prompt: TeacherUnavailable("gone") if next(count) > 100 else None)
    with pytest.raises(TeacherUnavailable):
        capture(run, teachers=[teacher])
    with TraceStore(run.traces, readonly=True) as store:
        assert store.stats().responses == 101
    assert "capture" not in run.records()
    rest = StubTeacher()
    assert capture(run, teachers=[rest])["responses"] == 200
    assert len(rest.asked) == 99


def test_a_bug_in_a_teacher_keeps_its_traceback(tmp_path: Path):
    with pytest.raises(ZeroDivisionError):
        capture(make_run(tmp_path, 20), teachers=[StubTeacher(fail=lambda prompt: ZeroDivisionError())])


def test_minutes_stop_the_asking(tmp_path: Path):
    run, teacher = make_run(tmp_path, 500, minutes=0.5 / 60), StubTeacher(4, 0.05)
    told = list[Event]()
    summary = capture(run, told.append, teachers=[teacher])
    assert 16 <= summary["responses"] == len(teacher.asked) < 120
    left = 500 - summary["responses"]
    assert [f"were over before {left} of 500 prompts" in e.message for e in told if e.kind == "note"] == [True]
    assert all(0 <= e.data["eta"] <= 0.5 for e in told if e.kind == "progress"), "the minutes end it"
    assert capture(run, teachers=[teacher]) == summary, "what is there is gone on with"
    run.settings.capture.minutes = 0.0
    assert capture(run, teachers=[StubTeacher(8)])["responses"] == 500


def test_a_teacher_without_logprobs_leaves_text(tmp_path: Path):
    summary = capture(make_run(tmp_path, 10), teachers=[StubTeacher(logprobs=False)])
    assert (summary["responses"], summary["tokens"], summary["soft_share"]) == (10, 0, 0.0)


def test_answers_without_targets_are_asked_again_where_there_may_be_some_now(tmp_path: Path):
    run = make_run(tmp_path, 10)
    capture(run, teachers=[StubTeacher(logprobs=False)])
    without = StubTeacher(logprobs=False)
    capture(run, force=True, teachers=[without])
    assert without.asked == [], "nothing is to be had by asking again"
    summary = capture(run, force=True, teachers=[told := StubTeacher()])
    assert (summary["responses"], len(told.asked)) == (10, 10)
    assert summary["soft_share"] > 0.5
    again = StubTeacher()
    capture(run, force=True, teachers=[again])
    assert again.asked == []


def test_targets_that_are_asked_for_in_vain_are_not_asked_for_again(tmp_path: Path):
    class Hard(StubTeacher):
        """Tells logprobs as far as anybody knows, and none with its answers."""

        def generate(self, prompt: str, options: GenerateOptions) -> Response:
            return replace(super().generate(prompt, options), tokens=None)

    run, failing = make_run(tmp_path, 20), TeacherUnavailable("http://x: no answer")
    assert capture(run, teachers=[Hard(fail=lambda p: failing if "number 7?" in p else None)])["failed"] == 1
    again = Hard()
    assert capture(run, teachers=[again])["responses"] == 20
    assert again.asked == ["What is number 7?"]
    told = StubTeacher()  # by a server that was mended
    assert capture(run, force=True, teachers=[told])["soft_share"] > 0
    assert len(told.asked) == 20


def test_a_capture_that_fails_leaves_what_the_record_tells_of(tmp_path: Path):
    """Its settings are put back: the next stages read what was captured with them."""
    run = make_run(tmp_path, 80)
    capture(run, teachers=[StubTeacher()])

    def selected() -> tuple[int, str]:
        with TraceStore(run.traces, readonly=True) as store:
            return store.stats().responses, store.content_digest()

    before, record, count = selected(), run.require("capture"), itertools.count()
    run.settings.capture.temperature += 0.5
    with pytest.raises(TeacherUnavailable):
        capture(run, teachers=[StubTeacher(fail=lambda _: TeacherUnavailable("gone") if next(count) > 10 else None)])
    assert (selected(), run.require("capture")) == (before, record)
    rest = StubTeacher()
    assert capture(run, teachers=[rest])["responses"] == 80
    assert len(rest.asked) < 80, "what it had said is kept all the same"


def test_a_record_does_not_outlive_what_was_selected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped while it takes fewer, and then told to take all again."""
    run = make_run(tmp_path, 20)
    capture(run, teachers=[StubTeacher()])
    before = run.require("capture").outputs
    assert (changed(run), best_source([run], run.settings)[1]) == ([], ["capture"])

    def press(*_: object) -> None:
        raise KeyboardInterrupt

    run.settings.capture.limit = 5
    with monkeypatch.context() as patched:
        patched.setattr("distill.corpus.capture._run_session", press)
        with pytest.raises(KeyboardInterrupt):
            capture(run, teachers=[StubTeacher()])
    run.settings.capture.limit = 0
    with pytest.raises(MissingStage, match="dream capture"):
        run.require("capture")
    assert capture(run, teachers=[StubTeacher()])["responses"] == 20
    assert run.require("capture").outputs == before
    with (tmp_path / "prompts.txt").open("a", encoding="utf-8") as file:
        file.write("What is one more?\n")
    assert (changed(run), best_source([run], run.settings)[1]) == (["the prompts changed"], [])
    (tmp_path / "prompts.txt").unlink()
    assert changed(run) == [], "what can't be read can't be told"


@pytest.mark.parametrize(("key", "value"), [("top_logprobs", 21), ("max_tokens", 0), ("minutes", -1.0)])
def test_unusable_settings(tmp_path: Path, key: str, value: object):
    with pytest.raises(BadInput, match=f"capture.{key}={value}"):
        capture(make_run(tmp_path, 5, **{key: value}), teachers=[StubTeacher()])


def test_control_c_keeps_what_was_answered_and_says_how_to_go_on(tmp_path: Path):
    run, events = make_run(tmp_path, 200), list[Event]()
    count = itertools.count(1)

    def press_at_the_60th(prompt: str) -> None:
        if next(count) == 60:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        capture(run, events.append, teachers=[StubTeacher(2, 0.02, fail=press_at_the_60th)])
    assert events[-1].kind == "warning"
    assert "the same command goes on" in events[-1].message
    with TraceStore(run.traces, readonly=True) as store:
        stored = store.stats().responses
    assert 30 < stored < 100
    rest = StubTeacher()
    capture(run, teachers=[rest])
    assert len(rest.asked) == 200 - stored


_CHILD = """
import sys
from pathlib import Path
from distill.corpus.capture import MISSING, capture
from distill.run import Run
from tests.support.stub_teacher import StubTeacher
capture(Run.open(Path(sys.argv[1])), teachers=[StubTeacher(4, 0.02)])
"""


def test_killed_and_started_again_it_ends_as_if_undisturbed(tmp_path: Path):
    calm, killed = make_run(tmp_path, 300, "calm"), make_run(tmp_path, 300, "killed")
    capture(calm, teachers=[StubTeacher(16)])
    survived: list[int] = []
    for least in (20, 80):
        child = subprocess.Popen([sys.executable, "-c", _CHILD, str(killed.path)], cwd=ROOT)
        try:
            _wait(lambda least=least: killed.traces.exists() and _responses(killed) >= least)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        survived.append(_responses(killed))
    assert 20 <= survived[0] < survived[1] < 300
    rest = StubTeacher(16)
    capture(killed, teachers=[rest])
    assert len(rest.asked) == 300 - survived[1]
    assert digest(killed) == digest(calm)
    assert killed.records()["capture"].outputs == calm.records()["capture"].outputs


def _responses(run: Run) -> int:
    try:
        with TraceStore(run.traces, readonly=True) as store:
            return store.stats().responses
    except DistillError:  # the child is still making the file
        return 0


def _wait(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.02)
