"""Packing: every document whole, once, by itself, with the targets that its tokens have."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.small_student import small_tokenizer

from bench.training import FixedTokens, synthetic_documents
from distill.backbone.attention import Documents as Spans
from distill.backbone.model import Backbone, BackboneConfig
from distill.tokens.aligner import Aligner, to_last_sentence
from distill.tokens.packing import ARRAYS, Documents, spelled_bytes
from distill.training.batches import DRAFT, EMPTY, MINED, Batches, Piece
from distill.training.best_fit import best_fit
from distill.training.losses import CHUNK
from distill.training.mixture import Mixture, stuttered
from distill.training.told import Told, tilted

THINK, NEWLINE, END = 4, 3, 5


@pytest.fixture(scope="module")
def documents() -> Documents:
    return synthetic_documents(500)


def make(documents: Documents, length: int = 256, empty: float = 0.25, drafts: float = 0.5) -> Batches:
    return Batches(documents, FixedTokens(500), length, Mixture(True, empty, drafts), 7, 0.8)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=200))
def test_best_fit_loses_nothing_and_never_overflows(lengths: list[int]) -> None:
    rows = best_fit(lengths, 40)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert max(sums) <= 40
    assert sum(total <= 20 for total in sums) <= 1  # two half-empty rows would have shared one


def test_an_epoch_holds_every_document_and_no_padding(documents: Documents) -> None:
    rows = make(documents).epoch(3)
    whole = Counter(piece.document for row in rows for piece in row if not piece.again)
    assert whole == dict.fromkeys(range(len(documents)), 1)
    assert all(sum(piece.length for piece in row) == 256 for row in rows)
    assert sum(piece.length for row in rows for piece in row if piece.again) < 0.15 * 256 * len(rows)


def resized(documents: Documents, prompts: int, answers: int) -> Documents:
    """The first 4 of the documents with prompts and answers of so many tokens."""
    random, count = np.random.default_rng(1), 4
    tokens = count * answers
    return replace(
        documents,
        prompt_ids=random.integers(10, 400, count * prompts),
        prompt_ends=np.arange(1, count + 1) * prompts,
        dream_ends=documents.dream_ends[:count],
        answer_ids=random.integers(10, 400, tokens),
        answer_ends=np.arange(1, count + 1) * answers,
        slot_ids=random.integers(10, 400, (tokens, 20)),
        slot_logprobs=np.log(random.dirichlet(np.ones(22), tokens)[:, :21]).astype(np.float16),
        chunk_ids=np.full(tokens, -1, np.int32),
        answer_bytes=np.full(count, 4 * answers),
    )


@pytest.mark.parametrize("prompts", [20, 150, 500])
def test_a_long_answer_is_read_in_windows_that_keep_its_targets(documents: Documents, prompts: int) -> None:
    """1,500 tokens at 512: each token of dream and answer is a target once, after as much context as fits."""
    length, answers = 512, 1500
    long = resized(documents, prompts, answers)
    batches = make(long, length)
    assert batches.in_windows == len(long)
    learnt: Counter[tuple[int, int]] = Counter()
    for row in batches.epoch(0):
        batch = batches.assemble([row])
        where, ids = batch.where[: batch.loss_positions].tolist(), batch.ids[0].tolist()
        for piece, (_, begin, end) in zip(row, batch.spans.spans, strict=True):
            i = piece.document
            dream = [] if piece.variant == EMPTY else [*map(int, long.dream(i)), NEWLINE]
            head = [*map(int, long.prompt(i)), THINK, NEWLINE, *dream, END, NEWLINE]
            text = [*head, *map(int, long.answer(i))]
            kept = len(head) if len(head) <= length // 2 else 0
            for at in [] if piece.again else range(bisect_left(where, begin), bisect_left(where, end)):
                inside = where[at] - begin
                place = piece.start + inside - kept if piece.start else inside
                assert text[place + 1] == batch.targets.labels[at]
                read = ids[begin : begin + inside + 1]
                assert read == (text[:kept] + text[piece.start : place + 1] if piece.start else text[: place + 1])
                assert len(read) > min(place, (length - kept) // 2), "half of what fits was read before, at least"
                learnt[i, place + 1] += 1
                if place + 1 >= len(head):
                    flat = i * answers + place + 1 - len(head)
                    assert batch.targets.slots[at, 1:].tolist() == long.slot_ids[flat].tolist()
    assert set(learnt.values()) == {1}
    for i in range(len(long)):
        assert sum(document == i for document, _ in learnt) in (answers, answers + len(long.dream(i)) + 5)


def test_words_that_the_student_began_with_are_read_and_not_learned(documents: Documents) -> None:
    begun = np.random.default_rng(0).integers(0, np.diff(documents.answer_ends, prepend=0))
    rows = make(documents, empty=1.0).epoch(0)
    all_of, rest = (make(each, empty=1.0) for each in (documents, replace(documents, begun=begun)))
    for row in rows:
        whole, batch = all_of.assemble([row]), rest.assemble([row])
        assert torch.equal(whole.ids, batch.ids)
        learnt = batch.where[: batch.loss_positions].tolist()
        for piece, (_, begin, end) in zip(row, batch.spans.spans, strict=True):
            first = begin + len(documents.prompt(piece.document)) + 4 - 1 + int(begun[piece.document])
            assert [at for at in learnt if begin <= at < end] == list(range(first, end))


def framed(documents: Documents) -> Documents:
    """All prompts begin with tokens 6, 7, 8 and end with 9, 3."""
    ids, ends = documents.prompt_ids.copy(), documents.prompt_ends
    starts = ends - np.diff(ends, prepend=0)
    for places, ids_there in ((starts, (6, 7, 8)), (ends - 2, (9, NEWLINE))):
        for offset, id in enumerate(ids_there):
            ids[places + offset] = id
    return replace(documents, prompt_ids=ids)


def dense_mask(batches: Batches, rows: list[list[Piece]], bottlenecked: bool) -> torch.Tensor:
    """(B, 1, T, T) who may read whom, pair by pair: what follows a mined dream reads no question, tags included."""
    seen = torch.zeros(len(rows), 1, batches.length, batches.length, dtype=torch.bool)
    for number, row in enumerate(rows):
        start = 0
        for piece in row:
            dream = len(batches.documents.prompt(piece.document)) + 2
            after = dream + len(batches.documents.dream(piece.document))
            head = after + 3 if piece.variant == MINED else dream + 2
            kept = head if piece.start and head <= batches.length // 2 else 0
            places = torch.cat([torch.arange(kept), torch.arange(piece.start, piece.start + piece.length - kept)])
            for query, place in enumerate(places.tolist()):
                read = places[: query + 1]
                hidden = (read >= 3) & (read < dream) & (bottlenecked and piece.variant == MINED and place >= after)
                seen[number, 0, start + query, start : start + query + 1] = ~hidden
            start += piece.length
    return seen


@pytest.mark.parametrize("prompts", [20, 150, 500])
def test_windows_hide_the_question_from_what_follows_the_dream(documents: Documents, prompts: int) -> None:
    batches = make(framed(resized(documents, prompts, 700)), 512)
    batches.mixture = replace(batches.mixture, bottleneck=1.0)
    for row in batches.epoch(0)[:6]:
        assert torch.equal(batches.assemble([row], 1.0).spans.mask, dense_mask(batches, [row], True))
        assert torch.equal(batches.assemble([row]).spans.mask, dense_mask(batches, [row], False))


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=spans.mask, enable_gqa=True)


@pytest.mark.parametrize("layers", [1, 2])
def test_an_answer_behind_the_bottleneck_reads_the_question_through_its_dream_alone(
    documents: Documents, layers: int
) -> None:
    """In float64, against one masked product. With one layer nothing of a question is in its dream's keys and values,
    so that nothing reaches the answer at all; with two it comes through the dream."""
    batches = make(framed(documents), 256)
    batches.mixture = replace(batches.mixture, bottleneck=0.5)
    rows = batches.epoch(0)[:3]
    plain, batch = batches.assemble(rows), batches.assemble(rows, 1.0)
    assert torch.equal(plain.ids, batch.ids)
    hidden = batch.spans.hidden
    assert 0 < len(hidden) < sum(piece.variant == MINED for row in rows for piece in row)
    config = BackboneConfig(500, hidden=16, layers=layers, heads=4, kv_heads=2, ffn=32, context=256, pad_id=0, eos_id=2)
    model = Backbone(config).initialize(0).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # attention that tells tokens apart
    embeds = model.model.embed_tokens(batch.ids).detach().requires_grad_()
    logits, before = (model.lm_head(model.hidden(b.ids, b.positions, b.spans, embeds=embeds)) for b in (batch, plain))
    for layer in model.model.layers:  # as on a GPU
        vars(layer.self_attn)["attend"] = masked
    torch.testing.assert_close(
        model.lm_head(model.hidden(batch.ids, batch.positions, batch.spans, embeds=embeds)), logits
    )
    for span in batch.spans.spans:
        row, start, end = span
        after, begin, until = hidden.get(span, (end - start, 0, 0))
        assert torch.equal(logits[row, start : start + after], before[row, start : start + after])
        if after == end - start:
            continue
        told = torch.autograd.grad(logits[row, start + after : end].square().sum(), embeds, retain_graph=True)[0]
        reached = told[row].abs().sum(-1) > 0
        assert reached[start : start + begin].all(), "what all prompts begin with"
        assert reached[start + until : end].all()
        assert bool(reached[start + begin : start + until].any()) == (layers > 1)
        assert not reached[:start].any()
        assert not reached[end:].any()
        assert not torch.equal(logits[row, start + after : end], before[row, start + after : end])


def test_blank_tokens_of_questions_are_only_read(documents: Documents) -> None:
    plain, blank = make(framed(documents)), make(framed(documents))
    blank.mixture = replace(plain.mixture, prompt_dropout=0.4)
    rows = plain.epoch(3)
    assert blank.epoch(3) == rows
    one, other = plain.assemble(rows), blank.assemble(rows, 0.5)
    assert torch.equal(blank.assemble(rows).ids, one.ids)
    assert torch.equal(other.targets.labels, one.targets.labels)
    assert torch.equal(other.targets.weight, one.targets.weight)
    changed, questions = one.ids != other.ids, torch.zeros_like(one.ids, dtype=torch.bool)
    assert (other.ids[changed] == 0).all()
    pieces = [piece for row in rows for piece in row]
    for piece, (row, start, _) in zip(pieces, one.spans.spans, strict=True):
        if piece.variant == MINED:
            asked = len(plain.documents.prompt(piece.document)) - 2
            questions[row, start + 3 : start + min(piece.length, asked)] = True
    assert not (changed & ~questions).any()
    assert float(changed.sum() / questions.sum()) == pytest.approx(0.2, abs=0.02)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.sampled_from([40, 700]))
def test_drafts_begin_within_an_epoch_that_still_holds_every_document_once(
    seed: int, share: float, answers: int
) -> None:
    documents = synthetic_documents(500)
    documents = resized(documents, 20, answers) if answers > 100 else documents
    batches = Batches(documents, FixedTokens(500), 256, Mixture(True, 0.25, 0.3), seed, 0.8)
    plain = batches.epoch(1)
    begun = int(share * len(plain))
    wanted = batches.to_draft(1, plain, begun)
    drafts = {i: [7, 8, 9] for i in wanted if i % 5}  # some turn out empty, or cut off
    rows = batches.drafted(1, plain, begun, drafts)
    assert rows[:begun] == plain[:begun]
    assert all(sum(piece.length for piece in row) == 256 for row in rows)
    once = Counter((p.document, p.start) for row in rows for p in row if not p.again)
    assert set(once.values()) <= {1}
    assert {document for document, start in once if not start} == set(range(len(documents)))
    for variant in (MINED, EMPTY):  # and whole: what no draft replaces is read as it would have been
        before = {(p.document, p.start) for row in plain for p in row if not p.again and p.variant == variant}
        assert {key for key in before if key[0] not in drafts} <= set(once)
    assert {p.document for row in rows for p in row if p.variant == DRAFT} == set(drafts)


def test_so_many_dreams_are_drafts_however_many_there_are() -> None:
    """Of 20,000 documents as of 500: 0.3 of the dreams that are still to be read, and no document is left out."""
    few = synthetic_documents(500)
    times = 20_000 // len(few)
    many = Documents(
        **{
            name: np.concatenate([part + i * part[-1] for i in range(times)])
            if name.endswith("_ends")
            else np.tile(part, (times, *[1] * (part.ndim - 1)))
            for name in ARRAYS
            if not name.startswith(("slot", "chunk"))
            for part in [getattr(few, name)]
        },
        **{name: getattr(few, name) for name in ARRAYS if name.startswith(("slot", "chunk"))},
    )
    batches = Batches(many, FixedTokens(500), 512, Mixture(True, 0.25, 0.3), 7, 0.8)
    rows = batches.epoch(0)
    begun = int(0.7 * len(rows))
    left = [p for row in rows[begun:] for p in row if not p.again]
    wanted = batches.to_draft(0, rows, begun)
    assert len(wanted) / sum(p.variant == MINED for p in left) == pytest.approx(0.3, abs=0.02)
    assert len(wanted) > 1200


def test_order_follows_from_seed_and_epoch_alone(documents: Documents) -> None:
    assert make(documents).epoch(5) == make(documents).epoch(5)
    assert make(documents).epoch(5) != make(documents).epoch(6)


def test_shares_of_empty_and_drafted_dreams(documents: Documents) -> None:
    batches = make(documents, length=512)
    rows = batches.epoch(1)
    drafts = {i: [9, 9, 9] for i in batches.to_draft(1, rows, 0)}
    first = {p.document: p.variant for row in batches.drafted(1, rows, 0, drafts) for p in row if not p.again}
    count = Counter(first.values())
    assert count[EMPTY] / len(documents) == pytest.approx(0.25, abs=0.06)
    assert count[DRAFT] / (count[DRAFT] + count[MINED]) == pytest.approx(0.5, abs=0.07)
    without = Batches(documents, FixedTokens(500), 512, Mixture(False, 0.25, 0.5), 7, 0.8)
    assert {piece.variant for row in without.epoch(1) for piece in row} == {EMPTY}


def test_noise_is_in_what_is_read_of_answers_and_in_nothing_that_is_learned(documents: Documents) -> None:
    plain = make(documents)
    noisy = Batches(documents, FixedTokens(500), 256, replace(plain.mixture, noise=0.2), 7, 0.8)
    rows = plain.epoch(3)
    assert noisy.epoch(3) == rows
    assert len({piece.noise for row in rows for piece in row}) > 0.8 * sum(map(len, rows))
    one, other = plain.assemble(rows), noisy.assemble(rows)
    assert torch.equal(other.targets.labels, one.targets.labels)
    assert torch.equal(other.targets.logprobs, one.targets.logprobs)
    changed = (one.ids != other.ids).flatten()
    answers = torch.zeros_like(changed)
    answers[one.where[: one.loss_positions][one.answers[: one.loss_positions]]] = True
    assert not (changed & ~answers).any()
    assert float(changed.sum() / answers.sum()) == pytest.approx(0.2, abs=0.03)
    assert float((other.ids.flatten()[changed] == NEWLINE).float().mean()) == pytest.approx(0.1, abs=0.04)
    assert int(other.ids.flatten()[changed].max()) < FixedTokens(500).base_size
    assert torch.equal(noisy.assemble(rows).ids, other.ids)
    learned, slips = other.targets.weight > 0, changed[other.where] & other.answers
    assert torch.equal(learned, (one.targets.weight > 0) & ~slips)
    assert torch.equal(other.targets.weight[learned], one.targets.weight[learned])


class LikelierBySlot(Told):
    """Tells a word's likelihood by its ids and the dream's: of random tokens, none means anything."""

    def __init__(self) -> None:
        pass

    def gains(
        self, prompt: NDArray[Any], dream: Sequence[int], answer: NDArray[Any], slots: NDArray[Any]
    ) -> NDArray[np.float32]:
        ids = np.concatenate([answer[:, None], slots], axis=1)
        return ((ids + sum(dream) + prompt.sum()) % 7 == 0).astype(np.float32) * 2


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_batches_hold_what_the_documents_say(seed: int) -> None:
    """Rebuilds each document's text, targets and losses by hand and compares with the tensors."""
    documents = synthetic_documents(500, seed)
    batches = make(documents, length=200)
    batches._told = LikelierBySlot()
    rows = batches.epoch(2)
    drafts = {i: [7, 8, 9] for i in batches.to_draft(2, rows, 0)}
    rows = batches.drafted(2, rows, 0, drafts)[:3]
    batch = batches.assemble(rows)
    found = {int(where): i for i, where in enumerate(batch.where[: batch.loss_positions])}
    assert len(batch.where) % CHUNK == 0
    assert float(batch.targets.weight.sum()) == pytest.approx(1.0, rel=1e-4)
    expected_losses = 0
    for number, row in enumerate(rows):
        start = 0
        for piece in row:
            i = piece.document
            dream = {EMPTY: [], MINED: [*map(int, documents.dream(i))], DRAFT: [7, 8, 9]}[piece.variant]
            think = [THINK, NEWLINE, *dream, *([NEWLINE] if piece.variant != EMPTY else []), END, NEWLINE]
            prompt, answer = [*map(int, documents.prompt(i))], [*map(int, documents.answer(i))]
            text = [*prompt, *think, *answer]
            assert batch.ids[number, start : start + piece.length].tolist() == text[: piece.length]
            assert batch.positions[number, start : start + piece.length].tolist() == list(range(piece.length))
            for place in range(piece.length):
                target = place + 1
                is_answer = target >= len(prompt) + len(think)
                is_dream = piece.variant == MINED and len(prompt) <= target < len(prompt) + len(think)
                at = found.get(number * 200 + start + place)
                assert (at is not None) == (is_answer or is_dream)
                if at is None:
                    continue
                expected_losses += 1
                assert int(batch.targets.labels[at]) == text[target]
                assert bool(batch.answers[at]) == is_answer
                assert float(batch.targets.soft_weight[at]) == pytest.approx(0.8 if is_answer else 0.0)
                if is_answer:
                    flat = Documents.span(documents.answer_ends, i).start + target - len(prompt) - len(think)
                    assert batch.targets.slots[at, 1:].tolist() == documents.slot_ids[flat].tolist()
                    logprobs = documents.slot_logprobs[flat].astype(np.float32)[None]
                    if piece.variant == MINED:
                        answer = Documents.span(documents.answer_ends, i)
                        told = LikelierBySlot().gains(
                            documents.prompt(i), dream, documents.answer(i), documents.slot_ids[answer]
                        )
                        logprobs = tilted(logprobs, told[flat - answer.start][None])
                    assert torch.equal(batch.targets.logprobs[at], torch.from_numpy(logprobs[0]))
            start += piece.length
        assert start == 200
    assert expected_losses == batch.loss_positions


