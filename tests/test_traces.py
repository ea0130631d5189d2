import json
import os
import sqlite3
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from distill.corpus.export_traces import export_traces
from distill.corpus.pack_targets import logical_bytes, pack_targets, unpack_targets
from distill.corpus.traces import FORMAT, Trace, TraceStore
from distill.errors import BadInput, CorruptFile, DistillError, MissingStage, RunMismatch
from distill.events import Event
from distill.teacher.protocol import GenerateOptions, Response, TeacherInfo, TokenTargets
from tests.support.stub_teacher import StubTeacher, make_targets

INFO = TeacherInfo("stub:x", "x", "d" * 64, "t" * 64, "1", True)


def make_trace(number: int, info: TeacherInfo = INFO, seconds: float = 1.0) -> Trace:
    options = GenerateOptions(seed=number)
    response = Response(f"Text {number} é⟨a⟩", make_targets(12, 20, 400, number), "stop", {"service": seconds})
    prompt = f"Prompt {number}"
    return Trace(TraceStore.key(info, prompt, options), prompt, number % 3 == 0, response, options, info.digest)


def fill(path: Path, numbers: list[int], seconds: float = 1.0) -> None:
    with TraceStore(path) as store:
        store.put_teacher(INFO, StubTeacher().tokenizer())
        for number in numbers:
            store.put(make_trace(number, seconds=seconds))


@st.composite
def any_targets(draw: st.DrawFn) -> TokenTargets:
    n, k = draw(st.integers(0, 12)), draw(st.integers(0, 20))
    ids = hnp.arrays(np.int32, n, elements=st.integers(-1, 262143))
    top = hnp.arrays(np.int32, (n, k), elements=st.integers(-1, 2**31 - 1))
    logprob = st.one_of(st.floats(-100, 0, width=32), st.sampled_from([np.nan, -np.inf, -1e9, -0.0]))
    targets = TokenTargets(
        draw(ids),
        draw(hnp.arrays(np.float32, n, elements=logprob)),
        draw(top),
        draw(hnp.arrays(np.float32, (n, k), elements=logprob)),
        draw(hnp.arrays(np.bool_, n)),
    )
    if k and draw(st.booleans()):  # as it mostly is: the sampled token is one of the alternatives
        rank = draw(hnp.arrays(np.int64, n, elements=st.integers(0, k - 1)))
        rows = np.arange(n)
        targets = replace(targets, ids=targets.top_ids[rows, rank], logprobs=targets.top_logprobs[rows, rank])
    return targets


def assert_equal_after_rounding(result: TokenTargets, targets: TokenTargets) -> None:
    for name in ("ids", "top_ids", "soft"):
        np.testing.assert_array_equal(getattr(result, name), getattr(targets, name))
        assert getattr(result, name).dtype == getattr(targets, name).dtype
    for name in ("logprobs", "top_logprobs"):
        with np.errstate(over="ignore"):
            rounded = getattr(targets, name).astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(getattr(result, name), rounded)
        assert getattr(result, name).dtype == np.float32


@settings(max_examples=150, deadline=None)
@given(any_targets())
def test_packing_is_exact_but_for_float16(targets: TokenTargets):
    assert_equal_after_rounding(unpack_targets(pack_targets(targets)), targets)


@pytest.mark.parametrize("n", [1, 300, 3000])
def test_packing_many_distinct_ids(n: int):
    rng = np.random.default_rng(n)
    top = rng.integers(0, 256_000, (n, 20)).astype(np.int32)
    top_logprobs = -np.sort(rng.gamma(4, 2, (n, 20))).astype(np.float32)
    targets = TokenTargets(top[:, 0], top_logprobs[:, 0], top, top_logprobs, np.ones(n, np.bool_))
    assert_equal_after_rounding(unpack_targets(pack_targets(targets)), targets)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_an_altered_or_cut_response_is_noticed(tmp_path_factory: pytest.TempPathFactory, place: int, byte: int):
    blob = pack_targets(make_targets(12, 20, 400, 1))
    altered = bytearray(blob)
    altered[place % len(blob)] = byte
    for bad in (bytes(altered), blob[: place % len(blob)], blob + b"x"):
        try:
            result = unpack_targets(bad)
        except CorruptFile:
            continue
        # Only an equal blob, or what zlib takes for one, may pass.
        assert_equal_after_rounding(result, make_targets(12, 20, 400, 1))


def test_logical_bytes_do_not_depend_on_the_compressor():
    import zlib

    blob = pack_targets(make_targets(30, 20, 400, 1))
    header = blob[: len(blob) - len(zlib.compress(zlib.decompress(blob[14:]), 6))]
    other = header + zlib.compress(zlib.decompress(blob[14:]), 1)
    assert other != blob
    assert logical_bytes(other) == logical_bytes(blob)


