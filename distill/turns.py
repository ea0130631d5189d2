r"""Conversations as prompts: what is asked last, and the turns before it, in one text.

A single question is its text alone. Other turns stand as the student's chat format writes them (tokens/chat.py):

    What falls faster?<|im_end|>
    <|im_start|>assistant
    Both fall alike.<|im_end|>
    <|im_start|>user
    Why?

and a system message of the conversation's own is its first turn. Whoever is asked gets the turns apart.
"""

import re
from collections.abc import Iterable

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
MARKS = ("<|im_start|>", "<|im_end|>")
"""What parts turns: no turn's own text may hold it."""

_TURN = re.compile(rf"(?:\A|<\|im_end\|>\n)<\|im_start\|>({SYSTEM}|{USER}|{ASSISTANT})\n")


def joined(turns: Iterable[tuple[str, str]]) -> str:
    """The prompt of (role, text) turns, the last of them a user's."""
    start, end = MARKS
    return f"{end}\n".join(f"{start}{role}\n{text}" for role, text in turns).removeprefix(f"{start}{USER}\n")


def turns(prompt: str, system: str = "") -> list[tuple[str, str]]:
    """(role, text) of each turn. system: the message before them, where the conversation has none of its own."""
    first, *rest = _TURN.split(prompt)
    found = [(USER, first)] if first or not rest else []
    found += zip(rest[::2], rest[1::2], strict=True)
    return [(SYSTEM, system), *found] if system and found[0][0] != SYSTEM else found


def apart_from_system(prompt: str, system: str = "") -> tuple[str, str]:
    """The prompt without its own system message, and the message that it is asked with."""
    found = turns(prompt, system)
    return (joined(found[1:]), found[0][1]) if found[0][0] == SYSTEM else (prompt, "")


def messages(prompt: str, system: str = "") -> list[dict[str, str]]:
    """The same as servers and chat templates take them."""
    return [{"role": role, "content": text} for role, text in turns(prompt, system)]


def is_conversation(prompt: str) -> bool:
    """Whether there is more than one question."""
    return _TURN.search(prompt) is not None


def opening(prompt: str) -> str:
    """The first question: what tells conversations apart where none may be on both sides."""
    return next((text for role, text in turns(prompt) if role == USER), prompt)


def question(prompt: str) -> str:
    """The last question."""
    return turns(prompt)[-1][1]


def words(prompt: str) -> str:
    """All that is said, without who says it."""
    return "\n".join(text for _, text in turns(prompt))


def transcript(prompt: str) -> str:
    """For people, and for models that are told of it: a line says who speaks. A single question as it is."""
    return "\n".join(f"{role}: {text}" for role, text in turns(prompt)) if is_conversation(prompt) else prompt
