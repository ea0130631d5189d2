"""The student's tokenizer against independent ones: the teacher's own ids, llama.cpp, sentencepiece, transformers."""

import copy
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fuzz_text import fuzz_text
from support.small_capture import mined_small
from support.tiny_gguf import write_tiny_gguf

from bundle.verify import ODD
from distill import spread
from distill.config import Settings, TokenizeSettings
from distill.corpus.traces import Trace, TraceStore
from distill.errors import BadInput, CorruptFile, DistillError
from distill.events import Event
from distill.mining.triplets import LENSES
from distill.run import Run, sha256_file
from distill.teacher.gguf_tokenizer import CONTROL, NORMAL, USER_DEFINED, read_tokenizer
from distill.teacher.llama_cpp import LlamaCpp
from distill.teacher.pre_tokenizers import PRE_TOKENIZATIONS, imported_as
from distill.teacher.protocol import TeacherTokenizer
from distill.tokens.aligned import AlignedCut, why_not
from distill.tokens.bpe import ADDED, GgufVocabulary, StudentTokenizer
from distill.tokens.build import build_tokenizer, cut_to_corpus, read_corpus
from distill.tokens.packing import pack
from distill.tokens.sentence_piece import from_model, train_model

LABELS = ["a ball", "release", "falls to the floor", "café", "naïve 2", "don't"]
TEXTS = fuzz_text(seed=1, count=600)


@dataclass
class Aligned:
    cut: AlignedCut
    student: StudentTokenizer
    traces: list[Trace]


@pytest.fixture(scope="session")
def aligned(small_run: Run) -> Aligned:
    corpus = read_corpus(small_run)
    assert corpus.teacher is not None
    cut = cut_to_corpus(corpus.teacher, corpus, 3000)
    return Aligned(cut, cut.build(LABELS, corpus.teacher_digest), list(corpus.traces()))


@pytest.fixture(scope="session")
def sentencepiece_model(small_run: Run) -> bytes:
    corpus = read_corpus(small_run)
    return train_model([*corpus, *TEXTS[:100]], 1500)


@pytest.fixture(scope="session")
def pieces(sentencepiece_model: bytes) -> StudentTokenizer:
    return from_model(sentencepiece_model, LABELS)


@pytest.fixture(params=["aligned", "pieces"])
def student(request: pytest.FixtureRequest, aligned: Aligned, pieces: StudentTokenizer) -> StudentTokenizer:
    return aligned.student if request.param == "aligned" else pieces


# The aligned kind is exact.


def test_every_sampled_token_has_one_id_that_prints_the_same(aligned: Aligned) -> None:
    """First statement: teacher → student, token for token, over every captured response."""
    assert len(aligned.traces) == 24
    student, teacher = aligned.student, aligned.cut.teacher
    assert student.teacher_map is not None
    for trace in aligned.traces:
        assert trace.response.tokens is not None
        sampled = trace.response.tokens.ids
        ids = student.teacher_map[sampled]
        assert (ids >= 0).all()
        if trace.response.done_reason == "stop":
            assert sampled[-1] == teacher.eos_id
            assert ids[-1] == student.eos_id
            ids = ids[:-1]
        assert student.decode(ids.tolist()) == trace.response.text


def test_the_cut_splits_the_corpus_as_the_teacher_does(aligned: Aligned, smollm2: Path) -> None:
    """Second statement: re-encoding text. The reference is llama.cpp with the teacher's own file."""
    student, teacher_map = aligned.student, aligned.student.teacher_map
    assert teacher_map is not None
    texts = [trace.response.text for trace in aligned.traces] + [trace.prompt for trace in aligned.traces]
    with LlamaCpp(smollm2, slots=1, context=64, threads=1) as engine:
        for text in texts:
            ids = engine.tokenize(text)
            assert student.encode(text) == teacher_map[ids].tolist()
            assert aligned.cut.full.encode(text).ids == ids


def test_the_cut_is_closed_and_keeps_the_order_of_ranks(aligned: Aligned) -> None:
    """Every kept token can be had by kept merges, and kept merges are the teacher's in the teacher's order."""
    student, teacher = aligned.student, aligned.cut.teacher
    merges = student.gguf().merges
    ranks = {merge: rank for rank, merge in enumerate(teacher.merges)}
    assert [ranks[merge] for merge in merges] == sorted(ranks[merge] for merge in merges)
    results = {merge.replace(" ", "") for merge in merges}
    assert all(len(token) == 1 or token in results for token in student.tokens[: student.base_size])
    for id in range(student.base_size):  # each token's own text comes back as that token
        data = student.token_bytes(id)
        if (text := data.decode(errors="ignore")).encode() == data:
            alone = aligned.cut.full.encode(text).ids
            if len(alone) == 1:
                assert student.encode(text) == [id]