@pytest.mark.parametrize("vocabulary", [49_152, 128_256, 256_000])
def test_at_most_90_bytes_a_token(vocabulary: int):
    packed = [len(pack_targets(make_targets(64, 20, vocabulary, seed))) for seed in range(5)]
    text = 4.5  # bytes a token, English
    assert sum(packed) / (5 * 64) + text <= 90


def test_what_is_selected_stays_so_where_it_is_gathered_again(tmp_path: Path):
    fill(tmp_path / "traces.db", [1, 2])
    with TraceStore(tmp_path / "traces.db") as store:
        before = store.content_digest()
        again = make_trace(1)
        store.put(replace(again, response=replace(again.response, text="Another one.")), chosen=False)
        assert store.content_digest() == before
        store.put(make_trace(3), chosen=False)
        assert (store.stats().responses, store.left_out()) == (2, 1)


def test_a_trace_comes_back_as_it_was(tmp_path: Path):
    fill(tmp_path / "traces.db", [1, 2, 3])
    with TraceStore(tmp_path / "traces.db", readonly=True) as store:
        trace = make_trace(2)
        back = store.get(trace.key)
        assert replace(back, response=replace(back.response, tokens=None)) == replace(
            trace, response=replace(trace.response, tokens=None)
        )
        assert back.response.tokens is not None
        assert trace.response.tokens is not None
        assert_equal_after_rounding(back.response.tokens, trace.response.tokens)
        assert store.has(trace.key)
        assert not store.has("x")
        assert store.teacher() == INFO
        assert store.tokenizer() == StubTeacher().tokenizer()
        with pytest.raises(KeyError):
            store.get("x")


def test_thinking_lies_beside_its_answer_and_old_stores_have_none(tmp_path: Path):
    path = tmp_path / "traces.db"
    fill(path, [1, 2])
    with TraceStore(path, readonly=True) as store:
        digest = store.content_digest()
    db = sqlite3.connect(path)  # as before there was thinking
    db.execute("DROP TABLE thinking")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    with TraceStore(path, readonly=True) as store:
        assert (store.content_digest(), store.stats().thinking) == (digest, 0)
        assert [trace.response.thinking for trace in store.traces()] == ["", ""]
    trace, thought = make_trace(2), make_targets(5, 20, 400, 9)
    with TraceStore(path) as store:
        for text, tokens in (("Hm ⟨a⟩", None), ("So", thought)):
            store.put(replace(trace, response=replace(trace.response, thinking=text, thought=tokens)))
            back = store.get(trace.key).response
            assert (back.thinking, back.text, back.thought is None) == (text, trace.response.text, tokens is None)
        assert back.thought is not None
        assert_equal_after_rounding(back.thought, thought)
        assert (store.stats().thinking, store.stats().thinking_tokens, store.stats().tokens) == (1, 5, 24)
        assert store.content_digest() != digest
        store._db.execute("UPDATE thinking SET thinking = 'No'")  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(CorruptFile, match="was altered"):
            store.get(trace.key)
        store.put(trace)
        assert store.content_digest() == digest


def test_keys_of_what_does_not_think_are_what_they_were():
    """Else every run of before would ask its teacher anew."""
    key = "6aa4770de85daa45e5569ec900e35f60b28de3566c7a8a3460c2af038340c9ba"
    assert TraceStore.key(INFO, "a", GenerateOptions()) == key
    assert TraceStore.key(INFO, "a", GenerateOptions(thinking_tokens=7)) == key
    assert TraceStore.key(INFO, "a", GenerateOptions(think="true", thinking_tokens=7)) != key


def test_a_response_without_tokens(tmp_path: Path):
    trace = replace(make_trace(1), response=Response("Only text.", None, "length"))
    with TraceStore(tmp_path / "traces.db") as store:
        store.put_teacher(INFO, None)
        store.put(trace)
        assert list(store.traces()) == [trace]
        assert store.tokenizer() is None
        assert store.stats().bytes_per_token == 0.0
        assert len(store.content_digest()) == 64


def test_order_and_digest_depend_on_content_only(tmp_path: Path):
    fill(tmp_path / "a.db", [1, 2, 3, 4])
    fill(tmp_path / "b.db", [4, 2, 1, 3], seconds=9.0)
    fill(tmp_path / "c.db", [1, 2, 3])
    stores = [TraceStore(tmp_path / f"{name}.db", readonly=True) for name in "abc"]
    a, b, c = stores
    assert [t.key for t in a.traces()] == [t.key for t in b.traces()] == sorted(t.key for t in a.traces())
    assert a.content_digest() == b.content_digest() != c.content_digest()
    for store in stores:
        store.close()


