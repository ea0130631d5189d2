"""Students of ours in the exam: every score by brute force in float64, whatever the batch, the order and the folder."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.answers_run import TEACHER
from support.small_exam import SYSTEM, TRIPLETS, SmallExam, assert_equal_scores, brute_score, small_exam
from support.small_student import ANSWER, DREAM, dreaming_model, small_model, small_tokenizer, write_checkpoint

from distill.config import Settings, TrainSettings
from distill.corpus.traces import Trace, TraceStore
from distill.dream.pretrained import Parts, save_parts
from distill.errors import BadInput, CorruptFile, RunMismatch
from distill.exam.examinees.common import map_teacher
from distill.exam.examinees.native import MASKED, RETRIEVED, NativeExaminee, vocabulary_of
from distill.exam.examinees.opening import open_examinee
from distill.exam.examinees.protocol import AnswerScore, Examinee, Spoken
from distill.exam.metrics.likelihood import SoftTargets
from distill.exam.metrics.speech import Form
from distill.exam.questions import Question, Sibling
from distill.exam.scoring import score_answers
from distill.exam.targets import How, Target, find_target
from distill.mining.triplets import Triplet, write_triplets
from distill.run import Run
from distill.student.grammar import dream_size
from distill.teacher.protocol import GenerateOptions, Response, TeacherTokenizer
from distill.tokens.aligner import Aligner
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import dream_ids, prompt_ids, think_block, with_context
from distill.tokens.image_tokens import dream_of, save_codes
from distill.tokens.sentence_piece import from_model, train_model
from distill.training.checkpoint import weights_of, write_checksums

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def exam(smollm2: Path) -> SmallExam:
    return small_exam(smollm2)


@pytest.fixture(scope="module")
def folder(exam: SmallExam, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Altered by no test."""
    return exam.checkpoint(tmp_path_factory.mktemp("native") / "student")


@pytest.fixture(scope="module")
def how(exam: SmallExam) -> How:
    return How(seed=5, dream_tokens=12, device="cpu", vocabulary=exam.vocabulary)


@pytest.fixture(scope="module")
def examinee(folder: Path, how: How) -> NativeExaminee:
    return NativeExaminee(Target(str(folder), "checkpoint", folder), how)


def test_it_is_an_examinee_and_says_what_it_is(folder: Path, how: How, exam: SmallExam) -> None:
    opened: Examinee = open_examinee(find_target(str(folder)), how)
    assert opened.card.kind == "checkpoint"
    assert opened.card.name == "student"
    assert opened.card.context == 256
    assert opened.card.bytes == (folder / "model.safetensors").stat().st_size
    assert opened.card.dreams
    assert not opened.cannot
    opened.close()


@pytest.mark.parametrize("dream", ["none", "mined", "own"])
def test_every_score_equals_brute_force(examinee: NativeExaminee, exam: SmallExam, dream: str) -> None:
    tokenizer, soft = exam.tokenizer, 0
    found = examinee.score(exam.questions, dream, 1)  # pyright: ignore[reportArgumentType]
    own = examinee._dreamed(exam.questions, 1.0, 1)
    for question, score, dreamt in zip(exam.questions, found, own, strict=True):
        header = prompt_ids(tokenizer, question.prompt, system=question.system)
        codes = dict(zip(phrases(question), exam.codebook.encode(phrases(question)).tolist(), strict=True))
        mined = dream_ids(tokenizer, dream_of(question.triplets, codes)) if question.triplets else []
        context = [*header, *think_block(tokenizer, {"none": [], "mined": mined, "own": dreamt.ids}[dream])]
        answer = tokenizer.encode(question.text)
        assert_equal_scores(score, brute_score(examinee.model, tokenizer, question, context, answer))
        soft += int(np.isfinite(score.kl).sum())
    assert soft > 20


def phrases(question: Question) -> list[str]:
    return sorted({phrase for triplet in question.triplets for phrase in triplet.phrases})


def test_the_exams_own_system_message_is_read(examinee: NativeExaminee, exam: SmallExam) -> None:
    asked = next(question for question in exam.questions if question.system == SYSTEM)
    (with_it,), (without,) = examinee.score([asked], "none"), examinee.score([replace(asked, system="")], "none")
    assert not np.allclose(with_it.logprobs, without.logprobs, atol=1e-3)