def test_ids_are_in_the_teachers_order_and_every_byte_has_one(aligned: Aligned) -> None:
    student, teacher_map = aligned.student, aligned.student.teacher_map
    assert teacher_map is not None
    base = teacher_map[(teacher_map >= 0) & (teacher_map < student.base_size)]
    assert (np.diff(base) == 1).all()
    single = {student.token_bytes(id) for id in range(student.base_size) if len(student.token_bytes(id)) == 1}
    assert single == {bytes([byte]) for byte in range(256)}


def test_likely_alternatives_fill_the_room(aligned: Aligned, small_run: Run) -> None:
    """More room, more of the teacher's probability can be learned; what the corpus needs is kept without room."""
    corpus = read_corpus(small_run)
    shares: list[float] = []
    for room in (0, 2500, 5000):
        cut = cut_to_corpus(aligned.cut.teacher, corpus, room)
        teacher_map = cut.build([]).teacher_map
        assert teacher_map is not None
        assert cut.size <= max(room, cut_to_corpus(aligned.cut.teacher, corpus, 0).size)
        mass = total = 0.0
        for trace in corpus.traces():
            assert trace.response.tokens is not None
            known = teacher_map[trace.response.tokens.top_ids] >= 0
            probabilities = np.exp(trace.response.tokens.top_logprobs.astype(np.float64))
            mass, total = mass + float(probabilities[known].sum()), total + float(probabilities.sum())
        shares.append(mass / total)
    assert 0.8 < shares[0] < shares[1] < shares[2] <= 1


def telling(weights: Path, pre: str) -> TeacherTokenizer:
    """The teacher's vocabulary, altered to tell ways of splitting apart: with tokens of two and three digits, and
    without every seventh merge, so that some tokens can only be taken whole."""
    teacher = read_tokenizer(weights)
    merges = [merge for i, merge in enumerate(teacher.merges) if i % 7]
    merges += [f"{i} {j}" for i, j in product(range(10), repeat=2)]
    merges += [f"{i:02} {j}" for i, j in product(range(100), range(10))]
    new = [token for merge in merges if (token := merge.replace(" ", "")) not in teacher.token_to_id]
    types = [*teacher.types, *[NORMAL] * len(new)]
    return replace(teacher, pre=pre, merges=merges, tokens=[*teacher.tokens, *new], types=types)


@cache
def whole(weights: Path, pre: str) -> AlignedCut:
    """Of `telling`, read once; don't alter what it keeps."""
    return AlignedCut(telling(weights, pre))


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2", "dbrx"])
def test_pre_tokenizers_split_as_llama_cpp_does(smollm2: Path, tmp_path: Path, pre: str) -> None:
    """A big vocabulary under each way of splitting, on fuzzed text."""
    teacher, full = whole(smollm2, pre).teacher, whole(smollm2, pre).full
    vocabulary = GgufVocabulary("gpt2", pre, teacher.tokens, teacher.types, teacher.merges, [])
    path = write_tiny_gguf(tmp_path / "tiny.gguf", vocabulary, teacher.eos_id, teacher.eos_id)
    with LlamaCpp(path, slots=1, context=64, threads=1) as engine:
        assert [full.encode(text).ids for text in TEXTS] == [engine.tokenize(text) for text in TEXTS]


def imported(folder: Path, to: Path) -> Path:
    """A GGUF with the vocabulary that Ollama's importer reads out of a folder of safetensors: what tokenizer.json
    lists, how it is split by the digest of its patterns, and special tokens by name where they are added ones."""
    content, config = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("tokenizer.json", "tokenizer_config.json")
    )
    added = {token["content"]: token for token in content["added_tokens"]}
    ids = {**content["model"]["vocab"], **{text: token["id"] for text, token in added.items()}}
    tokens = sorted(ids, key=ids.__getitem__)
    types = [(CONTROL if added[text]["special"] else USER_DEFINED) if text in added else NORMAL for text in tokens]
    merges = [" ".join(pair) for pair in content["model"]["merges"]]
    vocabulary = GgufVocabulary("gpt2", imported_as(content["pre_tokenizer"]), tokens, types, merges, [])
    begins, bos = (config["add_bos_token"], ids[config["bos_token"]]) if config["bos_token"] in added else (None, None)
    return write_tiny_gguf(
        to, vocabulary, ids[config["eos_token"]], ids[config["pad_token"]], begins=begins, bos_id=bos
    )