def test_selection(tmp_path: Path):
    fill(tmp_path / "traces.db", [1, 2, 3])
    one, two, three = (make_trace(number) for number in (1, 2, 3))
    with TraceStore(tmp_path / "traces.db") as store:
        whole = store.content_digest()
        assert store.select({one.key: True, two.key: False, "unknown": True}) == 2
        assert [t.prompt for t in store.traces(held_out=True)] == ["Prompt 1"]
        assert [t.prompt for t in store.traces(held_out=False)] == ["Prompt 2"]
        assert store.stats().responses == 2
        assert store.has(three.key)
        assert store.content_digest() != whole
        store.select({t.key: t.held_out for t in (one, two, three)})
        assert store.content_digest() == whole


def test_stats(tmp_path: Path):
    fill(tmp_path / "traces.db", [1, 2, 3])
    with TraceStore(tmp_path / "traces.db", readonly=True) as store:
        stats = store.stats()
    size = sum(len(make_trace(n).response.text.encode()) for n in (1, 2, 3))
    size += sum(len(pack_targets(make_targets(12, 20, 400, n))) for n in (1, 2, 3))
    assert (stats.responses, stats.held_out, stats.tokens, stats.soft_tokens) == (3, 1, 36, 33)
    assert stats.bytes_per_token == pytest.approx(size / 36)
    assert stats.done_reasons == {"stop": 3}


def test_keys_depend_on_everything_asked():
    options = GenerateOptions()
    keys = {
        TraceStore.key(INFO, "a", options),
        TraceStore.key(INFO, "b", options),
        TraceStore.key(INFO, "a", replace(options, temperature=0.0)),
        TraceStore.key(replace(INFO, digest="e" * 64), "a", options),
        TraceStore.key(replace(INFO, template_digest="e" * 64), "a", options),
    }
    assert len(keys) == 5
    assert TraceStore.key(replace(INFO, version="2", details={"x": 1}), "a", options) in keys


def test_another_teacher_is_refused_by_name(tmp_path: Path):
    fill(tmp_path / "traces.db", [1])
    with TraceStore(tmp_path / "traces.db") as store:
        store.put_teacher(replace(INFO, version="2"), None)
        with pytest.raises(RunMismatch, match="stub:x"):
            store.put_teacher(replace(INFO, spec="stub:y", digest="e" * 64), None)
        with pytest.raises(RunMismatch, match="template"):
            store.put_teacher(replace(INFO, template_digest="e" * 64), None)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE responses SET text = text || 'x'",
        "UPDATE responses SET prompt = 'x'",
        "UPDATE responses SET done_reason = 'length'",
        "UPDATE responses SET targets = substr(targets, 1, 50)",
        "UPDATE responses SET targets = NULL",
        "UPDATE responses SET targets = CAST(x'ff' AS TEXT)",
        "UPDATE responses SET targets = CAST(substr(targets, 1, 60) || x'ff' || substr(targets, 62) AS BLOB)",
    ],
)
def test_altered_rows_are_noticed(tmp_path: Path, change: str):
    path = tmp_path / "traces.db"
    fill(path, [1])
    with sqlite3.connect(path) as db:
        db.execute(change)
    db.close()
    with (
        TraceStore(path, readonly=True) as store,
        pytest.raises(CorruptFile, match=r"traces\.db: .*(altered|no sound)"),
    ):
        list(store.traces())


def test_files_that_are_no_trace_database(tmp_path: Path):
    path = tmp_path / "traces.db"
    with pytest.raises(MissingStage, match="dream capture"):
        TraceStore(path, readonly=True)
    path.write_bytes(b"no database at all, but long enough to hold a header" * 20)
    with pytest.raises(CorruptFile, match=r"traces\.db"):
        TraceStore(path)
    path.unlink()
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE x (y)")
    db.close()
    with pytest.raises(BadInput, match="not one of traces"):
        TraceStore(path)


def test_another_format_version_is_named(tmp_path: Path):
    path = tmp_path / "traces.db"
    fill(path, [1])
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {FORMAT + 1}")
    db.close()
    with pytest.raises(BadInput, match=f"trace format {FORMAT + 1}, this version reads {FORMAT}"):
        TraceStore(path)


