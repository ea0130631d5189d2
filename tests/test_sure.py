"""Answers that stand without a dream: just those of which a student is sure enough, wherever it is asked."""

import asyncio
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from support.ablation_run import small_world
from support.dreaming_student import PROMPTS, engine, parts
from support.small_student import ANSWER, DREAM, write_checkpoint

from bundle.load import Student, load_dreaming, load_student
from bundle.manifest import Manifest, write_manifest
from cli.main import dream
from distill.backbone.session import Session
from distill.config import DreamingConfig
from distill.dream.model import DreamingReasoningLLM
from distill.dream.output_decoder import Sampling, is_sure
from distill.dream.simulate import simulate
from distill.errors import BadInput
from distill.exam.examinees.native import NativeExaminee
from distill.exam.questions import Question
from distill.exam.targets import How, Target
from distill.run import Run
from distill.serve.app import create_app
from distill.serve.shelf import Shelf
from distill.serve.student import Offer
from distill.settings import load_settings
from distill.student.sure import LONGEST, Trial, are_sure
from distill.tokens.chat import prompt_ids

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = PROMPTS[0]


@pytest.fixture(scope="module")
def sureness() -> float:
    """Of the answer without a dream: the product of its tokens' probabilities."""
    model, tokenizer, _ = parts()
    context = prompt_ids(tokenizer, PROMPT, False)
    answer = [*tokenizer.encode(ANSWER), tokenizer.eos_id]
    with torch.inference_mode():
        table = model(torch.tensor([context + answer]))[0].double().softmax(-1)
    found = math.prod(float(table[len(context) - 1 + i, id]) for i, id in enumerate(answer))
    assert 0.5 < found < 1
    return found


@pytest.fixture(params=[True, False], ids=["sure", "unsure"])
def asked(request: pytest.FixtureRequest, sureness: float) -> tuple[float, bool]:
    """How sure it must be, just below and just above what it is; and whether it dreams."""
    return (0.999 * sureness, False) if request.param else (1.001 * sureness, True)


# The rule.


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=LONGEST + 3), st.floats(0.01, 0.99))
def test_an_answer_stands_while_the_product_of_its_probabilities_does(odds: list[float], sure: float) -> None:
    trial = Trial(sure)
    for count in range(1, len(odds) + 1):
        stands = trial.add(math.log(odds[count - 1]))
        product = float(np.prod(np.array(odds[:count])))
        if abs(product / sure - 1) > 1e-9:
            assert stands == trial.still == (product >= sure and count <= LONGEST)


def test_only_whole_answers_stand(sureness: float) -> None:
    model, tokenizer, _ = parts()
    context = prompt_ids(tokenizer, PROMPT, False)
    answer = [*tokenizer.encode(ANSWER), tokenizer.eos_id]
    some = [answer, answer[:-1], []]
    assert are_sure(model, [context] * 3, some, tokenizer.eos_id, 0.999 * sureness) == [True, False, False]
    assert are_sure(model, [context], [answer], tokenizer.eos_id, 1.001 * sureness) == [False]


# Wherever it is asked.


def test_chat_dreams_where_it_is_not_sure(asked: tuple[float, bool]) -> None:
    model, tokenizer, _ = parts()
    sure, dreams = asked
    student = Student("small", model, tokenizer, sure=sure)
    found = student.answer(PROMPT, temperature=0.0)
    assert (found.text, found.dream_text) == (ANSWER, DREAM if dreams else "")
    if dreams:
        assert found == replace(student, sure=1.0).answer(PROMPT, temperature=0.0)


@pytest.mark.parametrize("drafts", [False, True], ids=["backbone", "engine"])
def test_python_dreams_where_it_is_not_sure_or_a_dream_is_wanted(asked: tuple[float, bool], drafts: bool) -> None:
    model, tokenizer, codebook = parts()
    sure, dreams = asked
    config = DreamingConfig(sure=sure, keep_above=0.0)
    made = DreamingReasoningLLM(
        config,
        backbone=model,
        tokenizer=tokenizer,
        codebook=codebook,
        engine=engine(config=config) if drafts else None,
        device="cpu",
    )
    found = made.generate(PROMPT, temperature=0, return_dreams=True)
    assert bool(found["record"].read) == dreams
    assert dreams or (found["output"], found["record"].dreamer) == (ANSWER, "none")
    assert "".join(made.generate(PROMPT, temperature=0, stream=True)) == found["output"]
    wanted: list[dict[str, Any]] = [{"dreamer": "backbone"}, {"guide": "⟨a ball⟩"}, {"dream": DREAM}]
    for how in (*wanted, {"on_dream": lambda _: None}, {"replace": {1: "⟨water⟩"}}):
        if not drafts or "replace" not in how:
            assert made.generate(PROMPT, temperature=0, return_dreams=True, **how)["record"].read, how
    assert simulate(made, PROMPT, 1, temperature=0).rollouts[0].record.read, "a branch dreams"