@pytest.mark.parametrize(
    ("pre", "known"), [("llama-bpe", True), ("qwen2", True), ("smollm", False), ("gpt-2", False), ("dbrx", False)]
)
def test_a_folder_that_ollama_imports_gives_the_same_ids_or_says_that_it_does_not(
    smollm2: Path, tmp_path: Path, pre: str, known: bool
) -> None:
    cut = copy.copy(whole(smollm2, pre))
    cut.kept = {*cut.kept}
    cut.keep_text(TEXTS)
    student = cut.build(LABELS)
    student.save(tmp_path)
    assert StudentTokenizer.load(tmp_path).importable == known
    with LlamaCpp(imported(tmp_path, tmp_path / "tiny.gguf"), slots=1, context=64, threads=1) as engine:
        texts = [*ODD, *TEXTS[:300], "<|im_start|>user\n⟨a ball⟩ <think>\n⟨spatial⟩"]
        same = [engine.tokenize(text, begin=True) == student.encode(text, special=True) for text in texts]
    assert all(same) == (known or pre == "dbrx")  # which differs from llama-bpe where merges don't lead to a token


def test_only_what_is_equivalent_is_importable(pieces: StudentTokenizer) -> None:
    assert not pieces.importable  # the importer takes every tokenizer.json for a byte-level BPE
    assert imported_as(None) == imported_as({"type": "ByteLevel"}) == "default"


def test_pre_tokenizations_differ(smollm2: Path) -> None:
    """The comparison above tells them apart: no two of the five split the fuzzed text alike."""
    names = ("smollm", "gpt-2", "llama-bpe", "qwen2", "dbrx")
    full = {name: whole(smollm2, name).full for name in names}
    splits = {name: [full[name].encode(text).ids for text in TEXTS] for name in names}
    assert [(a, b) for a, b in combinations(names, 2) if splits[a] == splits[b]] == []
    assert {PRE_TOKENIZATIONS[name] for name in names} == set(PRE_TOKENIZATIONS.values())


def test_a_teacher_that_cannot_be_cut_is_refused(smollm2: Path) -> None:
    teacher = read_tokenizer(smollm2)
    assert why_not(teacher) is None
    for strange in (replace(teacher, pre="unheard-of"), replace(teacher, model="llama")):
        with pytest.raises(BadInput, match="sentencepiece") as caught:
            AlignedCut(strange)
        assert "\n" not in str(caught.value)


def test_ends_of_every_kind_are_ours(smollm2: Path) -> None:
    teacher = read_tokenizer(smollm2)
    assert teacher.extra_stop_ids
    cut = AlignedCut(teacher)
    cut.keep([teacher.eos_id, *teacher.extra_stop_ids, -1, 10**6])  # none of these is a BPE token
    cut.keep_text(["\n"])
    student = cut.build([])
    assert student.teacher_map is not None
    assert {int(student.teacher_map[id]) for id in (teacher.eos_id, *teacher.extra_stop_ids)} == {student.eos_id}


# The sentencepiece kind is sentencepiece.


def reference(model: bytes) -> Callable[[str], list[int]]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return lambda text: processor.encode(text)


def test_pieces_equal_sentencepiece(pieces: StudentTokenizer, sentencepiece_model: bytes, small_run: Run) -> None:
    encode = reference(sentencepiece_model)
    corpus = read_corpus(small_run)
    for text in [*corpus, *TEXTS]:
        assert pieces.encode(text) == encode(text)


def test_pieces_say_what_they_stand_for(pieces: StudentTokenizer) -> None:
    assert pieces.token_bytes(pieces.newline_id) == b"\n"
    assert pieces.tokens[0] == "<unk>"
    assert pieces.teacher_map is None
    assert pieces.kind == "sentencepiece"


def test_training_is_deterministic_and_says_when_there_is_no_room() -> None:
    texts = ["The ball falls to the floor. " * 20, "a ball, a floor; 1995"]
    assert train_model(texts, 300) == train_model(texts, 300)
    with pytest.raises(BadInput, match="vocab_size"):
        train_model(texts, 100)


