"""The chat format says the same in Python, in Jinja (transformers, llama.cpp) and in Go's templates (Ollama)."""

import json
import shutil
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.go_template import GoTemplateError
from support.go_template import render as render_go
from support.tiny_gguf import write_tiny_gguf

from distill.errors import DistillError
from distill.mining.triplets import LENSES
from distill.run import Run
from distill.teacher.llama_cpp import LlamaCpp
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.build import cut_to_corpus, read_corpus
from distill.tokens.chat import (
    Dream,
    Message,
    dream_ids,
    go_template,
    modelfiles,
    parse_dream,
    prompt_ids,
    render,
    think_ids,
    with_steps,
)
from distill.tokens.chat_template import JINJA

LABELS = ["a ball", "release", "falls", "café", "the floor", "bounces"]
DREAM = "⟨spatial⟩⟨a ball⟩⟨release⟩⟨falls⟩⟨temporal⟩⟨causal⟩⟨abstract⟩"
THINK = (None, True, False)

SYSTEM: Message = {"role": "system", "content": "Be brief.\n"}
USER: Message = {"role": "user", "content": "What happens when you drop a ball?"}
STEERED: Message = {
    "role": "user",
    "content": "\n What of ⟨a ball⟩? Don't say 1234 {{ .Role }} {{ 'x' }} \"quoted\" \\n\n",
}
ANSWER: Message = {"role": "assistant", "content": "It falls."}
DREAMED: Message = {"role": "assistant", "content": " It bounces…\n", "thinking": DREAM}

CONVERSATIONS: list[list[Message]] = [
    [USER],
    [STEERED],
    [SYSTEM, USER],
    [USER, ANSWER],
    [USER, DREAMED],
    [USER, DREAMED, STEERED],
    [USER, ANSWER, USER, DREAMED, USER],
    [SYSTEM, STEERED, DREAMED, USER, ANSWER, STEERED],
    [SYSTEM, USER, DREAMED, STEERED, DREAMED],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": "hm", "thinking": "no dream of a user's is shown"}],
]


def go_data(messages: list[Message], think: bool | None) -> dict[str, Any]:
    """What Ollama hands to a template."""
    turns = [{"Role": m["role"], "Content": m["content"], "Thinking": m.get("thinking", "")} for m in messages]
    return {"Messages": turns, "IsThinkSet": think is not None, "Think": bool(think)}


def jinja_options(think: bool | None) -> dict[str, Any]:
    return {} if think is None else {"enable_thinking": think}


def for_llama_cpp(messages: list[Message]) -> list[dict[str, str]]:
    """Its requests call a dream `reasoning_content`."""
    return [{("reasoning_content" if k == "thinking" else k): str(v) for k, v in m.items()} for m in messages]


@pytest.fixture(scope="module")
def student(small_run: Run) -> StudentTokenizer:
    corpus = read_corpus(small_run)
    assert corpus.teacher is not None
    return cut_to_corpus(corpus.teacher, corpus, 0).build(LABELS)


# Renderings.


def test_the_form_is_the_one_it_learns() -> None:
    assert render([USER]) == ("<|im_start|>user\nWhat happens when you drop a ball?<|im_end|>\n<|im_start|>assistant\n")
    assert render([USER], think=True) == render([USER])
    assert render([USER], think=False) == render([USER]) + "<think>\n</think>\n"
    assert render([USER, DREAMED], add_generation_prompt=False) == (
        render([USER]) + f"<think>\n{DREAM}\n</think>\n It bounces…\n<|im_end|>\n"
    )


def test_ids_of_the_three_renderings_are_equal(student: StudentTokenizer, tmp_path: Path) -> None:
    """Python; Jinja as transformers and as llama.cpp run it; Go."""
    from transformers import AutoTokenizer

    student.save(tmp_path)
    transformers = AutoTokenizer.from_pretrained(tmp_path)
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf", student.gguf(), student.eos_id, student.pad_id, JINJA)
    with LlamaCpp(gguf, slots=1, context=64, threads=1) as llama_cpp:
        for messages, think in product(CONVERSATIONS, THINK):
            ids = student.encode(render(messages, think), special=True)
            options: dict[str, Any] = {"add_generation_prompt": True, **jinja_options(think)}
            theirs = transformers.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
            assert theirs == ids
            if messages[-1] != ANSWER:  # before an open turn without a dream its server puts an empty one by itself
                text = llama_cpp.apply_template(for_llama_cpp(messages), **jinja_options(think))
                assert llama_cpp.tokenize(text) == ids
            text = render_go(go_template(), go_data(messages, think))
            assert llama_cpp.tokenize(text) == ids


