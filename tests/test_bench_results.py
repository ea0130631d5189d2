"""A benchmark's result: its numbers beside other implementations', its files, and being compared with a saved one."""

import inspect
import json
import os
import platform
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from support.bench_command import Run, bench
from support.fake_ollama import NDJSON, Reply, Request, serve, timed

from bench.check import check
from bench.result import BenchResult, Series, combined, load_result, machine, row
from bench.stopwatch import Stopwatch, listed
from cli import main as entry
from cli.commands.bench import parts
from distill.errors import BadInput, DistillError
from distill.events import Event

QUICK = ("startup",)
"""In the place of its own, which starts processes, `quick_bench`."""

finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
scalars = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | finite | st.text(max_size=8)
facts = st.dictionaries(st.text(max_size=8), scalars, max_size=3)
series_ = st.builds(
    Series,
    name=st.text(min_size=1, max_size=20),
    unit=st.sampled_from(["s", "tokens/s", "ratio"]),
    better=st.sampled_from([1, -1]),
    values=st.lists(finite, min_size=1, max_size=9).map(tuple),
    setting=facts,
)
results = st.builds(
    BenchResult,
    name=st.sampled_from(["train", "all"]),
    series=st.lists(series_, min_size=1, max_size=4),
    settings=facts,
    about=facts,
    warmup=st.integers(0, 3),
    machine=facts,
)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return partial(bench, capsys)


def quick_bench(watch: Stopwatch) -> BenchResult:
    jobs = {name: partial(sum, range(size)) for name, size in (("much", 2_000), ("little", 1_000))}
    return watch.result("startup", listed(watch.seconds(jobs, "quick")), {"of": 2})


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.startup.bench_startup", quick_bench)
        yield


def result_of(*values: float, better: Any = 1, name: str = "speed", **kinds: Any) -> BenchResult:
    return BenchResult("train", [Series(name, "tokens/s", better, values)], **kinds)


# Numbers.
@settings(deadline=None, max_examples=60)
@given(st.lists(finite, min_size=1, max_size=40))
def test_an_interval_holds_its_median(values: list[float]) -> None:
    series = Series("x", "s", -1, tuple(values))
    assert series.median == statistics.median(values)
    low, high = series.interval
    assert min(values) <= low <= series.median <= high <= max(values)


@pytest.mark.parametrize("count", range(1, 60))
def test_the_interval_is_the_narrowest_that_keeps_its_promise(count: int) -> None:
    """Of distinct values, P(median below the l-th of n) = P(Binomial(n, 1/2) < l): beside scipy's tables."""
    low, high = Series("x", "s", 1, tuple(map(float, range(1, count + 1)))).interval
    place = int(low)
    assert high == count + 1 - place
    outside = 2 * binom.cdf(place - 1, count, 0.5)
    assert outside <= 0.05 or place == 1
    assert 2 * binom.cdf(place, count, 0.5) > 0.05, "one further in would do as well"


def test_jobs_alternate_and_warm_up_apart() -> None:
    called: list[str] = []
    jobs = {name: lambda name=name: called.append(name) for name in "ab"}
    told: list[Event] = []
    seconds = Stopwatch(repeat=2, warmup=1, listen=told.append).seconds(jobs, "t")
    assert called == ["b", "a", "a", "b", "b", "a"]
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 2, "b": 2}
    assert [(event.done, event.total) for event in told] == [(1, 3), (2, 3), (3, 3)]
    assert Stopwatch(repeat=2, warmup=1).each(iter("xyz").__next__, "t") == ["y", "z"]


# Files.
@settings(deadline=None, max_examples=60)
@given(results)
def test_json_comes_back_whole(result: BenchResult) -> None:
    again = BenchResult.from_json(json.loads(json.dumps(result.to_json())))
    assert again == result
    assert again.to_json() == result.to_json()


def test_a_row_says_what_was_measured() -> None:
    assert row(Series("a", "s", -1, (1.0, 2.0))) == ("a", "s", "1.5", "1", "2", "1 to 2", "2")
    assert row(Series("c", "s", -1, (1234.5,)))[2] == "1,234"


def test_the_machine_tells_no_name() -> None:
    found = machine()
    assert found["cores"] == os.cpu_count()
    assert found["processor"]
    assert found["threads"] is None or found["threads"] >= 1
    assert platform.node() not in json.dumps({key: value for key, value in found.items() if key != "processor"})


