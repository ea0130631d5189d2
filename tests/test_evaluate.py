"""The evaluate stage on a real capture and a student trained for a moment, against brute force where it counts."""

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.evaluation_run import STEPS, trained_run
from support.examples import Example, load_examples
from support.gone_on import went_on

from distill.backbone.generate import log_likelihood
from distill.backbone.model import Backbone, load_backbone
from distill.corpus.traces import TraceStore
from distill.errors import BadInput, CorruptFile, MissingStage, RunMismatch
from distill.events import Event, silent
from distill.exam.baselines import train_baseline
from distill.exam.examine import dream_tokens_of
from distill.exam.metrics.catalogue import METRICS
from distill.exam.questions import load_exam
from distill.report.evaluate import evaluate, evaluate_run, summarize, without_times
from distill.report.page import render_markdown
from distill.run import Run
from distill.settings import load_settings
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import prompt_ids, think_block
from distill.tokens.image_tokens import Codebook, load_codes
from distill.training.checkpoint import best, folder_of, latest, write_checksums

pytestmark = pytest.mark.usefixtures("one_thread", "no_plots")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Evaluated by no test: those that evaluate take a copy."""
    return trained_run(tmp_path_factory.mktemp("evaluate") / "run")


@pytest.fixture
def copied(run: Run, tmp_path: Path) -> Run:
    shutil.copytree(run.path, tmp_path / "run")
    return Run.open(tmp_path / "run")


@pytest.fixture(scope="module")
def evaluated(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy that was evaluated; don't alter it."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(run.path, folder)
    evaluate(Run.open(folder))
    return Run.open(folder)


def results_of(run: Run) -> dict[str, Any]:
    return json.loads((run.evaluation / "results.json").read_text(encoding="utf-8"))


def samples_of(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.evaluation / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def examples_of(run: Run) -> tuple[list[Example], StudentTokenizer]:
    """The held-out answers in the student's ids, as an ablation reads them."""
    words = best(run) / "tokenizer"
    tokenizer, dream_tokens = StudentTokenizer.load(words), dream_tokens_of(run)
    context = load_backbone(best(run)).config.context
    codes = load_codes(words, Codebook.load(words))
    return load_examples(run, tokenizer, codes, context, dream_tokens + 4)[0], tokenizer


def test_the_held_out_answers_are_what_is_asked(evaluated: Run) -> None:
    with TraceStore(evaluated.traces, readonly=True) as store:
        held = {trace.key: trace for trace in store.traces(held_out=True)}
    results, samples = results_of(evaluated), samples_of(evaluated)
    assert len(held) == results["prompts"] + results["left_out"]
    other = copy.deepcopy(evaluated.settings)
    other.capture.system = "Of a capture that was stopped."
    assert load_exam(Run(evaluated.path, other)).digest == load_exam(evaluated).digest
    assert [sample["key"] for sample in samples] == sorted(sample["key"] for sample in samples)
    for sample in samples:
        assert sample["teacher"] == held[sample["key"]].response.text
        assert sample["prompt"] == held[sample["key"]].prompt
    texts = [held[sample["key"]].response.text for sample in samples]
    assert results["answer_bytes"] == sum(len(text.encode()) for text in texts)
    examples, tokenizer = examples_of(evaluated)
    assert results["answer_tokens"] == sum(len(example.answer) for example in examples)
    for example in examples:
        assert [*example.header, *think_block(tokenizer, [])] == prompt_ids(tokenizer, example.prompt, think=False)


@pytest.mark.parametrize("mined", [False, True])
def test_bits_per_byte_are_those_of_each_answer_alone(evaluated: Run, mined: bool) -> None:
    """By another function, one answer at a time."""
    examples, tokenizer = examples_of(evaluated)
    model = load_backbone(best(evaluated)).eval()
    name = "bits_per_byte_oracle" if mined else "bits_per_byte"
    for example, sample in zip(examples, samples_of(evaluated), strict=True):
        context = [*example.header, *think_block(tokenizer, example.mined if mined else [])]
        (logprobs,) = log_likelihood(model, [context], [example.answer])
        want = -logprobs.sum() / math.log(2) / example.bytes
        assert sample["systems"]["student"][0]["metrics"][name] == pytest.approx(want, rel=1e-5)