def test_no_cache_is_copied_at_each_token(sureness: float, monkeypatch: pytest.MonkeyPatch) -> None:
    grown: list[bool] = []
    reserve = Session.reserve

    def noted(session: Session, columns: int) -> None:
        grown.append(session.end + columns > session.cache.shape[4])
        reserve(session, columns)

    monkeypatch.setattr(Session, "reserve", noted)
    model, tokenizer, _ = parts()
    student = Student("small", model, tokenizer, sure=0.999 * sureness)
    ids = student.prompt_ids([{"role": "user", "content": PROMPT}], False)
    assert is_sure(model, ids, Sampling(), student._grammar.answering, tokenizer.eos_id, student.sure)
    assert student.answer(PROMPT, temperature=0.0, dream=student.editor.written(DREAM)).text
    assert len(grown) > 2 * len(tokenizer.encode(ANSWER))
    assert not any(grown)


def test_servers_dream_where_they_are_not_sure(asked: tuple[float, bool]) -> None:
    model, tokenizer, _ = parts()
    sure, dreams = asked
    shelf = Shelf([Offer(lambda: Student("small", model, tokenizer, sure=sure), True, 0.0)])

    async def ask(think: bool) -> dict[str, str]:
        transport = httpx.ASGITransport(create_app(shelf), client=("127.0.0.1", 1))
        body = {"model": "small", "messages": [{"role": "user", "content": PROMPT}], "think": think, "stream": False}
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:11435", timeout=60) as client:
            return (await client.post("/api/chat", json=body)).json()["message"]

    try:
        thinking = asyncio.run(ask(True))
        assert thinking["content"] == asyncio.run(ask(False))["content"] == ANSWER
        assert thinking.get("thinking", "") == (DREAM if dreams else "")
    finally:
        shelf.close()


def test_examinees_dream_where_they_are_not_sure(asked: tuple[float, bool], tmp_path: Path) -> None:
    model, tokenizer, codebook = parts()
    sure, dreams = asked
    write_checkpoint(tmp_path / "student", model, tokenizer)
    codebook.save(tmp_path / "student" / "tokenizer")
    examinee = NativeExaminee(Target("student", "checkpoint", tmp_path / "student"), How(0, device="cpu"))
    examinee.sure = sure
    (spoken,) = examinee.answer([Question("0", PROMPT)], think=True, temperature=0.0, max_tokens=40, draw=0)
    assert (spoken.dream, spoken.answer) == (DREAM if dreams else "", ANSWER)


# From the command line.


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Ablated with one seed; don't alter it."""
    run = small_world(tmp_path_factory.mktemp("sure") / "small")
    asked = ["ablate", str(run.path), "--seeds", "1", "--set", "dreaming.sure=0.9", "--arms", "backbone,sure", "-q"]
    done = CliRunner().invoke(dream, [*asked, "--json"])
    assert done.exit_code == 0, done.output
    assert list(json.loads(done.output)["systems"]) == ["backbone", "sure"]
    return Run.open(run.path)


def test_the_ablation_holds_it_against_dreaming_always(world: Run) -> None:
    told = json.loads((world.path / "ablation" / "results.json").read_text(encoding="utf-8"))
    differences = {(each["system"], each["against"], each["metric"]) for each in told["differences"]}
    assert {("sure", "backbone", "tokens_dreamed"), ("sure", "backbone", "exact_match")} <= differences
    for line in (world.path / "ablation" / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        systems = json.loads(line)["systems"]
        assert systems["sure"][0]["dream"] in ("", systems["backbone"][0]["dream"])


def test_a_run_and_its_bundle_keep_how_sure_it_must_be(world: Run, tmp_path: Path) -> None:
    student = world.path / "ablation" / "seed-0" / "dreams"
    assert load_student(student).sure == load_dreaming(student, device="cpu").config.sure == 0.9
    model, tokenizer, _ = parts()
    made = DreamingReasoningLLM(DreamingConfig(), backbone=model, tokenizer=tokenizer, device="cpu")
    folder = made.save_pretrained(tmp_path / "bundle")
    (folder / "dreaming.json").unlink()
    write_manifest(folder, Manifest("small", "f16", {}, {"sure": 0.7}, []))
    assert load_dreaming(folder, device="cpu").config.sure == 0.7


@pytest.mark.parametrize("wrong", ["0", "-0.5", "1.5"])
def test_what_is_no_probability_is_refused(wrong: str) -> None:
    with pytest.raises(BadInput, match=r"dreaming\.sure=.*: must be above 0, and 1 at most"):
        load_settings(overrides=[f"dreaming.sure={wrong}"])
    with pytest.raises(BadInput, match=r"dreaming\.sure=.*: must be above 0, and 1 at most"):
        DreamingReasoningLLM(DreamingConfig(sure=float(wrong)))