@pytest.mark.parametrize(
    "spoil",
    [
        {"series": [{"name": "x"}]},
        {"series": [{"name": "x", "unit": "s", "better": 1, "setting": {}, "values": []}]},
        {"series": [{"name": "x", "unit": "s", "better": 1, "setting": {}, "values": [float("nan")]}]},
        {"series": [{"name": "x", "unit": "s", "better": 2, "setting": {}, "values": [1]}]},
        {"series": 3},
        {"series": []},
        {"machine": "mine"},
        {"format": 99},
        {"kind": "other"},
    ],
)
def test_a_spoiled_result_is_told(tmp_path: Path, spoil: dict[str, Any]) -> None:
    path = tmp_path / "saved.json"
    path.write_text(json.dumps(result_of(1.0).to_json() | spoil), encoding="utf-8")
    with pytest.raises(BadInput, match=r"saved\.json: ") as told:
        load_result(path)
    assert "\n" not in str(told.value)


# Comparing.
@settings(deadline=None, max_examples=60)
@given(results, st.floats(0, 1))
def test_a_result_is_no_worse_than_itself(result: BenchResult, threshold: float) -> None:
    found = check(result, result, threshold)
    assert {change.verdict for change in found} == {"same"}


@pytest.mark.parametrize("better", [1, -1])
def test_past_the_threshold_and_apart_is_a_change(better: int) -> None:
    saved = result_of(100.0, 101.0, 99.0, better=better)
    for gain, verdict in ((0.3, "better"), (0.05, "same"), (-0.05, "same"), (-0.3, "worse")):
        now = result_of(*(value * (1 + better * gain) for value in (100.0, 101.0, 99.0)), better=better)
        found = check(now, saved, 0.1)
        assert [change.verdict for change in found] == [verdict]
        assert found[0].worse == pytest.approx(-gain)


@pytest.mark.parametrize("better", [1, -1])
def test_past_the_threshold_with_overlap_is_unsure(better: int) -> None:
    now = {1: (60.0, 80.0, 99.5), -1: (100.0, 140.0, 150.0)}[better]
    found = check(result_of(*now, better=better), result_of(100.0, 120.0, 90.0, better=better), 0.1)
    assert [change.verdict for change in found] == ["unsure"]


def test_one_value_alone_tells_no_noise() -> None:
    for before, after in (((100.0,), (50.0,)), ((100.0,), (50.0, 51.0)), ((100.0, 101.0), (50.0,))):
        assert [change.verdict for change in check(result_of(*after), result_of(*before), 0.1)] == ["unsure"]


def test_zero_can_become_worse() -> None:
    (change,) = check(result_of(1.0, 1.0, better=-1), result_of(0.0, 0.0, better=-1), 0.1)
    assert (change.verdict, change.worse) == ("worse", float("inf"))


def test_series_of_another_setting_are_others() -> None:
    both = Series("both", "s", -1, (1.0,), {"batch": 1})
    saved = BenchResult("train", [both, Series("same name", "s", -1, (1.0,), {"batch": 1})])
    now = BenchResult("train", [both, Series("same name", "s", -1, (9.0,), {"batch": 2})])
    assert [change.name for change in check(now, saved, 0.1)] == ["both"]
    with pytest.raises(BadInput, match="none of its series was measured now"):
        check(BenchResult("train", now.series[1:]), saved, 0.1)


def test_results_combine_and_keep_what_each_measured() -> None:
    one = BenchResult("train", [Series("ours", "s", -1, (1.0,), {"batch": 2})], {"rows": 8}, {"x": 1}, warmup=1)
    both = combined("all", {"train": one, "startup": one}, {"export": "no disk"})
    assert [series.name for series in both.series] == ["train: ours", "startup: ours"]
    assert both.series[0].setting == {"rows": 8, "batch": 2}
    assert both.about == {"train": {"x": 1}, "startup": {"x": 1}, "failed": {"export": "no disk"}}


