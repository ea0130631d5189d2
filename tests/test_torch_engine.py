"""Our own engine of the embedded teacher against llama.cpp, on a small random model and on the real one."""

import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.small_student import TEXTS, small_model, small_tokenizer
from support.tiny_gguf import write_tiny_gguf

from bundle.gguf import write_gguf
from distill.config import TeacherSettings, TrainSettings
from distill.corpus.traces import TraceStore
from distill.errors import BadInput, PromptRefused, TeacherUnavailable
from distill.events import Event
from distill.teacher import doctor, open_teacher, room_for, torch_engine
from distill.teacher.batching import Batcher
from distill.teacher.choice import ENOUGH, MeasuredEngine
from distill.teacher.embedded import EmbeddedTeacher
from distill.teacher.gguf_file import read_metadata
from distill.teacher.gguf_tokenizer import Vocabulary, read_tokenizer
from distill.teacher.llama_cpp import LlamaCpp
from distill.teacher.prompt_ids import PromptIds
from distill.teacher.protocol import GenerateOptions, Response
from distill.teacher.targets import is_cut
from distill.teacher.torch_engine import TorchEngine
from distill.tokens.bpe import GgufVocabulary
from distill.training.numerics import precisions
from distill.turns import joined

pytestmark = pytest.mark.usefixtures("one_thread")
TRIED = torch_engine.fast_bfloat16.__wrapped__
GREEDY = GenerateOptions(max_tokens=24, temperature=0)
WARM = GenerateOptions(max_tokens=16, temperature=1.3, top_k=40, top_p=0.95, seed=1)
QUESTIONS = [*TEXTS, "The rain?", "Why", "the ball " * 12, "<|im_end|> 12 + 30", "Café, naïve 日本語 😀\n\n\tend "]


@pytest.fixture(scope="module")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random student in float32, with a real tokenizer and chat template."""
    tokenizer = small_tokenizer(smollm2)
    model = small_model(tokenizer)
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_gguf(model.state_dict(), model.config, tokenizer, path, "f32", {"general.name": "tiny"})
    return path


@contextmanager
def asked(path: Path, engine: str, **how: object) -> Generator[EmbeddedTeacher]:
    teacher = EmbeddedTeacher(str(path), **{"engine": engine, "threads": 1, "context": 256, **how})  # pyright: ignore[reportArgumentType]
    try:
        yield teacher
    finally:
        teacher.close()


@pytest.fixture(scope="module")
def ours(tiny: Path) -> Iterator[EmbeddedTeacher]:
    """In float32, as llama.cpp's is, whatever this processor is fast in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_engine, "fast_bfloat16", lambda device: False)
        with asked(tiny, "torch") as teacher:
            yield teacher


@pytest.fixture(scope="module")
def theirs(tiny: Path) -> Iterator[EmbeddedTeacher]:
    with asked(tiny, "llama.cpp", exact=True) as teacher:
        yield teacher


def ids_of(response: Response) -> list[int]:
    assert response.tokens is not None
    return response.tokens.ids.tolist()


def test_greedy_tokens_and_their_rivals_are_llama_cpps(ours: EmbeddedTeacher, theirs: EmbeddedTeacher) -> None:
    for question in QUESTIONS:
        mine, other = ours.generate(question, GREEDY), theirs.generate(question, GREEDY)
        assert mine.tokens is not None
        assert other.tokens is not None
        assert ids_of(mine) == ids_of(other)
        assert (mine.text, mine.done_reason) == (other.text, other.done_reason)
        soft = other.tokens.soft
        assert mine.tokens.soft.all()
        assert np.abs(mine.tokens.logprobs - other.tokens.logprobs)[soft].max() < 1e-3
        assert mine.tokens.top_ids.shape == other.tokens.top_ids.shape
        assert np.abs(mine.tokens.top_logprobs - other.tokens.top_logprobs)[soft].max() < 1e-3
        assert (mine.tokens.top_ids == other.tokens.top_ids)[soft].mean() > 0.99  # ties may stand in another order
        assert mine.timings["service"] >= mine.timings["answer"] > 0


