"""The engine, the embedded teacher and the GGUF reader, on the real model."""

import contextlib
import hashlib
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.recorded import exchange

from distill.config import TeacherSettings
from distill.errors import BadInput, CorruptFile, PromptRefused, TeacherError, TeacherUnavailable
from distill.stopping import Terminated, terminable
from distill.teacher import llama_cpp, open_teacher
from distill.teacher.embedded import EmbeddedTeacher
from distill.teacher.gguf_file import read_gguf, read_metadata
from distill.teacher.gguf_tokenizer import Vocabulary, byte_alphabet, read_tokenizer, tokenizer_from_metadata
from distill.teacher.llama_cpp import LlamaCpp
from distill.teacher.llama_engine import LlamaEngine
from distill.teacher.protocol import GenerateOptions

CHATML = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
GREEDY = GenerateOptions(max_tokens=24, temperature=0)


@pytest.fixture(scope="module")
def teacher(smollm2: Path) -> Iterator[EmbeddedTeacher]:
    asked = EmbeddedTeacher(str(smollm2), engine="llama.cpp", slots=2, threads=1, context=256)
    yield asked
    asked.close()


@pytest.fixture(scope="module")
def engine(teacher: EmbeddedTeacher) -> LlamaCpp:
    """The model behind it."""
    llama = teacher._engine
    assert isinstance(llama, LlamaEngine)
    return llama.model


def test_the_file_and_ollama_tell_the_same_vocabulary(smollm2: Path) -> None:
    mine = read_tokenizer(smollm2)
    assert mine == tokenizer_from_metadata(exchange("show_verbose")["response"]["json"]["model_info"])
    assert (mine.model, mine.pre, mine.eos_id, mine.bos_id, mine.extra_stop_ids) == ("gpt2", "smollm", 2, 1, (0,))