# On the command line.
@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real result on disk."""
    path = tmp_path_factory.mktemp("bench") / "saved.json"
    with pytest.raises(SystemExit) as exit_:
        entry.main(["bench", *QUICK, "--repeat", "3", "--out", str(path)])
    assert not exit_.value.code
    return path


def edited(saved: Path, folder: Path, factor: float = 1.0, **changes: Any) -> Path:
    """A copy whose values of time are `factor` times as great."""
    value = json.loads(saved.read_text(encoding="utf-8")) | changes
    for series in value["series"]:
        if series["unit"] == "s":
            series["values"] = [number * factor for number in series["values"]]
    path = folder / "edited.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_files_and_stdout_say_the_same(run: Run, tmp_path: Path) -> None:
    paths = [tmp_path / "new" / name for name in ("one.json", "two.json")]
    code, out, err = run(*QUICK, "--repeat", 2, "--json", *(part for path in paths for part in ("--out", path)))
    assert code == 0, err
    assert (
        json.loads(out)
        == json.loads(paths[0].read_text(encoding="utf-8"))
        == json.loads(paths[1].read_text(encoding="utf-8"))
    )
    result = load_result(paths[0])
    assert all(len(series.values) == 2 for series in result.series)


def test_against_a_slower_and_a_faster_past(run: Run, saved: Path, tmp_path: Path) -> None:
    there = json.loads(saved.read_text(encoding="utf-8"))["machine"] | {"processor": "Abacus 3000", "torch": "0.1"}
    code, out, err = run(*QUICK, "--repeat", 3, "--against", edited(saved, tmp_path, 1000.0, machine=there))
    assert code == 0, err
    assert "was measured elsewhere (processor Abacus 3000, now" in err
    assert "torch 0.1, now" in err
    assert "better" in out
    assert "0 of 2 worse by more than 10%" in out
    code, out, err = run(*QUICK, "--repeat", 3, "--against", edited(saved, tmp_path, 0.001))
    assert code == 1, out
    assert "2 of 2 worse" in out
    worse = [line for line in out.splitlines() if line.endswith("worse")]
    assert [line.split("  ")[0] for line in worse] == ["much", "little"]
    code, out, err = run(*QUICK, "--against", edited(saved, tmp_path, 0.001), "--threshold", 1e9, "--json")
    assert code == 0, err
    assert {change["verdict"] for change in json.loads(out)["against"]["changes"]} == {"same"}
    assert BenchResult.from_json(json.loads(out)).name == "startup", "what --json printed can be compared with, too"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "no such file"),
        ("", "can't be read"),
        ("[" * 100_000, "can't be read"),
        ("[1, 2]", "holds no result"),
        ('{"ours": 3}', "holds no result"),
        (b"\xff\xfe\x00", "can't be read"),
        (json.dumps(result_of(1.0).to_json()), "is of `dream bench train`, not of `dream bench startup`"),
    ],
)
def test_a_file_that_is_no_result_is_refused_before_measuring(
    run: Run, tmp_path: Path, content: str | bytes | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "old.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes() if path.exists() else None
    monkeypatch.setattr("bench.startup.bench_startup", lambda *_: pytest.fail("measured in vain"))
    code, out, err = run(*QUICK, "--against", path, "--out", tmp_path / "new.json")
    assert (code, out) == (1, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert told in err
    assert str(path) in err
    assert (path.read_bytes() if path.exists() else None) == before
    assert not (tmp_path / "new.json").exists()


def test_other_settings_are_nothing_to_compare(run: Run, saved: Path, tmp_path: Path) -> None:
    out_file = tmp_path / "now.json"
    other = edited(saved, tmp_path, settings={"of": 3})
    code, out, err = run(*QUICK, "--against", other, "--out", out_file)
    assert code == 1
    assert "other settings (of 3, now 2)" in err
    assert "much" in out, "what was measured is not lost"
    assert load_result(out_file).settings["of"] == 2


def test_a_baseline_is_renewed_unless_it_is_failed_against(run: Run, saved: Path, tmp_path: Path) -> None:
    path = edited(saved, tmp_path, 0.001)
    before = path.read_bytes()
    code, _, err = run(*QUICK, "--against", path, "--out", path)
    assert code == 1
    assert "kept as it was" in err
    assert path.read_bytes() == before
    path = edited(saved, tmp_path, 1000.0)
    code, _, err = run(*QUICK, "--against", path, "--out", path)
    assert code == 0, err
    assert load_result(path).named("much").median < load_result(saved).named("much").median * 100


IMPOSSIBLE = [("generate", "--batch", "1,x"), ("generate", "--batch", "0"), ("ollama",)]


@pytest.mark.parametrize("args", IMPOSSIBLE)
def test_impossible_numbers_are_usage_errors(run: Run, args: tuple[object, ...]) -> None:
    code, _, err = run(*args)
    assert code == 2
    assert "Error" in err


def test_one_that_fails_doesn_t_lose_the_others(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(watch: Stopwatch) -> BenchResult:
        raise DistillError("the disk is full")

    def bug(watch: Stopwatch) -> BenchResult:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(parts, "quick", lambda: {"export": breaks, "startup": quick_bench, "train": bug})
    code, out, err = run("all", "--repeat", 2, "--json")
    assert code == 1
    result = json.loads(out)
    assert result["series"][0]["name"] == "startup: much"
    assert result["about"]["failed"] == {"export": "the disk is full", "train": "ZeroDivisionError: by zero"}
    assert "export: failed: the disk is full" in err
    assert "Traceback" in err
    monkeypatch.setattr(parts, "quick", lambda: {"export": breaks})
    assert run("all")[::2] == (1, "Error: export: failed: the disk is full\n")


def test_the_quick_batch_asks_for_what_there_is() -> None:
    quick = parts.quick()
    assert set(quick) == {"startup", "train", "generate", "capture"}
    for measure in quick.values():
        inspect.signature(measure).bind(Stopwatch(1, 0))


# Ollama.
MODEL = "smollm2:135m"


def test_ollama_s_clock_and_ours(run: Run) -> None:
    """A server that reads a prompt in 0.05 s and writes 9 tokens in 0.45 s, two requests at once."""
    with timed(slots=2, seconds=0.5) as server:
        args = ("ollama", MODEL, "--host", server.url, "--words", 8, "--concurrency", "1,4", "--tokens", 8)
        code, out, err = run(*args, "--repeat", 2, "--warmup", 1, "--json")
        assert code == 0, err
        asked = [request.json for request in server.requests if request.path == "/api/generate"]
    assert len(asked) == 1 + 3 * (1 + 4)
    assert len({body["prompt"] for body in asked}) == len(asked), "an answer may not come out of the server's cache"
    assert {len(body["prompt"].split()) for body in asked} == {8}
    assert all(body["options"]["num_predict"] == 8 and body["stream"] for body in asked)
    result = BenchResult.from_json(json.loads(out))
    one, four = (f"{MODEL}, prompt 8 words, {count} at once" for count in (1, 4))
    first = result.named(f"{one}: first token, client")
    assert first.setting == {"model": MODEL, "prompt_words": 8, "at_once": 1}
    assert 0.05 + 0.45 / 8 <= first.median < 0.5
    assert result.named(f"{one}: writing, server").median == pytest.approx(8 / 0.45)
    assert result.named(f"{one}: reading, server").median == pytest.approx(17 / 0.05)
    assert 8 < result.named(f"{one}: writing, client").median <= 8 / 0.45 * 1.01
    assert 8 < result.named(f"{one}: all requests, client").median <= 16
    assert result.named(f"{four}: first token, client").median > first.median, "two of four wait"
    assert result.named(f"{four}: all requests, client").median > result.named(f"{one}: all requests, client").median
    assert result.about[MODEL]["quantization_level"] == "Q4_1"
    assert result.machine["ollama"] == "0.33.0-rc2"
    assert len(result.machine[MODEL]) == 12
    assert server.url.partition("//")[2] not in out


class Broken:
    """A server whose streams are not what they should be."""

    def __init__(self, *chunks: Any) -> None:
        self.chunks = chunks

    def answer(self, request: Request) -> Reply:
        if request.path == "/api/version":
            return Reply(200, NDJSON, b'{"version": "0.33.0"}')
        if request.path == "/api/generate":
            return Reply(200, NDJSON, stream=self.chunks)
        return Reply(200, NDJSON, b'{"models": []}')

    def knows_blob(self, path: str) -> bool:
        return False

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("chunks", "told"),
    [
        ([{"response": "a", "done": False}], "breaks off /api/generate before its end"),
        ([{"response": "a", "done": True}], "breaks off /api/generate before its end"),
        ([], "breaks off /api/generate before its end"),
        ([{"response": "a", "done": False}, {"error": "out of memory"}], "out of memory"),
        (["hello"], "something that is no JSON"),
    ],
)
def test_a_broken_stream_is_told(run: Run, chunks: list[Any], told: str) -> None:
    with serve(Broken(*chunks)) as server:
        code, out, err = run("ollama", "any", "--host", server.url)
    assert (code, out) == (1, "")
    assert told in err
    assert err.count("\n") == 1


def test_what_the_server_does_not_say_is_missing_not_guessed(run: Run) -> None:
    """One chunk, no durations: no rate of the server's, and none between first and last text."""
    last = {"response": "", "done": True, "done_reason": "stop", "eval_count": 3}
    with serve(Broken({"response": "all", "done": False}, last)) as server:
        code, out, err = run("ollama", "any", "--host", server.url, "--json")
    assert code == 0, err
    names = [series["name"] for series in json.loads(out)["series"]]
    label = "any, prompt 64 words, 1 at once"
    assert names == [f"{label}: first token, client", f"{label}: all requests, client"]


def test_no_model_no_server_and_a_slow_one(run: Run) -> None:
    with timed(slots=1, seconds=0.1) as server:
        code, _, err = run("ollama", "missing-model", "--host", server.url)
        assert code == 1
        assert "model 'missing-model' not found" in err
        server.fail("slow", seconds=3)
        code, _, err = run("ollama", MODEL, "--host", server.url, "--timeout", 0.5)
        assert code == 1
        assert "no answer within 0.5 s" in err
        server.fail("503")
        code, _, err = run("ollama", MODEL, "--host", server.url)
        assert code == 1
        assert "503" in err
    code, _, err = run("ollama", MODEL, "--host", "http://127.0.0.1:9")
    assert code == 1
    assert "no Ollama answers there" in err