def test_answers_depend_on_the_seed_and_not_on_the_neighbours(ours: EmbeddedTeacher) -> None:
    alone = [ids_of(ours.generate(question, WARM)) for question in QUESTIONS]
    with ThreadPoolExecutor(32) as pool:
        others = [replace(WARM, seed=seed, max_tokens=3 + seed) for seed in range(2, 26)]
        crowd = [pool.submit(ours.generate, QUESTIONS[i % len(QUESTIONS)], other) for i, other in enumerate(others)]
        among = list(pool.map(lambda question: ids_of(ours.generate(question, WARM)), QUESTIONS))
        answers = [ids_of(answer.result()) for answer in crowd]
    assert among == alone
    assert len({tuple(answer[:3]) for answer in answers}) > 12
    assert all(len(answer) <= other.max_tokens for answer, other in zip(answers, others, strict=True))


@pytest.mark.parametrize("top_k", [0, 1, 3, 10**6])
def test_any_top_k_beside_any_other(ours: EmbeddedTeacher, top_k: int) -> None:
    options = replace(WARM, top_k=top_k, top_p=1.0)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda o: ours.generate(TEXTS[0], o), [options, WARM, replace(options, seed=2)]))
    tokens = answers[0].tokens
    assert tokens is not None
    place = (tokens.top_logprobs > tokens.logprobs[:, None] + 1e-6).sum(1)
    assert place.max() < (top_k or 10**6)
    assert ids_of(answers[0]) == ids_of(ours.generate(TEXTS[0], options))
    assert (ids_of(answers[0]) == ids_of(answers[2])) == (top_k == 1)


def test_sampled_tokens_follow_the_distribution(ours: EmbeddedTeacher) -> None:
    """The first token over many seeds, against the probabilities that it is drawn from."""
    options = [GenerateOptions(max_tokens=1, temperature=1.0, top_k=20, top_p=1.0, seed=seed) for seed in range(600)]
    with ThreadPoolExecutor(64) as pool:
        answers = [answer.tokens for answer in pool.map(lambda o: ours.generate(TEXTS[1], o), options)]
    drawn = [int(tokens.ids[0]) for tokens in answers if tokens is not None and len(tokens)]
    first = answers[0]
    assert first is not None
    p = np.exp(first.top_logprobs[0].astype(float))
    p /= p.sum()
    counts = np.array([drawn.count(int(i)) for i in first.top_ids[0]])
    spelled = Vocabulary(ours.tokenizer()).bytes_of
    whole = np.array([not is_cut(spelled[i]) for i in first.top_ids[0]])  # half a character is no answer
    assert counts[~whole].sum() == 0
    assert whole.sum() > 15
    assert (np.abs(counts - len(options) * p) < 4 * np.sqrt(len(options) * p * (1 - p)))[whole].all()


def test_an_answer_ends_where_it_ends_itself(ours: EmbeddedTeacher) -> None:
    tokenizer = ours.tokenizer()
    options = GenerateOptions(max_tokens=200, temperature=1.5, top_k=0, top_p=1.0)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda seed: ours.generate("Why", replace(options, seed=seed)), range(48)))
    ended = [answer for answer in answers if answer.done_reason == "stop" and not answer.thinking]
    assert ended
    for answer in ended:
        assert answer.tokens is not None
        *body, last = ids_of(answer)
        assert last in (tokenizer.eos_id, *tokenizer.extra_stop_ids)
        assert not set(body) & {tokenizer.eos_id, *tokenizer.extra_stop_ids}
        assert answer.tokens.soft[-1]


def test_prompts_that_do_not_fit_and_answers_that_fill_the_context(tiny: Path) -> None:
    with asked(tiny, "torch", context=64) as teacher:
        with pytest.raises(PromptRefused, match=r"tiny\.gguf: .* context size \(64 tokens\); .* raise teacher.context"):
            teacher.generate("word " * 100, GREEDY)
        answer = teacher.generate("the ball " * 12, GenerateOptions(max_tokens=60, temperature=0))
        assert answer.done_reason == "length"
        assert 0 < len(ids_of(answer)) < 60


