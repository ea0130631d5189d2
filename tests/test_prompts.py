import contextlib
import csv
import itertools
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.corpus.prompts import evenly, is_held_out, load_prompts, prompt_sets, read_prompts
from distill.errors import BadInput
from distill.events import Event


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


KINDS: dict[str, object] = {
    "a string": "Why?",
    "a prompt": {"prompt": "Why?", "id": 1},
    "a question": {"id": 1, "question": " Why? ", "answer": "So."},
    "Alpaca's": {"instruction": "Why?", "input": "", "output": "So."},
    "OpenAI's": {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]},
    "OpenAI's parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]},
    "ShareGPT's": {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    "bare turns": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": None}],
}


@pytest.mark.parametrize("row", KINDS.values(), ids=KINDS.keys())
def test_rows_that_others_wrote(tmp_path: Path, row: object):
    assert read_prompts(write(tmp_path / "a.jsonl", f"{json.dumps(row)}\n" * 2)) == ["Why?"] * 2
    assert read_prompts(write(tmp_path / "a.json", json.dumps([row], indent=1))) == ["Why?"]
    if isinstance(row, dict):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
        assert read_prompts(tmp_path / "a.parquet") == ["Why?"]


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
    alpaca = {"instruction": "Sum up.", "input": "A long text.", "output": "Text."}
    assert read_prompts(write(tmp_path / "b.json", json.dumps([alpaca]))) == ["Sum up.\n\nA long text."]


def test_what_of_conversations_is_left_out_is_told(tmp_path: Path):
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    told: list[Event] = []
    file = write(tmp_path / "a.jsonl", json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns[1:]}))
    assert read_prompts(file, told.append) == ["user", "user"]
    (event,) = told
    assert "4 answers and later questions, 1 system messages (set capture.system) are left out" in event.message


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
        ("a.csv", "id,prompt\n1,fine\n2\n", "a.csv:3: 1 cells, and the first line names 2"),
        ("a.csv", "id,prompt\n1,\n", "a.csv:2: holds no prompt"),
        ("a.csv", 'prompt\n"fine\n', "a.csv:2: is no table"),
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
    st.sampled_from([".txt", ".jsonl", ".yaml", ".json", ".csv", ".tsv", ".parquet"]),
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
