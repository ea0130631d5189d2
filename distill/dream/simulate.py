"""Several rollouts of one prompt, each with where it comes from, scored, and the best of them chosen.

A rollout takes facts from the knowledge graph, dreams and answers. The first takes the graph's likeliest facts, the
others draw theirs; each draws its own dream. Scores are from 0 to 1:

likelihood  of its answer's tokens after its facts and its dream, the geometric mean of their probabilities; the token
            that ends it counts too, where it came to an end
agreement   with the other answers: words in common, 2·|a ∩ b| / (|a| + |b|), the mean over the others
support     share of its dream's steps that the graph knows

Chosen is the highest mean of the three, of equals the first. That is a rule, and was not learned.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from distill.backbone.generate import log_likelihood
from distill.dream.model import DreamingReasoningLLM
from distill.dream.record import CUT, DreamRecord
from distill.errors import BadInput
from distill.knowledge.retrieval import Chain, Labels, Retriever
from distill.mining.inflect import content_stems
from distill.tokens.bpe import image_text
from distill.tokens.chat import prompt_ids, think_ids, with_context

MOST = 64
Concepts = tuple[frozenset[str], ...]


@dataclass(frozen=True)
class Known:
    """A step of a dream and the edges of the graph that say the same. tokens: its numbers, as `--replace` counts them;
    nodes: what —performs→ action —causes→ result; times: how often that was said, 0 where never."""

    lens: str
    labels: Labels
    tokens: tuple[int, int, int]
    nodes: tuple[str, ...]
    times: int


@dataclass(frozen=True)
class Rollout:
    """facts: taken from the graph and read; steps: of the dream that was read. A score that can't be had is None:
    agreement of one branch alone, support of an empty dream or without a graph."""

    record: DreamRecord
    facts: list[Labels]
    steps: list[Known]
    likelihood: float
    support: float | None
    agreement: float | None = None

    @property
    def score(self) -> float:
        return float(np.mean([one for one in (self.likelihood, self.agreement, self.support) if one is not None]))


@dataclass(frozen=True)
class Simulation:
    """retrieve: how facts were found, "" where there is no graph."""

    prompt: str
    retrieve: str
    rollouts: list[Rollout]

    @property
    def chosen(self) -> int:
        return max(range(len(self.rollouts)), key=lambda i: (self.rollouts[i].score, -i))

    def to_json(self) -> dict[str, Any]:
        best = self.rollouts[self.chosen]
        branches = [asdict(one) | {"score": one.score} for one in self.rollouts]
        told = {"prompt": self.prompt, "retrieve": self.retrieve, "chosen": self.chosen, "answer": best.record.answer}
        return told | {"branches": branches}

    def lines(self, number: int) -> list[str]:
        """What is told of a branch: its scores, whether its answer was cut, its facts, the steps of its dream and which
        of them are known."""
        one = self.rollouts[number]
        shares = {"likelihood": one.likelihood, "agreement": one.agreement, "support": one.support}
        told = ", ".join(f"{name} {'–' if share is None else f'{share:.2f}'}" for name, share in shares.items())
        mark = "★" if number == self.chosen else " "
        facts = " ".join(map(_shown, one.facts)) or "none"
        dream = [
            f"{step.lens}: {_shown(step.labels)} {f'said {step.times}×' if step.times else 'not in the graph'}"
            for step in one.steps
        ]
        head = f"{mark} branch {number + 1}, {one.score:.2f} ({told}): {one.record.answer.strip()}"
        cut = [CUT] if one.record.cut else []
        return [head, *cut, f"facts: {facts}", *(dream or ["no dream"])]


def simulate(
    model: DreamingReasoningLLM, prompt: str, branches: int = 3, retrieve: str = "", seed: int = 0, **how: Any
) -> Simulation:
    """Roll a prompt out `branches` times. retrieve: how facts are found (`generate`), "" for none. how: as for
    `generate`. Raises BadInput as it does, and for a number of branches that is none."""
    if not 1 <= branches <= MOST:
        raise BadInput(f"branches={branches}: choose 1 to {MOST}")
    memory = model.memory
    how.setdefault("on_dream", _unheeded)
    said = _said(memory.retriever()) if memory else {}
    rollouts: list[Rollout] = []
    for number in range(branches):
        facts = memory.recall(model.parts, prompt, retrieve, seed + number, drawn=number > 0) if retrieve else []
        read = with_context(prompt, facts)
        record: DreamRecord = model.generate(read, output_mode="text", seed=seed + number, return_dreams=True, **how)[
            "record"
        ]
        steps = [
            _known(said, branch.lens, (w.label, a.label, r.label), 3 * place)
            for place, (branch, (w, a, r)) in enumerate(
                (record.branches[i], record.branches[i].steps[t].slots) for i, t in record.read
            )
        ]
        support = sum(step.times > 0 for step in steps) / len(steps) if memory and steps else None
        rollouts.append(
            Rollout(replace(record, prompt=prompt), facts, steps, _likelihood(model, read, record), support)
        )
    words = [Counter(one.record.answer.lower().split()) for one in rollouts]
    for i, one in enumerate(rollouts if branches > 1 else []):
        others = [_alike(words[i], words[j]) for j in range(branches) if j != i]
        rollouts[i] = replace(one, agreement=float(np.mean(others)))
    return Simulation(prompt, retrieve, rollouts)


def _unheeded(dream: DreamRecord) -> None:
    """Whoever asks for dreams gets one from a student that is sure of its answer, too."""


def _shown(labels: Labels) -> str:
    return "".join(map(image_text, labels))


def _concepts(labels: Sequence[str]) -> Concepts:
    return tuple(frozenset(content_stems([label])) or frozenset((label,)) for label in labels)


def _said(retriever: Retriever) -> dict[Concepts, tuple[Chain, int]]:
    """What a chain says → the one that was said most in these words, and how often all were."""
    found: dict[Concepts, tuple[Chain, int]] = {}
    for chain, count in sorted(retriever.chains.items(), key=lambda item: (-item[1], item[0])):
        key = tuple(retriever.entries[name].concept for name in chain[:3])
        first, before = found.get(key, (chain, 0))
        found[key] = first, before + count
    return found


def _known(said: Mapping[Concepts, tuple[Chain, int]], lens: str, labels: Labels, first: int) -> Known:
    chain, times = said.get(_concepts(labels), (None, 0))
    return Known(lens, labels, (first + 1, first + 2, first + 3), () if chain is None else chain[:3], times)


def _likelihood(model: DreamingReasoningLLM, read: str, record: DreamRecord) -> float:
    parts = model.parts
    dream = parts.editor.written(record.dream)
    context = [*prompt_ids(parts.tokenizer, read, system=parts.system), *think_ids(parts.tokenizer, dream)]
    if not (answer := parts.tokenizer.encode(record.answer)):
        return 0.0
    answer += [] if record.cut else [parts.tokenizer.eos_id]
    answer = answer[: parts.model.config.context + 1 - len(context)]
    return float(np.exp(log_likelihood(parts.model, [context], [answer])[0].mean()))


def _alike(one: Counter[str], other: Counter[str]) -> float:
    total = one.total() + other.total()
    return 2 * (one & other).total() / total if total else 1.0