def test_without_a_generation_prompt_every_turn_is_closed(student: StudentTokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    student.save(tmp_path)
    transformers = AutoTokenizer.from_pretrained(tmp_path)
    for messages in CONVERSATIONS:
        text = render(messages, add_generation_prompt=False)
        assert transformers.apply_chat_template(messages, tokenize=False) == text
        assert text.endswith("<|im_end|>\n")
        assert text.count("<|im_start|>") == text.count("<|im_end|>") == len(messages)


def test_a_list_of_parts_is_their_text(student: StudentTokenizer, tmp_path: Path) -> None:
    """OpenAI's form, in transformers and in llama.cpp; what isn't text is refused, and no content is none."""
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    student.save(tmp_path)
    transformers = AutoTokenizer.from_pretrained(tmp_path)
    words = ("What happens", " when you drop {{ 'a' }} ball?\n")
    parts = [{"type": "text", "text": text} for text in words]
    listed: list[Any] = [
        {"role": "system", "content": []},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None},
        {"role": "user", "content": parts[:1]},
    ]
    contents = ("", "\n".join(words), "", words[0])
    plain: list[Any] = [{**turn, "content": content} for turn, content in zip(listed, contents, strict=True)]
    for think in THINK:
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, **jinja_options(think)}
        assert transformers.apply_chat_template(listed, **options) == render(plain, think)
    with pytest.raises(TemplateError, match="reads text, no image_url"):
        transformers.apply_chat_template([{"role": "user", "content": [*parts, {"type": "image_url"}]}])
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf", student.gguf(), student.eos_id, student.pad_id, JINJA)
    with LlamaCpp(gguf, slots=1, context=64, threads=1) as llama_cpp:
        assert llama_cpp.apply_template(listed[1:2]) == render(plain[1:2])
        with pytest.raises(DistillError):
            llama_cpp.apply_template([{"role": "user", "content": [{"type": "image_url"}]}])  # pyright: ignore


texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)
turns = st.builds(
    lambda role, content, thinking: {"role": role, "content": content, **({"thinking": thinking} if thinking else {})},
    st.sampled_from(["system", "user", "assistant", "tool"]),
    texts,
    texts,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(turns, max_size=6), st.sampled_from(THINK))
def test_any_conversation_renders_the_same(messages: list[Any], think: bool | None) -> None:
    """Whatever the turns hold, also what looks like a template."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(JINJA)  # as transformers
    text = render(messages, think)
    assert jinja.render(messages=messages, add_generation_prompt=True, **jinja_options(think)) == text
    assert render_go(go_template(), go_data(messages, think)) == text


def test_the_template_is_the_one_that_ollama_was_seen_to_run() -> None:
    """Its thinking part made a real server show the dream as thinking; around that part is now that it is only of the
    last turn, which leaves `.Thinking` between the two texts that Ollama takes for its tags."""
    recorded = json.loads((Path(__file__).parent / "fixtures" / "thinking_template.json").read_text(encoding="utf-8"))
    part = '{{ if and (eq .Role "assistant") .Thinking }}<think>\n{{ .Thinking }}\n</think>\n{{ end }}'
    assert part in recorded["template"]
    assert go_template() == recorded["template"].replace(part, f"{{{{ if $last }}}}{part}{{{{ end }}}}")
    assert (modelfiles() / "student.modelfile").exists()


def test_what_was_dreamed_before_earlier_turns_is_not_read() -> None:
    """Ollama's own client sends it back; trainings have none."""
    assert render([USER, DREAMED, USER]) == render([USER, {**DREAMED, "thinking": ""}, USER])
    assert DREAM in render([USER, DREAMED])


# Ids of prompts and dreams.


@st.composite
def dreams(draw: st.DrawFn) -> Dream:
    step = st.tuples(*[st.integers(0, len(LABELS) - 1)] * 3)
    return {lens: draw(st.lists(step, max_size=5)) for lens in LENSES}


