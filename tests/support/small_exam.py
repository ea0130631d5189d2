"""Questions with made-up soft targets in SmolLM2's ids, a small student for them, and scores by brute force."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from support.small_student import TEXTS, small_model, small_tokenizer, write_checkpoint

from distill.backbone.model import Backbone
from distill.exam.examinees.protocol import AnswerScore
from distill.exam.questions import Question
from distill.mining.triplets import Triplet
from distill.teacher.gguf_tokenizer import read_tokenizer
from distill.teacher.protocol import TeacherTokenizer, TokenTargets
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.image_tokens import Codebook, build_codebook

TRIPLETS = (
    Triplet("the ball", "falls to", "the floor", "spatial", 0, "k1", 0, "syntax"),
    Triplet("the ball", "bounces", "twice", "temporal", 0, "k1", 0, "syntax"),
    Triplet("plants", "take", "water", "causal", 0, "k2", 0, "syntax"),
    Triplet("rain", "wets", "the street", "causal", 0, "k3", 0, "syntax"),
)
SYSTEM = "Answer in one sentence."


@dataclass(frozen=True)
class SmallExam:
    vocabulary: TeacherTokenizer
    tokenizer: StudentTokenizer
    codebook: Codebook
    questions: list[Question]

    def checkpoint(self, folder: Path, seed: int = 0) -> Path:
        """A student of random weights, with its codebook, as training leaves it."""
        write_checkpoint(folder, small_model(self.tokenizer, seed), self.tokenizer)
        self.codebook.save(folder / "tokenizer")
        return folder


def small_exam(smollm2: Path) -> SmallExam:
    vocabulary = read_tokenizer(smollm2)
    codebook, _ = build_codebook(TRIPLETS, size=8)
    tokenizer = small_tokenizer(smollm2, labels=codebook.labels)
    random = np.random.default_rng(3)
    questions: list[Question] = []
    for i, text in enumerate(TEXTS):
        ended = bool(i % 2)
        asked, text = ("How do plants grow in the garden?", text) if i else (TEXTS[0], text[:12])
        triplets = tuple(t for t in TRIPLETS if t.trace == f"k{i}")
        tokens = made_up_targets(tokenizer, vocabulary, text, ended, random)
        system = SYSTEM if i == 2 else ""
        questions.append(Question(f"k{i}", asked, system, text, "stop" if ended else "length", tokens, triplets))
    hard = Question("k9", "What happens?", "", "The street is wet.", "stop", None)
    return SmallExam(vocabulary, tokenizer, codebook, [*questions, hard])


def made_up_targets(
    tokenizer: StudentTokenizer, vocabulary: TeacherTokenizer, text: str, ended: bool, random: np.random.Generator
) -> TokenTargets:
    """20 alternatives a token, most of them the student's; one in five tokens has a hard label alone."""
    assert tokenizer.teacher_map is not None
    kept = np.flatnonzero((tokenizer.teacher_map >= 0) & (tokenizer.teacher_map < tokenizer.base_size))
    theirs = {int(tokenizer.teacher_map[id]): int(id) for id in kept}
    ids = [theirs[id] for id in tokenizer.encode(text)] + [vocabulary.eos_id] * ended
    top_ids = np.stack(
        [
            random.permutation([*random.choice(kept, 16, False), *random.integers(1000, 49000, 3), own])[:20]
            for own in ids
        ]
    )
    logits = np.sort(random.normal(0, 2, (len(ids), 22)), axis=1)[:, ::-1]
    top = (logits - np.log(np.exp(logits).sum(1, keepdims=True)))[:, :20]
    own = np.array([row[list(alternatives).index(id)] for row, alternatives, id in zip(top, top_ids, ids, strict=True)])
    soft = random.random(len(ids)) > 0.2
    return TokenTargets(
        np.array(ids, np.int32),
        np.where(soft, own, np.nan).astype(np.float32),
        top_ids.astype(np.int32),
        np.where(soft[:, None], top, -np.inf).astype(np.float32),
        soft,
    )


def brute_score(
    model: Backbone, tokenizer: StudentTokenizer, question: Question, context: list[int], answer: list[int]
) -> AnswerScore:
    """In float64, token by token, by the formulas: nothing shared with the code but the weights and the map."""
    wide = Backbone(model.config).double().eval()
    wide.load_state_dict({name: weight.double() for name, weight in model.state_dict().items()})
    with torch.no_grad():
        logits = wide(torch.tensor([[*context, *answer]]))[0].numpy()
    score, tokens, teacher_map = AnswerScore.unknown(len(answer)), question.tokens, tokenizer.teacher_map
    for i, label in enumerate(answer):
        z = logits[len(context) - 1 + i]
        q = np.exp(z - z.max()) / math.fsum(np.exp(z - z.max()))
        order = sorted(range(len(z)), key=lambda id: -z[id])
        score.logprobs[i] = math.log(q[label])
        if tokens is None or teacher_map is None or not tokens.soft[i]:
            continue
        p = {label: math.exp(np.float16(tokens.logprobs[i]))}  # as exactly as training stores it
        for id, logprob in zip(tokens.top_ids[i].tolist(), tokens.top_logprobs[i].tolist(), strict=True):
            if teacher_map[id] >= 0 and teacher_map[id] not in p:
                p[int(teacher_map[id])] = math.exp(np.float16(logprob))
        scale = max(1.0, math.fsum(p.values()))
        p = {id: value / scale for id, value in p.items()}
        kl = math.fsum(value * math.log(value / q[id]) for id, value in p.items())
        if (rest := 1 - math.fsum(p.values())) > 1e-12:
            kl += rest * math.log(rest / math.fsum(q[id] for id in range(len(z)) if id not in p))
        likeliest = int(teacher_map[tokens.top_ids[i, 0]])
        score.kl[i], score.agrees[i], score.agrees_5[i] = kl, likeliest == order[0], likeliest in order[:5]
    return score


def assert_equal_scores(found: AnswerScore, wanted: AnswerScore, atol: float = 1e-4) -> None:
    for name, column in vars(wanted).items():
        np.testing.assert_allclose(getattr(found, name), column, atol=atol, rtol=1e-5, err_msg=name)