def test_a_small_corpus_gives_fewer_pieces_than_wanted() -> None:
    student = from_model(train_model(["The ball falls to the floor."], 5000), [])
    assert 257 < student.base_size < 5000
    assert student.decode(student.encode("The ball.\n")) == "The ball.\n"


# Both kinds.


def test_layout(student: StudentTokenizer) -> None:
    added = student.tokens[student.base_size :]
    assert added == [
        *("<|pad|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"),
        *("⟨spatial⟩", "⟨temporal⟩", "⟨causal⟩", "⟨abstract⟩"),
        *(f"⟨{label}⟩" for label in LABELS),
    ]
    named = (student.pad_id, student.start_id, student.eos_id, student.think_id, student.end_think_id)
    assert [*named, *student.lens_ids, *student.image_ids] == list(range(student.base_size, student.vocab_size))
    assert student.labels == LABELS
    assert [student.image_code(int(id)) for id in student.image_ids] == list(range(len(LABELS)))
    assert student.image_code(student.base_size + ADDED - 1) is None
    assert student.image_code(0) is None


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_any_text_comes_back(aligned: Aligned, pieces: StudentTokenizer, text: str) -> None:
    """Also text that the teacher can't spell: it lacks 21 of the 256 bytes. (sentencepiece can't tell ▁ from a
    space.)"""
    for student in (aligned.student, pieces):
        assert student.decode(student.encode(text)) == text


def test_written_tokens_are_parsed_only_when_asked(student: StudentTokenizer) -> None:
    text = "a<think>⟨a ball⟩⟨a ball ⟩<|im_end|>⟨café⟩"
    ids = student.encode(text, special=True)
    added = [id for id in ids if id >= student.base_size]
    assert added == [student.think_id, student.image_ids[0], student.eos_id, student.image_ids[3]]
    assert max(student.encode(text)) < student.base_size
    assert student.decode(ids) == student.decode(student.encode(text)) == text
    assert student.decode(ids, skip_special=True) == text.replace("<|im_end|>", "")


def test_batches_equal_single_texts(student: StudentTokenizer) -> None:
    assert student.encode_batch(TEXTS[:50]) == [student.encode(text) for text in TEXTS[:50]]


def test_saved_and_loaded_it_is_the_same(student: StudentTokenizer, tmp_path: Path) -> None:
    student.save(tmp_path)
    loaded = StudentTokenizer.load(tmp_path)
    assert loaded.tokens == student.tokens
    assert loaded.gguf() == student.gguf()
    assert [loaded.encode(text, special=True) for text in TEXTS] == [
        student.encode(text, special=True) for text in TEXTS
    ]
    assert (loaded.teacher_map is None) == (student.teacher_map is None)
    if loaded.teacher_map is not None and student.teacher_map is not None:
        assert (loaded.teacher_map == student.teacher_map).all()
    assert not (tmp_path / "tokenizer.model").exists()  # Ollama would take it instead of ours
    digests = {path.name: sha256_file(path) for path in tmp_path.iterdir()}
    loaded.save(tmp_path)
    assert {path.name: sha256_file(path) for path in tmp_path.iterdir()} == digests


def test_loading_is_fast(aligned: Aligned, tmp_path: Path) -> None:
    aligned.student.save(tmp_path)
    seconds: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        StudentTokenizer.load(tmp_path).encode("What happens?")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3


@pytest.mark.parametrize("damage", ["cut", "altered", "missing", "meta", "version", "map", "encoding"])
def test_a_damaged_folder_is_named(aligned: Aligned, tmp_path: Path, damage: str) -> None:
    aligned.student.save(tmp_path)
    path = tmp_path / ("dream_tokenizer.json" if damage in ("meta", "version") else "tokenizer.json")
    if damage == "map":
        path = tmp_path / "teacher_map.safetensors"
    data = path.read_bytes()
    if damage == "encoding":  # read as Latin-1 and written as UTF-8, its digest with it
        path.write_text(data.decode("iso-8859-1"), encoding="utf-8")
        meta = tmp_path / "dream_tokenizer.json"
        about = json.loads(meta.read_text(encoding="utf-8"))
        about["files"][path.name] = sha256_file(path)
        meta.write_text(json.dumps(about), encoding="utf-8")
        path = meta
    elif damage == "missing":
        path.unlink()
    elif damage == "version":
        path.write_text(json.dumps({**json.loads(data), "version": 99}), encoding="utf-8")
    elif damage == "altered":
        path.write_bytes(data.replace(b'"Digits"', b'"Digitz"'))
    else:
        path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptFile, match=str(path)) as caught:
        StudentTokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert "dream tokenize" in str(caught.value)


