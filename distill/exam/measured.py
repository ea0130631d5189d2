"""From what is kept of a target's examination to its metrics: a pure function.

Shape legend: Q the exam's questions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from distill.config import EvaluateSettings
from distill.errors import TeacherError
from distill.exam.examinees.protocol import Ability, AnswerScore, Card, Spoken
from distill.exam.metrics.catalogue import METRICS, in_order
from distill.exam.metrics.concepts import concept_metrics
from distill.exam.metrics.dreams import dream_metrics, labels_of
from distill.exam.metrics.likelihood import LOG_2, log_mean_exp
from distill.exam.metrics.speech import Form, speech_metrics
from distill.exam.metrics.statistics import Ratio
from distill.exam.metrics.steering import steering
from distill.exam.metrics.text import exact_match, text_metrics
from distill.exam.questions import Exam, Question
from distill.mining.triplets import Triplet
from distill.tokens.image_tokens import dream_of, load_codes

ANSWERS, GREEDY = "answers", "greedy"
STEERED = ("steer-own", "steer-sibling")
"""Phases of an examination, besides those that score."""

KNOWN = 0.9
"""Of the image tokens dreamed by a target that ships no codebook, the share that the exam's must know to be used."""

AVERAGED = {"kl": "kl", "agrees": "agreement", "agrees_5": "agreement_5"}
"""What is averaged over positions → metric."""


@dataclass(frozen=True)
class Scored:
    """An `AnswerScore`, summed over the answer's tokens.

    nats: Σ log p. sums and counts: of kl, agrees and agrees_5, over the positions where each is known.
    """

    nats: float
    tokens: int
    sums: dict[str, float]
    counts: dict[str, int]

    @classmethod
    def of(cls, score: AnswerScore) -> Self:
        values = {name: getattr(score, name) for name in AVERAGED}
        return cls(
            nats=float(score.logprobs.sum()),
            tokens=len(score.logprobs),
            sums={name: float(np.nansum(each)) for name, each in values.items()},
            counts={name: int(np.isfinite(each).sum()) for name, each in values.items()},
        )

    @classmethod
    def read(cls, record: dict[str, Any]) -> Self:
        """As kept; journals of old hold more ("bins")."""
        return cls(**{name: record[name] for name in ("nats", "tokens", "sums", "counts")})


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
    answers: list[Spoken] = field(default_factory=list[Spoken])
    greedy: list[str] = field(default_factory=list[str])
    steered: list[list[str]] = field(default_factory=list[list[str]])

    def enter(self, phase: str, records: list[Any]) -> None:
        """What a journal holds of a phase. Raises TypeError or KeyError where it is something else."""
        if phase == ANSWERS:
            self.answers = [replace(Spoken(**record), form=Form(**record["form"])) for record in records]
        elif phase == GREEDY:
            self.greedy = records
        elif phase in STEERED:
            self.steered.append(records)
        else:
            self.scores[phase.removeprefix("score-")] = [Scored.read(record) for record in records]


@dataclass
class Measured:
    """What a target did on an exam.

    keys: of its questions. metrics: name → ratio over them; for those in `left_out` (key → why: they don't fit its
    context) all are undefined. missing: metric → why this target can't give it. dreams, answers: as spoken at
    the exam's temperature, one a question, "" where left out; no answers where it wasn't to speak.
    """

    keys: list[str]
    metrics: dict[str, Ratio]
    missing: dict[str, str]
    dreams: list[str]
    answers: list[str]
    left_out: dict[str, str]
    tokens_per_second: float | None
    card: Card
    answer_tokens: int | None = None
    """Of the teacher's answers in the target's own tokens, where it scored them."""
    cut_thinking: int = 0
    """Answers that are empty since the limit came while it thought in words."""

    def at(self, metric: str, i: int) -> float | None:
        """One question's value; None where it is not defined."""
        ratio = self.metrics[metric]
        return float(ratio.numerator[i] / ratio.denominator[i]) if ratio.denominator[i] else None


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
    spoken = [said.get(i, SILENT) for i in range(size)] if said else []
    seconds, tokens = sum(s.seconds for s in sheet.answers), sum(s.written for s in sheet.answers)
    scored = sheet.scores.get("none")
    return Measured(
        keys=[question.key for question in exam.questions],
        metrics={n: spread_over(metrics[n], places, size) for n in in_order(set(metrics)) if n not in missing},
        missing={name: missing[name] for name in in_order(set(missing))},
        dreams=[each.dream for each in spoken],
        answers=[each.answer for each in spoken],
        left_out=dict(sheet.left_out),
        tokens_per_second=tokens / seconds if seconds else None,
        card=sheet.card,
        answer_tokens=None if scored is None else sum(score.tokens for score in scored),
        cut_thinking=sum(map(_is_cut, sheet.answers)) if _in_words(sheet.answers) else 0,
    )


SILENT = Spoken("", "", False, 0, 0.0, Form(None, clean=True, whole=True, ended=False))
"""Of a question that wasn't asked."""


def spread_over(ratio: Ratio, places: Sequence[int], size: int) -> Ratio:
    """A metric over some questions as one over all `size`; it is undefined for the others."""
    top, bottom = np.zeros(size), np.zeros(size)
    top[list(places)], bottom[list(places)] = ratio.numerator, ratio.denominator
    return Ratio(top, bottom)