def test_a_cut_answer_ends_after_its_last_whole_sentence(smollm2: Path) -> None:
    tokenizer = small_tokenizer(smollm2, ["It falls. It costs 3.14 in all. Then it bounces and. It rolls"])
    aligner = Aligner(tokenizer, None)

    def kept(text: str) -> str:
        answer = to_last_sentence(aligner.align(text, None, "length"), tokenizer)
        assert len({len(answer.ids), len(answer.slot_ids), len(answer.slot_logprobs), len(answer.chunk_ids)}) == 1
        assert np.isnan(answer.slot_logprobs[-1, 0]), "a hard label"
        text = tokenizer.decode([int(id) for id in answer.ids if id != tokenizer.eos_id])
        assert spelled_bytes(answer.ids, tokenizer) == len(text.encode())
        return text + ("|" if answer.ids[-1] == tokenizer.eos_id else "…")

    assert kept("It falls. It costs 3.14 in all. Then it") == "It falls. It costs 3.14 in all.|"
    assert kept("It falls. It costs 3.14 in all and then it bounces and it rolls") == (
        "It falls. It costs 3.14 in all and then it bounces and it rolls…"
    ), "more than half would go"
    assert kept("It costs 3.14") == "It costs 3.14…"
    assert kept("It falls. It costs 3.14 in all.\n3. Then it") == "It falls. It costs 3.14 in all.|", (
        "no number of a list"
    )
    assert kept("It falls. It costs 3.14, e.g. in all") == "It falls. It costs 3.14, e.g. in all…", (
        "nor an abbreviation"
    )
    assert kept("It falls in 3. Then") == "It falls in 3.|"
    assert kept("It falls.") == "It falls.…", "whether more would have come isn't known"


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_gaps_move_positions_and_nothing_else(documents: Documents, share: float) -> None:
    plain, gapped = (
        Batches(documents, FixedTokens(500), 256, Mixture(True, 0.25, 0.0, gaps=gaps), 7, 0.8) for gaps in (0.0, share)
    )
    rows = plain.epoch(0)
    assert gapped.epoch(0) == rows
    one, two = plain.assemble(rows), gapped.assemble(rows)
    assert torch.equal(one.ids, two.ids)
    assert torch.equal(one.where, two.where)
    assert torch.equal(one.targets.slots, two.targets.slots)
    moved = list[bool]()
    for row, begin, end in two.spans.spans:
        positions = two.positions[row, begin:end]
        assert (positions.diff() > 0).all()
        assert positions[0] >= 0
        assert positions[-1] < 256
        moved.append(not torch.equal(positions, one.positions[row, begin:end]))
    assert abs(np.mean(moved) - share) < 0.15