def test_transformers_gives_the_same_ids(student: StudentTokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    student.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == student.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id) == (student.eos_id, student.pad_id)
    texts = [*TEXTS, "<|im_start|>user\n⟨a ball⟩ <think>\n⟨spatial⟩⟨don't⟩</think>\nSo<|im_end|>\n"]
    assert [theirs(text)["input_ids"] for text in texts] == [student.encode(text, special=True) for text in texts]
    ids = student.encode(texts[-1], special=True)
    assert theirs.decode(ids) == texts[-1]
    assert theirs.decode(ids, skip_special_tokens=True) == student.decode(ids, skip_special=True)


@pytest.fixture(params=["aligned", "pieces"])
def engine(
    request: pytest.FixtureRequest, aligned: Aligned, pieces: StudentTokenizer, tmp_path: Path
) -> Iterator[tuple[StudentTokenizer, LlamaCpp]]:
    student = aligned.student if request.param == "aligned" else pieces
    path = write_tiny_gguf(tmp_path / "tiny.gguf", student.gguf(), student.eos_id, student.pad_id)
    with LlamaCpp(path, slots=1, context=64, threads=1) as engine:
        yield student, engine


def test_llama_cpp_gives_the_same_ids(engine: tuple[StudentTokenizer, LlamaCpp]) -> None:
    """The GGUF says the same: on fuzzed text, with and without the student's own tokens written in it."""
    student, llama_cpp = engine
    texts = [*TEXTS, "<|im_start|>user\n⟨a ball⟩ <think>\n⟨spatial⟩⟨don't⟩</think>\nSo<|im_end|>\n", "⟨a ball⟩⟨a ball"]
    for text in texts:
        assert student.encode(text, special=True) == llama_cpp.tokenize(text)


# The stage.


@pytest.fixture
def mined_run(tmp_path: Path) -> Run:
    run = mined_small(tmp_path / "run")
    return Run(run.path, replace(run.settings, tokenize=TokenizeSettings(vocab_size=3000, image_tokens=40)))


def test_the_stage_writes_a_whole_tokenizer_and_is_skipped_when_fresh(mined_run: Run) -> None:
    from distill.tokens.image_tokens import Codebook, load_codes

    events: list[Event] = []
    summary = build_tokenizer(mined_run, events.append)
    student, codebook = StudentTokenizer.load(mined_run.tokenizer), Codebook.load(mined_run.tokenizer)
    assert student.labels == codebook.labels
    assert load_codes(mined_run.tokenizer, codebook)
    assert summary["kind"] == student.kind == "aligned"
    assert summary["vocab_size"] == student.vocab_size <= 3000
    assert summary["bpe_tokens"] + ADDED + summary["image_tokens"] == student.vocab_size
    assert 0.9 < summary["soft_mass_in_vocabulary"] <= 1
    assert 1 < summary["tokens_a_word"] < 4
    assert 1 < summary["bytes_a_token"] < 6
    assert 0 <= summary["noncanonical_responses"] < 1
    assert [event.kind for event in events] == ["start", "done"]
    record = mined_run.require("tokenize")
    assert {mined_run.path / name for name in record.outputs} == set(mined_run.tokenizer.iterdir())
    written = {path: path.stat().st_mtime_ns for path in mined_run.tokenizer.iterdir()}
    assert build_tokenizer(mined_run, events.append) == summary
    assert {path: path.stat().st_mtime_ns for path in mined_run.tokenizer.iterdir()} == written
    build_tokenizer(mined_run, force=True)
    assert mined_run.require("tokenize").outputs == record.outputs  # the same bytes
    assert {path: path.stat().st_mtime_ns for path in mined_run.tokenizer.iterdir()} != written


@pytest.mark.parametrize("kind", ["aligned", "sentencepiece"])
def test_lenses_stand_in_the_order_that_is_set(mined_run: Run, kind: str) -> None:
    mined_run.settings.tokenize.kind = kind
    build_tokenizer(mined_run)
    assert "lenses" not in mined_run.require("tokenize").settings, "as before there was such a setting"
    assert StudentTokenizer.load(mined_run.tokenizer).lenses == LENSES
    assert mined_run.stale("tokenize") == []
    mined_run.settings.tokenize.lenses = order = ["abstract", "spatial", "temporal", "causal"]
    (why,) = mined_run.stale("tokenize")
    assert why.startswith("tokenize.lenses was ['spatial', 'temporal', 'causal', 'abstract'], is ['abstract'"), (
        "a sweep asks"
    )
    build_tokenizer(mined_run)
    assert mined_run.stale("tokenize") == []
    assert StudentTokenizer.load(mined_run.tokenizer).lenses == (*order,)


