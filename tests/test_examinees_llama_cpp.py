"""A GGUF in the exam: its likelihoods against the native student's, position by position, in float64."""

import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.small_student import DREAM, dreaming_model, small_model, small_tokenizer
from support.tiny_gguf import write_tiny_gguf

from bundle.gguf import write_gguf
from distill.backbone.model import Backbone
from distill.errors import TeacherError
from distill.exam.examinees.common import without_thought
from distill.exam.examinees.llama_cpp import GgufExaminee
from distill.exam.questions import Question
from distill.exam.targets import How, Target
from distill.teacher.gguf_tokenizer import read_tokenizer
from distill.teacher.llama_cpp import LlamaCpp
from distill.teacher.protocol import TeacherTokenizer, TokenTargets
from distill.tokens.aligned import AlignedCut
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import prompt_ids
from distill.tokens.sentence_piece import from_model, train_model

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "What happens when you drop a ball?"
ANSWERS = (
    "The ball falls to the floor because of gravity, bounces twice, and then settles.",
    'Café 🙂, then 中文 and naïve\n[ends] "here"!',
    "🙂",
    "It",
)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> StudentTokenizer:
    return small_tokenizer(smollm2)


@pytest.fixture(scope="module")
def teacher(smollm2: Path) -> TeacherTokenizer:
    return read_tokenizer(smollm2)


@pytest.fixture(scope="module")
def model(tokenizer: StudentTokenizer) -> Backbone:
    """It dreams DREAM, more or less, and is unsure enough of its answers to have something to measure."""
    return dreaming_model(tokenizer, [PROMPT], steps=40)