def test_the_reader_agrees_with_the_gguf_library(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a.u8", 7)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_array("a.strings", ["", "⟨a ball⟩", "x" * 300])
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_tensor("t.weight", np.zeros((3, 5), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    library = {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items() if not k.startswith("GGUF.")}
    assert read_metadata(path) == library
    (mine,), (theirs,) = read_gguf(path).tensors, gguf.GGUFReader(path).tensors
    assert (mine.name, mine.shape, mine.kind) == ("t.weight", (3, 5), int(gguf.GGMLQuantizationType.F16))
    assert mine.start == theirs.data_offset


def test_the_byte_alphabet_names_every_byte_once() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert (alphabet["Ġ"], alphabet["Ċ"], alphabet["a"]) == (ord(" "), ord("\n"), ord("a"))


def test_ids_print_what_llama_cpp_prints(teacher: EmbeddedTeacher, engine: LlamaCpp) -> None:
    text = "Repeat: 日本語 😀 naïve\n\tend  of it."
    vocabulary = Vocabulary(teacher.tokenizer())
    ids = engine.tokenize(text)
    assert vocabulary.decode(ids) == text.encode()
    assert all(vocabulary.id_of(vocabulary.bytes_of[i]) == i for i in ids)


def test_no_system_prompt_is_sneaked_in(engine: LlamaCpp) -> None:
    assert engine.render("Hi") == CHATML
    assert engine.render("Hi", "Be brief.") == "<|im_start|>system\nBe brief.<|im_end|>\n" + CHATML


def test_the_prompt_is_the_one_that_ollama_made(engine: LlamaCpp) -> None:
    known = exchange("generate_logprobs")["response"]["json"]
    ids = engine.tokenize(engine.render("What happens when you drop a ball?"))
    assert ids == known["context"][: known["prompt_eval_count"]]


def test_soft_targets_one_to_one_eos_included(teacher: EmbeddedTeacher) -> None:
    response = teacher.generate("Reply with one word: yes.", GenerateOptions(max_tokens=60, temperature=0))
    tokens = response.tokens
    assert tokens is not None
    assert response.done_reason == "stop"
    assert tokens.ids[-1] == teacher.tokenizer().eos_id
    assert tokens.soft.all()
    assert Vocabulary(teacher.tokenizer()).decode(tokens.ids.tolist()) == response.text.encode()
    assert (tokens.top_ids[:, 0] == tokens.ids).all()  # greedy
    assert np.allclose(tokens.top_logprobs[:, 0], tokens.logprobs)
    assert (np.diff(tokens.top_logprobs, axis=1) <= 1e-6).all()
    assert (np.exp(tokens.top_logprobs.astype(float)).sum(axis=1) <= 1 + 1e-5).all()
    assert response.timings["service"] > 0


def test_the_whole_vocabulary_is_a_distribution_at_any_temperature(teacher: EmbeddedTeacher, engine: LlamaCpp) -> None:
    size = len(teacher.tokenizer().tokens)
    rows = [
        {a["id"]: a["logprob"] for a in entry["top_logprobs"]}
        for temperature in (0.0, 1.5)
        for entry in engine.complete(CHATML, max_tokens=1, temperature=temperature, n_probs=size, seed=1).entries
    ]
    assert len(rows[0]) == size
    assert abs(np.exp(np.array(list(rows[0].values()))).sum() - 1) < 1e-3  # float32
    assert max(abs(rows[0][i] - rows[1][i]) for i in rows[0]) < 1e-4


def test_merged_characters_keep_their_ids_and_cut_ones_go(teacher: EmbeddedTeacher) -> None:
    vocabulary = Vocabulary(teacher.tokenizer())
    lengths: set[int] = set()
    for limit in (4, 5, 6, 9):
        response = teacher.generate("Repeat exactly: 日本語 😀 naïve", GenerateOptions(max_tokens=limit, temperature=0))
        assert response.tokens is not None
        assert vocabulary.decode(response.tokens.ids.tolist()) == response.text.encode()
        lengths.add(len(response.tokens))
        hard = response.tokens.ids[~response.tokens.soft].tolist()
        assert all(_is_part(vocabulary.bytes_of[i]) for i in hard)
    assert 6 in lengths  # three tokens of words, three of one character


def _is_part(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return True
    return False


def test_equal_seeds_give_equal_answers_in_threads(teacher: EmbeddedTeacher) -> None:
    options = [GenerateOptions(max_tokens=8, temperature=0.7, seed=seed) for seed in (1, 2, 1, 2)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda o: teacher.generate("Name a colour.", o).text, options))
    assert (answers[0], answers[1]) == (answers[2], answers[3])
    assert answers[0] != answers[1]


def test_json_follows_the_schema(teacher: EmbeddedTeacher) -> None:
    schema = {
        "type": "object",
        "properties": {"what": {"enum": ["ball", "stone"]}},
        "required": ["what"],
        "additionalProperties": False,
    }
    assert json.loads(teacher.generate_json("What falls?", schema, GREEDY))["what"] in ("ball", "stone")


def test_describe(teacher: EmbeddedTeacher, smollm2: Path) -> None:
    info = teacher.describe()
    assert info.digest == hashlib.sha256(smollm2.read_bytes()).hexdigest()
    assert info.version.startswith("xllamacpp 20")
    assert info.logprobs
    assert (info.details["architecture"], info.details["context_length"]) == ("llama", 8192)


def test_what_it_cannot_do(teacher: EmbeddedTeacher, engine: LlamaCpp) -> None:
    with pytest.raises(PromptRefused, match=r"exceeds the available context size .* raise teacher.context"):
        teacher.generate("word " * 600, GREEDY)
    with pytest.raises(TeacherError, match="invalid tokens"):
        engine.complete([10**6], max_tokens=1)


def test_an_engine_that_stays_silent(smollm2: Path) -> None:
    with (
        LlamaCpp(smollm2, slots=1, threads=1, context=512, timeout=0.02) as engine,
        pytest.raises(TeacherUnavailable, match=r"no answer within .* s"),
    ):
        engine.complete("The " * 100, max_tokens=4)


def test_a_connection_that_the_engine_closed_is_opened_again(smollm2: Path) -> None:
    """As it does with one that nothing came over for five seconds."""
    engine = LlamaCpp(smollm2, slots=1, threads=1, context=64)
    ids = engine.tokenize("hello")
    for end in (socket.SHUT_RD, socket.SHUT_RDWR):
        (connection,) = engine._connections
        connection.sock.shutdown(end)
        assert engine.tokenize("hello") == ids
    engine.close()


def test_files_that_are_no_models(tmp_path: Path, smollm2: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wrong, short = tmp_path / "wrong.gguf", tmp_path / "short.gguf"
    wrong.write_bytes(b"PK\x03\x04 not a model")
    with smollm2.open("rb") as file:
        start = file.read(8_000_000)
    short.write_bytes(start)
    with pytest.raises(BadInput, match="no such model file"):
        open_teacher(TeacherSettings(model=f"embedded:{tmp_path}/none.gguf"))
    with pytest.raises(CorruptFile, match="is not a GGUF"):
        open_teacher(TeacherSettings(model=f"embedded:{wrong}"))
    with pytest.raises(CorruptFile, match=r"llama\.cpp can't load it"):
        open_teacher(TeacherSettings(model=f"embedded:{short}"))
    short.write_bytes(start[:100_000])
    with pytest.raises(CorruptFile, match="metadata can't be read"):
        open_teacher(TeacherSettings(model=f"embedded:{short}"))
    assert capfd.readouterr().err == ""


def test_exact_engines_repeat_themselves_bit_for_bit(smollm2: Path) -> None:
    with LlamaCpp(smollm2, exact=True, threads=1, context=128) as engine:
        assert engine.slots == 1
        first = engine.complete(CHATML, max_tokens=3, n_probs=5)
        engine.complete("Something else in between", max_tokens=3)
        assert engine.complete(CHATML, max_tokens=3, n_probs=5).entries == first.entries


STAT = """cpu  {a} 0 0 {b} 0 0 0 0 0 0
cpu0 {a} 0 0 {b} 0 0 0 0 0 0
cpu1 0 0 0 100 {c} 0 0 0 0 0
cpu7 900 0 0 0 0 0 0 0 0 0
intr 12 34
"""


@pytest.mark.parametrize(
    ("busy", "idle", "expected"),
    [((0, 0), (0, 10), 2), ((0, 10), (0, 0), 1), ((0, 9), (0, 1), 1), ((0, 0), (0, 0), 2)],
    ids=["both free", "one busy", "one nearly busy", "no time has passed"],
)
def test_the_engine_takes_as_many_threads_as_there_are_free_cores(
    busy: tuple[int, int], idle: tuple[int, int], expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stat = tmp_path / "stat"
    waited = sum(busy) + sum(idle)

    def tick(_: float) -> None:
        stat.write_text(STAT.format(a=busy[1], b=idle[1], c=waited), encoding="ascii")

    stat.write_text(STAT.format(a=busy[0], b=idle[0], c=0), encoding="ascii")
    monkeypatch.setattr(llama_cpp, "STAT", stat)
    monkeypatch.setattr("os.sched_getaffinity", {0: {0, 1}}.__getitem__, raising=False)
    monkeypatch.setattr("time.sleep", tick)
    assert llama_cpp.free_cores() == expected


def test_all_cores_are_free_where_nobody_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(llama_cpp, "STAT", tmp_path / "none")
    monkeypatch.setattr("os.sched_getaffinity", {0: {0, 1, 5}}.__getitem__, raising=False)
    assert llama_cpp.free_cores() == 3


def test_a_stop_while_it_loads_waits_for_it(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is dropped before it has begun would never end."""
    library = llama_cpp._xllamacpp  # pyright: ignore[reportPrivateUsage]
    load = library.Server

    def stopped(params: object) -> object:
        server = load(params)
        signal.raise_signal(signal.SIGTERM)
        return server

    monkeypatch.setattr(library, "Server", stopped)
    with terminable(), pytest.raises(Terminated):
        LlamaCpp(smollm2, context=64, threads=1)


@pytest.mark.parametrize("after", [0.0, 0.3])
def test_it_closes_while_it_is_asked(smollm2: Path, after: float) -> None:
    """Threads whose request breaks off must not send it once more."""
    engine = LlamaCpp(smollm2, slots=2, context=256, threads=1)

    def ask() -> None:
        with contextlib.suppress(TeacherError, AssertionError):
            while True:
                engine.complete("Tell me", max_tokens=1 if after else 200)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(after)
    engine.close()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