def test_a_corpus_that_needs_too_many_tokens_keeps_the_commonest_and_says_what_it_drops(mined_run: Run) -> None:
    build_tokenizer(mined_run)
    whole = StudentTokenizer.load(mined_run.tokenizer)
    mined_run.settings.tokenize.vocab_most = most = 700
    events: list[Event] = []
    summary = build_tokenizer(mined_run, events.append)
    student = StudentTokenizer.load(mined_run.tokenizer)
    assert most - 40 < student.vocab_size == summary["vocab_size"] <= most < whole.vocab_size
    (told,) = [event.message for event in events if event.kind == "warning"]
    assert f"{summary['tokens_left_out']:,} of the teacher's tokens more than tokenize.vocab_most=700" in told
    corpus = read_corpus(mined_run)
    spoken = [trace.response.tokens for trace in corpus.traces()]
    said = Counter(id for targets in spoken if targets is not None for id in targets.ids.tolist())
    assert student.teacher_map is not None
    kept = {id for id in said if student.teacher_map[id] >= 0}
    assert {id for id, _ in said.most_common(100)} <= kept < set(said)
    for answer in corpus.answers:
        assert student.decode(student.encode(answer)) == answer
    counts = pack(mined_run)
    assert 0 < counts["train"]["soft_share"] < 1


def test_two_processes_write_what_one_writes_and_half_of_nothing(
    mined_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("random.py").write_text("raise SystemExit('the current folder was searched')", encoding="utf-8")
    monkeypatch.setattr("distill.tokens.build.AT_ONCE", 6)
    monkeypatch.setattr("distill.tokens.packing.TOGETHER", 6)
    monkeypatch.setattr(spread, "WORTH", 1)

    def written(processes: int) -> tuple[dict[str, object], dict[str, object], dict[Path, bytes]]:
        mined_run.settings.mine.processes = processes
        summary, counts = build_tokenizer(mined_run, force=True), pack(mined_run)
        files = [path for folder in (mined_run.tokenizer, mined_run.data) for path in folder.rglob("*.*")]
        return summary, counts, {path: path.read_bytes() for path in files}

    found = written(1)
    (mined_run.data / "data.json").unlink()
    assert written(2) == found

    def die(worker: spread.Worker, task: object) -> bytes:
        worker.kill()
        return ask(worker, task)

    ask = spread.Worker.ask
    monkeypatch.setattr(spread.Worker, "ask", die)
    with pytest.raises(DistillError, match=r"ended with code -9 .*mine\.processes=1"):
        build_tokenizer(mined_run, force=True)
    mined_run.settings.capture.system = "Be kind."
    with pytest.raises(DistillError, match=r"ended with code -9 .*mine\.processes=1"):
        pack(mined_run)
    assert {path: path.read_bytes() for path in found[2]} == found[2]
    assert not list(mined_run.path.glob(".*"))


def test_the_stage_falls_back_with_a_note_or_says_why_not(mined_run: Run) -> None:
    """A teacher whose way of splitting nobody knows."""
    with TraceStore(mined_run.traces) as store:
        tokenizer = store.tokenizer()
        assert isinstance(tokenizer, TeacherTokenizer)
        store.put_teacher(store.teacher(), replace(tokenizer, pre="unheard-of"))
    mined_run.settings.tokenize.kind = "aligned"
    with pytest.raises(BadInput, match="unheard-of"):
        build_tokenizer(mined_run)
    assert not mined_run.tokenizer.exists()
    mined_run.settings.tokenize.kind = "auto"
    events: list[Event] = []
    summary = build_tokenizer(mined_run, events.append)
    assert [event.kind for event in events] == ["start", "note", "done"]
    assert summary["kind"] == "sentencepiece"
    assert summary["soft_mass_in_vocabulary"] is None
    assert StudentTokenizer.load(mined_run.tokenizer).vocab_size == summary["vocab_size"]


def test_the_stage_refuses_an_unknown_kind(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", Settings(tokenize=TokenizeSettings(kind="words")))
    with pytest.raises(BadInput, match=r"tokenize\.kind=words"):
        build_tokenizer(run)
