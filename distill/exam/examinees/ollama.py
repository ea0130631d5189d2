"""A model in Ollama sits the exam: it answers as it answers its users, and can be asked for no more than that."""

import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from distill.address import default_host
from distill.errors import AnswerBroken, PromptRefused
from distill.exam.examinees.common import STORED, engine_seed, without_thought
from distill.exam.examinees.protocol import Ability, AnswerScore, Card, Dreamt, Spoken, Thinks
from distill.exam.metrics.speech import OPENS, Form, is_clean, is_printed_dream, is_whole, letters_of
from distill.exam.questions import Question
from distill.exam.targets import How, Target
from distill.mining.triplets import Triplet
from distill.teacher.ollama import OllamaTeacher
from distill.teacher.ollama_client import OllamaClient
from distill.tokens.chat import END_THINK
from distill.turns import messages

IN_FLIGHT = 4
"""Requests sent at once: a server works on as many as OLLAMA_NUM_PARALLEL allows, the others queue."""

NO_LIKELIHOOD = "Ollama's API gives no likelihood of a given answer"
FREE = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
"""Sampling from the model's own distribution. Unset, Ollama would take top-k 40, top-p 0.9 and punish repetitions, and
so even change what temperature 0 says."""

OWN_SYSTEM = "where a prompt comes without a system prompt, Ollama puts its Modelfile's SYSTEM before it"
"""Sending an empty one is no way out: many templates then print an empty system turn."""


