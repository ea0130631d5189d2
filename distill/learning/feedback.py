"""What users said of a student's answers: RUN/feedback.jsonl, a line each, on disk at once and never changed by us."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from distill.errors import BadInput
from distill.journal import append_line
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import Message
from distill.written import whole

FEEDBACK = "feedback.jsonl"
VERDICTS = ("good", "bad", "better")


@dataclass(frozen=True)
class Feedback:
    """An answer and what was thought of it.

    messages: the conversation up to it, a system message among them where there was one. dream: as text, "" for none.
    better: with the verdict "better", what should have been said. cut: the answer didn't end by itself.
    """

    messages: list[Message]
    dream: str
    answer: str
    verdict: Literal["good", "bad", "better"]
    better: str = ""
    cut: bool = False


def keep(path: Path, feedback: Feedback) -> None:
    """Append a line; it is on disk when this returns. Raises DistillError where it can't be, BadInput for an answer
    that was cut before its first word: there is nothing to learn from."""
    if feedback.cut and not feedback.answer.strip():
        raise BadInput("the answer was cut before its first word; let it have more tokens, and say then what you think")
    append_line(path, asdict(feedback))


def keep_said(
    path: Path, messages: list[Message], dream: str, answer: str, verdict: Any, better: str = "", cut: bool = False
) -> None:
    """The same, of what came from elsewhere. Raises BadInput where it is no feedback."""
    try:
        keep(path, _checked(Feedback(messages, dream, answer, verdict, better, cut)))
    except ValueError as error:
        raise BadInput(f"no feedback: {error}") from error


def read_feedback(path: Path) -> list[Feedback]:
    """All of it. Raises BadInput where there is none, naming file and line where one can't be read."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines(): a text may hold U+2028
    except FileNotFoundError:
        lines = []
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: can't be read: {error}") from error
    found = [_feedback(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise BadInput(f"{path}: no feedback yet; say /good, /bad or /better TEXT in `dream chat`")
    return found


def answer_ids(tokenizer: StudentTokenizer, text: str, cut: bool = False) -> list[int]:
    """Ids of an answer, its end among them but for one that was cut."""
    ids = tokenizer.encode(text)
    return ids if cut and ids else [*ids, tokenizer.eos_id]


def _feedback(path: Path, number: int, line: str) -> Feedback:
    try:
        content: dict[str, Any] = json.loads(line)
        return _checked(Feedback(**content))
    except (ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{path}, line {number}: is no feedback ({error}); mend or delete it") from error


def _checked(feedback: Feedback) -> Feedback:
    """It. Raises ValueError, or what its fields raise that aren't what they should be."""
    turns: list[Any] = [m.get(part) for m in feedback.messages for part in ("role", "content")]
    texts: list[Any] = [feedback.dream, feedback.answer, feedback.better, *turns]
    if feedback.verdict not in VERDICTS:
        raise ValueError(f"verdict {feedback.verdict!r} is none of {', '.join(VERDICTS)}")
    if not turns or turns[-2] != "user" or not all(map(_is_text, texts)) or feedback.cut not in (False, True):
        raise ValueError("messages must be a conversation that ends with a question, all else text, cut true or false")
    for text in texts:
        whole(text)
    if feedback.verdict == "better" and not feedback.better.strip():
        raise ValueError("better is empty")
    return feedback


def _is_text(value: object) -> bool:
    return isinstance(value, str)