LENSES = (10, 11, 12, 13)


@given(st.lists(st.integers(0, 5), min_size=4, max_size=4), st.sampled_from([None, 5, 7]), st.integers(0, 10**6))
def test_what_stutters_says_steps_twice_and_nothing_else(sizes: list[int], most: int | None, seed: int) -> None:
    ids = iter(range(100, 200))
    dream = [
        id for lens, size in zip(LENSES, sizes, strict=True) for id in (lens, *(next(ids) for _ in range(3 * size)))
    ]
    longer, said = stuttered(dream, LENSES, most, np.random.default_rng(seed))
    assert [id for place, id in enumerate(longer) if place not in said] == dream
    assert all(longer[place] == longer[place - 3] for place in said)
    assert len(said) % 3 == 0
    begins = [longer.index(lens) for lens in LENSES]
    for begin, end, size in zip(begins, [*begins[1:], len(longer)], sizes, strict=True):
        assert (end - begin - 1) // 3 <= (2 * size if most is None else most)


def test_a_dreams_tokens_weigh_less_than_its_answers_and_its_form_as_much(documents: Documents) -> None:
    grammar: Any = SimpleNamespace(rows=lambda ids: [1] * len(ids), forbidden=torch.zeros(2, 500))
    (full, answers), (less, same) = (
        (batch.targets, batch.answers)
        for weight in (1.0, 0.05)
        for batches in [
            Batches(documents, FixedTokens(500), 256, Mixture(True, 0, 0, dream_weight=weight), 7, 0.8, grammar, 4)
        ]
        for batch in [batches.assemble(batches.epoch(0)[:2])]
    )
    assert torch.equal(answers, same)
    dreams = (full.weight > 0) & ~answers
    assert dreams.any()
    assert torch.equal(less.weight[answers], full.weight[answers])
    torch.testing.assert_close(less.weight[dreams], 0.05 * full.weight[dreams])
    assert full.strict is not None
    assert less.strict is not None
    assert torch.equal(less.strict, full.strict)