@settings(max_examples=100, deadline=None)
@given(dreams())
def test_a_dream_comes_back(student: StudentTokenizer, dream: Dream) -> None:
    """From its ids, from its think block, and from its text."""
    ids = dream_ids(student, dream)
    assert parse_dream(student, ids) == dream
    if with_steps(dream) is None:
        assert ids == []
        assert think_ids(student, dream) == think_ids(student, None)
        return
    assert with_steps(dream) == dream
    assert len(ids) == 4 + 3 * sum(map(len, dream.values()))
    block = think_ids(student, dream)
    assert parse_dream(student, block) == dream
    text = f"<think>\n{student.decode(ids)}\n</think>\n"
    assert student.decode(block) == text
    assert student.encode(text, special=True) == block


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whatever_a_student_writes_is_read(student: StudentTokenizer, data: st.DataObject) -> None:
    """Whole steps only, of image tokens only, and nothing from behind </think>."""
    interesting = [*student.lens_ids, *student.image_ids.tolist(), student.think_id, student.newline_id, 5]
    ids = data.draw(st.lists(st.sampled_from(interesting), max_size=40))
    dream = parse_dream(student, ids)
    assert list(dream) == list(LENSES)
    assert all(0 <= code < len(LABELS) for steps in dream.values() for step in steps for code in step)
    assert parse_dream(student, [*ids, student.end_think_id, *ids]) == dream
    assert 3 * sum(map(len, dream.values())) <= sum(student.image_code(id) is not None for id in ids)
    assert parse_dream(student, dream_ids(student, dream)) == dream


def test_a_broken_dream_keeps_its_whole_steps(student: StudentTokenizer) -> None:
    spatial, temporal, causal, _ = student.lens_ids
    a, b, c, d = student.image_ids[:4].tolist()
    ids = [a, spatial, a, b, c, d, temporal, a, 5, b, c, spatial, b, b, b, causal, a]
    assert parse_dream(student, ids) == {
        "spatial": [(0, 1, 2), (1, 1, 1)],
        "temporal": [(0, 1, 2)],
        "causal": [],
        "abstract": [],
    }


def test_prompt_ids_end_where_the_student_goes_on(student: StudentTokenizer) -> None:
    prompt = STEERED["content"]
    asked = prompt_ids(student, prompt)
    assert student.decode(asked) == render([STEERED])
    assert int(student.image_ids[0]) in asked  # a user steers by typing an image token
    assert prompt_ids(student, prompt, think=False) == asked + think_ids(student, None)
    assert prompt_ids(student, prompt, system="Be brief.\n") == student.encode(render([SYSTEM, STEERED]), special=True)


# The interpreter of Go's templates, held to Go itself.

