"""The evaluate stage on a real capture and a student trained for a moment, against brute force where it counts."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.evaluation_run import STEPS, trained_run

from distill.config import load_settings
from distill.corpus.traces import TraceStore
from distill.errors import BadInput, CorruptFile, MissingStage, RunMismatch
from distill.evaluation.baselines import train_baseline
from distill.evaluation.evaluate import Evaluation, evaluate, without_speed
from distill.evaluation.examples import Example, load_examples
from distill.evaluation.measure import Examiner
from distill.evaluation.report import render
from distill.evaluation.scoring import OwnDream, dream_context, score_answers
from distill.events import Event, silent
from distill.run import Run
from distill.student.generate import log_likelihood
from distill.student.model import Backbone
from distill.tokens.chat import prompt_ids
from distill.tokens.image_tokens import Codebook, load_codes
from distill.training.checkpoint import best, folder_of, latest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(small_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Evaluated by no test: those that evaluate take a copy."""
    return trained_run(small_run, tmp_path_factory.mktemp("evaluate") / "run")


@pytest.fixture
def copied(run: Run, tmp_path: Path) -> Run:
    shutil.copytree(run.path, tmp_path / "run")
    return Run.open(tmp_path / "run")


@pytest.fixture(scope="module")
def evaluation(run: Run) -> Evaluation:
    return Evaluation(run, best(run), run.evaluation, silent, force=False)


@pytest.fixture(scope="module")
def model(evaluation: Evaluation) -> Backbone:
    return evaluation.student


def contexts_of(evaluation: Evaluation, mined: bool) -> list[list[int]]:
    return [dream_context(evaluation.tokenizer, e.header, e.mined if mined else []) for e in evaluation.examples]


def scores(evaluation: Evaluation, contexts: list[list[int]], batch_tokens: int = 4096) -> list[Any]:
    examples = evaluation.examples
    found = score_answers(
        evaluation.student, contexts, [e.answer for e in examples], [e.targets for e in examples], batch_tokens
    )
    return [score for _, score in sorted(found, key=lambda pair: pair[0])]


def test_examples_are_the_held_out_answers(run: Run, evaluation: Evaluation) -> None:
    tokenizer = evaluation.tokenizer
    with TraceStore(run.traces, readonly=True) as store:
        held = {trace.key: trace for trace in store.traces(held_out=True)}
    assert len(held) == len(evaluation.examples) + evaluation.left_out
    assert [e.key for e in evaluation.examples] == sorted(e.key for e in evaluation.examples)
    for example in evaluation.examples:
        trace = held[example.key]
        assert tokenizer.eos_id not in example.answer
        spelled = b"".join(tokenizer.token_bytes(id) for id in example.answer)
        assert spelled.decode(errors="ignore") == trace.response.text.rstrip("\ufffd")
        assert example.bytes == len(trace.response.text.encode())
        assert dream_context(tokenizer, example.header, []) == prompt_ids(tokenizer, example.prompt, think=False)


@pytest.mark.parametrize("mined", [False, True])
def test_scores_equal_log_likelihood_whatever_the_batch(evaluation: Evaluation, mined: bool) -> None:
    contexts = contexts_of(evaluation, mined)
    want = log_likelihood(evaluation.student, contexts, [e.answer for e in evaluation.examples])
    for batch_tokens in (1, 500, 10**6):
        for score, expected in zip(scores(evaluation, contexts, batch_tokens), want, strict=True):
            np.testing.assert_allclose(score.logprobs, expected, atol=1e-5)


