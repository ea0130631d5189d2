"""From what is kept of a target's examination to its metrics: a pure function.

Shape legend: Q the exam's questions, B bins of confidence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from distill.config import EvaluateSettings
from distill.errors import MissingDependency, TeacherError
from distill.exam.examinees.protocol import Ability, AnswerScore, Card
from distill.exam.metrics.calibration import calibration_bins, calibration_error
from distill.exam.metrics.catalogue import METRICS, in_order
from distill.exam.metrics.concepts import concept_metrics
from distill.exam.metrics.dreams import dream_metrics, labels_of
from distill.exam.metrics.likelihood import bits, log_mean_exp
from distill.exam.metrics.speech import Form, speech_metrics
from distill.exam.metrics.statistics import Ratio
from distill.exam.metrics.steering import steering
from distill.exam.metrics.text import exact_match, text_metrics
from distill.exam.questions import Exam, Question
from distill.mining.triplets import Triplet
from distill.tokens.image_tokens import dream_of, load_codes

KNOWN = 0.9
"""Of the image tokens dreamed by a target that ships no codebook, the share that the exam's must know to be used."""

AVERAGED = {"kl": "kl", "agrees": "agreement", "agrees_5": "agreement_5"}
"""What is averaged over positions → metric."""


@dataclass(frozen=True)
class Scored:
    """An `AnswerScore`, summed over the answer's tokens.

    nats: Σ log p. sums and counts: of kl, agrees and agrees_5, over the positions where each is known.
    bins (B, 3): see `calibration_bins`; empty where not kept.
    """

    nats: float
    tokens: int
    sums: dict[str, float]
    counts: dict[str, int]
    bins: list[list[float]]

    @classmethod
    def of(cls, score: AnswerScore, bins: bool) -> Self:
        values = {name: getattr(score, name) for name in AVERAGED}
        return cls(
            nats=float(score.logprobs.sum()),
            tokens=len(score.logprobs),
            sums={name: float(np.nansum(each)) for name, each in values.items()},
            counts={name: int(np.isfinite(each).sum()) for name, each in values.items()},
            bins=calibration_bins(score).tolist() if bins else [],
        )


@dataclass(frozen=True)
class Said:
    """A `Spoken`, and the labels that the question's triplets have in the target's codebook; None where it ships
    none."""

    dream: str
    answer: str
    closed: bool
    tokens: int
    seconds: float
    form: Form
    mined: list[str] | None


@dataclass
class Sheet:
    """All that is kept of one target's examination.

    cannot: abilities that it lacks, and why. left_out: key → why it wasn't asked. All lists are over the questions
    that were asked, in the exam's order; scores by what stood before the answers: "none", "own-1" …, "mined",
    "sibling"; steered: answers after the question's dream, and after its sibling's. Empty are those that weren't to be
    made.
    """

    card: Card
    cannot: Mapping[Ability, str]
    left_out: dict[str, str]
    scores: dict[str, list[Scored]] = field(default_factory=dict[str, list[Scored]])
    answers: list[Said] = field(default_factory=list[Said])
    greedy: list[str] = field(default_factory=list[str])
    steered: list[list[str]] = field(default_factory=list[list[str]])


@dataclass
class Measured:
    """What a target did on an exam.

    keys: of its questions. metrics: name → ratio over them; for those in `left_out` (key → why: they don't fit its
    context) all are undefined. missing: metric → why this target can't give it. dreams, answers, closed: as spoken at
    the exam's temperature, one a question, "" where left out; no answers where it wasn't to speak.
    """

    keys: list[str]
    metrics: dict[str, Ratio]
    missing: dict[str, str]
    dreams: list[str]
    answers: list[str]
    closed: list[bool]
    left_out: dict[str, str]
    tokens_per_second: float | None
    card: Card
    answer_tokens: int | None = None
    """Of the teacher's answers in the target's own tokens, where it scored them."""

    def at(self, metric: str, i: int) -> float | None:
        """One question's value; None where it is not defined. Of a metric with parts, the sum of their sizes."""
        ratio = self.metrics[metric]
        top = ratio.numerator[i] if ratio.numerator.ndim == 1 else np.abs(ratio.numerator[i]).sum()
        return float(top / ratio.denominator[i]) if ratio.denominator[i] else None

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        metrics = {name: [m.numerator.tolist(), m.denominator.tolist()] for name, m in self.metrics.items()}
        return {**vars(self), "metrics": metrics, "card": asdict(self.card)}


