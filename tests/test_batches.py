"""Packing: every document whole, once, by itself, with the targets that its tokens have."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_student import small_tokenizer

from bench.training import FixedTokens, synthetic_documents
from distill.tokens.packing import Aligner, Documents, spelled_bytes, to_last_sentence
from distill.training.batches import DRAFT, EMPTY, MINED, Batches, Mixture, Piece, best_fit
from distill.training.losses import CHUNK

THINK, NEWLINE, END = 4, 3, 5


@pytest.fixture(scope="module")
def documents() -> Documents:
    return synthetic_documents(500)


def make(documents: Documents, length: int = 256, empty: float = 0.25, drafts: float = 0.5) -> Batches:
    return Batches(documents, FixedTokens(500), length, Mixture(True, empty, drafts), 7, 0.8)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=200))
def test_best_fit_loses_nothing_and_never_overflows(lengths: list[int]) -> None:
    rows = best_fit([Piece(i, EMPTY, length) for i, length in enumerate(lengths)], 40)
    assert sorted(piece.document for row in rows for piece in row) == list(range(len(lengths)))
    sums = [sum(piece.length for piece in row) for row in rows]
    assert max(sums) <= 40
    assert sum(total <= 20 for total in sums) <= 1  # two half-empty rows would have shared one


def test_an_epoch_holds_every_document_and_no_padding(documents: Documents) -> None:
    rows = make(documents).epoch(3)
    whole = Counter(piece.document for row in rows for piece in row)
    assert set(whole) == set(range(len(documents)))
    assert all(sum(piece.length for piece in row) == 256 for row in rows)
    repeated = sum(piece.length for row in rows for piece in row) - sum(
        max(piece.length for row in rows for piece in row if piece.document == i) for i in whole
    )
    assert repeated < 0.15 * 256 * len(rows)


def test_order_follows_from_seed_and_epoch_alone(documents: Documents) -> None:
    assert make(documents).epoch(5) == make(documents).epoch(5)
    assert make(documents).epoch(5) != make(documents).epoch(6)


def test_shares_of_empty_and_drafted_dreams(documents: Documents) -> None:
    batches = make(documents, length=512)
    batches.drafts = {i: [9, 9, 9] for i in range(len(documents))}
    first = {piece.document: piece.variant for row in batches.epoch(1) for piece in row}
    count = Counter(first.values())
    assert count[EMPTY] / len(documents) == pytest.approx(0.25, abs=0.06)
    assert count[DRAFT] / (count[DRAFT] + count[MINED]) == pytest.approx(0.5, abs=0.07)
    without = Batches(documents, FixedTokens(500), 512, Mixture(False, 0.25, 0.5), 7, 0.8)
    assert {piece.variant for row in without.epoch(1) for piece in row} == {EMPTY}


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_batches_hold_what_the_documents_say(seed: int) -> None:
    """Rebuilds each document's text, targets and losses by hand and compares with the tensors."""
    documents = synthetic_documents(500, seed)
    batches = make(documents, length=200)
    batches.drafts = {i: [7, 8, 9] for i in range(0, len(documents), 2)}
    rows = batches.epoch(2)[:3]
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
                    logprobs = documents.slot_logprobs[flat].astype(np.float32)
                    assert torch.equal(batch.targets.logprobs[at], torch.from_numpy(logprobs))
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
    assert kept("It falls.") == "It falls.…", "whether more would have come isn't known"