@pytest.fixture(scope="module")
def path(model: Backbone, tokenizer: StudentTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(model.state_dict(), model.config, tokenizer, path, "f32", {"general.name": "small"})
    return path


@pytest.fixture(scope="module")
def examinee(path: Path, teacher: TeacherTokenizer) -> Generator[GgufExaminee]:
    examinee = GgufExaminee(Target(str(path), "gguf", path), How(dream_tokens=24, vocabulary=teacher))
    yield examinee
    examinee.close()


@pytest.fixture(scope="module")
def questions(teacher: TeacherTokenizer, tokenizer: StudentTokenizer) -> list[Question]:
    full = AlignedCut(teacher).full
    rows = [targets(teacher, full.encode(text).ids, i) for i, text in enumerate(ANSWERS)]
    return [Question(f"k{i}", PROMPT, "", text, tokens=rows[i]) for i, text in enumerate(ANSWERS)]


def targets(teacher: TeacherTokenizer, spelled: list[int], seed: int) -> TokenTargets:
    """What a teacher could have said: a text in its own spelling, EOS, and four random alternatives a token."""
    rng = np.random.default_rng(seed)
    ids = np.array([*spelled, teacher.eos_id], np.int32)
    top_ids = np.stack([rng.choice(len(teacher.tokens), 4, replace=False) for _ in ids]).astype(np.int32)
    top_ids[:, 0] = np.where(rng.random(len(ids)) < 0.7, ids, teacher.eos_id)
    top_ids[0, 1:3] = teacher.eos_id, teacher.token_to_id["<|endoftext|>"]
    logprobs = np.sort(np.log(rng.dirichlet(np.ones(6), len(ids))), axis=1)[:, ::-1].astype(np.float32)
    own = np.where(top_ids[:, 0] == ids, logprobs[:, 0], logprobs[:, 4])
    soft = rng.random(len(ids)) < 0.8
    soft[0] = True
    return TokenTargets(ids, np.where(soft, own, np.nan).astype(np.float32), top_ids, logprobs[:, :4], soft)


@torch.inference_mode()
def native(model: Backbone, context: list[int], answer: list[int]) -> np.ndarray:
    """(A, V) log-probabilities, float64."""
    logits = model(torch.tensor([[*context, *answer]]))[0, len(context) - 1 : -1]
    return logits.double().log_softmax(-1).numpy()


def test_likelihoods_are_the_native_students(
    examinee: GgufExaminee, questions: list[Question], model: Backbone, tokenizer: StudentTokenizer
) -> None:
    for question, score in zip(questions, examinee.score(questions, "none"), strict=True):
        answer = tokenizer.encode(question.text, special=False)
        expected = native(model, prompt_ids(tokenizer, PROMPT, False), answer)
        picked = expected[np.arange(len(answer)), answer]
        assert score.logprobs == pytest.approx(picked, abs=1e-3)


def test_soft_targets_against_brute_force(
    examinee: GgufExaminee,
    questions: list[Question],
    model: Backbone,
    tokenizer: StudentTokenizer,
    teacher: TeacherTokenizer,
) -> None:
    ends = {teacher.eos_id, *teacher.extra_stop_ids}
    assert tokenizer.teacher_map is not None
    checked = 0
    for question, score in zip(questions, examinee.score(questions, "none"), strict=True):
        said = question.tokens
        assert said is not None
        ours = tokenizer.encode(question.text, special=False)
        expected = native(model, prompt_ids(tokenizer, PROMPT, False), ours)
        theirs = tokenizer.teacher_map[said.ids[:-1]]
        if theirs.tolist() != ours:  # bytes that the student has no larger token for
            assert np.isnan(score.agrees).all()
            continue
        for at in range(len(ours)):
            if not said.soft[at]:
                assert all(math.isnan(row[at]) for row in (score.agrees, score.agrees_5))
                continue
            top = int(said.top_ids[at, 0])
            top = tokenizer.eos_id if top in ends else int(tokenizer.teacher_map[top])
            best = np.argsort(-expected[at])[:5].tolist()
            assert score.agrees[at] == (best[0] == top)
            assert score.agrees_5[at] == (top in best)
            checked += 1
    assert checked > 12


def test_an_answer_after_its_own_dream(
    examinee: GgufExaminee, questions: list[Question], model: Backbone, tokenizer: StudentTokenizer
) -> None:
    question = questions[0]
    [spoken] = examinee.answer([question], think=True, temperature=0, max_tokens=12, draw=0)
    assert spoken.dream == DREAM
    assert spoken.closed
    assert spoken.form.dream
    assert "<think>" not in spoken.answer
    assert "</think>" not in spoken.answer
    assert spoken.tokens > len(tokenizer.encode(DREAM, special=True))
    assert spoken.seconds > 0
    # What it dreams at temperature 1 is its own affair; the answer after it is scored in that context.
    [score] = examinee.score([question], "own", draw=3)
    (dream,) = examinee._dreamed([question], 1.0, 3)
    context = examinee.context(question, dream.ids)
    text = tokenizer.decode(context)
    assert text.startswith(f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert text.endswith("</think>\n")
    answer = tokenizer.encode(question.text, special=False)
    expected = native(model, context, answer)[np.arange(len(answer)), answer]
    assert score.logprobs == pytest.approx(expected, abs=1e-3)


def test_a_dream_that_never_ends_is_cut_and_said_to_be(path: Path, questions: list[Question]) -> None:
    examinee = GgufExaminee(Target(str(path), "gguf", path), How(dream_tokens=3))
    [spoken] = examinee.answer(questions[:1], think=True, temperature=0, max_tokens=4, draw=0)
    assert not spoken.closed
    assert spoken.dream == "⟨spatial⟩⟨a ball⟩⟨release⟩"
    assert spoken.form.dream is False
    assert not spoken.form.ended
    assert examinee.cannot["targets"] == "the exam has no soft targets"
    [score] = examinee.score(questions[:1], "none")
    assert np.isnan(score.kl).all()
    examinee.close()


def test_noise_is_told_by_its_tokens(
    tokenizer: StudentTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights, without a mask: what the engine wrote, token by token, says how it was spelled."""
    model = small_model(tokenizer)
    write_gguf(model.state_dict(), model.config, tokenizer, tmp_path / "noise.gguf", "f32", {})
    examinee = GgufExaminee(Target("noise", "gguf", tmp_path / "noise.gguf"), How(dream_tokens=18))
    wrote: list[list[int]] = []
    complete = LlamaCpp.complete

    def told(self: LlamaCpp, prompt: list[int], **how: Any) -> Any:
        said = complete(self, prompt, **how)
        wrote.append(said.ids)
        return said

    monkeypatch.setattr(LlamaCpp, "complete", told)
    asked = [Question(f"k{i}", PROMPT) for i in range(12)]
    spoken = examinee.answer(asked, think=True, temperature=1.5, max_tokens=8, draw=0)
    for said, answer in zip(spoken, wrote[len(asked) :], strict=True):
        words = [id for id in answer if id != tokenizer.eos_id]
        assert said.form.ended == (len(words) < len(answer))
        assert said.form.clean == all(id < tokenizer.base_size for id in words)
        assert said.form.dream is False, "chance hardly dreams by the grammar"
        text = tokenizer.decode(words).rstrip("\ufffd")
        assert said.form.whole or "\ufffd" in tokenizer.decode(wrote[spoken.index(said)]) + text
    assert 0 < sum(said.form.clean for said in spoken) < len(spoken)
    examinee.close()


def test_the_same_questions_give_the_same_numbers(examinee: GgufExaminee, questions: list[Question]) -> None:
    def numbers(asked: list[Question]) -> dict[str, list[float]]:
        scores = [*examinee.score(asked, "none"), *examinee.score(asked, "own", 1)]
        return {f"{q.key} {i}": s.logprobs.tolist() for i, (q, s) in enumerate(zip(asked * 2, scores, strict=True))}

    once = numbers(questions)
    assert numbers(questions) == once
    for question, row in zip(questions, examinee.score(questions[::-1], "none")[::-1], strict=True):
        assert row.logprobs.tolist() == once[f"{question.key} {questions.index(question)}"]
    first, again, other = (
        examinee.answer(questions, think=False, temperature=1.0, max_tokens=8, draw=draw) for draw in (0, 0, 1)
    )
    assert [s.answer for s in first] == [s.answer for s in again]
    assert [s.answer for s in first] != [s.answer for s in other]


def test_what_it_is(examinee: GgufExaminee, path: Path, model: Backbone) -> None:
    card = examinee.card
    assert (card.kind, card.quantization, card.context, card.dreams) == ("gguf", "float32", 256, True)
    assert card.parameters == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert card.bytes == path.stat().st_size
    assert set(examinee.cannot) == {"kl", "mined"}
    assert examinee.labels([]) is None


def test_what_does_not_fit_is_told_before_it_is_asked(examinee: GgufExaminee) -> None:
    assert examinee.fits(Question("k", PROMPT, text="It falls."), 24)
    assert not examinee.fits(Question("k", PROMPT, text="It falls."), 240)
    long = Question("k", PROMPT, text="It falls. " * 80)
    assert not examinee.fits(long, 0)
    with pytest.raises(TeacherError, match="don't fit its context of 256; leave the question out"):
        examinee.score([long], "none")


def test_foreign_tokens_have_no_soft_targets_and_no_space_too_many(teacher: TeacherTokenizer, tmp_path: Path) -> None:
    tokenizer = from_model(train_model(["Zqwx blorpt the ball falls to the kwizzbork floor."] * 9, 330), [])
    path = write_tiny_gguf(tmp_path / "pieces.gguf", tokenizer.gguf(), tokenizer.eos_id, tokenizer.pad_id)
    examinee = GgufExaminee(Target(str(path), "gguf", path), How(vocabulary=teacher))
    assert "its tokens are not the teacher's" in examinee.cannot["targets"]
    question = Question("k", PROMPT, text="The ball falls 中.")
    ids, _ = examinee.aligned(question)
    assert examinee.vocabulary.decode(ids) == question.text.encode()
    [score] = examinee.score([question], "none")
    # A network of zeros finds every token equally likely.
    size = len(tokenizer.gguf().tokens)
    assert score.logprobs == pytest.approx(np.full(len(ids), -math.log(size)), abs=1e-5)
    examinee.close()


@pytest.fixture(scope="module")
def random_engine(
    tokenizer: StudentTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Generator[tuple[Backbone, LlamaCpp]]:
    model = small_model(tokenizer)
    path = tmp_path_factory.mktemp("random") / "random.gguf"
    write_gguf(model.state_dict(), model.config, tokenizer, path, "f32", {})
    with LlamaCpp(path, exact=True, context=256, threads=1) as engine:
        yield model, engine


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tokens_can_be_forced(
    data: st.DataObject, random_engine: tuple[Backbone, LlamaCpp], tokenizer: StudentTokenizer
) -> None:
    model, engine = random_engine
    ids = st.integers(0, tokenizer.vocab_size - 1)
    answer = data.draw(st.lists(ids, min_size=1, max_size=12))
    if data.draw(st.booleans()):
        answer += tokenizer.encode(data.draw(st.text(max_size=6)), special=False)
    width = data.draw(st.sampled_from([1, 5, tokenizer.vocab_size]))
    context = prompt_ids(tokenizer, PROMPT, False)
    forced = engine.force(context, answer, width)
    expected = native(model, context, answer)
    assert forced.logprobs == pytest.approx(expected[np.arange(len(answer)), answer], abs=2e-3)
    assert forced.top_logprobs == pytest.approx(-np.sort(-expected, axis=1)[:, :width], abs=2e-3)
    assert np.take_along_axis(expected, forced.top_ids, 1) == pytest.approx(forced.top_logprobs, abs=2e-3)


def test_an_unusual_spelling_of_the_teachers_is_kept(
    examinee: GgufExaminee, model: Backbone, tokenizer: StudentTokenizer, teacher: TeacherTokenizer
) -> None:
    said = targets(teacher, [teacher.token_to_id[letter] for letter in ("I", "t", "Ġ", "f", "a", "l", "l", "s")], 3)
    question = Question("odd", PROMPT, text="It falls", tokens=said)
    [score] = examinee.score([question], "none")
    assert tokenizer.teacher_map is not None
    spelled = tokenizer.teacher_map[said.ids[:-1]].tolist()
    assert spelled != tokenizer.encode(question.text, special=False)
    expected = native(model, prompt_ids(tokenizer, PROMPT, False), spelled)
    assert score.logprobs == pytest.approx(expected[np.arange(8), spelled], abs=1e-3)
    assert np.isfinite(score.agrees).tolist() == said.soft[:-1].tolist()


def test_thoughts_are_no_part_of_an_answer() -> None:
    assert without_thought(" <think>\n⟨a⟩\n</think>\n\nIt falls.") == "It falls."
    assert without_thought("<think>\nfor ever") == ""
    assert without_thought(" It <think> falls.") == " It <think> falls."
