import contextlib
import csv
import gzip
import itertools
import json
import re
import tempfile
import tracemalloc
import unittest.mock
from pathlib import Path

import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.corpus import prompt_files
from distill.corpus.prompt_rows import Reading, Rows
from distill.corpus.prompts import evenly, is_held_out, load_prompts, prompt_sets, read_prompts
from distill.errors import BadInput
from distill.events import Event
from distill.tokens.packing import is_validation
from distill.turns import is_conversation, joined, turns, words


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_sets_hold_enough_distinct_sensible_prompts():
    sets = prompt_sets()
    assert {"everyday", "explain", "advice"} <= set(sets)
    prompts = load_prompts(sets, 0.1)
    texts = [prompt.text for prompt in prompts]
    assert len(texts) == len(set(texts)) >= 2000
    assert len(load_prompts(["everyday"], 0.1)) >= 1200
    assert all("{" not in text and "  " not in text and text[0].isupper() for text in texts)
    assert all(text[-1] in ".?!" for text in texts)


def test_sets_have_no_articles_before_the_wrong_sound():
    words = [text.lower().split() for text in (p.text for p in load_prompts(prompt_sets(), 0.1))]
    pairs = {(a, b) for line in words for a, b in itertools.pairwise(line)}
    an_for_u = ("hour", "honest", "hourglass")
    yoo = ("us", "uni", "eu", "one", "usual")
    wrong = {(a, b) for a, b in pairs if a == "a" and b[0] in "aeiou" and not b.startswith(yoo)}
    wrong |= {(a, b) for a, b in pairs if a == "an" and b[0] not in "aeiou" and not b.startswith(an_for_u)}
    assert wrong == set()


@given(st.text(max_size=40), st.floats(0, 1), st.floats(0, 1))
def test_what_a_smaller_share_holds_out_a_larger_one_does_too(text: str, a: float, b: float):
    assert is_held_out(text, min(a, b)) <= is_held_out(text, max(a, b))
    assert not is_held_out(text, 0.0)
    assert is_held_out(text, 1.0)


def test_held_out_is_the_hash_of_the_text():
    # SHA-256("abc") = ba7816bf…: 0xba7816bf / 2**32 = 0.7284
    assert is_held_out("abc", 0.73)
    assert not is_held_out("abc", 0.72)


def test_held_out_share_is_about_right():
    prompts = load_prompts(prompt_sets(), 0.1)
    assert 0.07 < sum(prompt.held_out for prompt in prompts) / len(prompts) < 0.13


@pytest.mark.parametrize("limit", [2, 20, 100, 500])
def test_limit_spreads_and_a_larger_one_keeps_what_a_smaller_chose(limit: int):
    everything = load_prompts(["everyday"], 0.1)
    few, more = load_prompts(["everyday"], 0.1, limit), load_prompts(["everyday"], 0.1, limit + 50)
    assert len(few) == limit
    assert {p.text for p in few} <= {p.text for p in more}
    share = sum(p.held_out for p in everything) / len(everything)
    assert sum(p.held_out for p in few) == max(1, round(limit * share))
    places = {p.text: i for i, p in enumerate(everything)}
    positions = [places[p.text] for p in few]
    assert positions == sorted(positions)
    gaps = [b - a for a, b in zip([0, *positions], [*positions, len(everything)], strict=True)]
    assert max(gaps) <= 4 * len(everything) / limit


@given(st.integers(1, 3000))
def test_evenly_is_a_permutation(count: int):
    assert sorted(evenly(count)) == list(range(count))


def test_text_and_json_lines(tmp_path: Path):
    text = write(tmp_path / "a.txt", "# a comment\nWhat is rain?\n\n  Why?  \nWhat is rain?\n")
    lines = write(tmp_path / "b.jsonl", '{"prompt": "Why?"}\n\n"A plain\u2028string"\n{"prompt": "Where?", "id": 3}\n')
    prompts = load_prompts([str(text), str(lines)], 0.0)
    assert [(p.text, Path(p.source).name) for p in prompts] == [
        ("What is rain?", "a.txt"),
        ("Why?", "a.txt"),
        ("A plain\u2028string", "b.jsonl"),
        ("Where?", "b.jsonl"),
    ]


