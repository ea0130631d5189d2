"""How much more likely an answer becomes under the teacher's own weights where a triplet stands beside its question.

log p(answer | question, triplet) − log p(answer | question), in nats: the triplet's pointwise mutual information with
the answer, as the teacher sees it, before anything is learnt. The triplet is plain text in a line of its own.
"""

import time
from collections.abc import Iterable, Iterator, Sequence

from distill.backbone.generate import log_likelihood
from distill.errors import BadInput
from distill.events import Event, Listener, silent
from distill.mining.clauses import Candidate
from distill.teacher.gguf_file import read_metadata
from distill.teacher.prompt_ids import PromptIds
from distill.teacher.source import Source
from distill.teacher.source_folder import chat_template

ELSE = "take mine.choose=rarity"
"""What helps where the teacher can't be asked."""
ANSWER_TOKENS = 192
"""Of an answer, from its beginning, that are scored."""
PROMPT_TOKENS = 512
MOST = 12
"""Candidates of an answer that are tried."""


class Judge:
    """The teacher's weights in float32 and how it is asked. Raises as `Source.backbone` and `PromptIds` do, and
    BadInput for a folder without a chat template."""

    def __init__(self, source: Source, system: str) -> None:
        if source.path.is_dir():
            fields = {"tokenizer.chat_template": chat_template(source.path)}
            if not fields["tokenizer.chat_template"]:
                raise BadInput(f"{source.path}: has no chat template to ask with; {ELSE}")
        else:
            fields = read_metadata(source.path)
        self._prompts, self._system = PromptIds(fields, source.tokenizer, str(source.path), ELSE), system
        self._model = source.backbone(PROMPT_TOKENS + ANSWER_TOKENS).eval()

    def gains(self, prompt: str, answer: str, candidates: Sequence[Candidate]) -> list[float] | None:
        """Nats that each candidate adds; None for a prompt that has no room."""
        asked = [prompt, *(f"{prompt}\n{' '.join(candidate.phrases)}" for candidate in candidates)]
        contexts = [self._prompts.encode(self._prompts.render(text, self._system)) for text in asked]
        if max(map(len, contexts)) > PROMPT_TOKENS:
            return None
        ids = self._prompts.encode(answer, begin=False)[:ANSWER_TOKENS]
        without, *beside = (float(nats.sum()) for nats in log_likelihood(self._model, contexts, [ids] * len(contexts)))
        return [nats - without for nats in beside]


def by_likelihood(
    answered: Iterable[tuple[str, str]],
    ranked: Iterable[list[Candidate]],
    judge: Judge,
    minutes: float,
    listen: Listener = silent,
) -> Iterator[list[Candidate]]:
    """Of each (prompt, answer) those of its `ranked` candidates that make the answer likelier, first those that do
    most; where none does, the first. minutes: what it may take, 0: no limit; then what is left stays as ranked, as does
    what belongs to a prompt too long to be judged."""
    started, chosen, left, long, took = time.monotonic(), 0, 0, 0, 0.0
    for (prompt, answer), candidates in zip(answered, ranked, strict=True):
        if left or (minutes and time.monotonic() - started > 60 * minutes):
            left += 1
            yield candidates
            continue
        tried = candidates[:MOST]
        if (nats := judge.gains(prompt, answer, tried)) is None:
            long += 1
            yield candidates
            continue
        gains = dict(zip(tried, nats, strict=True))
        likelier = [candidate for candidate in tried if gains[candidate] > 0]
        yield sorted(likelier, key=lambda candidate: -gains[candidate]) or tried[:1]
        chosen, took = chosen + 1, time.monotonic() - started
    note = f"chosen by likelihood: {chosen} answers, {took / max(chosen, 1):.2f} s each"
    if left:
        note += f"; the other {left} by rarity (mine.minutes={minutes:g} were over)"
    if long:
        note += f"; {long} by rarity, as their prompts are longer than {PROMPT_TOKENS} tokens"
    listen(Event("mine", "warning" if left or long else "note", note))