GO_CASES: list[tuple[str, dict[str, Any], str]] = [
    ("a {{- 1 }} b {{ 2 -}} c", {}, "a1 b 2c"),
    ('{{ "x\\n\\"\\u2028" }}{{ `raw\\n` }}', {}, 'x\n"\u2028raw\\n'),
    ("{{ .A.B }}{{ .None }}{{ $.A.B }}", {"A": {"B": "b"}}, "b<no value>b"),
    ("{{ if .A }}yes{{ else if .B }}b{{ else }}no{{ end }}", {"A": "", "B": [1]}, "b"),
    ("{{ if and .A (not .B) }}1{{ end }}{{ if or .B .A }}2{{ end }}", {"A": True, "B": False}, "12"),
    ("{{ or .Zero .Empty .Full }}{{ and .Full .Empty }}|", {"Zero": False, "Empty": "", "Full": "f"}, "f|"),
    ("{{ range .L }}[{{ . }}{{ $.X }}]{{ else }}none{{ end }}", {"L": ["a", "b"], "X": "x"}, "[ax][bx]"),
    ("{{ range .L }}[{{ . }}]{{ else }}none{{ end }}", {"L": []}, "none"),
    (
        "{{ range $i, $x := .L }}{{ $i }}{{ $x }}{{ end }}{{ range $x := .L }}{{ $x }}{{ end }}",
        {"L": ["a", "b"]},
        "0a1bab",
    ),
    ("{{ $n := 0 }}{{ range .L }}{{ $n = len . }}{{ end }}{{ $n }}", {"L": ["aa", "bbb"]}, "3"),
    ("{{ $x := 1 }}{{ if true }}{{ $x := 2 }}{{ $x }}{{ end }}{{ $x }}", {}, "21"),
    (
        "{{ range $i, $_ := .L }}{{ len (slice $.L $i) }}{{ eq (len (slice $.L $i 2)) 1 }}{{ end }}",
        {"L": ["a", "b"]},
        "2false1true",
    ),
    ('{{ eq "a" "b" "a" }}{{ ne "a" "b" }}{{ lt 1 2 }}{{ ge 1 2 }}{{ not "" }}', {}, "truetruetruefalsetrue"),
    (
        "{{ with .A }}{{ .B }}{{ $.C }}{{ else }}no{{ end }}{{ with .N }}{{ else }}no{{ end }}",
        {"A": {"B": 1}, "C": "c"},
        "1cno",
    ),
    ('{{ .L | len | printf "%d of %d" 7 }}{{/* a comment */}}', {"L": "abc"}, "7 of 3"),
    ('{{ printf "%s-%v" .A .B }}{{ print .A "b" }}{{ index .L 1 }}', {"A": "a", "B": "b", "L": ["x", "y"]}, "a-baby"),
    ("{{ if (index .L 0).Deep.Er }}deep{{ end }}", {"L": [{"Deep": {"Er": True}}]}, "deep"),
    ("{{- /* trimmed */ -}}  x  {{- /* both */ -}}  y", {}, "xy"),
]
GO_ERRORS = [
    "{{ /* a comment */ }}",
    "{{ if .A }}",
    "{{ end }}",
    "{{ nonsense 1 }}",
    "{{ .A",
    "{{ $undefined }}",
    '{{ eq 1 "1" }}',
    "{{ slice .L 3 }}",
]

GO_PROGRAM = """
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"text/template"
)

func main() {
	var cases []struct {
		Template string
		Data     map[string]any
	}
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	answers := []any{}
	for _, c := range cases {
		var out bytes.Buffer
		t, err := template.New("").Parse(c.Template)
		if err == nil {
			err = t.Execute(&out, c.Data)
		}
		if err != nil {
			answers = append(answers, nil)
		} else {
			answers = append(answers, out.String())
		}
	}
	json.NewEncoder(os.Stdout).Encode(answers)
}
"""


@pytest.mark.parametrize(("template", "data", "wanted"), GO_CASES, ids=[case[0] for case in GO_CASES])
def test_go_constructs(template: str, data: dict[str, Any], wanted: str) -> None:
    assert render_go(template, data) == wanted


@pytest.mark.parametrize("template", GO_ERRORS)
def test_go_errors(template: str) -> None:
    with pytest.raises(GoTemplateError):
        render_go(template, {"A": 1, "L": ["a"]})


def test_recorded_template_of_another_model() -> None:
    """SmolLM2's, as a real server showed it."""
    recorded = json.loads((Path(__file__).parent / "fixtures" / "thinking_template.json").read_text(encoding="utf-8"))
    messages: list[Message] = [SYSTEM, USER]
    text = render_go(recorded["smollm2"], go_data(messages, None))
    assert text == render(messages)


def test_real_go_says_the_same(tmp_path: Path) -> None:
    """Go's own text/template on every case above and on every conversation."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("no `go` on PATH: only the interpreter in tests/support was held to the cases")
    (tmp_path / "main.go").write_text(GO_PROGRAM, encoding="utf-8")
    ours = [(go_template(), go_data(*pair), render(*pair)) for pair in product(CONVERSATIONS, THINK)]
    cases: list[tuple[str, dict[str, Any], str | None]] = [*GO_CASES, *ours]
    cases += [(template, {"A": 1, "L": ["a"]}, None) for template in GO_ERRORS]
    asked = json.dumps([{"Template": template, "Data": data} for template, data, _ in cases])
    environment = {
        "PATH": str(Path(go).parent),
        "HOME": str(tmp_path),
        "GOCACHE": str(tmp_path / "cache"),
        "GOFLAGS": "",
    }
    done = subprocess.run(
        [go, "run", "main.go"],
        cwd=tmp_path,
        env=environment,
        input=asked,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for (template, data, wanted), answer in zip(cases, json.loads(done.stdout), strict=True):
        assert answer == wanted, (template, data)
