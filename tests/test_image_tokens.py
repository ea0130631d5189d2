"""The codebook against brute force, its files against damage, and the concept space against what words mean."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.answers_run import answers, texts

from distill.config import TeacherSettings
from distill.errors import BadInput, CorruptFile
from distill.mining.inflect import STOP_WORDS, stem
from distill.mining.syntax_miner import mine_texts
from distill.mining.triplets import LENSES, Triplet, by_trace, clean_phrase
from distill.tokens import concepts, image_tokens
from distill.tokens.bpe import image_text
from distill.tokens.concepts import CONCEPT_DIM, EMBED_BATCH, OllamaEncoder, load_encoder
from distill.tokens.image_tokens import (
    Codebook,
    build_codebook,
    dream_of,
    load_codes,
    save_codes,
)

SIZE = 96


@pytest.fixture(scope="module")
def triplets() -> list[Triplet]:
    return [t for found in mine_texts(texts(), 5) for t in found.triplets]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return [f"{a['prompt']} {a['text']}" for a in answers()]


@pytest.fixture(scope="module")
def built(triplets: list[Triplet], corpus: list[str]) -> tuple[Codebook, dict[str, int]]:
    return build_codebook(triplets, size=SIZE, seed=0, texts=corpus)


def content(phrase: str) -> list[str]:
    words = phrase.replace("'s ", " ").split()
    return [stem(word) for word in words if word not in STOP_WORDS] or words


def test_every_phrase_gets_the_code_of_its_word_or_the_nearest_of_its_role(
    built: tuple[Codebook, dict[str, int]], triplets: list[Triplet]
) -> None:
    """Brute force, one phrase at a time, in float64."""
    codebook, codes = built
    said = [(phrase, role == 1) for t in triplets for role, phrase in enumerate(t.phrases)]
    phrases = sorted({phrase for phrase, _ in said})
    acts = {phrase for phrase in phrases if said.count((phrase, True)) > said.count((phrase, False))}
    heads = Counter((phrase in acts, content(phrase)[0 if phrase in acts else -1]) for phrase, _ in said)
    share = round(SIZE * len(acts) / len(phrases))
    actions = [word for act, word in sorted(heads, key=lambda key: (-heads[key], key[1])) if act][:share]
    things = [word for act, word in sorted(heads, key=lambda key: (-heads[key], key[1])) if not act][: SIZE - share]
    assert codebook.words == actions + things
    vectors = codebook.encoder.encode(phrases)
    assert vectors.shape == (len(phrases), CONCEPT_DIM)
    assert np.allclose(np.linalg.norm(codebook.centroids, axis=1), 1, atol=1e-5)
    named = {word: code for code, word in enumerate(codebook.words)}
    for phrase, vector in zip(phrases, vectors.astype(np.float64), strict=True):
        own = content(phrase)[0 if phrase in acts else -1]
        role = actions if phrase in acts else things
        if own in role:
            assert codes[phrase] == role.index(own) + (0 if phrase in acts else share)
        elif others := [word for word in reversed(content(phrase)) if word in named]:
            assert codes[phrase] == named[others[0]]
        else:
            similarity = codebook.centroids.astype(np.float64) @ vector
            similarity[[(code < share) != (phrase in acts) for code in range(SIZE)]] = -1
            assert codes[phrase] == similarity.argmax()
    places = codebook.nearest(vectors)
    assert np.allclose((vectors * codebook.centroids[places]).sum(1), (vectors @ codebook.centroids.T).max(1))


def test_a_label_is_its_word_where_that_is_said_or_what_is_said_most(
    built: tuple[Codebook, dict[str, int]], triplets: list[Triplet]
) -> None:
    codebook, codes = built
    counts = Counter(phrase for triplet in triplets for phrase in triplet.phrases)
    assert len(codebook) == len(set(codebook.labels)) == SIZE
    assert set(codes.values()) == set(range(len(codebook)))
    for code, (label, word) in enumerate(zip(codebook.labels, codebook.words, strict=True)):
        assert label == clean_phrase(label)
        assert label not in LENSES
        assert codes[label] == code
        own = [phrase for phrase in codes if codes[phrase] == code and word in content(phrase)]
        bare = [phrase for phrase in own if stem(phrase) == word]
        assert counts[label] == max(counts[phrase] for phrase in bare or own)


def test_phrases_never_seen_are_coded_by_their_words(built: tuple[Codebook, dict[str, int]]) -> None:
    codebook, codes = built
    assert "the very cold waters" not in codes
    assert codebook.encode(["the very cold waters", "water"]).tolist() == [codes["water"]] * 2
    old = dataclasses.replace(codebook, words=[])  # as a codebook that was saved before there were words
    assert old.encode(["xyz", "water"]).tolist() == old.nearest(old.encoder.encode(["xyz", "water"])).tolist()


def test_quantization_error_is_reported_as_defined(
    built: tuple[Codebook, dict[str, int]], triplets: list[Triplet]
) -> None:
    """Every mention of a phrase written out, one by one."""
    codebook, codes = built
    vectors = dict(zip(codes, codebook.encoder.encode(list(codes)), strict=True))
    said = [phrase for t in triplets for phrase in t.phrases]
    assert set(codes) == set(said)
    assert codebook.counts.sum() == len(said)
    errors = sorted(1 - float(vectors[p] @ codebook.centroids[codes[p]]) for p in said)
    report = codebook.report
    assert report["mean_error"] == pytest.approx(np.mean(errors), abs=1e-4)
    assert report["p90_error"] == pytest.approx(errors[int(np.ceil(0.9 * len(errors))) - 1], abs=1e-4)
    assert report["own_label_share"] == pytest.approx(np.mean([codebook.labels[codes[p]] == p for p in said]), abs=1e-4)


def test_building_is_deterministic_by_seed(
    built: tuple[Codebook, dict[str, int]], triplets: list[Triplet], corpus: list[str]
) -> None:
    again, codes = build_codebook(triplets, size=SIZE, seed=0, texts=corpus)
    assert codes == built[1]
    assert np.array_equal(again.centroids, built[0].centroids)
    shuffled, codes = build_codebook(triplets[::-1], size=SIZE, seed=0, texts=corpus)
    assert codes == built[1]
    assert shuffled.labels == built[0].labels


def test_many_phrases_are_coded_some_at_a_time_in_the_space_of_the_commonest(
    triplets: list[Triplet], built: tuple[Codebook, dict[str, int]], monkeypatch: pytest.MonkeyPatch, corpus: list[str]
) -> None:
    monkeypatch.setattr(image_tokens, "AT_ONCE", 50)
    monkeypatch.setattr(concepts, "WORDS_AT_ONCE", 500)
    again, codes = build_codebook(iter(triplets), size=SIZE, seed=0, texts=corpus)
    np.testing.assert_allclose(again.centroids, built[0].centroids, atol=1e-4)
    assert np.mean([codes[phrase] == code for phrase, code in built[1].items()]) > 0.99
    monkeypatch.setattr(image_tokens, "SAMPLE", 100)
    sampled, codes = build_codebook(triplets, size=SIZE, seed=0, texts=corpus)
    assert codes.keys() == built[1].keys()
    assert sampled.labels == built[0].labels, "which words have codes depends on no space"
    assert sampled.report["phrases"] == len(codes)


def test_a_codebook_large_enough_loses_nothing(triplets: list[Triplet]) -> None:
    codebook, codes = build_codebook(triplets[:40], size=512)
    assert sorted(codebook.labels) == sorted(codes)
    assert all(codebook.labels[code] == phrase for phrase, code in codes.items())
    assert codebook.report["mean_error"] == pytest.approx(0, abs=1e-5)


def test_related_phrases_are_nearer_than_others(built: tuple[Codebook, dict[str, int]]) -> None:
    encoder = built[0].encoder
    for phrase, near, far in [
        ("water molecules", "molecules", "sun"),
        ("drop", "drop into", "create"),
        ("create", "generate", "water"),
        ("magnet", "magnetize", "sun"),
        ("rubber band", "stretched rubber band", "light"),
    ]:
        a, b, c = encoder.encode([phrase, near, far])
        assert a @ b > a @ c, (phrase, near, far)


def test_state_on_disk_embeds_unseen_phrases_alike(built: tuple[Codebook, dict[str, int]], tmp_path: Path) -> None:
    codebook, codes = built
    codebook.save(tmp_path)
    save_codes(tmp_path, codes)
    loaded = Codebook.load(tmp_path)
    unseen = ["purple elephants", "is thrown upward", "ball", "xyz", "Water", "日本"]
    assert np.array_equal(loaded.encoder.encode(unseen), codebook.encoder.encode(unseen))
    assert loaded.encode(unseen).tolist() == codebook.encode(unseen).tolist()
    assert loaded.labels == codebook.labels
    assert loaded.report == codebook.report
    assert np.array_equal(loaded.counts, codebook.counts)
    assert load_codes(tmp_path, loaded) == codes
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("codebook.json", "codebook.safetensors", "encoder.json", "encoder.safetensors", "phrases.json"),
    ]


def test_files_that_do_not_fit_are_named(
    built: tuple[Codebook, dict[str, int]], triplets: list[Triplet], tmp_path: Path
) -> None:
    codebook, codes = built
    other, _ = build_codebook(triplets[:30], size=16)
    codebook.save(tmp_path / "a")
    other.save(tmp_path / "b")
    original = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    about = json.loads(original["codebook.json"])

    def damaged(name: str, data: bytes | None) -> None:
        for file, good in original.items():
            (tmp_path / "a" / file).write_bytes(good)
        if data is None:
            (tmp_path / "a" / name).unlink()
        else:
            (tmp_path / "a" / name).write_bytes(data)
        with pytest.raises(CorruptFile, match=r"dream tokenize --force") as caught:
            Codebook.load(tmp_path / "a")
        assert "\n" not in str(caught.value)

    damaged("codebook.safetensors", (tmp_path / "b" / "codebook.safetensors").read_bytes())
    for name in original:
        damaged(name, None)
        damaged(name, original[name][: len(original[name]) // 2])
    for labels in (about["labels"][:-1], about["labels"][:-1] * 2, ["spatial", *about["labels"][1:]], 7):
        damaged("codebook.json", json.dumps(about | {"labels": labels}).encode())
    damaged("encoder.safetensors", (tmp_path / "b" / "encoder.safetensors").read_bytes())
    save_codes(tmp_path / "b", codes)
    with pytest.raises(CorruptFile, match="does not fit the codebook"):
        load_codes(tmp_path / "b", other)
    with pytest.raises(BadInput, match="512"):
        codebook.nearest(np.zeros((2, 3), np.float32))


def test_awkward_phrases_become_labels_all_the_same() -> None:
    lens = Triplet("spatial", "temporal", "causal", "causal", 0, "t", 0, "syntax")
    codebook, codes = build_codebook([lens], size=8)
    assert sorted(codebook.labels) == ["causal 2", "spatial 2", "temporal 2"]
    assert image_text(codebook.labels[codes["causal"]]) == "⟨causal 2⟩"


def test_no_triplets_give_an_empty_codebook(tmp_path: Path) -> None:
    codebook, codes = build_codebook([], size=8)
    assert (len(codebook), codes) == (0, {})
    codebook.save(tmp_path)
    assert len(Codebook.load(tmp_path)) == 0
    with pytest.raises(BadInput, match="empty"):
        codebook.encode(["ball"])


@pytest.mark.parametrize("size", [0, 4097])
def test_sizes_out_of_bounds_are_refused(size: int) -> None:
    with pytest.raises(BadInput, match="1 to 4096"):
        build_codebook([], size=size)


def test_an_unknown_encoder_is_refused() -> None:
    with pytest.raises(BadInput, match="local, ollama:MODEL or clip:FOLDER"):
        build_codebook([], size=8, encoder="clip")


WORDS = st.text(st.characters(categories=["Ll", "Nd"]), min_size=1, max_size=8)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=12), st.integers(1, 9))
def test_any_phrases_give_a_sound_codebook(steps: list[tuple[str, str, str]], size: int) -> None:
    triplets = [Triplet(*step, "causal", i, "t", 0, "syntax") for i, step in enumerate(steps)]
    codebook, codes = build_codebook(triplets, size=size)
    assert len(codebook) <= size
    assert set(codes.values()) == set(range(len(codebook)))
    assert len(set(codebook.labels)) == len(codebook)
    assert np.isfinite(codebook.centroids).all()


# An embedding model as encoder.


@pytest.mark.parametrize("width", [384, 512, 768])
def test_an_embedding_models_vectors_are_fitted_to_512(
    built: tuple[Codebook, dict[str, int]], tmp_path: Path, triplets: list[Triplet], width: int
) -> None:
    """Inner products survive padding; where PCA is needed, with fewer phrases than 512, distances do."""
    projection = np.random.default_rng(0).normal(size=(CONCEPT_DIM, width)).astype(np.float32)
    local = built[0].encoder

    def embed(phrases: list[str]) -> np.ndarray:
        assert 0 < len(phrases) <= EMBED_BATCH
        return local.encode(phrases) @ projection

    codebook, _ = build_codebook(triplets[:60], size=32, encoder="ollama:minilm", embed=embed)
    codebook.save(tmp_path)
    loaded = load_encoder(tmp_path)
    assert isinstance(loaded, OllamaEncoder)
    assert loaded.name == "ollama:minilm"
    loaded._embed = embed
    phrases = sorted({phrase for triplet in triplets[:60] for phrase in triplet.phrases})
    vectors = loaded.encode(phrases)
    assert np.array_equal(vectors, codebook.encoder.encode(phrases))
    assert vectors.shape == (len(phrases), CONCEPT_DIM)
    raw = embed(phrases)
    raw = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    if width > CONCEPT_DIM:
        raw = raw - raw.mean(axis=0)
        raw = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    assert np.allclose(vectors @ vectors.T, raw @ raw.T, atol=0.02)
    loaded._embed = lambda phrases: np.ones((len(phrases), width + 1), np.float32)
    with pytest.raises(BadInput, match=f"with {width}"):
        loaded.encode(phrases)
    loaded._embed = lambda phrases: np.full((len(phrases), width), np.nan, np.float32)
    with pytest.raises(BadInput, match="not finite"):
        loaded.encode(phrases)


def test_an_embedding_model_is_asked_at_the_teachers_host_in_batches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[int] = []

    class Embedder:
        def embed(self, phrases: list[str]) -> np.ndarray:
            asked.append(len(phrases))
            return np.stack([np.full(8, 1 + len(phrase)) for phrase in phrases]).astype(np.float32)

    opened: list[tuple[str, TeacherSettings]] = []

    def opening(name: str, settings: TeacherSettings, *_others: object) -> list[Embedder]:
        opened.append((name, settings))
        return [Embedder()]

    monkeypatch.setattr("distill.teacher.ollama.open_teachers", opening)
    triplets = [Triplet(f"thing {i}", "falls", "down", "causal", 0, str(i), 0, "syntax") for i in range(300)]
    teacher = TeacherSettings(model="embedded:smollm2", hosts=["http://there:1"], timeout=7, retries=1)
    codebook, _ = build_codebook(triplets, size=4, encoder="ollama:minilm", teacher=teacher)
    assert opened == [("minilm", teacher)]
    assert asked == [256, 46, 256, 46]  # once to fit the projection, once to encode
    codebook.save(tmp_path)
    Codebook.load(tmp_path, teacher).encode(["a thing"])
    assert opened[1:] == opened[:1], "later it is asked at the same hosts, for as long"


# Dreams.


def test_a_dream_is_the_triplets_of_a_trace_as_codes(
    built: tuple[Codebook, dict[str, int]], triplets: list[Triplet]
) -> None:
    codes = built[1]
    for group in by_trace(triplets).values():
        dream = dream_of(group[::-1], codes)
        assert tuple(dream) == LENSES
        for lens in LENSES:
            said = [t.phrases for t in group if t.lens == lens]
            said = [p for p in said if p[0] == p[2] or codes.get(p[0]) != codes.get(p[2])]
            steps = [tuple(codes[p] for p in phrases) for phrases in said if all(p in codes for p in phrases)]
            assert dream[lens] == [step for i, step in enumerate(steps) if i == 0 or step != steps[i - 1]]
    assert Counter(map(len, dream_of([], codes).values())) == {0: 4}
    stranger = Triplet("never", "seen", "before", "causal", 0, "t", 0, "syntax")
    assert dream_of([stranger], codes)["causal"] == []
    what, action, result = triplets[0].phrases
    same = Triplet(what, action, what, "causal", 0, "t", 0, "syntax")
    assert dream_of([same], codes)["causal"] == [(codes[what], codes[action], codes[what])]
    circle = Triplet(what, action, result, "causal", 0, "t", 0, "syntax")
    assert dream_of([circle], codes | {result: codes[what]})["causal"] == []