def _likelihoods(scores: Mapping[str, list[Scored]], asked: Sequence[Question]) -> dict[str, Ratio]:
    """Bits per byte, KL and agreement; after K own dreams the first as a marginal over them, the others as means."""
    metrics: dict[str, Ratio] = {}
    own = [each for name, each in scores.items() if name.startswith("own-")]
    lengths = [question.bytes for question in asked]
    if "sibling" in scores:
        after = Ratio.of([-score.nats / LOG_2 for score in scores["sibling"]], lengths)
        metrics["bits_per_byte_sibling"] = after.within(np.array([q.sibling is not None for q in asked]))
    groups = {"": [scores["none"]] if "none" in scores else [], "_dreams": own}
    groups["_oracle"] = [scores["mined"]] if "mined" in scores else []
    for suffix, draws in groups.items():
        if not draws:
            continue
        by_question = [[draw[i] for draw in draws] for i in range(len(asked))]
        marginal = [log_mean_exp([score.nats for score in each]) for each in by_question]
        metrics[f"bits_per_byte{suffix}"] = Ratio.of([-total / LOG_2 for total in marginal], lengths)
        for name, metric in AVERAGED.items():
            sums = [float(np.mean([score.sums[name] for score in each])) for each in by_question]
            metrics[metric + suffix] = Ratio.of(sums, [each[0].counts[name] for each in by_question])
    return metrics


def _of_answers(exam: Exam, sheet: Sheet, asked: Sequence[Question], missing: dict[str, str]) -> dict[str, Ratio]:
    """What its own answers and dreams are like; adds to `missing` what can't be said of them here."""
    answers = [said.answer for said in sheet.answers]
    references = [question.text for question in asked] if exam.has_answers else None
    metrics = text_metrics(answers, references) | speech_metrics([said.form for said in sheet.answers])
    if exam.codebook is not None and references is not None:
        try:
            metrics |= concept_metrics(answers, references, exam.codebook)
        except TeacherError as error:
            missing |= {name: str(error) for name in _names("concept_")}
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


def _in_words(answers: Sequence[Spoken]) -> bool:
    """Whether one that ships no codebook dreams, and in none of its dreams of an image token."""
    dreams = [said.dream for said in answers if said.mined is None]
    return any(dream.strip() for dream in dreams) and not any(labels_of(dream) for dream in dreams)


def _is_cut(said: Spoken) -> bool:
    return not (said.closed or said.answer or said.form.ended)


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


LIKELIHOOD = ("bits_per_byte", "kl", "agreement")
OF_DREAMS = ("dream_", "malformed_dreams", "tokens_dreamed")
NO_SIBLINGS = "the teacher gave these prompts one answer each, or nothing was mined from others (capture.samples)"
NOT_MINED = "nothing was mined from these answers"
NO_CODEBOOK = "the prompts' run has no codebook (`dream tokenize` builds it)"
OF_SIBLINGS = ("bits_per_byte_sibling", "steering_")
OF_A_REFERENCE = ("chrf", "rouge_l", "length_ratio", "concept_", "dream_recall", "dream_precision")


def reasons(exam: Exam, sheet: Sheet, settings: EvaluateSettings) -> dict[str, str]:
    """Metric → why it can't be had, as far as that is known before anything was asked."""
    cannot, likelihoods = sheet.cannot, _names(*LIKELIHOOD)
    mined = any(question.triplets for question in exam.questions)
    dreamed, oracle = ([n for n in likelihoods if n.endswith(end)] for end in ("_dreams", "_oracle"))
    unasked = "" if settings.dreams else "evaluate.dreams is 0"
    # The first reason counts.
    lacking: list[tuple[Sequence[str], str | None]] = [
        (
            _names(*LIKELIHOOD, *OF_A_REFERENCE, *OF_SIBLINGS),
            None if exam.has_answers else "nobody has answered these prompts",
        ),
        (_names(*OF_SIBLINGS), cannot.get("mined") or (None if exam.has_siblings else NO_SIBLINGS)),
        (likelihoods, cannot.get("likelihood")),
        (dreamed, cannot.get("dreams") or unasked),
        (["bits_per_byte_used"], unasked if "dreams" not in cannot else None),
        (oracle, cannot.get("mined") or (None if mined else NOT_MINED)),
        (_names("kl", "agreement"), cannot.get("targets")),
        (_names("kl"), cannot.get("kl")),
        (_names("concept_", "steering_concepts"), None if exam.codebook else NO_CODEBOOK),
        (_names(*OF_DREAMS), None if sheet.card.dreams else "it was not made to dream"),
        (_names("dream_recall", "dream_precision"), None if mined else NOT_MINED),
    ]
    why: dict[str, str] = {}
    for names, reason in lacking:
        why = {**dict.fromkeys(names if reason else (), str(reason)), **why}
    return why


def _explain(metrics: Mapping[str, Ratio], missing: dict[str, str]) -> None:
    """Add why a metric that was measured is defined for no question."""
    for name, ratio in metrics.items():
        if not ratio.defined and name in METRICS and (why := UNDEFINED.get(METRICS[name].group)):
            missing.setdefault(name, why)


UNDEFINED = {
    "targets": "the answers have no soft targets in its vocabulary",
    "speech": "it dreamed nothing",
}
"""Group of metrics → why they are defined for no question."""