def assemble(exam: Exam, sheet: Sheet, settings: EvaluateSettings) -> Measured:
    """Every metric that the sheet holds, and why others are missing."""
    places = [i for i, question in enumerate(exam.questions) if question.key not in sheet.left_out]
    asked = [exam.questions[i] for i in places]
    size = len(exam.questions)
    missing = reasons(exam, sheet, settings)
    metrics: dict[str, Ratio] = {}
    if sheet.scores:
        metrics |= _likelihoods(sheet.scores, asked)
        # As a user has it: one that dreams dreams before it answers.
        used = "bits_per_byte" if "dreams" in sheet.cannot else "bits_per_byte_dreams"
        if used in metrics:
            metrics["bits_per_byte_used"] = metrics[used]
    if sheet.answers:
        metrics |= _of_answers(exam, sheet, asked, missing)
    if sheet.greedy:
        metrics |= exact_match(sheet.greedy, asked)
    if sheet.steered:
        own, others = sheet.steered
        metrics |= steering(own, others, asked, exam.codebook)
    _explain(metrics, missing)
    said = dict(zip(places, sheet.answers, strict=bool(sheet.answers)))
    seconds, tokens = sum(s.seconds for s in sheet.answers), sum(s.tokens for s in sheet.answers)
    scored = sheet.scores.get("none")
    return Measured(
        keys=[question.key for question in exam.questions],
        metrics={
            name: spread_over(metrics[name], places, size) for name in in_order(set(metrics)) if name not in missing
        },
        missing={name: missing[name] for name in in_order(set(missing))},
        dreams=[said[i].dream if i in said else "" for i in range(size)] if said else [],
        answers=[said[i].answer if i in said else "" for i in range(size)] if said else [],
        closed=[said[i].closed if i in said else False for i in range(size)] if said else [],
        left_out=dict(sheet.left_out),
        tokens_per_second=tokens / seconds if seconds else None,
        card=sheet.card,
        answer_tokens=None if scored is None else sum(score.tokens for score in scored),
    )


def spread_over(ratio: Ratio, places: Sequence[int], size: int) -> Ratio:
    """A metric over some questions as one over all `size`; it is undefined for the others."""
    top = np.zeros((size, *ratio.numerator.shape[1:]))
    bottom = np.zeros(size)
    top[list(places)], bottom[list(places)] = ratio.numerator, ratio.denominator
    return Ratio(top, bottom)


def _likelihoods(scores: Mapping[str, list[Scored]], asked: Sequence[Question]) -> dict[str, Ratio]:
    """Bits per byte, KL, agreement and calibration; after K own dreams the first as a marginal over them, KL and
    agreement as means over them, and calibration after the first dream."""
    metrics: dict[str, Ratio] = {}
    own = [each for name, each in scores.items() if name.startswith("own-")]
    lengths = [question.bytes for question in asked]
    if "sibling" in scores:
        after = [bits(np.array([score.nats])) for score in scores["sibling"]]
        known = [question.sibling is not None for question in asked]
        metrics["bits_per_byte_sibling"] = Ratio.of(after, lengths).within(np.array(known))
    groups = {"": [scores["none"]] if "none" in scores else [], "_dreams": own}
    groups["_oracle"] = [scores["mined"]] if "mined" in scores else []
    for suffix, draws in groups.items():
        if not draws:
            continue
        by_question = [[draw[i] for draw in draws] for i in range(len(asked))]
        marginal = [log_mean_exp([score.nats for score in each]) for each in by_question]
        metrics[f"bits_per_byte{suffix}"] = Ratio.of([bits(np.array([total])) for total in marginal], lengths)
        for name, metric in AVERAGED.items():
            sums = [float(np.mean([score.sums[name] for score in each])) for each in by_question]
            metrics[metric + suffix] = Ratio.of(sums, [each[0].counts[name] for each in by_question])
        if suffix != "_oracle":
            metrics[f"calibration_error{suffix}"] = calibration_error(_bins(draws[0]))
    return metrics


def _bins(scores: Sequence[Scored]) -> NDArray[np.float64]:
    """(Q, B, 3)."""
    return np.array([score.bins for score in scores], np.float64)


def _of_answers(exam: Exam, sheet: Sheet, asked: Sequence[Question], missing: dict[str, str]) -> dict[str, Ratio]:
    """What its own answers and dreams are like; adds to `missing` what can't be said of them here."""
    answers = [said.answer for said in sheet.answers]
    references = [question.text for question in asked] if exam.has_answers else None
    metrics = text_metrics(answers, references) | speech_metrics(sheet.answers)
    if exam.codebook is not None and exam.has_answers:
        try:
            metrics |= concept_metrics(answers, asked, exam.codebook)
        except (MissingDependency, TeacherError) as error:
            missing |= {name: str(error) for name in _names("concept_", "triplet_")}
    if sheet.card.dreams and _in_words(sheet.answers):
        missing |= {name: missing.get(name, IN_WORDS) for name in _names(*OF_DREAMS)}
    elif sheet.card.dreams:
        mined = _mined_labels(exam, sheet, asked)
        if mined is None:
            why = "its dreams are of other image tokens than the exam's codebook has, and it ships no codebook"
            missing |= dict.fromkeys(_names("dream_recall", "dream_precision"), why)
        metrics |= dream_metrics([said.dream for said in sheet.answers], mined)
    return metrics


