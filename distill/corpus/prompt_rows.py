"""What rows ask that others wrote: chats, instructions and tables, and what is answered in them.

A row is a string, a list of turns, or has a column that holds either: a question, or a conversation as OpenAI
(`messages`) or ShareGPT (`conversations`) writes it. Alpaca's `instruction` goes with its `input`, a blank line between
them. Turns before the one that is asked are its context (distill/turns.py).
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from distill.corpus import prompt_files
from distill.errors import BadInput
from distill.events import Event, Listener
from distill.teacher.targets import apart
from distill.turns import ASSISTANT, MARKS, SYSTEM, USER, joined
from distill.written import whole

ASKS = ("prompt", "messages", "conversations", "conversation", "instruction", "question", "query", "input", "problem")
"""Columns where a prompt is looked for, in this order."""
TALKS = ("messages", "conversations", "conversation")
"""Those of conversations, which tables hold as JSON text."""
ANSWERS = ("answer", "response", "output", "completion", "reply", "chosen", "solution")
"""Columns where its answer is."""
MORE = {"instruction": ("input", "context")}
"""Columns that go with a prompt's."""
SYSTEMS = ("system", "system_prompt")
ROLES = {
    **dict.fromkeys((USER, "human"), USER),
    **dict.fromkeys((ASSISTANT, "gpt", "model", "chatgpt", "bot"), ASSISTANT),
    **dict.fromkeys((SYSTEM, "developer"), SYSTEM),
}
SAYS = (("role", "content"), ("from", "value"))
"""Who speaks, and what: OpenAI's names and ShareGPT's."""

BAD_SHARE = 0.1
"""Share of rows without a prompt above which a file is refused: it is read in a wrong way."""
HOPELESS = 100
"""Rows of which none has a prompt, after which no more are read."""
LISTED = 20
"""Bad rows that are told one by one."""
OFTEN = 20_000

LIST = re.compile(r"\s*\[\s*\{")
"""How a list of turns begins as text."""

Turn = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Reading:
    """How rows are read. given: with the answers that stand in them. every: each question of a conversation, after the
    turns before it; else the last alone."""

    given: bool = False
    every: bool = False


LAST = Reading()
"""The last question alone, whatever was answered."""


