"""Answers with tokens that the student has none for: these in smaller ones, everything else as soft as before."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from distill.teacher.protocol import TokenTargets
from distill.tokens.aligner import Aligner

TEACHER = [b"a", b"bc", b"    ", b"<tool_call>", "日".encode()[:2], b"", b"<eos>"]
"""Of these the student lacks 2 to 5."""
ALTERNATIVES = 3


class Student:
    """Its ids: the bytes, then a, bc and the end."""

    eos_id = 258
    teacher_map: NDArray[np.int32] | None = np.array([256, 257, -1, -1, -1, -1, 258], np.int32)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, id: int) -> bytes:
        return [b"a", b"bc", b""][id - 256] if id > 255 else bytes([id])


def targets_of(ids: list[int]) -> TokenTargets:
    random = np.random.default_rng(len(ids))
    count = len(ids)
    return TokenTargets(
        np.array(ids, np.int32),
        -random.random(count).astype(np.float32),
        random.integers(0, 2, (count, ALTERNATIVES)).astype(np.int32),
        -1 - random.random((count, ALTERNATIVES)).astype(np.float32),
        np.ones(count, np.bool_),
    )


@given(st.lists(st.sampled_from([0, 1, 2, 3]), min_size=1, max_size=12))
def test_what_is_known_stays_as_it_was_and_the_rest_is_hard(ids: list[int]) -> None:
    targets, student = targets_of([*ids, 6]), Student()
    found = Aligner(student, TEACHER).align("any", targets, "stop")
    assert b"".join(student.token_bytes(int(id)) for id in found.ids) == b"".join(TEACHER[id] for id in ids)
    place = 0
    for i, id in enumerate([*ids, 6]):
        alone = Aligner(student, TEACHER).align("any", targets.part(i, i + 1), "length")
        size = len(alone.ids)
        assert found.ids[place : place + size].tolist() == alone.ids.tolist()
        own = found.slot_logprobs[place : place + size]
        if id in (2, 3):
            assert size == len(TEACHER[id])
            assert np.isnan(own[:, 0]).all()
            assert np.isneginf(own[:, 1:]).all()
        else:
            assert size == 1
            assert own.tolist() == alone.slot_logprobs.tolist()
            assert own[0, 0] == np.float16(targets.logprobs[i])
        place += size
    assert place == len(found.ids)


def test_half_a_character_or_a_control_token_leaves_the_words_alone() -> None:
    for strange in (4, 5):
        found = Aligner(Student(), TEACHER).align("abc", targets_of([0, strange, 1]), "length")
        assert found.ids.tolist() == list(b"abc")
        assert np.isnan(found.slot_logprobs).all()
    unknown = Aligner(Student(), None).align("abc", targets_of([0, 2, 1]), "length")
    assert unknown.ids.tolist() == list(b"abc"), "without the teacher's vocabulary nobody knows what it stands for"
