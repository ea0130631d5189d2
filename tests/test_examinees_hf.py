"""transformers folders in the exam: as our own examinee scores them where both read the same, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from support.small_exam import SmallExam, assert_equal_scores, brute_score, small_exam
from support.small_student import ANSWER, DREAM, dreaming_model
from torch import Tensor

from distill.backbone.model import load_backbone, save_backbone
from distill.dream.pretrained import Parts, save_parts
from distill.errors import BadInput, CorruptFile
from distill.exam.examinees.hf import APART, NO_TEMPLATE, TransformersExaminee
from distill.exam.examinees.native import NativeExaminee
from distill.exam.examinees.opening import open_examinee
from distill.exam.metrics.speech import Form
from distill.exam.targets import How, Target, find_target

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def exam(smollm2: Path) -> SmallExam:
    return small_exam(smollm2)


@pytest.fixture(scope="module")
def folder(exam: SmallExam, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that dreams, as a folder that transformers reads. Altered by no test."""
    folder = tmp_path_factory.mktemp("hf") / "student"
    model = dreaming_model(exam.tokenizer, [question.prompt for question in exam.questions[:2]], steps=60)
    save_parts(Parts(model, exam.tokenizer, exam.codebook), folder)
    return folder


@pytest.fixture(scope="module")
def how(exam: SmallExam) -> How:
    return How(seed=5, dream_tokens=12, device="cpu", vocabulary=exam.vocabulary)


def opened(folder: Path, how: How) -> TransformersExaminee:
    return TransformersExaminee(Target(str(folder), "transformers", folder), how)


@pytest.fixture(scope="module")
def theirs(folder: Path, how: How) -> TransformersExaminee:
    return opened(folder, how)


class Anything:
    """A grammar that forbids nothing."""

    start = 0

    @property
    def inside(self) -> Self:
        return self

    answering = inside

    def mask(self, logits: Tensor, states: Tensor) -> Tensor:
        return logits

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        return states


@pytest.fixture(scope="module")
def ours(folder: Path, how: How) -> NativeExaminee:
    """Without the mask that transformers hasn't got either."""
    examinee = NativeExaminee(Target(str(folder), "checkpoint", folder), how)
    examinee._grammar = Anything()  # pyright: ignore[reportAttributeAccessIssue]
    return examinee


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """What a stranger's folder holds: nothing of ours."""
    shutil.copytree(folder, tmp_path / "model")
    for name in ("dreaming.json", "dream_tokenizer.json", "codebook.json"):
        (tmp_path / "model" / name).unlink()
    return tmp_path / "model"


@pytest.mark.parametrize("dream", ["none", "own"])
def test_our_own_student_scores_the_same(
    theirs: TransformersExaminee, ours: NativeExaminee, exam: SmallExam, dream: Any
) -> None:
    soft = 0
    pairs = zip(theirs.score(exam.questions, dream, 2), ours.score(exam.questions, dream, 2), strict=True)
    for one, two in pairs:
        assert_equal_scores(one, two)
        soft += int(np.isfinite(one.kl).sum())
    assert soft > 20


def test_it_says_the_same_as_ours(theirs: TransformersExaminee, ours: NativeExaminee, exam: SmallExam) -> None:
    for think, temperature in ((True, 0.0), (False, 0.0), (True, 1.0)):
        said = [
            [
                (spoken.dream, spoken.answer, spoken.closed, spoken.tokens, spoken.form)
                for spoken in one.answer(exam.questions, think=think, temperature=temperature, max_tokens=9, draw=1)
            ]
            for one in (theirs, ours)
        ]
        assert said[0] == said[1]
    assert any(answer for _, answer, *_ in said[0])


def test_its_own_ways_of_sampling_count_for_nothing(
    theirs: TransformersExaminee, copy: Path, how: How, exam: SmallExam
) -> None:
    wanted = {"repetition_penalty": 5.0, "do_sample": True, "top_k": 1, "min_new_tokens": 9}
    (copy / "generation_config.json").write_text(json.dumps(wanted), encoding="utf-8")
    asked = {"think": False, "temperature": 1.0, "max_tokens": 9, "draw": 1}
    plain, odd = ([said.answer for said in one.answer(exam.questions, **asked)] for one in (theirs, opened(copy, how)))
    assert plain == odd