def test_likelihood_kl_and_agreement_equal_brute_force(run: Run, evaluation: Evaluation) -> None:
    """In float64, one answer at a time, from the stored traces: nothing shared with the code but the weights."""
    wide = Backbone(evaluation.student.config).double().eval()
    wide.load_state_dict({name: weight.double() for name, weight in evaluation.student.state_dict().items()})
    teacher_map = evaluation.tokenizer.teacher_map
    assert teacher_map is not None
    contexts = contexts_of(evaluation, mined=True)
    compared = 0
    with TraceStore(run.traces, readonly=True) as store:
        for example, context, score in zip(evaluation.examples, contexts, scores(evaluation, contexts), strict=True):
            tokens = store.get(example.key).response.tokens
            assert tokens is not None
            with torch.no_grad():
                logits = wide(torch.tensor([[*context, *example.answer]]))[0].numpy()
            for i, label in enumerate(example.answer):
                z = logits[len(context) - 1 + i]
                log_q = z - z.max() - math.log(np.exp(z - z.max()).sum())
                assert score.logprobs[i] == pytest.approx(log_q[label], abs=1e-4)
                if not tokens.soft[i]:
                    assert math.isnan(score.kl[i])
                    continue
                p = {label: math.exp(np.float16(tokens.logprobs[i]))}  # as exactly as training stores it
                for id, logprob in zip(tokens.top_ids[i].tolist(), tokens.top_logprobs[i].tolist(), strict=True):
                    if id >= 0 and teacher_map[id] >= 0 and teacher_map[id] not in p:
                        p[int(teacher_map[id])] = math.exp(np.float16(logprob))
                scale = max(1.0, sum(p.values()))
                p = {id: value / scale for id, value in p.items() if value > 0}
                q_rest = math.fsum(np.exp(log_q[j]) for j in range(len(z)) if j not in p)
                p_rest = 1 - math.fsum(p.values())
                kl = math.fsum(value * (math.log(value) - log_q[id]) for id, value in p.items())
                kl += p_rest * (math.log(p_rest) - math.log(q_rest)) if p_rest > 1e-12 else 0.0
                assert score.kl[i] == pytest.approx(kl, abs=2e-5)
                assert score.agrees[i] == (z.argmax() == teacher_map[tokens.top_ids[i, 0]])
                compared += 1
    assert compared > 50


def examiner(evaluation: Evaluation, **changes: Any) -> Examiner:
    return replace(evaluation._examiner(lambda count: None), **changes)


def test_marginal_over_dreams_is_the_mean_of_likelihoods(evaluation: Evaluation, model: Backbone) -> None:
    three = examiner(evaluation, dreams=3)
    found = three.measure(model, dreams=True, texts=False).metrics["bits_per_byte_dreams"]
    draws = [scores(evaluation, three._dreamed(model, draw)) for draw in range(3)]
    for i, example in enumerate(evaluation.examples):
        logs = [math.fsum(draw[i].logprobs) for draw in draws]
        offset = max(logs)
        mean = sum(math.exp(value - offset) for value in logs) / 3
        assert found.numerator[i] == pytest.approx(-(offset + math.log(mean)) / math.log(2))
        assert found.denominator[i] == example.bytes
    assert three._dreamed(model, 0) != three._dreamed(model, 1)


def test_dream_metrics_know_a_perfect_dream(evaluation: Evaluation) -> None:
    one = examiner(evaluation)
    perfect = one._dream_metrics([OwnDream(e.mined, closed=True) for e in one.examples])
    assert perfect["dream_recall"].value == 1
    assert perfect["dream_recall_chance"].value < 1
    dreamed = [bool(e.mined) for e in one.examples]
    assert perfect["dream_form"].numerator.tolist() == dreamed
    cut = one._dream_metrics([OwnDream(e.mined[:-1], closed=True) for e in one.examples])
    unclosed = one._dream_metrics([OwnDream(e.mined, closed=False) for e in one.examples])
    assert cut["dream_form"].value == unclosed["dream_form"].value == 0


