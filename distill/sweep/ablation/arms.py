"""The arms of an ablation: what a trained student is given to read before it answers, and how well it then answers.

An arm is an examinee that doesn't dream as it likes: it is asked as all others are (`distill.exam.examine`). A dream
here is the ids between `<think>⏎` and `⏎</think>`; an empty one is what `think: false` renders.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from distill.exam.examinees.common import OwnDream, TokenExaminee
from distill.exam.examinees.native import NativeExaminee
from distill.exam.measured import Measured
from distill.exam.metrics.statistics import Ratio
from distill.exam.metrics.text import exact_match
from distill.exam.questions import Question
from distill.exam.targets import How, Target
from distill.mining.triplets import Triplet
from distill.run import Run
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import dream_ids, parse_dream
from distill.tokens.image_tokens import dream_of

if TYPE_CHECKING:
    from distill.dream.engine import DreamEngine


@dataclass(frozen=True)
class Arm:
    """label: what it reads. training: the student that it is measured on, a variant of configs/sweeps/ablation.yaml.
    own: its dreams are a guess at the true one. optional: measured only where it is asked for, or ("several") where
    prompts have several answers, or ("sure") where `dreaming.sure` lets some go without.
    """

    label: str
    training: str
    own: bool = False
    optional: bool | Literal["several", "sure"] = False


ARMS = {
    "nodream": Arm("no dream, and trained without any", "nodream"),
    "pause": Arm("pause tokens, as many as the true dream has, and trained on them", "pause"),
    "backbone": Arm("the dream that it decodes", "dreams", own=True),
    "sure": Arm("the dream that it decodes, where it is not sure of its answer", "dreams", True, optional="sure"),
    "engine": Arm("the dream that its engine drafts", "dreams", own=True),
    "oracle": Arm("the true dream, made from the true answer", "dreams"),
    "empty": Arm("its dream left out", "dreams"),
    "shuffled": Arm("its dream shuffled", "dreams"),
    "other": Arm("its dream of another prompt", "dreams"),
    "sibling": Arm("the true dream of another answer", "dreams", optional="several"),
    "oracle_other": Arm("the true dream of another prompt", "dreams", optional="several"),
    "oracle_shuffled": Arm("the true dream shuffled", "dreams", optional="several"),
    "retrieval": Arm("what the graph says of the prompt, and the dream that it decodes", "retrieval", True, True),
}
CONTROLS = ("nodream", "pause")
"""What a dream is held against: trained without any, and with as many tokens that say nothing."""
TRUE_READINGS = ("sibling", "oracle_other", "oracle_shuffled")
"""What stands in the place of true dreams."""
PAIRS = [
    *((arm, control) for arm in ("backbone", "engine", "oracle", "retrieval") for control in CONTROLS),
    *(("backbone", reading) for reading in ("empty", "shuffled", "other")),
    *(("oracle", reading) for reading in ("empty", *TRUE_READINGS)),
    ("empty", "nodream"),
    *((reading, none) for reading in TRUE_READINGS for none in ("empty", "nodream")),
    ("sure", "backbone"),
    ("engine", "backbone"),
    ("retrieval", "backbone"),
]
"""Differences that are reported: the first minus the second."""


def default_arms(several: bool, sure: bool) -> list[str]:
    """Those that are measured where none are named. several: prompts have several answers; sure: some go without."""
    there = {False, *(["several"] if several else []), *(["sure"] if sure else [])}
    return [name for name, arm in ARMS.items() if arm.optional in there]


class Reader(NativeExaminee):
    """A trained student that reads the dreams of `arm` before it answers. Its own are decoded once for all arms.

    questions: all of the exam, among which dreams are exchanged. codes: phrase → image token. child: the student's run.
    """

    def __init__(
        self, target: Target, how: How, questions: Sequence[Question], codes: Mapping[str, int], child: Run
    ) -> None:
        super().__init__(target, how)
        self._codes, self._child = dict(codes), child
        for ability in ("dreams", "mined"):  # the arm dreams, however the student was trained
            self.cannot.pop(ability, None)
        self.card = replace(self.card, dreams=True)
        self.arm = "backbone"
        # Prompts of one split and depth dream alike; each gets another's dream from among them.
        kinds = [(q.truth.split, q.truth.depth) if q.truth else None for q in questions]
        self._partners = {q.key: questions[i] for q, i in zip(questions, others(kinds, how.seed), strict=True)}
        self._own: dict[str, list[int]] = {}
        self._engine: DreamEngine | None = None

    def mined(self, triplets: Sequence[Triplet]) -> list[int]:
        """A step with a phrase that no image token stands for is left out, as in training."""
        return dream_ids(self.tokenizer, dream_of(triplets, self._codes))

    def _dreamed(self, questions: Sequence[Question], temperature: float, draw: int) -> list[OwnDream]:
        return [OwnDream(dream, True) for dream in self.dreams(questions)]

    def dreams(self, questions: Sequence[Question]) -> list[list[int]]:
        """What the arm reads, one dream a question."""
        mined = [self.mined(question.triplets) for question in questions]
        match self.arm:
            case "nodream" | "empty":
                return [[] for _ in mined]
            case "pause":
                return [[self.tokenizer.pad_id] * len(dream) for dream in mined]
            case "oracle":
                return mined
            case "sibling":
                return [self.mined(question.after_sibling.triplets) for question in questions]
            case "oracle_other":
                return [self.mined(self._partners[question.key].triplets) for question in questions]
            case "oracle_shuffled":
                return [self._shuffled(question, dream) for question, dream in zip(questions, mined, strict=True)]
            case "sure":
                pairs = zip(self.sure_of(questions, 0.0, 0), self.own_dreams(questions), strict=True)
                return [[] if sure else dream for sure, dream in pairs]
            case "engine":
                return self._drafts(questions)
            case "shuffled":
                pairs = zip(questions, self.own_dreams(questions), strict=True)
                return [self._shuffled(question, dream) for question, dream in pairs]
            case "other":
                return self.own_dreams([self._partners[question.key] for question in questions])
            case _:
                return self.own_dreams(questions)

    def own_dreams(self, questions: Sequence[Question]) -> list[list[int]]:
        """The backbone's, at temperature 0."""
        new = [question for question in questions if question.key not in self._own]
        found = TokenExaminee._dreamed(self, new, 0.0, 0)  # all of them, however sure it is
        self._own |= {question.key: dream.ids for question, dream in zip(new, found, strict=True)}
        return [self._own[question.key] for question in questions]

    @property
    def engine(self) -> "DreamEngine":
        """Loaded where an arm needs it."""
        if self._engine is None:
            from distill.dream.engine import DreamEngine

            assert self.codebook is not None
            loaded = DreamEngine.load(self._child.engine, self.codebook, self.model.config.hidden)
            self._engine = loaded.to(self.model.cos.device)
        return self._engine

    def _drafts(self, questions: Sequence[Question]) -> list[list[int]]:
        """The paths that the engine's graph keeps; where it keeps none, nothing."""
        import torch

        from distill.dream.engine import drafted_dreams, prompt_states

        headers = [self.header(question) for question in questions]
        with torch.inference_mode():
            drafted = self.engine(*prompt_states(self.model, headers))
        dreams = drafted_dreams(drafted, keep_above=self._child.settings.dreaming.keep_above)
        return [dream_ids(self.tokenizer, dream) for dream in dreams]

    def _shuffled(self, question: Question, dream: Sequence[int]) -> list[int]:
        """A dream with its image tokens in another order; what is none keeps its place."""
        ids = np.array(dream, np.int64)
        image = [self.tokenizer.image_code(id) is not None for id in dream]
        places = np.flatnonzero(np.array(image, np.bool_))
        generator = np.random.default_rng(question.seed(self.how.seed, 0))
        ids[places] = ids[generator.permutation(places)]
        return ids.tolist()