def test_it_dreams_and_ends_by_itself(theirs: TransformersExaminee, folder: Path, how: How, exam: SmallExam) -> None:
    assert theirs.card.dreams
    for spoken in theirs.answer(exam.questions[:2], think=False, temperature=0, max_tokens=30, draw=0):
        assert (spoken.dream, spoken.answer) == ("", ANSWER)
        assert spoken.form == Form(dream=None, clean=True, whole=True, ended=True)
    long = opened(folder, replace(how, dream_tokens=60))
    (spoken,) = long.answer(exam.questions[:1], think=True, temperature=0, max_tokens=30, draw=0)
    assert spoken.closed
    assert spoken.dream.startswith(DREAM[:9])


def test_two_scorings_are_the_same_to_the_last_digit(theirs: TransformersExaminee, exam: SmallExam) -> None:
    for one, two in zip(theirs.score(exam.questions, "own"), theirs.score(exam.questions, "own"), strict=True):
        for name, column in vars(one).items():
            assert np.array_equal(column, getattr(two, name), equal_nan=True), name


@pytest.mark.parametrize("most", [1, 200, 100_000])
def test_batches_change_nothing(
    theirs: TransformersExaminee, exam: SmallExam, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = theirs.score(exam.questions, "none")
    monkeypatch.setattr("distill.exam.examinees.hf.BATCH_TOKENS", most)
    found = theirs.score(exam.questions[::-1], "none")[::-1]
    for one, two in zip(found, wanted, strict=True):
        assert_equal_scores(one, two)


def test_what_it_is(theirs: TransformersExaminee, folder: Path, exam: SmallExam) -> None:
    card = theirs.card
    assert (card.kind, card.name, card.context, card.quantization) == ("transformers", "student", 256, "float32")
    assert card.parameters == sum(p.numel() for p in load_backbone(folder).parameters())
    assert card.note == APART
    assert set(theirs.cannot) == {"mined"}
    assert theirs.labels(exam.questions[1].triplets) is None


def test_without_a_template_it_is_prompted_plainly(copy: Path, how: How, exam: SmallExam) -> None:
    config = json.loads((copy / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["chat_template"]
    (copy / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    plain = open_examinee(find_target(str(copy)), how)
    assert NO_TEMPLATE in plain.card.note
    assert not plain.card.dreams
    assert "think block" in plain.cannot["dreams"]
    question, tokenizer = replace(exam.questions[1], system="Be brief."), exam.tokenizer
    (score,) = plain.score([question], "none")
    context, answer = tokenizer.encode(f"Be brief.\n{question.prompt}\n"), tokenizer.encode(question.text)
    assert_equal_scores(score, brute_score(load_backbone(copy), tokenizer, question, context, answer))
    (spoken,) = plain.answer([question], think=True, temperature=0, max_tokens=3, draw=0)
    assert spoken.dream == ""


def test_a_template_without_system_messages_reads_them_in_the_prompt(copy: Path, how: How, exam: SmallExam) -> None:
    strict = (
        "{%- for message in messages -%}{%- if message.role == 'system' -%}{{ raise_exception('no system') }}"
        "{%- endif -%}{{ message.role + ': ' + message.content + '\n' }}{%- endfor -%}"
    )
    config = json.loads((copy / "tokenizer_config.json").read_text(encoding="utf-8"))
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": strict}), encoding="utf-8")
    strict_one = opened(copy, how)
    asked = replace(exam.questions[1], system="Be brief.", prompt="Why?")
    assert strict_one.words.decode(strict_one.words.prompt(asked, think=False)) == "user: Be brief.\n\nWhy?\n"
    broken = {**config, "chat_template": "{{ raise_exception('never') }}"}
    (copy / "tokenizer_config.json").write_text(json.dumps(broken), encoding="utf-8")
    with pytest.raises(BadInput, match="its chat template can't be used"):
        opened(copy, how).score([asked], "none")


def test_targets_need_the_teachers_tokens(copy: Path, how: How, exam: SmallExam) -> None:
    assert "no soft targets" in opened(copy, replace(how, vocabulary=None)).cannot["targets"]
    llama = replace(how, vocabulary=replace(exam.vocabulary, model="llama"))
    assert "its tokens are not the teacher's" in opened(copy, llama).cannot["targets"]


def test_another_architecture_without_its_own_positions(exam: SmallExam, copy: Path, how: How) -> None:
    """GPT-NeoX: biases, partly rotated heads; scored against transformers' own loss."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=exam.tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=256,
    )
    model: Any = GPTNeoXForCausalLM(config).eval()
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy)
    other = opened(copy, how)
    question = exam.questions[1]
    (score,) = other.score([question], "none")
    context, answer = other.words.prompt(question, think=False), other.words.encode(question.text)
    ids = torch.tensor([[*context, *answer]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=torch.tensor([[-100] * len(context) + answer])).loss
    assert -score.logprobs.mean() == pytest.approx(float(loss), abs=1e-4)
    together = other.answer(exam.questions, think=False, temperature=1, max_tokens=6, draw=0)
    alone = [other.answer([q], think=False, temperature=1, max_tokens=6, draw=0)[0] for q in exam.questions]
    assert [spoken.answer for spoken in together] == [spoken.answer for spoken in alone]


def test_what_fits(theirs: TransformersExaminee, exam: SmallExam) -> None:
    question = exam.questions[1]
    taken = len(theirs.words.prompt(question, True)) + len(theirs.words.encode(question.text)) + 3
    assert theirs.fits(question, 256 - taken)
    assert not theirs.fits(question, 257 - taken)
    with pytest.raises(BadInput, match="leave no room"):
        theirs.answer([replace(question, prompt="ball " * 300)], think=False, temperature=0, max_tokens=3, draw=0)


# What is refused.


def test_pickles_are_never_loaded(copy: Path, how: How) -> None:
    weights = copy / "model.safetensors"
    torch.save({}, copy / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(BadInput, match="pickled weights alone, which are never loaded"):
        opened(copy, how)
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(BadInput, match="holds no weights"):
        opened(copy, how)


def one_line_of(error: pytest.ExceptionInfo[Any], folder: Path) -> None:
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(folder))


@pytest.mark.parametrize("broken", ["config", "weights", "tokenizer", "layer", "architecture", "code"])
def test_broken_folders_are_one_line(copy: Path, how: How, broken: str) -> None:
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    if broken == "config":
        (copy / "config.json").write_text("{", encoding="utf-8")
    elif broken == "weights":
        (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:-64])
    elif broken == "tokenizer":
        (copy / "tokenizer.json").write_text("[]", encoding="utf-8")
    elif broken == "layer":
        (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}), encoding="utf-8")
    elif broken == "architecture":
        (copy / "config.json").write_text(json.dumps({**config, "model_type": "nobody"}), encoding="utf-8")
    else:
        foreign = {
            **config,
            "model_type": "own",
            "auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "code.C"),
        }
        (copy / "config.json").write_text(json.dumps(foreign), encoding="utf-8")
        (copy / "code.py").write_text("raise SystemExit('its code ran')\n", encoding="utf-8")
    with pytest.raises(CorruptFile) as error:
        opened(copy, how)
    one_line_of(error, copy)


def test_adapters_are_named(copy: Path, how: How) -> None:
    (copy / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BadInput, match="is an adapter"):
        opened(copy, how)


def test_untied_weights_too(exam: SmallExam, copy: Path, how: How) -> None:
    from distill.backbone.model import Backbone

    config = replace(load_backbone(copy).config, tie_embeddings=False)
    model = Backbone(config).initialize(1).eval()
    save_backbone(model, copy)
    question = exam.questions[1]
    untied = opened(copy, how)
    (score,) = untied.score([question], "none")
    context, answer = untied.words.prompt(question, think=False), exam.tokenizer.encode(question.text)
    assert_equal_scores(score, brute_score(model, exam.tokenizer, question, context, answer))