def saved_by_datasets(folder: Path, name: str, table: pyarrow.Table) -> None:
    """What `datasets`' save_to_disk leaves: rows as an Arrow stream, and JSON beside them that holds none."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.ipc.new_stream(folder / name, table.schema) as stream:
        stream.write_table(table)
    write(folder / "dataset_info.json", "{}")
    write((folder / name).parent / "state.json", "{}")


KINDS: dict[str, object] = {
    "a string": "Why?",
    "a prompt": {"prompt": "Why?", "id": 1},
    "a question": {"id": 1, "question": " Why? ", "answer": "So."},
    "Alpaca's": {"instruction": "Why?", "input": "", "output": "So."},
    "OpenAI's": {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
    "OpenAI's parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]},
    "ShareGPT's": {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    "bare turns": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": None}],
}


@pytest.mark.parametrize("row", KINDS.values(), ids=KINDS.keys())
def test_rows_that_others_wrote(tmp_path: Path, row: object):
    assert read_prompts(write(tmp_path / "a.jsonl", f"{json.dumps(row)}\n" * 2)) == ["Why?"] * 2
    assert read_prompts(write(tmp_path / "a.json", json.dumps([row], indent=1))) == ["Why?"]
    values = (tmp_path / "b.json", tmp_path / "a.jsonl.gz")
    write(values[0], f"{json.dumps(row)}\n" * 2)  # lines in a .json
    values[1].write_bytes(gzip.compress(f"{json.dumps(row)}\n".encode() * 2))
    if isinstance(row, dict):
        assert [read_prompts(value) for value in values] == [["Why?"] * 2] * 2
        pyarrow.parquet.write_table(table := pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
        pyarrow.feather.write_feather(table, str(tmp_path / "a.feather"))
        saved_by_datasets(tmp_path / "saved", "data-00000-of-00001.arrow", table)
        for name in ("a.parquet", "a.feather", "saved"):
            assert read_prompts(tmp_path / name) == ["Why?"], name


def test_tables_and_their_columns(tmp_path: Path):
    for suffix, separator in ((".csv", ","), (".tsv", "\t")):
        file = tmp_path / f"a{suffix}"
        with file.open("w", encoding="utf-8", newline="") as table:
            csv.writer(table, delimiter=separator).writerows(
                [["id", "question", "said"], ["1", 'Why, "so"?\nor not?', "a\tb, c"], [], ["2", "Where?", "there"]]
            )
        assert read_prompts(file) == ['Why, "so"?\nor not?', "Where?"]
        assert [prompt.text for prompt in load_prompts([f"{file}:said"], 0.0)] == ["a\tb, c", "there"]
        with pytest.raises(BadInput, match=r"a\.[ct]sv:3: holds no column 'none'; its columns are id, question, said"):
            load_prompts([f"{file}:none"], 0.0)
    for text in ("id;prompt\n1;Why, and how?\n", '"id";"prompt"\n1;"Why, and how?"\n', "id\tprompt\n1\tWhy, and how?"):
        assert read_prompts(write(tmp_path / "c.csv", text)) == ["Why, and how?"]
    assert read_prompts(write(tmp_path / "c.csv", "prompt\nWhy; how?\n")) == ["Why; how?"]
    alpaca = {"instruction": "Sum up.", "input": "A long text.", "output": "Text."}
    assert read_prompts(write(tmp_path / "b.json", json.dumps([alpaca]))) == ["Sum up.\n\nA long text."]


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "What falls faster?"},
    {"role": "assistant", "content": "<think>\nair?\n</think>\nBoth alike."},
    {"role": "user", "content": "Why?"},
    {"role": "user", "content": "Really?"},
    {"role": "assistant", "content": "Weight cancels."},
]


def test_conversations_are_asked_with_the_turns_before(tmp_path: Path):
    sharegpt = [{"from": t["role"].replace("user", "human"), "value": t["content"]} for t in TALK[1:]]
    rows = [
        {"messages": TALK},
        {"conversations": sharegpt, "system": "Be brief."},
        {"prompt": TALK[:-1], "chosen": TALK},
    ]
    file = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    told: list[Event] = []
    first = [("system", "Be brief."), ("user", "What falls faster?")]
    last = [*first, ("assistant", "Both alike."), ("user", "Why?\n\nReally?")]
    texts = read_prompts(file, told.append)
    assert [turns(text) for text in texts] == [last] * 3
    assert len({*texts}) == 1
    assert [event.message for event in told] == [
        f"{file}: 3 rows; asked is what stands in messages or conversations or prompt; answered in messages or "
        "conversations or chosen (not read: --answers given learns them); left out: 3 greetings before a first question"
    ]
    given = load_prompts([str(file)], 0.0, how=Reading(given=True, every=True))
    assert [(turns(prompt.text), prompt.answer) for prompt in given] == [
        (first, "<think>\nair?\n</think>\nBoth alike."),
        (last, "Weight cancels."),
    ]
    assert [prompt.answer for prompt in load_prompts([str(file)], 0.0, how=Reading(given=True))] == ["Weight cancels."]
    with (tmp_path / "b.csv").open("w", encoding="utf-8", newline="") as table:  # which holds text only
        csv.writer(table).writerows([["id", "messages"], ["1", json.dumps(TALK, indent=1)], ["2", "Why?"]])
    assert [turns(text) for text in read_prompts(tmp_path / "b.csv")] == [last, [("user", "Why?")]]


@given(st.integers(0, 10**9), st.floats(0, 1))
def test_all_questions_of_a_conversation_are_on_one_side(number: int, share: float):
    first = f"Question {number}?"
    talk = joined([("system", "S"), ("user", first), ("assistant", "A"), ("user", "More?")])
    assert is_held_out(talk, share) == is_held_out(first, share)
    assert is_validation(talk) == is_validation(first)


@given(
    st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(min_size=1).filter(lambda t: "<|" not in t))),
    st.sampled_from(["", "Be brief."]),
)
def test_turns_come_back_as_they_were_joined(said: list[tuple[str, str]], system: str):
    talk = [*([("system", system)] if system else []), *said, ("user", "Why?")]
    assert turns(joined(talk)) == talk
    assert turns(joined(talk), "Another.")[0] == (("system", system) if system else ("system", "Another."))
    assert is_conversation(joined(talk)) == (len(talk) > 1)
    assert words(joined(talk)) == "\n".join(text for _, text in talk)


def test_answers_that_are_there(tmp_path: Path):
    alpaca = {"instruction": "Sum up.", "input": "A long text.", "output": "Text."}
    rows = [
        alpaca,
        {"prompt": "Why?"},
        {"question": "Why?", "answer": "So."},
        {"prompt": "Why?", "completion": "Thus."},
    ]
    told: list[Event] = []
    file = write(tmp_path / "a.json", json.dumps([*rows, rows[2]]))
    found = load_prompts([str(file)], 0.0, 0, told.append, Reading(given=True))
    pairs = [("Sum up.\n\nA long text.", "Text."), ("Why?", "So."), ("Why?", "Thus.")]
    assert [(prompt.text, prompt.answer) for prompt in found] == pairs
    assert "answered in output or answer or completion; left out: 1 questions without an answer" in told[0].message
    assert len(load_prompts([str(file)], 0.0, 1, how=Reading(given=True))) in (1, 2)  # a prompt with all its answers
    table = write(tmp_path / "b.csv", "asked,said\nWhy?,So.\n")
    assert [p.answer for p in load_prompts([f"{table}:asked,said"], 0.0, how=Reading(given=True))] == ["So."]
    with pytest.raises(BadInput, match=r"b\.csv:2: holds no column 'say' of answers; its columns are asked, said"):
        load_prompts([f"{table}:asked,say"], 0.0, how=Reading(given=True))
    with pytest.raises(BadInput, match="holds no answers"):
        load_prompts([str(write(tmp_path / "c.txt", "Why?"))], 0.0, how=Reading(given=True))
    # A column that is named goes with what goes with it elsewhere; several ways to say it, and numbers.
    for name in ("d.parquet", "d.jsonl"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([alpaca]), tmp_path / "d.parquet")
        write(tmp_path / "d.jsonl", json.dumps(alpaca))
        found = load_prompts([f"{tmp_path / name}:instruction"], 0.0, how=Reading(given=True))
        assert [(prompt.text, prompt.answer) for prompt in found] == pairs[:1]
    open_question, number = {"question": "Where?", "answer": ["Paris", "paris"]}, {"question": "How many?", "answer": 0}
    for name, row, said in (("e", open_question, "Paris"), ("f", number, "0")):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / f"{name}.parquet")
        for file in (tmp_path / f"{name}.parquet", write(tmp_path / f"{name}.jsonl", json.dumps(row))):
            assert [p.text for p in load_prompts([str(file)], 0.0)] == [row["question"]]
            assert [p.answer for p in load_prompts([str(file)], 0.0, how=Reading(given=True))] == [said]
    # A question beside the conversation in which it is answered.
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    for row, said in (
        ({"prompt": "Why?", "messages": talk}, "So."),
        ({"prompt": "Why?", "messages": talk, "answer": "A"}, "A"),
    ):
        file = write(tmp_path / "h.jsonl", json.dumps(row))
        found = load_prompts([str(file)], 0.0, how=Reading(given=True))
        assert [(prompt.text, prompt.answer) for prompt in found] == [("Why?", said)]
    with (tmp_path / "g.csv").open("w", encoding="utf-8", newline="") as table:
        csv.writer(table).writerows([["prompt", "answer"], ["Why?", "So. " * 50_000]])
    [long] = load_prompts([str(tmp_path / "g.csv")], 0.0, how=Reading(given=True))
    assert len(long.answer) == 199_999


def test_bad_rows_are_told_one_by_one_and_left_out(tmp_path: Path):
    lines = [json.dumps(f"Question {i}?") for i in range(300)]
    lines[6], lines[40], lines[41] = '{"prompt": ', '{"prompt": 3}', '{"messages": [{"role": "tool", "content": "x"}]}'
    told: list[Event] = []
    assert len(read_prompts(write(tmp_path / "a.jsonl", "\n".join(lines)), told.append)) == 297
    assert [(e.kind, e.message.partition("a.jsonl:")[2].split(":")[0]) for e in told[:3]] == [
        ("warning", "7"),
        ("warning", "41"),
        ("warning", "42"),
    ]
    assert all(event.message.endswith("; left out") and "\n" not in event.message for event in told[:3])
    lines[100:160] = ["3"] * 60
    told.clear()
    with pytest.raises(BadInput, match=r"a\.jsonl:7: is not JSON.*\(63 of 300 rows are bad"):
        read_prompts(write(tmp_path / "a.jsonl", "\n".join(lines)), told.append)
    assert (len(told), told[-1].message) == (21, "43 more rows are such")
    cells = "\n".join(["prompt,id", *(f"Why {i}?,{i}" for i in range(30)), "one,two,three"])
    assert len(read_prompts(write(tmp_path / "a.csv", cells), told.append)) == 30
    assert told[-2].message == f"{tmp_path / 'a.csv'}:32: 3 cells, and the first line names 2; left out"


def test_folders_take_one_kind_and_train(tmp_path: Path):
    told: list[Event] = []
    for split in ("train", "test"):
        table = pyarrow.table({"prompt": [f"Why {split}?"], "n": [1]})
        saved_by_datasets(tmp_path / "saved", f"{split}/data-00000-of-00001.arrow", table)
        pyarrow.parquet.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    write(tmp_path / "notes.jsonl", '"no"')
    for folder in (tmp_path / "saved", tmp_path):
        told.clear()
        assert [prompt.text for prompt in load_prompts([f"{folder}:prompt"], 0.0, listen=told.append)] == ["Why train?"]
        assert "of its splits train is taken, test left out" in told[0].message
    assert read_prompts(tmp_path / "saved" / "test") == ["Why test?"]
    for there, taken in (
        ({"train_data/train.jsonl", "train_data/test.jsonl"}, "train_data/train.jsonl"),
        ({"training.jsonl", "testing.jsonl"}, "training.jsonl"),
        ({"all.jsonl", "test.jsonl"}, "all.jsonl"),
        ({"test.jsonl"}, "test.jsonl"),
    ):
        folder = tmp_path / f"of {taken.replace('/', ' ')}"
        (folder / taken).parent.mkdir(parents=True)
        for name in there:
            write(folder / name, json.dumps(name))
        told.clear()
        assert [prompt.text for prompt in load_prompts([str(folder)], 0.0, listen=told.append)] == [taken]
        assert ("left out" in told[0].message) == (len(there) > 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="is a folder without a file of prompts"):
        read_prompts(tmp_path / "empty")


def test_a_hub_is_asked_for_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def fetched(name: str, **how: object) -> str:
        asked.append(name)
        if name == "who/gone":
            raise OSError("no such repository\nand more")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    write(tmp_path / "chats.jsonl", '{"q": "Why?"}')
    assert [prompt.text for prompt in load_prompts(["hf:who/what:q"], 0.0)] == ["Why?"]
    assert [prompt.text for prompt in load_prompts(["hf:who/what/chats.jsonl:q"], 0.0)] == ["Why?"]
    assert asked == ["who/what"] * 2
    with pytest.raises(BadInput, match=r"^hf:who/gone: can't be had \(no such repository\); check the name"):
        load_prompts(["hf:who/gone"], 0.0)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow"])
def test_files_are_streamed(tmp_path: Path, name: str):
    """What reading holds at any moment is far less than the file."""
    count, text = 3000, "Why is this so long? " * 100
    values = [{"prompt": f"{i} {text}", "answer": "So."} for i in range(count)]
    file = tmp_path / name
    if name == "a.jsonl":
        write(file, "\n".join(map(json.dumps, values)))
    elif name == "a.json":
        write(file, json.dumps(values, indent=1))
    elif name == "a.csv":
        write(file, "prompt,answer\n" + "".join(f"{v['prompt']},So.\n" for v in values))
    else:
        table = pyarrow.Table.from_pylist(values)
        if name == "a.parquet":
            pyarrow.parquet.write_table(table, file, row_group_size=300)
        else:
            pyarrow.feather.write_feather(table, str(file), chunksize=300)
    del values
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    try:
        rows = Rows([file], "", Reading(given=True), lambda event: None)
        assert sum(len(answer) for _, answer in rows.asked()) == 3 * count
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2e6 < 6e6 < count * len(text)
    assert pyarrow.total_allocated_bytes() - before < 2e6


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.lists(st.text(max_size=30) | st.integers() | st.none() | st.floats(allow_nan=False)))
def test_arrays_are_read_alike_in_pieces_of_any_size(size: int, values: list[object]):
    text = json.dumps(values, indent=size % 3 or None, ensure_ascii=size % 2 == 0)
    with tempfile.TemporaryDirectory() as folder, unittest.mock.patch.object(prompt_files, "_PIECE", size):
        file = write(Path(folder, "a.json"), text)
        assert [value for _, value in prompt_files.rows(file, list)] == values
        with pytest.raises(BadInput, match=r"a\.json:\d+: is not JSON"):
            list(prompt_files.rows(write(file, text[:-1]), list))


def test_yaml_slots_are_combined_and_words_stay_words(tmp_path: Path):
    file = write(
        tmp_path / "s.yaml",
        "slots: {who: [a cat, no]}\n"
        "groups:\n"
        "  - templates: ['Does {who} {what}, {who}?', Plain]\n"
        "    slots: {what: [run, 1.50]}\n"
        "  - templates: ['{who}!']\n"
        "prompts: [on]\n",
    )
    assert read_prompts(file) == [
        "Does a cat run, a cat?",
        "Does a cat 1.50, a cat?",
        "Does no run, no?",
        "Does no 1.50, no?",
        "Plain",
        "a cat!",
        "no!",
        "on",
    ]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "# only a comment\n", "a.txt: holds no prompts"),
        ("a.yaml", "", "a.yaml: holds no prompts"),
        ("a.jsonl", '"fine"\n{"prompt": \n', "a.jsonl:2: is not JSON"),
        ("a.jsonl", '"fine"\n\n{"text": "x"}\n', "a.jsonl:3: holds no prompt; its columns are text: name one as in"),
        ("a.jsonl", '{"prompt": 3}\n', "a.jsonl:1: write a string"),
        ("a.jsonl", '""\n', "a.jsonl:1: holds an empty prompt"),
        (
            "a.jsonl",
            '{"messages": [{"role": "system", "content": "x"}]}',
            "a.jsonl:1: holds a conversation in which no",
        ),
        ("a.jsonl", '{"messages": ["x"]}', "a.jsonl:1: holds a turn that is neither"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "a.jsonl:1: holds a turn with something else than text",
        ),
        ("a.json", '["fine",\n 3]', "a.json: item 2: write a string"),
        ("a.json", '["fine",\n', "a.json:2: is not JSON"),
        ("a.json", '{"a": 1}', "a.json: holds no array"),
        ("a.json", '["fine"] 3', "a.json:1: is not JSON: something follows"),
        ("a.json", '["fine"\n"x"]', "a.json:2: is not JSON: expecting ','"),
        ("a.json", '["fi\\ne", {"a": \n\n]]', "a.json:3: is not JSON"),
        ("a.arrow", "x", "a.arrow: is no Arrow file"),
        ("a.jsonl.gz", "x", "a.jsonl.gz: can't read it: Not a gzipped file"),
        ("a.jsonl", '[{"role": "user", "content": "a<|im_end|>b"}]', "a.jsonl:1: holds <|im_end|> within a turn"),
        ("a.csv", "id,prompt\n1,fine\n2\n", "a.csv:3: 1 cells, and the first line names 2"),
        ("a.csv", "id,prompt\n1,\n", "a.csv:2: holds no prompt"),
        ("a.csv", 'prompt\n"fine\n', "a.csv:2: is no table"),
        ("a.csv", "messages\n[{'role': 'user'}]\n", "a.csv:2: holds messages that are not JSON"),
        ("a.csv", "a,a\n", "a.csv:1: two columns have the same name"),
        ("a.parquet", "x", "a.parquet: is no Parquet file"),
        ("a.yaml", "groups:\n  - templates: [x\n", "a.yaml:3: is not YAML"),
        (
            "a.yaml",
            "groups:\n  - templates:\n      - What {thing}?\n    slots:\n      things: [a]\n",
            "a.yaml:3: no slot",
        ),
        ("a.yaml", "groups:\n  - templates: [x]\n    slots:\n      thing: [a]\n", "a.yaml:4: no template uses"),
        ("a.yaml", "groups:\n  - templates: ['{a}']\n    slots:\n      a: []\n", "a.yaml:4: expected a list"),
        ("a.yaml", "groups:\n  - template: [x]\n", "a.yaml:2: unknown key 'template'"),
        ("a.yaml", "prompts:\n  - fine\n  - {a: b}\n", "a.yaml:3: expected text"),
        ("a.yaml", "- a\n- b\n", "a.yaml:1: expected `name: value`"),
        ("a.csv", "x\n", "a.csv: holds no prompts"),
        ("a.xls", "x\n", "a.xls: prompts come as .txt"),
        (
            "a.jsonl",
            '"ok?"\n{"prompt": "Why is \\ud83d here?"}\n',
            "a.jsonl:2: holds \\ud83d, half of a surrogate pair",
        ),
        ("a.yaml", 'prompts: ["Why \\ud83d?"]\n', "a.yaml:1: holds \\ud83d, half of a surrogate pair"),
        ("a.yaml", 'prompts: ["\\UFFFFFFFF"]\n', "a.yaml: is not YAML"),
        ("a.jsonl", "[" * 100_000, "a.jsonl: brackets are nested too deeply"),
        ("a.yaml", "[" * 600, "a.yaml: is not YAML: brackets are nested too deeply"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, name: str, text: str, expected: str):
    with pytest.raises(BadInput) as caught:
        load_prompts([str(write(tmp_path / name, text))], 0.1)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lines_end_where_they_end_and_nowhere_else(tmp_path: Path):
    lines = ["First half\u2028second half of one prompt?", "one\x85two?", "B\x0cC?", "D\x1cE\u2029F\x0bG?"]
    for end in ("\n", "\r\n", "\r"):
        file = tmp_path / "a.TXT"
        file.write_bytes(end.join(lines).encode())
        assert read_prompts(file) == lines
    pair = write(tmp_path / "b.YAML", 'prompts: ["Why \\uD83D\\uDE00?"]\n')
    assert read_prompts(pair) == ["Why \U0001f600?"]
    assert read_prompts(write(tmp_path / "c.jsonl", '"Why \\ud83d\\ude00?"\r\n')) == ["Why \U0001f600?"]


def test_lines_left_out_are_told(tmp_path: Path):
    file = write(tmp_path / "a.txt", "Why?\n#include <stdio.h> is what?\n\\#include is what?\n# b\n\\n is what?\n")
    told: list[Event] = []
    prompts = load_prompts([str(file)], 0.0, listen=told.append)
    assert [prompt.text for prompt in prompts] == ["Why?", "#include is what?", "\\n is what?"]
    (event,) = told
    assert (event.kind, "\n" in event.message) == ("note", False)
    assert f"{file}:2: 2 lines that begin with # left out ('#include <stdio.h>" in event.message
    assert read_prompts(write(tmp_path / "b.jsonl", '"#include is what?"\n')) == ["#include is what?"]


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([".txt", ".jsonl", ".yaml", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".jsonl.gz"]),
    st.binary(max_size=40)
    | st.text(max_size=40).map(lambda text: text.encode())
    | st.lists(st.text(max_size=12)).map(lambda texts: "\n".join(map(json.dumps, texts)).encode())
    | st.text("{}[]:,-&*!\"'\\ud8p#\n ", max_size=40).map(lambda text: f"prompts: [{text}]".encode()),
)
def test_fuzz_prompt_files_are_read_or_refused(tmp_path: Path, suffix: str, data: bytes):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(data)
    told: list[Event] = []
    with contextlib.suppress(BadInput):
        prompts = read_prompts(file, told.append)
        assert all(prompt.strip() and prompt.encode() for prompt in prompts)
        if suffix == ".txt":
            lines = [line for line in re.split("\r\n|\r|\n", data.decode("utf-8-sig")) if line.strip()]
            left_out = [line for line in lines if line.strip().startswith("#")]
            assert (len(prompts), len(told)) == (len(lines) - len(left_out), bool(left_out))


def test_a_misspelled_slot_is_told_the_nearest(tmp_path: Path):
    file = write(tmp_path / "a.yaml", "groups:\n  - templates: ['{objekt}']\n    slots: {object: [a]}\n")
    with pytest.raises(BadInput, match="do you mean 'object'"):
        read_prompts(file)


def test_bytes_that_are_not_utf8_name_the_line(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"fine\nfine\ncaf\xe9\n")
    with pytest.raises(BadInput, match=r"a\.txt:3: is not UTF-8"):
        load_prompts([str(file)], 0.1)


def test_an_unknown_set_is_told_the_nearest():
    with pytest.raises(BadInput, match="without a name"):
        load_prompts([" "], 0.1)
    with pytest.raises(BadInput, match="everyday"):
        load_prompts(["evryday"], 0.1)


@pytest.mark.parametrize(("held_out", "limit"), [(1.0, 0), (-0.1, 0), (0.1, -1)])
def test_unusable_shares_and_limits(held_out: float, limit: int):
    with pytest.raises(BadInput, match=r"capture\."):
        load_prompts(["everyday"], held_out, limit)


def test_json_lines_keep_any_text(tmp_path: Path):
    texts = ["⟨a ball⟩", 'quotes "and" \\ backslashes', "two\nlines"]
    file = write(tmp_path / "a.jsonl", "\n".join(json.dumps(text) for text in texts))
    assert read_prompts(file) == texts