def test_few_rows_where_memory_is_short(tiny: Path, ours: EmbeddedTeacher) -> None:
    """More requests than there is memory for wait for their turn."""
    engine = ours._engine
    assert isinstance(engine, TorchEngine)
    weights = engine._read()
    batcher = Batcher(weights, slots=8, context=256, stop_ids=frozenset(), memory=1, threads=1)
    futures = [batcher.submit([1, 2, 3 + i], replace(WARM, seed=i)) for i in range(6)]
    assert [len(future.result(60).ids) for future in futures] == [WARM.max_tokens] * 6
    assert batcher._batch._past.cache.shape[2] == 1
    batcher.close()


def test_closing_ends_what_is_in_flight(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, begun = Batcher._step, threading.Event()

    def slow(batcher: Batcher) -> None:
        begun.set()
        threading.Event().wait(0.05)
        step(batcher)

    monkeypatch.setattr(Batcher, "_step", slow)
    before = threading.active_count()
    with asked(tiny, "torch") as teacher, ThreadPoolExecutor(4) as pool:
        endless = GenerateOptions(max_tokens=100_000, temperature=0)
        waiting = [pool.submit(teacher.generate, text, endless) for text in TEXTS]
        assert begun.wait(60)
        teacher.close()
        assert all(isinstance(future.exception(30), TeacherUnavailable) for future in waiting)
        with pytest.raises(TeacherUnavailable, match=r"tiny\.gguf: our engine is closed"):
            teacher.generate("Why", GREEDY)
    assert threading.active_count() == before


def test_a_timeout_is_for_a_step_and_not_for_an_answer(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, seconds = Batcher._step, [0.02]

    def slow(batcher: Batcher) -> None:
        threading.Event().wait(seconds[0])
        step(batcher)

    monkeypatch.setattr(Batcher, "_step", slow)
    with asked(tiny, "torch", timeout=0.2) as teacher:
        assert len(ids_of(teacher.generate("Why", GREEDY))) == GREEDY.max_tokens
        seconds[0] = 1.0
        with pytest.raises(TeacherUnavailable, match=r"tiny\.gguf: our engine took no step within 0 s"):
            teacher.generate("Why", replace(GREEDY, max_tokens=1))


def test_a_failing_engine_tells_everybody(tiny: Path, ours: EmbeddedTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    with asked(tiny, "torch") as teacher:

        def broken(*_: object) -> torch.Tensor:
            raise MemoryError("no more")

        monkeypatch.setattr("distill.backbone.batch.likeliest", broken)
        with pytest.raises(MemoryError, match="no more"):
            teacher.generate("Why", GREEDY)
        with pytest.raises(TeacherUnavailable, match="closed"):
            teacher.generate("Why", GREEDY)


def test_both_engines_are_one_teacher(ours: EmbeddedTeacher, theirs: EmbeddedTeacher) -> None:
    """What one has answered is found whichever engine runs."""
    mine, other = ours.describe(), theirs.describe()
    assert TraceStore.key(mine, "Why", WARM) == TraceStore.key(other, "Why", WARM)
    assert mine.version == f"torch {torch.__version__}"
    assert other.version.startswith("xllamacpp 20")
    assert ours.generate_json("Why", {"enum": ["yes", "no"]}, GREEDY).strip('"') in ("yes", "no")


TALK = joined([("system", "Be kind."), ("user", "What falls faster?"), ("assistant", "Both alike."), ("user", "Why?")])


def test_prompts_are_rendered_and_split_as_llama_cpp_does(smollm2: Path) -> None:
    prompts = PromptIds(read_metadata(smollm2), read_tokenizer(smollm2), "x")
    with LlamaCpp(smollm2, slots=1, threads=1, context=128) as engine:
        for question in [*QUESTIONS, TALK]:
            for system in ("", "Be brief."):
                text = prompts.render(question, system)
                assert text == engine.render(question, system)
                assert prompts.encode(text) == engine.tokenize(text, begin=True)


TEMPLATES = {
    "llama-bpe": "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    "qwen2": "{%- for m in messages %}\n<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>\n{%- endfor %}"
    "{%- if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}",
    "gpt-2": None,
}


@pytest.mark.parametrize("pre", TEMPLATES)
def test_templates_and_beginnings(smollm2: Path, tmp_path: Path, pre: str) -> None:
    """With BOS in front by the tokenizer's kind, a template that writes it itself, and none at all."""
    teacher = read_tokenizer(smollm2)
    vocabulary = GgufVocabulary("gpt2", pre, teacher.tokens, teacher.types, teacher.merges, [])
    begins = None if pre == "llama-bpe" else False
    path = write_tiny_gguf(
        tmp_path / "x.gguf", vocabulary, teacher.eos_id, teacher.eos_id, TEMPLATES[pre], begins=begins, bos_id=1
    )
    prompts = PromptIds(read_metadata(path), read_tokenizer(path), "x")
    with LlamaCpp(path, slots=1, threads=1, context=128) as engine:
        for question in [*QUESTIONS, TALK]:
            text = prompts.render(question)
            assert text == engine.render(question)
            assert prompts.encode(text) == engine.tokenize(text, begin=True)
    assert (prompts.encode("a")[0] == 1) == (pre == "llama-bpe")
    assert prompts.encode("a", begin=False) == prompts.encode("a")[-1:], "what goes on begins with nothing"


def test_what_only_llama_cpp_can_run(smollm2: Path, tmp_path: Path) -> None:
    teacher = read_tokenizer(smollm2)
    vocabulary = GgufVocabulary("gpt2", "unheard-of", teacher.tokens, teacher.types, teacher.merges, [])
    path = write_tiny_gguf(tmp_path / "x.gguf", vocabulary, teacher.eos_id, teacher.eos_id)
    with pytest.raises(BadInput, match=r"x\.gguf: how the teacher's tokenizer 'unheard-of' splits words"):
        open_teacher(TeacherSettings(model=f"embedded:{path}", engine="torch"))
    broken = write_tiny_gguf(
        tmp_path / "y.gguf", replace(vocabulary, pre="gpt-2"), teacher.eos_id, teacher.eos_id, "{% for %}"
    )
    with pytest.raises(BadInput, match=r"y\.gguf: its chat template can't be read"):
        open_teacher(TeacherSettings(model=f"embedded:{broken}", engine="torch"))
    with pytest.raises(BadInput, match=r"teacher\.engine=fast: is none of auto, torch, llama\.cpp"):
        open_teacher(TeacherSettings(model=f"embedded:{smollm2}", engine="fast"))


def test_too_little_memory(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.teacher.torch_engine.available_memory", lambda: 1_000_000)
    with pytest.raises(BadInput, match=r"needs 0\.0 GB of memory, and 0\.0 GB are free; .* teacher\.engine=llama\.cpp"):
        EmbeddedTeacher(str(tiny), engine="torch")
    with asked(tiny, "auto") as teacher:
        assert teacher.describe().version.startswith("xllamacpp 20")


class Counted:
    """An engine that only says how fast it is."""

    slots = 4

    def __init__(self, version: str, rate: float) -> None:
        self.version, self.rate = version, rate
        self.answers = self.trials = self.loaded = self.closed = 0
        self.gate = threading.Event()

    def answer(self, prompt: str, options: GenerateOptions) -> Response:
        self.answers += 1
        assert self.gate.wait(30)
        return Response(self.version, None, "stop")

    def speed(self, *_: object) -> float:
        self.trials += 1
        return self.rate

    def load(self) -> None:
        self.loaded += 1

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize(("rate", "chosen"), [(50.0, "llama 1"), (200.0, "torch 1")])
def test_the_faster_engine_is_taken_once_there_is_enough_to_do(rate: float, chosen: str) -> None:
    llama, torch_ = Counted("llama 1", 100.0), Counted("torch 1", rate)
    torch_.slots = 16
    events: list[Event] = []
    engine = MeasuredEngine(llama, torch_, events.append)  # pyright: ignore[reportArgumentType]
    assert (engine.slots, engine.version) == (16, "llama 1 or torch 1")
    llama.gate.set()
    torch_.gate.set()
    assert engine.answer("Why", GREEDY).text == "llama 1"
    assert llama.trials == torch_.trials == 0
    llama.gate.clear()
    torch_.gate.clear()
    with ThreadPoolExecutor(ENOUGH * 4 + 4) as pool:
        answers = [pool.submit(engine.answer, "Why", GREEDY) for _ in range(ENOUGH * 4 + 4)]
        while engine.version != chosen:
            threading.Event().wait(0.01)
        llama.gate.set()
        torch_.gate.set()
        texts = [answer.result().text for answer in answers]
    assert texts[-1] == chosen
    assert (llama.trials, torch_.trials) == (1, 1)
    (event,) = events
    assert event.message.startswith(f"answers come from {chosen}: our engine wrote {rate:.0f} tokens/s in a trial")
    assert engine.slots == (16 if chosen == "torch 1" else 4)


def test_a_trial_of_the_real_engines(tiny: Path) -> None:
    events: list[Event] = []
    with asked(tiny, "auto", slots=2, listen=events.append) as teacher, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda seed: teacher.generate("Why", replace(WARM, seed=seed)), range(16)))
        assert all(answer.tokens is not None or answer.thinking for answer in answers)
        version = teacher.describe().version
    assert " or " not in version
    assert [event.message.split(":")[0] for event in events] == [f"answers come from {version}"]


def test_the_real_teacher_says_what_llama_cpp_lets_it_say(smollm2: Path) -> None:
    """llama.cpp rounds the inputs of each product with quantized weights to 8 bits, we don't: measured, its logprobs
    are 0.03 off on average, and greedy answers part where two tokens are about as likely."""
    questions = TEXTS[:3]
    with asked(smollm2, "torch") as mine, asked(smollm2, "llama.cpp", exact=True) as other:
        assert mine.describe().digest == other.describe().digest
        with ThreadPoolExecutor(3) as pool:
            ours = list(pool.map(lambda question: mine.generate(question, replace(GREEDY, max_tokens=12)), questions))
        theirs = [other.generate(question, replace(GREEDY, max_tokens=12)) for question in questions]
    gaps: list[float] = []
    for a, b in zip(ours, theirs, strict=True):
        assert a.tokens is not None
        assert b.tokens is not None
        same = int(np.argmin([*(x == y for x, y in zip(a.tokens.ids, b.tokens.ids, strict=True)), False]))
        gaps += np.abs(a.tokens.logprobs[:same] - b.tokens.logprobs[:same]).tolist()
        if same < 12:  # where they part, it was a near thing
            assert a.tokens.top_logprobs[same, 0] - a.tokens.top_logprobs[same, 1] < 0.5
            assert int(b.tokens.ids[same]) in a.tokens.top_ids[same, :3]
    assert len(gaps) >= 12
    assert np.mean(gaps) < 0.1
    assert max(gaps) < 0.6


@pytest.mark.parametrize(
    "text",
    [
        *("What happens? ", "W pokoju stoi stary zegar. ", "Mtoto anacheza. ", "0123456789", "🙂🥚"),
        *("なぜ空は青い？", "ทำไมฟ้าสีฟ้า", "Почему небо? "),
    ],
)
def test_room_is_enough_for_any_script(text: str, smollm2: Path) -> None:
    prompt = text * (4000 // len(text))
    tokens = len(PromptIds(read_metadata(smollm2), read_tokenizer(smollm2), "x").encode(prompt))
    assert tokens + 96 < room_for([prompt], 96) <= 3 * (tokens + 96) + 1024


def test_bfloat16_is_taken_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    for major in (7, 8):  # before 8.0 it is emulated
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, major=major: SimpleNamespace(major=major))
        assert TRIED(torch.device("cuda")) == (major == 8)
        assert precisions(TrainSettings(), "cuda") == ["bfloat16" if major == 8 else "float32"]
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
        told = doctor._torch().detail  # pyright: ignore[reportPrivateUsage]
        assert ("bfloat16 fast" in told) == (major == 8)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert not TRIED(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    for faster in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(torch_engine, "product_seconds", lambda *how, one=faster: 1.0 if one in how else 2.0)
        assert TRIED(torch.device("cpu")) == (faster == torch.bfloat16)