def test_evaluation_writes_its_files_and_repeats_to_the_last_digit(copied: Run) -> None:
    events: list[Event] = []
    summary = evaluate(copied, listen=events.append)
    results = json.loads((copied.evaluation / "results.json").read_text())
    samples = [json.loads(line) for line in (copied.evaluation / "samples.jsonl").read_text().splitlines()]
    assert (copied.evaluation / "report.md").read_text() == render(results, samples)
    assert len(samples) == results["prompts"] == summary["prompts"]
    assert set(results["systems"]) == {"student", "start", "teacher"}
    # The student learned something, and the headline number says how much.
    start, student = (results["systems"][name]["metrics"]["bits_per_byte"]["value"] for name in ("start", "student"))
    assert student < start
    assert results["fall"]["bits_per_byte"]["value"] == pytest.approx(1 - student / start)
    assert results["systems"]["start"]["versus_student"]["bits_per_byte"]["value"] == pytest.approx(start - student)
    # The numbers of one prompt, added up by hand, are the number of all.
    per_prompt = [sample["systems"]["student"]["metrics"]["bits_per_byte"] for sample in samples]
    sizes = [len(sample["teacher"].encode()) for sample in samples]
    assert sum(b * n for b, n in zip(per_prompt, sizes, strict=True)) / sum(sizes) == pytest.approx(student)
    last = [event for event in events if event.kind == "progress"][-1]
    assert last.done == last.total

    assert copied.fresh("evaluate", {}) is None  # another fingerprint
    again: list[Event] = []
    assert evaluate(copied, listen=again.append) == summary
    assert [event.kind for event in again] == ["done"]
    before = (copied.evaluation / "samples.jsonl").read_bytes()
    digests = copied.records()["evaluate"].outputs
    evaluate(copied, force=True)
    assert (copied.evaluation / "samples.jsonl").read_bytes() == before
    assert without_speed(json.loads((copied.evaluation / "results.json").read_text())) == without_speed(results)
    assert copied.records()["evaluate"].outputs == digests


def test_an_interrupted_evaluation_goes_on(copied: Run) -> None:
    class Interruptedly(Exception):
        pass

    def interrupt(event: Event) -> None:
        if event.data.get("system") == "start":
            raise Interruptedly

    with pytest.raises(Interruptedly):
        evaluate(copied, listen=interrupt)
    kept = copied.evaluation / "systems" / "student.json"
    assert not (copied.evaluation / "results.json").exists()
    content = json.loads(kept.read_text())
    content["measured"]["tokens_per_second"] = 12345.0
    kept.write_text(json.dumps(content))
    assert evaluate(copied)["tokens_per_second"] == 12345.0  # taken from there
    # A file cut short, or of another measurement, is not.
    kept.write_text(kept.read_text()[:100])
    copied.settings.evaluate.bootstrap = 300
    assert evaluate(copied)["tokens_per_second"] != 12345.0


def test_baselines_get_equal_steps_on_the_same_data(copied: Run) -> None:
    copied.settings.evaluate.baselines = ["hard", "nodream"]
    copied.settings.evaluate.prompts = 2
    events: list[Event] = []
    evaluate(copied, listen=events.append)
    results = json.loads((copied.evaluation / "results.json").read_text())
    hard, nodream = (results["systems"][name] for name in ("hard", "nodream"))
    assert results["prompts"] == 2
    assert "dream_recall" in hard["metrics"]
    assert "dream_recall" not in nodream["metrics"]
    assert hard["versus_student"]["kl"] is not None
    children = {name: Run.open(copied.path / "baselines" / name) for name in ("hard", "nodream")}
    for child in children.values():
        assert latest(child) == folder_of(child, STEPS)
        assert child.settings.student == copied.settings.student
        with TraceStore(child.traces, readonly=True) as one, TraceStore(copied.traces, readonly=True) as other:
            assert one.content_digest() == other.content_digest()
    assert children["hard"].settings.train.soft_weight == 0
    assert not children["nodream"].settings.train.dreams
    assert {"baseline hard", "baseline nodream"} <= {event.stage for event in events}
    # Asked again, nothing is trained anew; trained otherwise, all is.
    trained = children["hard"].records()["train"].finished, latest(children["hard"]).stat().st_mtime_ns
    evaluate(copied, force=True)
    assert trained == (children["hard"].records()["train"].finished, latest(children["hard"]).stat().st_mtime_ns)


def test_settings_of_the_measurement_train_no_baseline_anew(copied: Run) -> None:
    child = train_baseline(copied, "hard", 2, silent)
    trained = latest(child).stat().st_mtime_ns
    copied.settings.evaluate.dreams, copied.settings.export.temperature = 1, 0.1
    again = train_baseline(copied, "hard", 2, silent)
    assert latest(again).stat().st_mtime_ns == trained
    assert Run.open(again.path).settings.evaluate.dreams == 1
    copied.settings.train.lr /= 2
    assert latest(train_baseline(copied, "hard", 2, silent)).stat().st_mtime_ns != trained


