"""A bundle in lm-evaluation-harness, as it is: what the harness relies on, and a task of its own run for real.

docs/harness.md tells users the same.
"""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.small_student import LABELS, TEXTS, small_model, small_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from bundle.export import Origin, write_bundle
from bundle.load import Student
from distill.config import ExportSettings
from distill.corpus.datasets.causal_world import questions
from distill.tokens.chat import prompt_ids

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
TASK = ROOT / "docs" / "harness" / "causal_world.yaml"
SHOWN = 12
"""Questions of the task that are asked here."""


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in TASK.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def student(smollm2: Path) -> Student:
    tokenizer = small_tokenizer(smollm2, [*TEXTS, *(line["question"] for line in lines())], LABELS)
    return Student("tiny", small_model(tokenizer), tokenizer, "")


@pytest.fixture(scope="module")
def bundle(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness") / "bundle"
    provenance = {"teacher": {"name": "smollm2", "digest": "sha256:1"}, "prompts": ["everyday"], "checkpoint": "step-1"}
    write_bundle(folder, student, ExportSettings(), Origin("tiny", provenance, None, ["Is it wet?"]))
    return folder


def native(student: Student, line: dict[str, Any]) -> list[tuple[float, bool]]:
    """(log-likelihood, whether greedy decoding would say it) of each choice, by our own model and tokenizer.

    The harness counts what white space the context ends in as part of the continuation: so does this.
    """
    *context, newline = prompt_ids(student.tokenizer, line["question"], think=False)
    answers = [[newline, *student.tokenizer.encode(choice)] for choice in line["choices"]]
    found: list[tuple[float, bool]] = []
    for answer in answers:
        with torch.inference_mode():
            logits = student.model(torch.tensor([[*context, *answer]]))[0, len(context) - 1 : -1]
        logprobs, labels = logits.double().log_softmax(-1), torch.tensor(answer)
        likely = bool((logits.argmax(-1) == labels).all())
        found.append((float(logprobs[torch.arange(len(answer)), labels].sum()), likely))
    return found


def test_what_the_harness_relies_on(student: Student, bundle: Path) -> None:
    """The way of its `hf` model: the template as text, both encoded together, cut at the context's length."""
    model = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    assert tokenizer.pad_token_id is not None
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.config.max_position_embeddings == student.model.config.context
    for line in lines()[:SHOWN:3]:
        turn = [{"role": "user", "content": line["question"]}]
        options = {"tokenize": False, "add_generation_prompt": True, "continue_final_message": False}
        text = tokenizer.apply_chat_template(turn, **options, enable_thinking=False)
        assert text.endswith("<think>\n</think>\n")
        assert tokenizer.apply_chat_template(turn, **options) == text.removesuffix("<think>\n</think>\n")
        context = tokenizer.encode(text.rstrip())
        expected = native(student, line)
        for choice, (logprob, greedy) in zip(line["choices"], expected, strict=True):
            whole = tokenizer.encode(text + choice)
            assert whole[: len(context)] == context
            assert whole == [*prompt_ids(student.tokenizer, line["question"], False), *student.tokenizer.encode(choice)]
            with torch.no_grad():
                logits = model(torch.tensor([whole[:-1]])).logits[0, len(context) - 1 :].double()
            said = torch.tensor(whole[len(context) :])
            theirs = float(logits.log_softmax(-1).gather(1, said[:, None]).sum())
            assert theirs == pytest.approx(logprob, abs=1e-4 * len(said))
            assert bool((logits.argmax(-1) == said).all()) == greedy


def test_the_task_asks_held_out_questions_and_its_right_answers_are_right() -> None:
    made = {question.prompt: question for question in questions(3000, 16, 0)}
    for line in lines():
        answer = line["choices"][line["answer"]]
        assert len(set(line["choices"])) == 4
        if line["question"] in made:
            assert made[line["question"]].answer == answer
            assert made[line["question"]].split == line["split"] != "train"
    assert sum(line["question"] in made for line in lines()) >= 40  # a longer training set leaves out some of them
    places = [line["answer"] for line in lines()]
    assert max(places.count(place) for place in range(4)) <= len(places) / 2


def test_the_page_shows_the_task_that_is_there() -> None:
    text = (ROOT / "docs" / "harness.md").read_text(encoding="utf-8")
    task = yaml.safe_load(TASK.read_text(encoding="utf-8"))
    assert task["dataset_kwargs"]["data_files"]["test"] == str(TASK.with_suffix(".jsonl").relative_to(ROOT))
    assert re.search(rf"--tasks {task['task']}\b", text)
    assert "enable_thinking=False" in text


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason='lm_eval is not installed: pip install -c constraints.txt "lm_eval[hf]" (248 MB; docs/harness.md)',
)
def test_the_harness_takes_a_bundle_as_it_is(student: Student, bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--include_path", str(TASK.parent)]
    command += ["--model_args", f"pretrained={bundle},enable_thinking=False,dtype=float32"]
    command += ["--tasks", "causal_world", "--apply_chat_template", "--device", "cpu", "--batch_size", "4"]
    command += ["--limit", str(SHOWN), "--output_path", str(tmp_path), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **offline}, capture_output=True, encoding="utf-8", timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = tmp_path.rglob("results_*.json")
    (samples,) = tmp_path.rglob("samples_causal_world_*.jsonl")
    right = 0
    for line in map(json.loads, samples.read_text(encoding="utf-8").splitlines()):
        expected = native(student, line["doc"])
        for (theirs, greedy), (ours, said) in zip(line["filtered_resps"], expected, strict=True):
            assert float(theirs) == pytest.approx(ours, abs=2e-3)
            assert (str(greedy) == "True") == said
        right += max(range(4), key=lambda i: expected[i][0]) == line["doc"]["answer"]
    measured = json.loads(results.read_text(encoding="utf-8"))["results"]["causal_world"]
    assert math.isclose(measured["acc,none"], right / SHOWN)
