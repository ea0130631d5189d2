"""How much more likely an answer becomes under the teacher's own weights where a triplet stands beside its question.

log p(answer | question, triplet) − log p(answer | question), in nats: the triplet's pointwise mutual information with
the answer, as the teacher sees it, before anything is learnt. The triplet is plain text in a line of its own.
"""

import time
from collections.abc import Sequence

from distill.backbone.generate import log_likelihood
from distill.events import Event, Listener, silent
from distill.mining.clauses import Candidate
from distill.mining.syntax_miner import Found
from distill.teacher.gguf_file import read_metadata
from distill.teacher.prompt_ids import PromptIds
from distill.teacher.source import Source

ANSWER_TOKENS = 192
"""Of an answer, from its beginning, that are scored."""
PROMPT_TOKENS = 512
MOST = 12
"""Candidates of an answer that are tried."""


class Judge:
    """The teacher's weights in float32 and how it is asked. Raises as `Source.backbone` and `PromptIds` do."""

    def __init__(self, source: Source, system: str) -> None:
        fields = {} if source.path.is_dir() else read_metadata(source.path)
        self._prompts, self._system = PromptIds(fields, source.tokenizer, str(source.path)), system
        self._model = source.backbone(PROMPT_TOKENS + ANSWER_TOKENS).eval()

    def gains(self, prompt: str, answer: str, candidates: Sequence[Candidate]) -> list[float]:
        """Nats that each candidate adds; none for a prompt that has no room."""
        asked = [prompt, *(f"{prompt}\n{' '.join(candidate.phrases)}" for candidate in candidates)]
        contexts = [self._prompts.encode(self._prompts.render(text, self._system)) for text in asked]
        if max(map(len, contexts)) > PROMPT_TOKENS:
            return [0.0] * len(candidates)
        ids = self._prompts.encode(answer)[:ANSWER_TOKENS]
        without, *beside = (float(nats.sum()) for nats in log_likelihood(self._model, contexts, [ids] * len(contexts)))
        return [nats - without for nats in beside]


def by_likelihood(
    found: Sequence[Found], ranked: Sequence[list[Candidate]], judge: Judge, minutes: float, listen: Listener = silent
) -> list[list[Candidate]]:
    """Of each response those of its `ranked` candidates that make it likelier, first those that do most; where none
    does, the first. minutes: what it may take, 0: no limit; then what is left stays as it is ranked."""
    started, chosen = time.monotonic(), list[list[Candidate]]()
    for each, candidates in zip(found, ranked, strict=True):
        if minutes and time.monotonic() - started > 60 * minutes:
            break
        tried = candidates[:MOST]
        gains = dict(zip(tried, judge.gains(each.prompt, each.text, tried), strict=True))
        likelier = [candidate for candidate in tried if gains[candidate] > 0]
        chosen.append(sorted(likelier, key=lambda candidate: -gains[candidate]) or tried[:1])
        listen(Event("mine", "progress", done=len(chosen), total=len(found), unit="answer"))
    seconds = (time.monotonic() - started) / max(len(chosen), 1)
    note = f"chosen by likelihood: {len(chosen)} answers, {seconds:.2f} s each"
    if len(chosen) < len(found):
        note += f"; the other {len(found) - len(chosen)} by rarity (mine.minutes={minutes:g} were over)"
    listen(Event("mine", "warning" if len(chosen) < len(found) else "note", note))
    return [*chosen, *ranked[len(chosen) :]]