def test_kl_and_agreement_equal_brute_force(evaluated: Run) -> None:
    """In float64, one answer at a time, from the stored traces: nothing shared with the code but the weights."""
    model = load_backbone(best(evaluated)).eval()
    wide = Backbone(model.config).double().eval()
    wide.load_state_dict({name: weight.double() for name, weight in model.state_dict().items()})
    examples, tokenizer = examples_of(evaluated)
    teacher_map = tokenizer.teacher_map
    assert teacher_map is not None
    kls: list[float] = []
    hits: list[bool] = []
    in_five: list[bool] = []
    with TraceStore(evaluated.traces, readonly=True) as store:
        for example in examples:
            tokens = store.get(example.key).response.tokens
            assert tokens is not None
            context = [*example.header, *think_block(tokenizer, example.mined)]
            with torch.no_grad():
                logits = wide(torch.tensor([[*context, *example.answer]]))[0].numpy()
            for i, label in enumerate(example.answer):
                if not tokens.soft[i]:
                    continue
                z = logits[len(context) - 1 + i]
                log_q = z - z.max() - math.log(np.exp(z - z.max()).sum())
                p = {label: math.exp(np.float16(tokens.logprobs[i]))}  # as exactly as training stores it
                for id, logprob in zip(tokens.top_ids[i].tolist(), tokens.top_logprobs[i].tolist(), strict=True):
                    if id >= 0 and teacher_map[id] >= 0 and teacher_map[id] not in p:
                        p[int(teacher_map[id])] = math.exp(np.float16(logprob))
                scale = max(1.0, sum(p.values()))
                p = {id: value / scale for id, value in p.items() if value > 0}
                q_rest = math.fsum(np.exp(log_q[j]) for j in range(len(z)) if j not in p)
                p_rest = 1 - math.fsum(p.values())
                kl = math.fsum(value * (math.log(value) - log_q[id]) for id, value in p.items())
                kls.append(kl + (p_rest * (math.log(p_rest) - math.log(q_rest)) if p_rest > 1e-12 else 0.0))
                likeliest = teacher_map[tokens.top_ids[i, 0]]
                hits.append(bool(z.argmax() == likeliest))
                in_five.append(bool(likeliest in np.argsort(-z)[:5]))
    assert len(kls) > 50
    metrics = results_of(evaluated)["systems"]["student"]["metrics"]
    assert metrics["kl_oracle"]["value"] == pytest.approx(np.mean(kls), abs=2e-5)
    assert metrics["agreement_oracle"]["value"] == pytest.approx(np.mean(hits))
    assert metrics["agreement_5_oracle"]["value"] == pytest.approx(np.mean(in_five))