class OllamaExaminee:
    """`ollama:NAME`. Where it has the capability "thinking", what it thinks is its dream.

    Ollama has one limit for dream and answer: it gets the sum of both, with `thinking_tokens` for the dream of one that
    thinks in words. A dream that needs more than its limit takes it from the answer; where it needs less, the answer
    is cut at its own limit, by the tokens that /api/chat lists with `logprobs` (since Ollama 0.12.11; an older one's
    answer may be longer by what the dream left). A model's own stop strings stay in force, its other parameters
    (temperature, top-k …) do not. A reply that breaks off, as it does where the model writes bytes that are no UTF-8,
    and a prompt longer than the context, is no answer.
    """

    def __init__(self, target: Target, how: How) -> None:
        """Raises TeacherUnavailable, or ModelNotFound with the nearest installed names."""
        self._how = how
        self.model = target.model
        host = target.host or default_host()
        teacher = OllamaTeacher(target.model, host=host, timeout=how.timeout)
        try:
            info = teacher.describe()
        finally:
            teacher.close()
        self._client = OllamaClient(host, timeout=how.timeout)
        self._thinks = info.can_think
        entry = next((entry for entry in self._client.models() if entry["name"] == info.name), {})
        show = self._client.show(self.model, verbose=self._thinks)
        in_words = how.thinking_tokens if self._thinks and _in_words(show) else 0
        self._room = max(how.dream_tokens, in_words)
        self.card = _card(target.name, entry, show, self._thinks, in_words)
        self.cannot: dict[Ability, str] = dict.fromkeys(("likelihood", "targets", "kl", "mined"), NO_LIKELIHOOD)
        if not self._thinks:
            self.cannot["dreams"] = 'it has no capability "thinking" in Ollama'

    def fits(self, question: Question, dream_tokens: int) -> bool:
        return True  # Ollama counts no tokens of what it isn't asked to answer

    def score(self, questions: Sequence[Question], dream: Dreamt, draw: int = 0) -> list[AnswerScore]:
        raise AssertionError(NO_LIKELIHOOD)

    def answer(
        self, questions: Sequence[Question], *, think: Thinks, temperature: float, max_tokens: int, draw: int
    ) -> list[Spoken]:
        """Dream and answer are drawn in one go, as `draw`."""
        if not questions:
            return []
        started = time.perf_counter()
        bodies = [self._body(question, bool(think), temperature, max_tokens, draw) for question in questions]
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            answers = list(pool.map(self._whole, bodies))
        share = (time.perf_counter() - started) / len(questions)
        steps = self._how.steps
        silent = Spoken("", "", False, 0, share, Form(dream=None, clean=False, whole=False, ended=False))
        with self._client.reading("/api/chat"):
            return [
                silent if answer is None else _spoken(answer, bool(think) and self._thinks, max_tokens, share, steps)
                for answer in answers
            ]

    def _whole(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """None where the model gives no answer: it breaks off, or the prompt is longer than its context."""
        with contextlib.suppress(AnswerBroken, PromptRefused):
            return self._client.post("/api/chat", body)

    def begin(self, question: Question) -> bool:
        """The request ends when the answer begins: a limit for dream and answer together can't say that."""
        body = self._body(question, True, 0.0, 1, 0)
        with (
            contextlib.suppress(AnswerBroken, PromptRefused),
            self._client.reading("/api/chat"),
            contextlib.closing(self._client.stream("/api/chat", body)) as parts,
        ):
            return any(part["message"].get("content") for part in parts)
        return False

    def _body(self, question: Question, think: bool, temperature: float, max_tokens: int, draw: int) -> dict[str, Any]:
        thinks = think and self._thinks
        return {
            "model": self.model,
            "messages": messages(question.prompt, question.system),
            "stream": False,
            "options": {
                **FREE,
                "temperature": temperature,
                "seed": engine_seed(question.seed(self._how.seed, draw)),
                "num_predict": max_tokens + (self._room if thinks else 0),
            },
            **({"think": think} if self._thinks else {}),
            **({"logprobs": True} if thinks else {}),
        }

    def labels(self, triplets: Sequence[Triplet]) -> list[str] | None:
        return None

    def close(self) -> None:
        self._client.close()


def _spoken(answer: dict[str, Any], thinks: bool, max_tokens: int, seconds: float, steps: int) -> Spoken:
    """`tokens` are what Ollama counted, EOS left out; it doesn't tell the tags from what is between them."""
    message = cast("dict[str, Any]", answer.get("message") or {})
    dream, content = str(message.get("thinking") or "").strip(), str(message.get("content") or "")
    tokens = int(answer.get("eval_count") or 0) - (answer.get("done_reason") == "stop")
    said, ended, dropped, told = content, answer.get("done_reason") == "stop", 0, list[str]()
    if thinks:
        told = [str(entry["token"]) for entry in cast("list[dict[str, Any]]", answer.get("logprobs") or [])]
        said, dropped = cut(content, told, max_tokens)
        tokens -= dropped
        ended = ended and not dropped
    closed = not dream or bool(content) or any(token.strip() == END_THINK for token in told)
    form = Form(
        dream=closed and is_printed_dream(dream, steps) if dream else None,
        clean=is_clean(letters_of(said)),
        whole=is_whole(dream, closed) and is_whole(said, ended),
        ended=ended,
    )
    return Spoken(dream, without_thought(said), closed, max(0, tokens), seconds, form, dropped=dropped)


def cut(content: str, tokens: Sequence[str], limit: int) -> tuple[str, int]:
    """(the first `limit` of the tokens that the content is made of, how many were dropped).

    tokens: all that was written, the dream too; content: how the last of them read, without white space in front.
    Where they don't spell it (none were told, or a character was cut), it is left as it is.
    """
    text, count = "", 0
    while count < len(tokens) and len(text) < len(content):
        count += 1
        text = tokens[-count] + text
    if count <= limit or not text.endswith(content):
        return content, 0
    skipped = len(text) - len(content)
    return "".join(tokens[len(tokens) - count : len(tokens) - count + limit])[skipped:], count - limit


def thinks_in_words(target: Target, timeout: float) -> bool:
    """Raises TeacherError where its server doesn't tell."""
    client = OllamaClient(target.host or default_host(), timeout=timeout)
    try:
        with client.reading("/api/show"):
            thinks = "thinking" in (client.show(target.model).get("capabilities") or [])
            return thinks and _in_words(client.show(target.model, verbose=True))
    finally:
        client.close()


def _in_words(show: dict[str, Any]) -> bool:
    """Whether one that thinks does so in words: all students of ours tell a vocabulary, and have lenses in it."""
    return OPENS[0] not in ((show.get("model_info") or {}).get("tokenizer.ggml.tokens") or [])


def _card(name: str, entry: dict[str, Any], show: dict[str, Any], dreams: bool, in_words: int = 0) -> Card:
    info = cast("dict[str, Any]", show.get("model_info") or {})
    details = cast("dict[str, Any]", entry.get("details") or show.get("details") or {})
    context = info.get(f"{info.get('general.architecture')}.context_length") or details.get("context_length")
    stored = str(details.get("quantization_level") or "")
    return Card(
        kind="ollama",
        name=name,
        parameters=_number(info.get("general.parameter_count")),
        bytes=_number(entry.get("size")),
        context=_number(context),
        quantization=STORED.get(stored, stored),
        dreams=dreams,
        note="; ".join(
            [f"it thinks in words, in at most {in_words:,} tokens"] * bool(in_words)
            + [OWN_SYSTEM] * bool(show.get("system"))
        ),
    )


def _number(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) else None
