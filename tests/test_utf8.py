"""Which bytes may come, against Python's own strict decoder."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distill.tokens.utf8 import NOWHERE, STATES, after, leads

TABLE = np.array(
    [[-1 if (to := after(bytes([byte]), at)) is None else to for byte in range(256)] for at in range(STATES)]
)


def test_whole_characters_are_the_1_112_064_that_there_are_and_no_others() -> None:
    """Each is accepted where its last byte comes and not before, and no more strings of up to four bytes are: so
    whatever else there is of them is none."""
    edges = ((0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000))
    known = dict.fromkeys(range(1, 5), 0)
    for first, last in edges:
        text = np.arange(first, last, dtype="<u4").tobytes().decode("utf-32-le").encode()
        size = len(text) // (last - first)
        states = np.zeros(last - first, int)
        for place, column in enumerate(np.frombuffer(text, np.uint8).reshape(-1, size).T):
            states = TABLE[states, column]
            assert ((states > 0) if place + 1 < size else (states == 0)).all()
        known[size] += last - first
    ways = np.eye(STATES, dtype=int)[0]
    for size in range(1, 5):
        ways = np.array([sum(ways[at] * (TABLE[at] == to).sum() for at in range(STATES)) for to in range(STATES)])
        assert ways[0] == known[size]
        ways[0] = 0  # what is whole is counted
    assert not ways.any(), "none is longer than four bytes"
    assert sum(known.values()) == 1_112_064


edgy = st.sampled_from([0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, *range(0xC0, 0x100)])


@given(st.lists(edgy, max_size=6).map(bytes) | st.text(max_size=3).map(str.encode))
@settings(deadline=None, max_examples=100)
@example(b"")
def test_a_state_says_what_the_decoder_says(data: bytes) -> None:
    reason = "whole"
    try:
        data.decode()
    except UnicodeDecodeError as error:
        reason = error.reason
    state = after(data)
    found = "whole" if state == 0 else "unexpected end of data"
    assert found == reason if state is not None else reason in ("invalid start byte", "invalid continuation byte")
    data = data or b"a"  # no token is nothing
    assert leads(data) == tuple(after(data, at) for at in range(STATES))


def test_bytes_that_no_text_holds() -> None:
    """However it begins; what goes on with a character may stand at the beginning of a token."""
    for never in (b"\xc0", b"\xc1", b"\xf5", b"\xff", b"a\x80", b"\xed\xa0", b"\xe0\x80", b"\x80\x80\x80\x80"):
        assert leads(never) == NOWHERE
    assert leads(b"\x80") == (None, 0, 1, 2, None, 1, None, 2)
    assert leads(b"\x9f\xe2\x82") == (None, 1, None, None, None, None, None, None)