def test_evaluation_writes_its_files_and_repeats_to_the_last_digit(copied: Run) -> None:
    events: list[Event] = []
    summary = evaluate(copied, listen=events.append)
    results, samples = results_of(copied), samples_of(copied)
    assert (copied.evaluation / "report.md").read_text(encoding="utf-8") == render_markdown(results)
    assert len(samples) == results["prompts"] == summary["prompts"]
    assert set(results["systems"]) == {"student", "start", "teacher"}
    # The student learned something, and the headline number says how much.
    start, student = (results["systems"][name]["metrics"]["bits_per_byte"]["value"] for name in ("start", "student"))
    assert student < 1.01 * start, "so few steps learn little more than to dream"
    assert results["fall"]["bits_per_byte"]["value"] == pytest.approx(1 - student / start)
    told = {(d["system"], d["metric"]): d["value"] for d in results["differences"]}
    assert told["start", "bits_per_byte"] == pytest.approx(start - student)
    # The numbers of one prompt, added up by hand, are the number of all.
    per_prompt = [sample["systems"]["student"][0]["metrics"]["bits_per_byte"] for sample in samples]
    sizes = [len(sample["teacher"].encode()) for sample in samples]
    assert sum(b * n for b, n in zip(per_prompt, sizes, strict=True)) / sum(sizes) == pytest.approx(student)
    # Every metric is there or says why not, and those that are there are in the report.
    found = results["systems"]["student"]
    assert {*found["metrics"], *found["missing"]} == set(METRICS) - {"exact_match"}
    for name in ("student", "start"):
        (last,) = [e for e in events if e.kind == "progress" and e.data["target"] == TARGETS[name]][-1:]
        assert last.done == last.total

    assert summary["tokens_per_second"] == round(found["tokens_per_second"], 1)
    found["tokens_per_second"] = None  # its journal is of another machine
    assert summarize(results) == {name: value for name, value in summary.items() if name != "tokens_per_second"}
    assert copied.fresh("evaluate", {}) is None  # another fingerprint
    again: list[Event] = []
    assert evaluate(copied, listen=again.append) == summary
    assert [event.kind for event in again] == ["done"]
    before = (copied.evaluation / "samples.jsonl").read_bytes()
    digests = copied.records()["evaluate"].outputs
    evaluate(copied, force=True)
    assert (copied.evaluation / "samples.jsonl").read_bytes() == before
    assert without_times(results_of(copied)) == without_times(results)
    assert copied.records()["evaluate"].outputs == digests
    with TraceStore(copied.traces) as store:
        _, *fewer = [trace.key for trace in store.traces(held_out=True)]
        kept = {trace.key: False for trace in store.traces(held_out=False)}
        store.select(kept | dict.fromkeys(fewer, True))
        outputs = {"traces.db": store.content_digest()}
    captured = copied.require("capture")
    copied.record("capture", captured.settings, outputs, captured.summary, 0.0)
    assert evaluate(copied)["prompts"] == summary["prompts"] - 1, "another exam is another evaluation"


TARGETS = {"student": "run", "start": "step-000000"}
"""System → what the target is called."""


def test_an_interrupted_evaluation_goes_on(copied: Run, evaluated: Run) -> None:
    class Interruptedly(Exception):
        pass

    def interrupt(event: Event) -> None:
        if event.data.get("target") == TARGETS["start"]:
            raise Interruptedly

    with pytest.raises(Interruptedly):
        evaluate(copied, listen=interrupt)
    assert not (copied.evaluation / "results.json").exists()
    (kept,) = (copied.evaluation / "targets").glob("run-*/journal.jsonl")
    lines = kept.read_text(encoding="utf-8").splitlines()
    answers = json.loads(lines[-1])
    assert answers["phase"] == "answers"
    answers["records"][0]["answer"] = "from the kept file"
    # The last line is ours, and the process was killed while it wrote one more.
    kept.write_text("\n".join([*lines[:-1], json.dumps(answers), lines[-1][:50]]), encoding="utf-8")
    evaluate(copied)
    one, *others = samples_of(copied)
    assert one["systems"]["student"][0]["answer"] == "from the kept file"
    whole = samples_of(evaluated)
    assert [sample["systems"]["student"][0]["answer"] for sample in others] == [
        sample["systems"]["student"][0]["answer"] for sample in whole[1:]
    ]
    for name in ("bits_per_byte", "bits_per_byte_dreams", "kl"):
        metrics = [results_of(run)["systems"]["student"]["metrics"][name] for run in (copied, evaluated)]
        assert metrics[0] == metrics[1]


def test_baselines_get_equal_steps_on_the_same_data(copied: Run) -> None:
    copied.settings.evaluate.baselines = ["hard", "nodream"]
    copied.settings.evaluate.prompts = 2
    events: list[Event] = []
    evaluate(copied, listen=events.append)
    results = results_of(copied)
    hard, nodream = (results["systems"][name] for name in ("hard", "nodream"))
    assert results["prompts"] == 2
    assert hard["metrics"]["malformed_dreams"]["value"] == 0
    assert nodream["missing"]["malformed_dreams"] == "it was not made to dream"
    assert ("hard", "kl") in {(d["system"], d["metric"]) for d in results["differences"]}
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
    # What one learned since is not measured.
    went_on(children["hard"], "polish", rounds=1)
    evaluate(copied, force=True)
    about = results_of(copied)["systems"]["hard"]["trained_on"]
    assert (about["steps"], about["onward"]) == (hard["trained_on"]["steps"], "")


