"""Teachers that think before they answer: in Ollama, in either engine here, in the traces, in the dream."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_ollama import FakeOllama, dreaming_ollama, error, serve
from support.recorded import Told, exchange
from support.small_student import ANSWER, DREAM
from support.stub_teacher import VOCABULARY as WORDS
from support.stub_teacher import StubTeacher

from cli.main import dream as command
from distill.config import Settings, TeacherSettings
from distill.corpus.capture import capture
from distill.corpus.traces import Trace, TraceStore
from distill.errors import BadInput
from distill.events import Event
from distill.mining.syntax_miner import mine_texts
from distill.mining.thinking import dream_first, thought_aloud
from distill.mining.triplets import Mined, Triplet, read_triplets
from distill.run import Run
from distill.teacher import open_teacher
from distill.teacher.embedded import EmbeddedTeacher
from distill.teacher.gguf_tokenizer import Vocabulary
from distill.teacher.ollama import OllamaTeacher
from distill.teacher.protocol import UNKNOWN_ID, GenerateOptions, Response, TeacherInfo, TeacherTokenizer, TokenTargets
from distill.teacher.targets import respond, within

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "What happens when you drop a ball?"
THINK = GenerateOptions(max_tokens=20, temperature=0, think="true", thinking_tokens=40)
VOCABULARY = Vocabulary(TeacherTokenizer("gpt2", "gpt-2", WORDS, ["a b"], [3, *[1] * (len(WORDS) - 1)], 0))


@pytest.fixture(scope="module")
def server(dreamer: Path) -> Iterator[FakeOllama]:
    with dreaming_ollama(dreamer) as server:
        yield server


@pytest.fixture(scope="module", params=["torch", "llama.cpp", "ollama"])
def teacher(request: pytest.FixtureRequest, dreamer: Path, server: FakeOllama) -> Iterator[Any]:
    if request.param == "ollama":
        teacher = OllamaTeacher("dreamer", host=server.url)
    else:
        teacher = EmbeddedTeacher(str(dreamer), engine=request.param, threads=1, slots=1, context=128)
    yield teacher
    teacher.close()


def spelled(teacher: Any, tokens: TokenTargets | None) -> str:
    assert tokens is not None
    return Vocabulary(teacher.tokenizer()).decode(tokens.ids.tolist()).decode().strip()


def test_thinking_is_kept_apart_with_targets_of_its_own(teacher: Any) -> None:
    assert teacher.describe().can_think
    answer = teacher.generate(PROMPT, THINK)
    assert (answer.thinking, answer.text, answer.done_reason) == (DREAM, ANSWER, "stop")
    assert (spelled(teacher, answer.thought), spelled(teacher, answer.tokens)) == (DREAM, ANSWER)
    assert answer.thought.soft.all()
    assert (answer.thought.logprobs > -1).all()
    assert answer.thought.top_ids[:, 0].tolist() == answer.thought.ids.tolist()
    silent = teacher.generate(PROMPT, replace(THINK, think=""))
    assert (silent.thinking, silent.thought, silent.text) == ("", None, ANSWER)


def test_an_answer_keeps_to_its_own_limit(teacher: Any) -> None:
    whole = teacher.generate(PROMPT, THINK)
    short = teacher.generate(PROMPT, replace(THINK, max_tokens=3))
    assert (short.thinking, short.done_reason) == (DREAM, "length")
    assert short.tokens.ids.tolist() == whole.tokens.ids[:3].tolist()
    assert ANSWER.startswith(short.text)
    assert spelled(teacher, short.tokens) == short.text.strip() != ""
    cut = teacher.generate(PROMPT, replace(THINK, max_tokens=1, thinking_tokens=4))
    assert (cut.text, cut.done_reason) == ("", "length")
    assert DREAM.startswith(cut.thinking)
    assert cut.thinking


def test_both_engines_think_the_same(dreamer: Path) -> None:
    found: list[Response] = []
    for engine in ("torch", "llama.cpp"):
        [teacher] = open_teacher(TeacherSettings(model=f"embedded:{dreamer}", engine=engine, threads=1), context=64)
        found.append(teacher.generate(PROMPT, THINK))  # 64 tokens hold no thinking: there is room for it besides
        teacher.close()
    first, second = (answer.thought for answer in found)
    assert first is not None
    assert second is not None
    assert first.ids.tolist() == second.ids.tolist()
    assert np.abs(first.logprobs - second.logprobs).max() < 1e-2  # llama.cpp keeps its past in float16


def test_the_stages_carry_thinking_from_the_teacher_to_the_dream(
    server: FakeOllama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, prompts, out = tmp_path / "run", tmp_path / "prompts.txt", tmp_path / "traces.parquet"
    prompts.write_text(f"{PROMPT}\n", encoding="utf-8")

    def dream(*arguments: object, **settings: object) -> str:
        sets = [f"--set={name.replace('__', '.')}={value}" for name, value in settings.items()]
        done = CliRunner().invoke(command, [*map(str, arguments), *sets])
        assert done.exit_code == 0, done.output
        return done.output

    limits = {"capture__max_tokens": 20, "capture__temperature": 0, "teacher__thinking_tokens": 40}
    where = ("--teacher", "ollama:dreamer", "--host", server.url, "--prompts", prompts)
    said = dream("capture", run, *where, **limits)
    assert "thinks before each answer, 40 tokens at most; teacher.think=false is faster" in " ".join(said.split())
    asked = server.asked("/api/generate")[-1]
    assert (asked["think"], asked["options"]["num_predict"]) == (True, 60)
    stats = json.loads(dream("traces", "stats", run, "--json"))
    assert (stats["responses"], stats["thinking"], stats["thinking_tokens"]) == (1, 1, 7)
    dream("traces", "export", run, out)
    [row] = pq.read_table(out).to_pylist()
    assert (row["thinking"], row["text"]) == (DREAM, ANSWER)
    assert row["thinking_tokens"] == [f"{label}⟩" for label in DREAM.split("⟩")[:-1]]
    assert len(row["thinking_top_ids"]) == 7
    dream("mine", run)
    triplets = read_triplets(run / "triplets.jsonl")
    assert triplets[0] == Triplet("a ball", "release", "falls to the floor", "spatial", 0, row["key"], -1, "dream")
    assert {triplet.miner for triplet in triplets} == {"dream", "syntax"}
    judged = set[str]()

    class Judge:
        def gains(self, prompt: str, answer: str, candidates: Sequence[object]) -> list[float]:
            judged.add(answer)
            return [1.0] * len(candidates)

    monkeypatch.setattr("distill.knowledge.mine._judge", lambda run, listen: Judge())  # pyright: ignore
    dream("mine", run, mine__choose="likelihood")
    assert judged == {ANSWER}, "and not what was thought before"
    count = len(server.asked("/api/generate"))
    dream("capture", run)
    assert len(server.asked("/api/generate")) == count

    # What was begun without thinking goes on so, unless it is told.
    dream("capture", run, teacher__think="false")
    assert server.asked("/api/generate")[-1]["think"] is False
    with TraceStore(run / "traces.db") as store:
        [trace] = store.traces()
        assert (trace.response.thinking, trace.options.think) == ("", "")
        store.select({})
        store._db.execute("DELETE FROM responses WHERE held_out IS NULL AND key != ?", (trace.key,))  # pyright: ignore
    prompts.write_text(f"{PROMPT}\nHow do plants grow?\n", encoding="utf-8")
    said = dream("capture", run, teacher__think="auto")
    assert "could think: teacher.think=true asks anew" in " ".join(said.split())
    assert server.asked("/api/generate")[-1]["think"] is False
    dream("capture", run, teacher__think="true")
    assert server.asked("/api/generate")[-1]["think"] is True


# What models take.


def thinker(answer: Any, listen: Any = None, **details: object) -> Any:
    """A fake server whose model can think, and a teacher there."""
    show = {**exchange("show_thinking_model")["response"]["json"], "details": details}
    verbose = exchange("show_verbose")["response"]["json"]
    return serve(Told({"/api/generate": answer, "/api/show": lambda body: verbose if body.get("verbose") else show}))


def told(text: str = "It falls.", thinking: str = "A ball is heavy.") -> dict[str, Any]:
    return {"response": text, "thinking": thinking, "done": True, "done_reason": "stop"}


def test_a_level_that_a_model_does_not_take_is_left_out_once() -> None:
    def answer(body: Any) -> Any:
        return told() if body["think"] is True else error(400, f'think value "{body["think"]}" is not supported')

    events: list[Event] = []
    with thinker(answer) as server:
        teacher = OllamaTeacher("proto", host=server.url, listen=events.append)
        for _ in range(2):
            found = teacher.generate("p", replace(THINK, think="low", top_logprobs=0))
            assert (found.text, found.thinking) == ("It falls.", "A ball is heavy.")
        assert [body["think"] for body in server.asked("/api/generate")] == ["low", True, True]
    assert sum("takes no level of thinking" in event.message for event in events) == 1


def test_what_always_thinks_is_told_to_think_little_and_given_room() -> None:
    with thinker(lambda body: told(), family="gptoss") as server:
        teacher = OllamaTeacher("proto", host=server.url, thinking_tokens=500)
        options = GenerateOptions(max_tokens=20, top_logprobs=0)
        for think in ("", "true", "high"):
            teacher.generate("p", replace(options, think=think, thinking_tokens=300))
        teacher.generate_json("p", {}, options)
        asked = [(body["think"], body["options"]["num_predict"]) for body in server.asked("/api/generate")]
    assert asked == [("low", 520), (True, 320), ("high", 320), ("low", 520)]


@pytest.mark.parametrize(
    ("think", "reason"), [("true", "stub:dddd can't think; leave it at auto"), ("deep", "is none of")]
)
def test_what_cannot_be_is_refused(tmp_path: Path, think: str, reason: str) -> None:
    (tmp_path / "p.txt").write_text("Why?\n", encoding="utf-8")
    settings = Settings()
    settings.capture.prompts, settings.teacher.think = [str(tmp_path / "p.txt")], think
    run = Run.create(tmp_path / "run", settings)
    with pytest.raises(BadInput, match=f"teacher.think={think}: {reason}"):
        capture(run, teachers=[StubTeacher()]) if think == "true" else open_teacher(settings.teacher)


# Tokens.


def plain(ids: list[int]) -> TokenTargets:
    count = len(ids)
    return TokenTargets(
        np.array(ids, np.int32),
        np.full(count, -0.5, np.float32),
        np.full((count, 1), UNKNOWN_ID, np.int32),
        np.full((count, 1), -np.inf, np.float32),
        np.ones(count, np.bool_),
    )


@given(st.lists(st.integers(1, 399), min_size=1, max_size=30), st.integers(0, 29), st.integers(1, 30))
@settings(max_examples=300, deadline=None)
def test_the_tokens_of_a_part_are_found(ids: list[int], start: int, count: int) -> None:
    start %= len(ids)
    end = start + count
    text = VOCABULARY.decode(ids[start:end]).decode()
    found = within(text, plain(ids), VOCABULARY)
    if VOCABULARY.decode(ids).decode().count(text.strip()) == 1:
        assert found is not None
        assert found.ids.tolist() == ids[start:end]
    elif found is not None:
        assert VOCABULARY.decode(found.ids.tolist()).decode().strip() == text.strip()


def test_what_continues_an_opened_thinking_is_no_answer() -> None:
    tokens = plain([1, 2])
    found = respond(" w1 w2", tokens, VOCABULARY, "length", {}, limit=9, opened=True)
    assert (found.text, found.thinking) == ("", "w1 w2")
    assert found.tokens is not None
    assert len(found.tokens) == 0
    assert found.thought is not None
    assert found.thought.ids.tolist() == [1, 2]


# Mining.


def trace(thinking: str, text: str = "The ball falls to the floor.") -> Trace:
    return Trace("k", PROMPT, False, Response(text, None, "stop", {}, thinking), GenerateOptions(), "d")


def test_what_is_said_of_the_talk_is_not_mined() -> None:
    said = (
        "Okay, the user is asking what happens when a ball drops. Let me think.\nGravity pulls the ball down. "
        "I should mention energy. Wait, the answer should be short. The ball loses energy."
    )
    aloud = thought_aloud(trace(said)).response.text
    assert aloud == "Gravity pulls the ball down.\nThe ball loses energy.\nThe ball falls to the floor."
    [found] = mine_texts([("k", PROMPT, aloud, "stop")], 5)
    assert {(0, "gravity"), (1, "ball"), (2, "ball")} <= {(t.sentence, t.what) for t in found.triplets}
    assert thought_aloud(trace("")) == trace("")


def test_a_dream_comes_first_and_leaves_room_for_what_is_left() -> None:
    mined = [Triplet("ball", "fall", "floor", "spatial", i, "k", i, "syntax") for i in range(2)]
    mined += [Triplet("gravity", "pull", "ball", "causal", 0, "k", 0, "syntax")]
    whole = "⟨spatial⟩⟨a ball⟩⟨release⟩⟨floor⟩⟨a ball⟩⟨release⟩⟨floor⟩⟨ball⟩⟨wet⟩⟨temporal⟩⟨causal⟩"
    dreamer = trace(whole)
    assert thought_aloud(dreamer) is dreamer
    found = dream_first(dreamer, Mined(mined, 5, 3), 2)
    assert [(t.lens, t.step, t.what, t.miner) for t in found.triplets] == [
        ("spatial", 0, "a ball", "dream"), ("spatial", 1, "ball", "syntax"), ("causal", 0, "gravity", "syntax"),
    ]  # fmt: skip
    assert (found.proposed, found.grounded) == (7, 5)
    prose = trace("A ball falls.")
    assert dream_first(prose, Mined(mined, 5, 3), 2) == Mined(mined, 5, 3)


def test_answers_that_thinking_left_no_room_for_are_counted_with_what_would_help(tmp_path: Path) -> None:
    class Thinker(StubTeacher):
        def describe(self) -> TeacherInfo:
            return replace(super().describe(), details={"capabilities": ["completion", "thinking"]})

        def generate(self, prompt: str, options: GenerateOptions) -> Response:
            asked.append(options)
            found = replace(super().generate(prompt, options), thinking="Okay, so")
            return replace(found, text="", tokens=None) if "1" in prompt else found

    asked: list[GenerateOptions] = []
    (tmp_path / "p.txt").write_text("What is 1?\nWhat is 2?\n", encoding="utf-8")
    made = Settings()
    made.capture.prompts = [str(tmp_path / "p.txt")]
    events: list[Event] = []
    summary = capture(Run.create(tmp_path / "run", made), events.append, teachers=[Thinker()])
    assert (summary["responses"], summary["empty"], summary["thought"]) == (1, 1, 1)
    assert {(options.think, options.room) for options in asked} == {("true", 96 + 1024)}
    assert any("gave no answer; raise teacher.thinking_tokens=1024" in event.message for event in events)