def test_what_a_dream_says_again_is_read_and_not_learned(documents: Documents) -> None:
    tokenizer = FixedTokens(500)
    tokenizer.lens_ids = LENSES
    dreams = [[10, 20, 21, 22, 23, 24, 25, 11, 26, 27, 28, 12, 13, 29 + i % 400, 30, 31] for i in range(len(documents))]
    told = replace(
        documents, dream_ids=np.concatenate(dreams), dream_ends=16 * np.arange(1, 1 + len(dreams), dtype=np.int64)
    )
    plain, batches = (
        Batches(told, tokenizer, 256, Mixture(True, 0.25, 0.0, stutter=share), 7, 0.8) for share in (0.0, 0.5)
    )
    rows = batches.epoch(2)
    assert batches.epoch(2) == rows
    whole = [piece for row in rows for piece in row if not piece.again]
    assert Counter(piece.document for piece in whole) == dict.fromkeys(range(len(documents)), 1)
    mined = [piece for piece in whole if piece.variant == MINED]
    assert np.mean([len(piece.said) > 0 for piece in mined]) == pytest.approx(0.5 * (1 - 1 / 12), abs=0.1)
    one = next(piece for piece in mined if piece.said)
    shorter = replace(one, dream=(), said=(), length=one.length - len(one.said))
    stutter, straight = batches.assemble([[one]]), plain.assemble([[shorter]])
    assert (dream := list(one.dream)) != dreams[one.document]
    begin = len(told.prompt(one.document)) + 2
    assert stutter.ids[0, begin : begin + len(dream)].tolist() == dream
    for batch in (stutter, straight):  # as many targets, and of the same words
        assert batch.loss_positions == stutter.loss_positions
    count = stutter.loss_positions
    assert torch.equal(stutter.targets.labels[:count], straight.targets.labels[:count])
    learned = {int(place) + 1 - begin for place in stutter.where[:count]}
    assert learned.isdisjoint(one.said)
    hidden = Batches(told, tokenizer, 256, replace(batches.mixture, bottleneck=1.0), 7, 0.8)
    found = hidden.assemble([[one]], unread=1.0).spans.hidden
    assert [(after, begins) for after, _, begins in found.values()] == [(begin + len(dream), begin)]