def test_settings_of_the_measurement_train_no_baseline_anew(copied: Run) -> None:
    child = train_baseline(copied, "hard", 2, silent)
    trained = latest(child).stat().st_mtime_ns
    copied.settings.evaluate.dreams, copied.settings.export.temperature = 1, 0.1
    again = train_baseline(copied, "hard", 2, silent)
    assert latest(again).stat().st_mtime_ns == trained
    assert Run.open(again.path).settings.evaluate.dreams == 1
    copied.settings.train.log_every += 1
    assert latest(train_baseline(copied, "hard", 2, silent)).stat().st_mtime_ns == trained
    copied.settings.train.lr /= 2
    events: list[Event] = []
    assert latest(train_baseline(copied, "hard", 2, events.append)).stat().st_mtime_ns != trained
    assert any("hard.1" in event.message for event in events)
    assert latest(Run.open(child.path.with_name("hard.1"))).stat().st_mtime_ns == trained, "it is lost"


def test_without_own_dreams_the_rest_is_measured(copied: Run) -> None:
    copied.settings.evaluate.dreams, copied.settings.evaluate.prompts = 0, 2
    evaluate(copied)
    student = results_of(copied)["systems"]["student"]
    assert "bits_per_byte_dreams" not in student["metrics"]
    assert student["missing"]["bits_per_byte_dreams"] == "evaluate.dreams is 0"
    assert {"bits_per_byte", "malformed_dreams"} <= student["metrics"].keys()
    assert "sampled a prompt" not in (copied.evaluation / "report.md").read_text(encoding="utf-8")


def test_what_does_not_fit_the_context_is_left_out(copied: Run) -> None:
    """A student with a smaller context: the longest prompts are left out, in all systems alike, and counted."""
    examples, _ = examples_of(copied)
    room = dream_tokens_of(copied) + 4
    sizes = sorted(len(e.header) + max(room, len(e.mined) + 5) + len(e.answer) for e in examples)
    for checkpoint in (best(copied), folder_of(copied, 0)):
        shorten(checkpoint, sizes[1])
    events: list[Event] = []
    evaluate(copied, listen=events.append)
    results, samples = results_of(copied), samples_of(copied)
    fitting = sum(size <= sizes[1] for size in sizes)
    assert results["prompts"] == len(samples) == fitting < len(sizes)
    assert results["left_out"] == len(sizes) - fitting
    assert results["answer_bytes"] == sum(len(sample["teacher"].encode()) for sample in samples)
    warnings = [event.message for event in events if event.kind == "warning"]
    assert any(f"does not fit its context of {sizes[1]} tokens" in warning for warning in warnings)
    for checkpoint in (best(copied), folder_of(copied, 0)):
        shorten(checkpoint, 10)
    with pytest.raises(BadInput, match=r"raise student\.context"):
        evaluate(copied, force=True)


def reseal(checkpoint: Path) -> None:
    """Make its checksums true again."""
    (checkpoint / "checksums.json").unlink()
    write_checksums(checkpoint)


def shorten(checkpoint: Path, context: int) -> None:
    """Make its context so long."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    (checkpoint / "config.json").write_text(
        json.dumps({**config, "max_position_embeddings": context}), encoding="utf-8"
    )
    reseal(checkpoint)


@pytest.mark.parametrize(
    "setting",
    ["evaluate.dreams=-1", "evaluate.bootstrap=0", "evaluate.max_tokens=0", "teacher.retries=-1", "train.steps=0"],
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


def test_a_tokenizer_that_does_not_fit_is_refused(copied: Run) -> None:
    folder = folder_of(copied, 0)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps({**config, "vocab_size": config["vocab_size"] - 1}), encoding="utf-8"
    )
    reseal(folder)
    with pytest.raises(RunMismatch, match=r"the tokenizer has \d+ tokens, the weights \d+"):
        evaluate_run(copied, best(copied))