class Rows:
    """The prompts of one file, or of several that are one set.

    columns: of prompts and of answers, as in `prompt,answer`; "" where they are to be found. A row without a prompt is
    left out and told; where more than a tenth are such, BadInput is raised. `listen` is told which columns were read,
    and what is left out.
    """

    def __init__(self, files: Sequence[Path], columns: str, how: Reading, listen: Listener) -> None:
        self._files, self._how, self._listen = files, how, listen
        self._asks, _, self._answers = (part.strip() for part in columns.partition(","))
        self._read: dict[str, None] = {}
        self._answered: dict[str, None] = {}
        self._left: Counter[str] = Counter()

    def asked(self) -> Iterator[tuple[str, str]]:
        """(prompt, answer), "" for an answer that isn't there or isn't asked for."""
        count, bad, listed = 0, 0, list[str]()
        for place, row in (row for file in self._files for row in prompt_files.rows(file, self._of_use)):
            count += 1
            if count % OFTEN == 0:
                self._listen(Event("prompts", "progress", done=count, unit="rows"))
            try:
                found = self._questions(self._turns(row))
            except (ValueError, TypeError) as error:
                bad += 1
                listed += [f"{place}: {error}"] if bad <= LISTED else []
                if bad == count == HOPELESS:
                    break
            else:
                yield from found
        self._tell(count, bad, listed)

    def _tell(self, count: int, bad: int, listed: list[str]) -> None:
        refused = bad > BAD_SHARE * count
        if refused and bad == 1:
            raise BadInput(listed[0])
        for line in listed:
            self._listen(Event("prompts", "warning", line if refused else f"{line}; left out"))
        if bad > len(listed):
            self._listen(Event("prompts", "warning", f"{bad - len(listed):,} more rows are such"))
        if refused:
            raise BadInput(f"{listed[0]} ({bad:,} of {count:,} rows are bad: mend them, or name the right column)")
        where = self._files[0] if len(self._files) == 1 else self._files[0].parent
        said = [f"{count - bad:,} rows"]
        said += [f"asked is what stands in {' or '.join(self._read)}"] if self._read else []
        if self._answered:
            unused = "" if self._how.given else " (not read: --answers given learns them)"
            said.append(f"answered in {' or '.join(self._answered)}{unused}")
        if self._left:
            said.append(f"left out: {', '.join(f'{n:,} {what}' for what, n in self._left.items())}")
        if len(said) > 1:
            self._listen(Event("prompts", "note", f"{where}: {'; '.join(said)}"))

    def _of_use(self, names: list[str]) -> list[str]:
        known = {*ASKS, *ANSWERS, *SYSTEMS, *(name for more in MORE.values() for name in more)}
        answers = {self._answers} if self._answers else {*ANSWERS}
        wanted = {self._asks, *MORE.get(self._asks, ()), *SYSTEMS, *answers} if self._asks else known | answers
        found = [name for name in names if name in wanted]
        return found if {*ASKS, self._asks} & {*found} else names

    def _turns(self, row: object) -> list[Turn]:
        """All that is said in a row. Raises ValueError or TypeError."""
        if isinstance(row, Exception):
            raise row
        if not isinstance(row, dict):
            return self._said(row)
        fields = cast("dict[str, Any]", row)
        names = [self._asks] if self._asks else [name for name in ASKS if fields.get(name)] or [""]
        name = names[0]
        if name not in fields:
            known = ", ".join(map(str, fields)) or "none"
            problem = f"no column {name!r}" if name else "no prompt"
            raise ValueError(f"holds {problem}; its columns are {known}: name one as in {self._files[0].name}:COLUMN")
        value, answer = _value(fields, name), self._answer(fields, name)
        if self._how.given and not answer and not isinstance(value, list):
            talks = ((talk, _value(fields, talk)) for talk in TALKS if talk in names)
            name, value = next((talk for talk in talks if isinstance(talk[1], list)), (name, value))
        self._read[name] = None
        turns = self._said(value)
        if turns[-1][0] == ASSISTANT:
            self._answered[name] = None
        more = next(
            (text for key in MORE.get(name, ()) if isinstance(text := fields.get(key), str) and text.strip()), ""
        )
        if more and not isinstance(value, list):
            turns = [(USER, f"{turns[0][1]}\n\n{more.strip()}")]
        system = next((text for key in SYSTEMS if isinstance(text := fields.get(key), str) and text.strip()), "")
        if system and turns[0][0] != SYSTEM:
            turns.insert(0, (SYSTEM, system.strip()))
        return turns + answer

    def _answer(self, fields: dict[str, Any], asks: str) -> list[Turn]:
        """What stands in a column of its own."""
        if self._answers and self._answers not in fields:
            raise ValueError(f"holds no column {self._answers!r} of answers; its columns are {', '.join(fields)}")
        used = (asks, *MORE.get(asks, ()))
        name = self._answers or next(
            (name for name in ANSWERS if fields.get(name) not in (None, "", []) and name not in used), ""
        )
        said = fields.get(name)
        if isinstance(said, list) and said:
            several = cast("list[object]", said)
            # Ways to say it, the usual one first; or a preference: the conversation, or its end.
            said = several[0] if all(isinstance(one, str) for one in several) else _turn(several[-1])[1]
        elif isinstance(said, int | float) and not isinstance(said, bool):
            said = str(said)
        if not isinstance(said, str) or not said.strip():
            return []
        self._answered[name] = None
        return [(ASSISTANT, said.strip())]

    def _said(self, value: object) -> list[Turn]:
        """A question, or the turns of a conversation: what one says in several is one. Raises ValueError, TypeError."""
        if isinstance(value, str):
            if not value.strip():
                raise ValueError("holds an empty prompt")
            return [(USER, value.strip())]
        if not isinstance(value, list):
            raise TypeError('write a string or {"prompt": "a string"}, no other value')
        turns = [_turn(turn) for turn in cast("list[object]", value)]
        if bad := next((mark for _, text in turns for mark in MARKS if mark in text), ""):
            raise ValueError(f"holds {bad} within a turn, where it would end it")
        return [
            (role, "\n\n".join(text for _, text in group if text))
            for role, group in groupby(turns, key=lambda turn: turn[0])
        ]

    def _questions(self, turns: list[Turn]) -> list[tuple[str, str]]:
        """Those of a conversation that are asked, with their answers. Raises ValueError."""
        first = next((i for i, (role, text) in enumerate(turns) if role == USER and text), None)
        if first is None:
            raise ValueError("holds a conversation in which no user says anything")
        systems = [text for role, text in turns[:first] if role == SYSTEM and text]
        if any(role != SYSTEM for role, _ in turns[:first]):
            self._left["greetings before a first question"] += 1
        turns = [*((SYSTEM, text) for text in systems[-1:]), *turns[first:]]
        ends = [i for i, (role, text) in enumerate(turns) if role == USER and text]
        if self._how.given:
            ends = [i for i in ends if i + 1 < len(turns) and turns[i + 1][0] == ASSISTANT and turns[i + 1][1]]
            if not ends:
                self._left["questions without an answer"] += 1
        return [self._pair(turns, i) for i in (ends if self._how.every else ends[-1:])]

    def _pair(self, turns: list[Turn], end: int) -> tuple[str, str]:
        context = [(role, apart(text)[1] if role == ASSISTANT else text) for role, text in turns[: end + 1]]
        for role, text in context:
            if role not in (SYSTEM, USER, ASSISTANT) or not text:
                who = "an assistant that calls a tool" if role == ASSISTANT else f"a turn of {role!r}"
                raise ValueError(f"holds {who} before the question: students learn from what people and assistants say")
        return whole(joined(context)), whole(turns[end + 1][1]) if self._how.given else ""


def _value(fields: dict[str, Any], name: str) -> Any:
    """What stands in a column; a conversation that is told as JSON text as a list. Raises ValueError."""
    value = fields[name]
    if name not in TALKS or not isinstance(value, str) or not LIST.match(value):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"holds {name} that are not JSON: {error}") from error


def _turn(turn: object) -> Turn:
    """Who says what; a role that we don't know as it is. Raises ValueError."""
    fields = cast("dict[str, Any]", turn) if isinstance(turn, dict) else {}
    for speaker, words in SAYS:
        who, what = fields.get(speaker), fields.get(words)
        if isinstance(what, list):  # OpenAI's parts
            parts = [cast("dict[str, Any]", part) for part in cast("list[object]", what) if isinstance(part, dict)]
            if any(part.get("type") != "text" for part in parts):
                raise ValueError("holds a turn with something else than text")
            what = "\n".join(str(part.get("text", "")) for part in parts)
        if isinstance(who, str) and isinstance(what, str):
            return ROLES.get(who.lower(), who), what.strip()
        if isinstance(who, str) and what is None and who not in (USER, "human"):
            return ROLES.get(who.lower(), who), ""  # a call of a tool
    raise ValueError("holds a turn that is neither of role and content nor of from and value")