def test_scores_after_its_own_dreams_follow_its_seeds(examinee: NativeExaminee, exam: SmallExam) -> None:
    first, again = (examinee.score(exam.questions, "own", 0) for _ in range(2))
    other = examinee.score(exam.questions, "own", 1)
    for one, two in zip(first, again, strict=True):
        for name, column in vars(one).items():
            assert np.array_equal(column, getattr(two, name), equal_nan=True), name
    assert any(not np.array_equal(one.logprobs, two.logprobs) for one, two in zip(first, other, strict=True))
    (alone,) = examinee.score(exam.questions[-1:], "own", 0)
    assert_equal_scores(alone, first[-1])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(5)), st.integers(1, 600))
def test_batches_and_order_change_nothing(
    examinee: NativeExaminee, exam: SmallExam, order: list[int], batch_tokens: int
) -> None:
    contexts = [examinee.context(question, examinee.mined(question.triplets)) for question in exam.questions]
    answers = [examinee.aligned(question) for question in exam.questions]
    wanted = examinee.score(exam.questions, "mined")

    def mixed(values: list) -> list:
        return [values[i] for i in order]

    found = dict(
        score_answers(
            examinee.model,
            mixed(contexts),
            mixed([ids for ids, _ in answers]),
            mixed([targets for _, targets in answers]),
            batch_tokens,
        )
    )
    for place, i in enumerate(order):
        assert_equal_scores(found[place], wanted[i])


def test_large_vocabularies_are_scored_in_blocks(examinee: NativeExaminee, exam: SmallExam, monkeypatch) -> None:
    wanted = examinee.score(exam.questions, "none")
    monkeypatch.setattr("distill.exam.scoring.POSITIONS_AT_ONCE", 3)
    monkeypatch.setattr("distill.exam.scoring.LOGITS_AT_ONCE", 1)
    for one, two in zip(examinee.score(exam.questions, "none"), wanted, strict=True):
        assert_equal_scores(one, two)


def test_targets_that_name_the_whole_vocabulary_have_no_tail(exam: SmallExam) -> None:
    model = small_model(exam.tokenizer)
    size = model.config.vocab_size
    q = np.full(size, -np.log(size))
    targets = SoftTargets(np.arange(size)[None], q[None], np.array([0]), np.array([True]))
    ((_, score),) = score_answers(model, [[5, 6]], [[7]], [targets])
    with torch.no_grad():
        log_q = model.double()(torch.tensor([[5, 6]]))[0, -1].log_softmax(-1).numpy()
    assert score.kl[0] == pytest.approx(float((np.exp(q) * (q - log_q)).sum()), abs=1e-4)


def test_it_answers_after_a_sibling_s_dream_as_after_its_own(examinee: NativeExaminee, exam: SmallExam) -> None:
    """What reads the sibling's dream is the very question, with its seed."""
    plants = replace(exam.questions[2], sibling=Sibling("Rain.", TRIPLETS[3:]))
    how = {"temperature": 1.0, "max_tokens": 8, "draw": 0}
    own, other = (examinee.answer([q], think="mined", **how)[0] for q in (plants, plants.after_sibling))
    assert [said.dream for said in (own, other)] == [
        exam.tokenizer.decode(examinee.mined(triplets)) for triplets in (plants.triplets, TRIPLETS[3:])
    ]
    assert other.dream != own.dream
    assert examinee.answer([replace(plants, triplets=TRIPLETS[3:])], think="mined", **how)[0].answer == other.answer


def test_nothing_to_score(examinee: NativeExaminee) -> None:
    empty = Question("k", "What is this?")
    (score,) = examinee.score([empty], "none")
    assert isinstance(score, AnswerScore)
    assert all(column.shape == (0,) for column in vars(score).values())
    assert examinee.score([], "none") == []