def arm_metrics(
    arm: str,
    questions: Sequence[Question],
    found: Measured,
    tokenizer: StudentTokenizer,
    mined: Sequence[Sequence[int]],
) -> dict[str, Ratio]:
    """The metrics of an ablation, of an arm's measurement. mined: the true dream of each question, [] for none."""
    dreams = [tokenizer.encode(dream, special=True) for dream in found.dreams]
    if any(question.truth for question in questions):
        metrics = exact_match(found.answers, questions)
    else:
        metrics = {"chrf": found.metrics["chrf"]}
    metrics["bits_per_byte_used"] = found.metrics["bits_per_byte_dreams"]
    metrics["tokens_dreamed"] = Ratio.of([len(dream) for dream in dreams])
    if arm == "sibling":  # of the others nothing was put in
        there = np.array([question.sibling is not None for question in questions])
        metrics = {name: ratio.within(there) for name, ratio in metrics.items()}
    return metrics | (dream_accuracy(tokenizer, dreams, mined) if ARMS[arm].own else {})


def dream_accuracy(
    tokenizer: StudentTokenizer, dreams: Sequence[Sequence[int]], mined: Sequence[Sequence[int]]
) -> dict[str, Ratio]:
    """codes_right: of the true dream's codes, those that stand in the own dream at the same lens, step and role.
    dreams_right: whether both are the same step by step. Prompts without a true dream don't count."""
    right: list[int] = []
    total: list[int] = []
    exact: list[bool] = []
    for own, true in zip(dreams, mined, strict=True):
        found, wanted = parse_dream(tokenizer, own), parse_dream(tokenizer, true)
        pairs = [pair for lens, steps in wanted.items() for pair in zip(found[lens], steps, strict=False)]
        right.append(sum(a == b for step, other in pairs for a, b in zip(step, other, strict=True)))
        total.append(3 * sum(len(steps) for steps in wanted.values()))
        exact.append(found == wanted and total[-1] > 0)
    return {"codes_right": Ratio.of(right, total), "dreams_right": Ratio.of(exact, [count > 0 for count in total])}


def others(groups: Sequence[Any], seed: int) -> list[int]:
    """For each place another one, of the same group where that has two; each is taken once (Sattolo 1986).

    Those that are alone in their group change places among each other. Raises ValueError for fewer than two places.
    """
    if len(groups) < 2:
        raise ValueError("nothing to exchange with")
    by_group: dict[Any, list[int]] = {}
    for i, group in enumerate(groups):
        by_group.setdefault(group, []).append(i)
    cycles = [places for places in by_group.values() if len(places) > 1]
    alone = [places[0] for places in by_group.values() if len(places) == 1]
    if len(alone) > 1 or not cycles:
        cycles.append(alone)
    elif alone:
        cycles[0].extend(alone)
    generator, found = np.random.default_rng(seed), list(range(len(groups)))
    for places in cycles:
        cycle = generator.permutation(places).tolist()
        for here, there in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
            found[here] = there
    return found