IN_WORDS = "it thinks in words, not in image tokens"


def _in_words(answers: Sequence[Said]) -> bool:
    """Whether one that ships no codebook dreams, and in none of its dreams of an image token."""
    dreams = [said.dream for said in answers if said.mined is None]
    return any(dream.strip() for dream in dreams) and not any(labels_of(dream) for dream in dreams)


def _mined_labels(exam: Exam, sheet: Sheet, asked: Sequence[Question]) -> list[list[str]] | None:
    """Each question's mined dream in the labels of the target's own image tokens, or of the exam's where those are
    what it dreams in. None where neither is known."""
    own = [said.mined for said in sheet.answers]
    found = [labels for labels in own if labels is not None]
    if len(found) == len(own):
        return found
    if exam.codebook is None or exam.run is None:
        return None
    dreamed = [label for said in sheet.answers for label in labels_of(said.dream)]
    known = set(exam.codebook.labels)
    if sum(label in known for label in dreamed) < KNOWN * len(dreamed):
        return None
    codes = load_codes(exam.run.tokenizer, exam.codebook)
    return [mined_labels(question.triplets, codes, exam.codebook.labels) for question in asked]


def mined_labels(triplets: Sequence[Triplet], codes: Mapping[str, int], labels: Sequence[str]) -> list[str]:
    """The image tokens' labels of the dream that triplets are. codes: phrase → image token."""
    dream = dream_of(triplets, codes)
    return [labels[code] for steps in dream.values() for step in steps for code in step]


# Why a metric is missing.


def _names(*starts: str) -> list[str]:
    return [name for name in METRICS if name.startswith(starts)]


LIKELIHOOD = ("bits_per_byte", "kl", "agreement", "calibration_error")
TARGETS = ("kl", "agreement")
OF_DREAMS = ("dream_", "malformed_dreams")
NO_SIBLINGS = "the teacher gave these prompts one answer each, or nothing was mined from others (capture.samples)"
OF_SIBLINGS = ("bits_per_byte_sibling", "steering_")
OF_A_REFERENCE = ("chrf", "rouge_l", "length_ratio", "concept_", "triplet_", "dream_recall", "dream_precision")


def reasons(exam: Exam, sheet: Sheet, settings: EvaluateSettings) -> dict[str, str]:
    """Metric → why it can't be had, as far as that is known before anything was asked."""
    why: dict[str, str] = {}

    def lacks(names: Sequence[str], reason: str | None) -> None:
        for name in names if reason else ():
            why.setdefault(name, str(reason))

    mined = any(question.triplets for question in exam.questions)
    likelihoods, cannot = _names(*LIKELIHOOD), sheet.cannot
    dreamed = [name for name in likelihoods if name.endswith("_dreams")]
    oracle = [name for name in likelihoods if name.endswith("_oracle")]
    if not exam.has_answers:
        lacks([*likelihoods, *_names(*OF_A_REFERENCE, *OF_SIBLINGS)], "nobody has answered these prompts")
    lacks(_names(*OF_SIBLINGS), cannot.get("mined"))
    lacks(_names(*OF_SIBLINGS), None if exam.has_siblings else NO_SIBLINGS)
    lacks(likelihoods, cannot.get("likelihood"))
    lacks(dreamed, cannot.get("dreams"))
    lacks(dreamed, None if settings.dreams else "evaluate.dreams is 0")
    if not settings.dreams and "dreams" not in cannot:
        lacks(["bits_per_byte_used"], "it dreams before it answers, and evaluate.dreams is 0")
    lacks(oracle, cannot.get("mined"))
    lacks(oracle, None if mined else "nothing was mined from these answers")
    lacks(_names(*TARGETS), cannot.get("targets"))
    lacks(_names("kl"), cannot.get("kl"))
    if exam.codebook is None:
        lacks(
            _names("concept_", "triplet_", "steering_concepts"),
            "the prompts' run has no codebook (`dream tokenize` builds it)",
        )
    if not sheet.card.dreams:
        lacks(_names(*OF_DREAMS), "it was not made to dream")
    elif not mined:
        lacks(_names("dream_recall", "dream_precision"), "nothing was mined from these answers")
    return why


def _explain(metrics: Mapping[str, Ratio], missing: dict[str, str]) -> None:
    """Add why a metric that was measured is defined for no question."""
    for name, ratio in metrics.items():
        if name in missing or ratio.defined or name not in METRICS:
            continue
        group = METRICS[name].group
        if group == "targets":
            missing[name] = "the answers have no soft targets in its vocabulary"
        elif group == "calibration":
            missing[name] = "it doesn't tell how sure it is"
        elif name == "malformed_dreams":
            missing[name] = "it dreamed nothing"