def test_answers_dream_first_and_stop_by_themselves(exam: SmallExam, smollm2: Path, tmp_path: Path, how: How) -> None:
    tokenizer = small_tokenizer(smollm2)
    prompts = [question.prompt for question in exam.questions[:2]]
    folder = write_checkpoint(tmp_path / "dreamer", dreaming_model(tokenizer, prompts), tokenizer)
    dreamer = NativeExaminee(find_target(str(folder)), replace(how, dream_tokens=40))
    assert "codebook" in dreamer.cannot["mined"]
    assert dreamer.labels(TRIPLETS) is None
    for spoken in dreamer.answer(exam.questions[:2], think=True, temperature=0, max_tokens=30, draw=0):
        assert (spoken.dream, spoken.answer, spoken.closed) == (DREAM, ANSWER, True)
        assert spoken.tokens == len(tokenizer.encode(DREAM, special=True)) + len(tokenizer.encode(ANSWER))
        assert spoken.seconds > 0
        assert spoken.form == Form(dream=True, clean=True, whole=True, ended=True)
    for spoken in dreamer.answer(exam.questions[:2], think=False, temperature=0, max_tokens=30, draw=0):
        assert (spoken.dream, spoken.answer) == ("", ANSWER)
        assert spoken.form == Form(dream=None, clean=True, whole=True, ended=True)
    cut = NativeExaminee(find_target(str(folder)), replace(how, dream_tokens=3))
    (spoken,) = cut.answer(exam.questions[:1], think=True, temperature=0, max_tokens=4, draw=0)
    assert (spoken.dream, spoken.closed) == ("⟨spatial⟩⟨a ball⟩⟨release⟩", False)
    assert spoken.form == Form(dream=False, clean=True, whole=True, ended=False)


def test_whatever_its_weights_its_dreams_are_whole_and_its_answers_clean(
    exam: SmallExam, folder: Path, how: How
) -> None:
    noise = NativeExaminee(Target("noise", "checkpoint", folder), replace(how, dream_tokens=dream_size(2)))
    spoken: list[Spoken] = []
    for draw, temperature in enumerate((0.0, 0.7, 1.0, 2.0, 5.0, 9.0)):
        spoken += noise.answer(exam.questions, think=True, temperature=temperature, max_tokens=20, draw=draw)
    for said in spoken:
        assert said.closed
        assert said.form.dream is not False
        assert said.form.clean
        assert not set("⟨⟩") & set(said.answer)
    assert any(said.form.dream for said in spoken)


def test_an_answer_that_was_cut_has_no_end_to_learn(exam: SmallExam) -> None:
    """As training packs it, with soft targets and without."""
    aligner, ends = Aligner(exam.tokenizer, None), list[bool]()
    for question in exam.questions:
        for tokens in (question.tokens, None):
            found = aligner.align(question.text, tokens, question.done_reason).ids.tolist()
            assert (exam.tokenizer.eos_id in found) == (question.done_reason == "stop")
            ends.append(exam.tokenizer.eos_id in found)
    assert 0 < sum(ends) < len(ends)


def test_labels_are_of_the_nearest_image_tokens(examinee: NativeExaminee, exam: SmallExam) -> None:
    codes = exam.codebook.encode(list(TRIPLETS[0].phrases)).tolist()
    assert examinee.labels(TRIPLETS[:1]) == [exam.codebook.labels[code] for code in codes]
    assert examinee.labels([]) == []
    new = Triplet("a cat", "sees", "the ball", "spatial", 0, "x", 0, "syntax")
    found = examinee.labels([new])
    assert found is not None
    assert found[2] == exam.codebook.labels[int(exam.codebook.encode(["the ball"])[0])]


def test_phrases_keep_the_codes_that_they_were_trained_with(exam: SmallExam, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "student")
    save_codes(tmp_path / "student" / "tokenizer", dict(zip(TRIPLETS[0].phrases, (2, 1, 0), strict=True)))
    trained = NativeExaminee(find_target(str(tmp_path / "student")), How(device="cpu"))
    assert trained.labels(TRIPLETS[:1]) == [exam.codebook.labels[code] for code in (2, 1, 0)]


