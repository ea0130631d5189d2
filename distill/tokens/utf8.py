"""Bytes that make UTF-8, as the Unicode Standard 15.0 has them (table 3-7, well-formed byte sequences).

A state says what a text lacks to be whole. No first byte is one that only longer spellings of a character than the
shortest (C0, C1), or numbers above U+10FFFF (F5 to FF), would begin with; after four of them the second byte is
restricted, so that no other such spelling, no surrogate and no larger number comes about.
"""

NEXT = (
    ((0x00, 0x7F, 0), (0xC2, 0xDF, 1), (0xE0, 0xE0, 4), (0xE1, 0xEC, 2), (0xED, 0xED, 5), (0xEE, 0xEF, 2),
     (0xF0, 0xF0, 6), (0xF1, 0xF3, 3), (0xF4, 0xF4, 7)),
    ((0x80, 0xBF, 0),),
    ((0x80, 0xBF, 1),),
    ((0x80, 0xBF, 2),),
    ((0xA0, 0xBF, 1),),
    ((0x80, 0x9F, 1),),
    ((0x90, 0xBF, 2),),
    ((0x80, 0x8F, 2),),
)  # fmt: skip
"""Of each state, the (first, last) bytes that may come and the state then. 0: whole · 1 to 3: so many bytes of any kind
are lacking · 4 to 7: after E0, ED, F0 and F4."""

STATES = len(NEXT)

Leads = tuple[int | None, ...]
"""(STATES,) where some bytes lead from each state; None where they may not come."""

WHOLE: Leads = (0,) + (None,) * (STATES - 1)
"""Of whole characters."""
NOWHERE: Leads = (None,) * STATES
"""Of what no text holds."""


def leads(data: bytes) -> Leads:
    try:
        data.decode()
        return WHOLE  # nearly all tokens are
    except UnicodeDecodeError:
        return tuple(after(data, state) for state in range(STATES))


def after(data: bytes, state: int | None = 0) -> int | None:
    """The state after some bytes; None where they may not come in this one."""
    for byte in data:
        if state is None:
            return None
        state = next((then for first, last, then in NEXT[state] if first <= byte <= last), None)
    return state