def test_traces_of_before_there_were_several_answers_a_prompt(tmp_path: Path):
    path = tmp_path / "traces.db"
    fill(path, [1, 2])
    db = sqlite3.connect(path)
    columns = "key, prompt, held_out, text, done_reason, options, tokens, soft, targets, checksum, timings"
    db.executescript(
        f"CREATE TABLE old AS SELECT {columns} FROM responses; DROP TABLE responses;"
        "ALTER TABLE old RENAME TO responses; PRAGMA user_version = 1"
    )
    db.close()
    with TraceStore(path, readonly=True) as store:
        before, digest = list(store.traces()), store.content_digest()
        assert [trace.sample for trace in before] == [0, 0]
        assert store.get(before[0].key).prompt == before[0].prompt
    with TraceStore(path) as store:
        store.put(replace(make_trace(3), sample=2))
    with TraceStore(path, readonly=True) as store:
        assert {trace.key: trace.sample for trace in store.traces()} == {
            **{trace.key: 0 for trace in before},
            make_trace(3).key: 2,
        }
        assert store.content_digest() != digest


def test_a_database_cut_short(tmp_path: Path):
    path = tmp_path / "traces.db"
    fill(path, list(range(40)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CorruptFile, match=r"traces\.db"), TraceStore(path, readonly=True) as store:
        list(store.traces())


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path):
    path = tmp_path / "traces.db"
    with TraceStore(path) as store:
        store.put_teacher(INFO, None)
        store._db.execute("PRAGMA max_page_count = 20")  # SQLite then answers as on a full disk
        stored = 0

        def put_until_full() -> None:
            nonlocal stored
            for stored in range(200):
                store.put(make_trace(stored))

        with pytest.raises(DistillError, match="disk is full"):
            put_until_full()
    with TraceStore(path, readonly=True) as store:
        assert len(list(store.traces())) == stored > 0


def exported(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        return pq.read_table(file).to_pylist()
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_export(tmp_path: Path, format: str):
    path, out = tmp_path / "traces.db", tmp_path / "out" / f"traces.{format}"
    fill(path, list(range(5)))
    with TraceStore(path) as store:
        store.put(make_trace(7), chosen=False)
    events: list[Event] = []
    assert export_traces(path, out, format, events.append) == 5
    assert [event.message for event in events if event.kind == "warning"] == [
        f"1 responses aren't selected: left out; `dream capture {tmp_path}` selects what was gathered"
    ]
    rows = exported(out)
    with TraceStore(path, readonly=True) as store:
        traces, tokenizer = list(store.traces()), store.tokenizer()
    assert tokenizer is not None
    assert [row["key"] for row in rows] == [trace.key for trace in traces]
    for row, trace in zip(rows, traces, strict=True):
        targets = trace.response.tokens
        assert targets is not None
        assert (row["prompt"], row["held_out"], row["text"]) == (trace.prompt, trace.held_out, trace.response.text)
        assert row["ids"] == targets.ids.tolist()
        assert row["tokens"] == [tokenizer.tokens[i] for i in row["ids"]]
        assert row["logprobs"][-1] is None
        assert row["top_ids"][-1] == []
        assert row["soft"] == targets.soft.tolist()
        assert row["top_tokens"][0] == [tokenizer.tokens[i] for i in targets.top_ids[0]]
        got = np.array(row["top_logprobs"][:-1], np.float32).astype(np.float16)
        np.testing.assert_array_equal(got, targets.top_logprobs[:-1].astype(np.float16))
    assert [file.name for file in out.parent.iterdir()] == [out.name]
    assert export_traces(path, out, format, shards=3) == 5
    parts = [exported(out.with_name(f"traces-0000{n}-of-00003.{format}")) for n in range(3)]
    assert [len(part) for part in parts] == [1, 2, 2]
    assert [row for part in parts for row in part] == rows
    assert len(list(out.parent.iterdir())) == 4


def test_what_lies_on_read_only_media_can_be_read() -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "run" / "traces.db"
        fill(path, [1, 2])
        Path(name).chmod(0o755)
        path.chmod(0o444)
        path.parent.chmod(0o555)
        user = os.geteuid()
        if user == 0:  # who may write everywhere
            os.seteuid(65534)
        try:
            with TraceStore(path, readonly=True) as store:
                assert store.stats().responses == 2
        finally:
            os.seteuid(user)
        assert [file.name for file in path.parent.iterdir()] == ["traces.db"]
        path.parent.chmod(0o755)


def test_export_refuses_other_formats(tmp_path: Path):
    for format in ("csv", ""):
        with pytest.raises(BadInput, match=r"x: traces are exported to files that end in \.parquet or \.jsonl"):
            export_traces(tmp_path / "traces.db", tmp_path / "x", format)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_what_is_half_read_when_it_is_closed_says_nothing(tmp_path: Path) -> None:
    """As after an interrupt, when the reading is dropped last."""
    fill(tmp_path / "traces.db", [1, 2])
    with TraceStore(tmp_path / "traces.db") as store:
        reading = [store.traces(), store.answers()]
        assert all(map(next, reading))
    reading.clear()
