"""How replies are spelled, from hand-written tokens and texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_student import LABELS

from distill.dream.starter import starter_tokenizer
from distill.exam.examinees.native import vocabulary_of
from distill.exam.metrics.speech import (
    Form,
    Letters,
    form_of,
    is_clean,
    is_dream,
    is_printed_dream,
    is_whole,
    letters_of,
    speech_metrics,
)
from distill.mining.triplets import LENSES
from distill.report.doubts import masked
from distill.teacher.gguf_tokenizer import CONTROL, NORMAL, USER_DEFINED, Vocabulary
from distill.teacher.protocol import TeacherTokenizer

TOKENIZER = starter_tokenizer(list(LABELS))
LENS = "".join(f"⟨{lens}⟩" for lens in LENSES)
STEP = "⟨a ball⟩⟨release⟩⟨wets⟩"


def letters() -> Letters:
    return Letters(vocabulary_of(TOKENIZER))


def spelled(text: str) -> str:
    return letters()(TOKENIZER.encode(text, special=True))


def test_letters_of_tokens() -> None:
    assert spelled("<think>\n⟨spatial⟩⟨a ball⟩⟨abstract⟩\n</think>\nIt<|im_start|>") == "tn0i3nenwwc"
    assert spelled("<|pad|><|im_end|>⟨temporal⟩⟨causal⟩") == "cc12"
    assert letters_of("<think>\n⟨spatial⟩⟨a ball⟩⟨abstract⟩\n</think>\nIt<|im_start|>") == "tw0i3wewc"
    assert letters_of("") == ""
    assert letters_of("a ⟨b") == "w"
    tokens, kinds = ["<think>", "</think>", "<|x|>", "   ", "y"], [CONTROL, CONTROL, CONTROL, USER_DEFINED, NORMAL]
    special = Letters(Vocabulary(TeacherTokenizer("gpt2", "", tokens, [], kinds, 2)))
    assert special([0, 1, 2, 3, 4]) == "tecww", "tags are tags though they aren't printed"


@pytest.mark.parametrize("dream", ["</think>", f"{LENS}{STEP}\n</think>", f"{LENS}{STEP}{STEP}\n</think>"])
def test_dreams_that_follow_the_grammar(dream: str) -> None:
    assert is_dream(spelled(dream), steps=2)
    assert is_dream(spelled(dream), steps=1) == (dream.count("⟨wets⟩") < 2)


@pytest.mark.parametrize(
    "dream",
    [
        "",
        "\n</think>",
        LENS,
        f"{LENS}\n",
        f"{LENS}\n</think>",
        f"{LENS}</think>",
        f"{LENS}\n\n</think>",
        f"{LENS}⟨a ball⟩⟨release⟩\n</think>",
        f"⟨spatial⟩{STEP}⟨temporal⟩⟨abstract⟩⟨causal⟩\n</think>",
        f"⟨spatial⟩{STEP}\n</think>",
        f"{STEP}{LENS}\n</think>",
        f"{LENS}{LENS}\n</think>",
        f"{LENS}⟨a ball⟩⟨release⟩ wets\n</think>",
        "Let me think.\n</think>",
        f"{LENS}\n<|im_end|>",
    ],
)
def test_dreams_that_do_not(dream: str) -> None:
    assert not is_dream(spelled(dream), steps=9)


labels = st.text("ab é'", min_size=1, max_size=4).filter(lambda label: label not in LENSES)


@given(st.dictionaries(st.sampled_from(LENSES), st.lists(labels, max_size=7)), st.integers(0, 3))
def test_printed_dreams(chains: dict[str, list[str]], steps: int) -> None:
    text = "".join(f"⟨{lens}⟩" + "".join(f"⟨{label}⟩" for label in chains.get(lens, [])) for lens in LENSES)
    wanted = any(chains.values()) and all(len(chain) in range(0, 3 * steps + 1, 3) for chain in chains.values())
    assert is_printed_dream(text, steps) == is_printed_dream(f"\n{text}\n", steps) == wanted


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "⟨spatial⟩⟨temporal⟩⟨causal⟩",
        "⟨temporal⟩⟨spatial⟩⟨causal⟩⟨abstract⟩",
        "⟨spatial⟩⟨temporal⟩⟨causal⟩⟨abstract⟩⟨spatial⟩",
        "⟨spatial⟩ ⟨temporal⟩⟨causal⟩⟨abstract⟩",
        "⟨spatial⟩⟨a⟩⟨b⟩⟨temporal⟩⟨causal⟩⟨abstract⟩⟨c⟩",
        "⟨spatial⟩⟨a⟩⟨b⟩⟨temporal⟩⟨c⟩⟨causal⟩⟨abstract⟩",
        "⟨spatial⟩⟨a⟩⟨b⟩⟨c⟩ and⟨temporal⟩⟨causal⟩⟨abstract⟩",
        "⟨spatial⟩⟨⟩⟨b⟩⟨c⟩⟨temporal⟩⟨causal⟩⟨abstract⟩",
        "Hmm, the ball will fall.",
    ],
)
def test_printed_dreams_that_are_broken(broken: str) -> None:
    assert not is_printed_dream(broken, 9)


@pytest.mark.parametrize(
    ("answer", "clean"),
    [
        ("It falls.\nThen it bounces.", True),
        ("", True),
        ("a < b > c, ⟨ alone", True),
        ("It ⟨falls to the floor⟩.", False),
        ("⟨causal⟩ it falls", False),
        ("It falls.</think>", False),
        ("<think>", False),
        ("It falls.<|im_start|>user", False),
    ],
)
def test_clean_answers(answer: str, clean: bool) -> None:
    assert is_clean(spelled(answer)) == is_clean(letters_of(answer)) == clean


def test_whole_texts() -> None:
    assert is_whole("Café", True)
    assert not is_whole("Caf\ufffd", True)
    assert is_whole("Caf\ufffd", False), "cut off within a character"
    assert not is_whole("C\ufffdf\ufffd", False)


def form(dream: str, answer: str = "It falls.", *, closed: bool = True, ended: bool = True) -> Form:
    return form_of(
        spelled(dream),
        spelled(answer),
        dream_text=dream,
        answer_text=answer,
        closed=closed,
        ended=ended,
        steps=2,
    )


def test_forms_of_replies() -> None:
    assert form(f"{LENS}{STEP}\n</think>") == Form(dream=True, clean=True, whole=True, ended=True)
    assert form(f"{STEP}\n</think>", "⟨wets⟩", ended=False) == Form(dream=False, clean=False, whole=True, ended=False)
    for nothing in ("", "</think>", "\n</think>", "\n\n</think>"):
        assert form(nothing).dream is None, "no dream, as where it wasn't asked for one"
    assert form("", closed=False).dream is False
    assert form(f"{LENS}\n", closed=False).dream is False
    assert not form(f"{LENS}\ufffd\n</think>").whole
    assert not form("</think>", "a\ufffd").whole


def test_metrics_of_some_replies() -> None:
    forms = [
        Form(dream=True, clean=True, whole=True, ended=True),
        Form(dream=False, clean=True, whole=False, ended=True),
        Form(dream=None, clean=False, whole=True, ended=False),
        Form(dream=False, clean=True, whole=True, ended=True),
    ]
    found = speech_metrics(forms)
    values = {name: ratio.value for name, ratio in found.items()}
    assert values == {"malformed_dreams": 2 / 3, "unclean_answers": 0.25, "broken_bytes": 0.25, "ended": 0.75}
    assert found["malformed_dreams"].denominator.tolist() == [1, 1, 0, 1]
    silent = speech_metrics([forms[2]])
    assert not silent["malformed_dreams"].defined


def test_a_comparison_says_who_was_masked() -> None:
    native = {"kind": "run", "card": {"dreams": True}}
    gguf = {"kind": "gguf", "card": {"dreams": True}}
    silent = {"kind": "ollama", "card": {"dreams": False}}
    (told,) = masked({"mine": native, "mine.gguf": gguf, "other": silent})
    assert told.startswith("mine ran natively, masked")
    assert "mine.gguf had no mask" in told
    assert masked({"mine": native, "other": silent}) == masked({"a": gguf, "b": silent}) == []