def test_what_fits_its_context(examinee: NativeExaminee, exam: SmallExam) -> None:
    question = exam.questions[1]
    room = 256 + 1 - (len(examinee.context(question, [0])) - 1) - len(examinee.aligned(question)[0])
    assert len(examinee.mined(question.triplets)) < room
    assert examinee.fits(question, room)
    assert not examinee.fits(question, room + 1)
    assert not examinee.fits(replace(question, key="long", prompt="ball " * 300), 12)


# Folders.


def test_a_bundle_scores_as_the_checkpoint_it_was_made_from(
    examinee: NativeExaminee, exam: SmallExam, tmp_path: Path, how: How
) -> None:
    """It is saved without the map of the teacher's ids, and with a system message of its own."""
    save_parts(Parts(examinee.model, exam.tokenizer, exam.codebook, system="Be brief."), tmp_path / "bundle")
    bundle = NativeExaminee(Target("bundle", "bundle", tmp_path / "bundle"), how)
    assert not bundle.cannot
    for dream in ("none", "mined", "own"):
        pairs = zip(bundle.score(exam.questions, dream), examinee.score(exam.questions, dream), strict=True)
        for one, two in pairs:
            assert_equal_scores(one, two, atol=0)


def test_the_map_is_found_again(exam: SmallExam) -> None:
    found, reason = map_teacher(vocabulary_of(exam.tokenizer), exam.vocabulary)
    assert not reason
    assert np.array_equal(found, exam.tokenizer.teacher_map)


def test_another_teachers_ids_are_taken_by_what_they_spell(exam: SmallExam) -> None:
    teacher, own = exam.vocabulary, vocabulary_of(exam.tokenizer)
    swapped = list(teacher.tokens)
    a, b = (teacher.token_to_id[token] for token in ("Ġball", "Ġfalls"))
    swapped[a], swapped[b] = swapped[b], swapped[a]
    found, _ = map_teacher(own, replace(teacher, tokens=swapped))
    assert found is not None
    assert exam.tokenizer.teacher_map is not None
    assert (found[a], found[b]) == (exam.tokenizer.teacher_map[b], exam.tokenizer.teacher_map[a])
    found, reason = map_teacher(own, replace(teacher, model="llama"))
    assert found is None
    assert "its tokens are not the teacher's" in reason
    assert map_teacher(own, None) == (None, "the exam has no soft targets")


def test_a_tokenizer_of_its_own_has_likelihoods_alone(exam: SmallExam, tmp_path: Path, how: How) -> None:
    texts = [question.text for question in exam.questions]
    tokenizer = from_model(train_model(texts * 20, 340), exam.codebook.labels)
    folder = write_checkpoint(tmp_path / "pieces", small_model(tokenizer), tokenizer)
    pieces = NativeExaminee(find_target(str(folder)), how)
    assert "its tokens are not the teacher's" in pieces.cannot["targets"]
    for question, score in zip(exam.questions, pieces.score(exam.questions, "none"), strict=True):
        assert len(score.logprobs) == len(tokenizer.encode(question.text))
        assert np.isnan(score.kl).all()


@pytest.mark.parametrize(
    ("train", "words"), [({"dreams": False}, "without dreams"), ({"pause": True}, "on pause tokens")]
)
def test_students_that_were_not_taught_to_dream(
    train: dict[str, bool], words: str, folder: Path, tmp_path: Path, how: How, exam: SmallExam
) -> None:
    run = Run.create(tmp_path / "run", Settings(train=TrainSettings(**train)))  # pyright: ignore[reportArgumentType]
    plain = NativeExaminee(Target("run", "run", folder, run=run), how)
    assert not plain.card.dreams
    assert words in plain.cannot["dreams"]
    assert words in plain.cannot["mined"]
    assert plain.card.name == "run"
    (spoken,) = plain.answer(exam.questions[:1], think=True, temperature=0.7, max_tokens=3, draw=0)
    assert spoken.dream == ""