def test_without_own_dreams_the_rest_is_measured(copied: Run) -> None:
    copied.settings.evaluate.dreams, copied.settings.evaluate.prompts = 0, 2
    evaluate(copied)
    student = json.loads((copied.evaluation / "results.json").read_text())["systems"]["student"]["metrics"]
    assert "bits_per_byte_dreams" not in student
    assert {"bits_per_byte", "bits_per_byte_oracle", "dream_recall"} <= student.keys()
    assert "own dreams" not in (copied.evaluation / "report.md").read_text()


def test_what_does_not_fit_the_context_is_left_out(run: Run, evaluation: Evaluation) -> None:
    tokenizer, examples = evaluation.tokenizer, evaluation.examples
    sizes = sorted(len(e.header) + evaluation.dream_tokens + 4 + len(e.answer) for e in examples)
    codes = load_codes(best(run) / "tokenizer", Codebook.load(best(run) / "tokenizer"))
    kept, left_out = load_examples(run, tokenizer, codes, sizes[1], evaluation.dream_tokens + 4)
    assert 2 <= len(kept) < len(examples)
    assert len(kept) + left_out == len(examples) + evaluation.left_out
    with pytest.raises(BadInput, match=r"raise student\.context"):
        load_examples(run, tokenizer, codes, 10, evaluation.dream_tokens + 4)


@pytest.mark.parametrize(
    "setting", ["evaluate.dreams=-1", "evaluate.bootstrap=0", "evaluate.max_tokens=0", "teacher.retries=-1"]
)
def test_numbers_without_a_meaning_are_refused(setting: str) -> None:
    with pytest.raises(BadInput, match=f"^{setting}: must be at least [01]$"):
        load_settings(overrides=[setting])


def test_another_checkpoint_is_measured_aside(copied: Run) -> None:
    start = folder_of(copied, 0)
    summary = evaluate(copied, checkpoint=start)
    assert summary["checkpoint"] == "step-000000"
    assert summary["bits_per_byte_fall"] == 0
    assert (copied.evaluation / "step-000000" / "results.json").exists()
    assert not (copied.evaluation / "results.json").exists()
    assert "evaluate" not in copied.records()


def test_what_cannot_be_evaluated_says_so(copied: Run, tmp_path: Path, small_run: Run) -> None:
    with pytest.raises(MissingStage, match="dream train"):
        evaluate(Run.create(tmp_path / "empty", small_run.settings))
    copied.settings.evaluate.baselines = ["soft"]
    with pytest.raises(BadInput, match=r"evaluate.baselines: 'soft' is none of hard, nodream"):
        evaluate(copied)
    copied.settings.evaluate.baselines = []
    chosen = best(copied)
    with TraceStore(copied.traces) as store:
        store.select({trace.key: False for trace in store.traces()})
    with pytest.raises(BadInput, match="no usable answer to a held-out prompt"):
        evaluate(copied)
    weights = chosen / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CorruptFile, match=r"model\.safetensors: was cut short or altered"):
        evaluate(copied)


def test_a_tokenizer_that_does_not_fit_is_refused(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "step-000001"
    shutil.copytree(best(run), folder)
    config = json.loads((folder / "config.json").read_text())
    assert isinstance(config["vocab_size"], int)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] - 1}))
    with pytest.raises(RunMismatch, match="embeddings, its tokenizer"):
        Evaluation(run, folder, tmp_path, silent, force=False)


def test_seeds_do_not_depend_on_neighbours(evaluation: Evaluation, model: Backbone) -> None:
    example: Example = evaluation.examples[-1]
    alone = examiner(evaluation, examples=[example])
    everyone = examiner(evaluation)
    assert alone._dreamed(model, 0) == everyone._dreamed(model, 0)[-1:]
    assert example.seed(0, 1) != example.seed(0, 2) != example.seed(1, 1)