def test_a_bundle_of_a_training_before_is_not_taken_for_the_run_as_it_is_now(
    folder: Path, tmp_path: Path, how: How
) -> None:
    run = Run.create(tmp_path / "run", Settings(train=TrainSettings(dreams=False)))
    shutil.copytree(folder, run.bundle)
    shutil.copytree(folder, checkpoint := run.checkpoints / "step-000001")
    write_checksums(checkpoint)
    for weights, dreams in ((weights_of(checkpoint), False), ("0" * 64, True)):
        told = {"files": {}, "provenance": {"checkpoint": checkpoint.name, "weights": weights}}
        (run.bundle / "bundle.json").write_text(json.dumps(told), encoding="utf-8")
        assert NativeExaminee(find_target(str(run.bundle)), how).card.dreams == dreams


def test_students_without_image_tokens_do_not_dream(smollm2: Path, tmp_path: Path, how: How) -> None:
    tokenizer = small_tokenizer(smollm2, labels=[])
    folder = write_checkpoint(tmp_path / "plain", small_model(tokenizer), tokenizer)
    plain = NativeExaminee(find_target(str(folder)), how)
    assert not plain.card.dreams
    assert plain.cannot["dreams"] == plain.cannot["mined"] == "it has no image tokens to dream in"


def test_what_was_retrieved_in_training_is_retrieved_here(exam: SmallExam, tmp_path: Path, how: How) -> None:
    """Of training answers alone: the held-out one, which holds the answer, is left out."""
    settings = Settings(train=TrainSettings(retrieve="neighbourhood", retrieve_limit=2))
    run, options = Run.create(tmp_path / "run", settings), GenerateOptions()
    with TraceStore(run.traces) as store:
        store.put_teacher(TEACHER, exam.vocabulary)
        said = {prompt: TraceStore.key(TEACHER, prompt, options) for prompt in ("plants?", "the ball?")}
        for prompt, held_out in (("plants?", False), ("the ball?", True)):
            response = Response("So.", None, "stop")
            store.put(Trace(said[prompt], prompt, held_out, response, options, TEACHER.digest))
        store.select({said["plants?"]: False, said["the ball?"]: True})
    mined = [replace(TRIPLETS[2], trace=said["plants?"]), replace(TRIPLETS[0], trace=said["the ball?"])]
    write_triplets(run.triplets, mined)
    folder = exam.checkpoint(run.checkpoints / "step-000001")
    codes = dict(zip(TRIPLETS[2].phrases, exam.codebook.encode(list(TRIPLETS[2].phrases)).tolist(), strict=True))
    save_codes(folder / "tokenizer", codes)
    reader = NativeExaminee(Target("run", "checkpoint", folder, run=run), how)
    assert reader.card.note == f"{MASKED}; {RETRIEVED}"
    labels = [exam.codebook.labels[codes[phrase]] for phrase in TRIPLETS[2].phrases]
    known = with_context("What do plants take?", [(labels[0], labels[1], labels[2])])
    assert reader.header(Question("a", "What do plants take?")) == prompt_ids(exam.tokenizer, known)
    about = "Where does the ball fall?"
    assert reader.header(Question("b", about)) == prompt_ids(exam.tokenizer, about)


def test_broken_folders_are_refused(folder: Path, tmp_path: Path, how: How, exam: SmallExam) -> None:
    shutil.copytree(folder, tmp_path / "cut")
    write_checksums(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CorruptFile, match=r"model\.safetensors: was altered"):
        NativeExaminee(Target("cut", "checkpoint", tmp_path / "cut"), how)
    with pytest.raises(BadInput, match=r"no config\.json"):
        NativeExaminee(Target("none", "checkpoint", tmp_path), how)
    other = write_checkpoint(tmp_path / "other", small_model(exam.tokenizer), small_tokenizer_of(exam.vocabulary))
    with pytest.raises(RunMismatch, match="put back the tokenizer"):
        NativeExaminee(Target("other", "checkpoint", other), how)


def small_tokenizer_of(teacher: TeacherTokenizer) -> StudentTokenizer:
    from distill.tokens.aligned import AlignedCut

    cut = AlignedCut(teacher)
    cut.keep_text(["Another corpus", "\n"])
    return cut.build(["one"])


def test_weights_that_are_no_numbers_are_refused(folder: Path, how: How, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    write_checksums(broken)
    with pytest.raises(CorruptFile, match=r"broken: model\.norm\.weight holds NaN or infinity"):
        open_examinee(find_target(str(broken)), how)
