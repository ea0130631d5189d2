"""How fast given answers are scored, beside the bare model's forward pass over as many tokens, in the same run.

Bare: hidden states and the logits of every position, made in blocks and dropped, over rows of one length: no padding,
nothing computed from the logits. Scored: contexts and answers of a real run's lengths, with all of `AnswerScore`:
likelihood, KL against soft targets of 20 alternatives, the five best, confidence.

Shape legend: B rows, T positions, S named alternatives.
"""

from collections.abc import Callable

import numpy as np
import torch

from bench.result import BenchResult
from bench.stopwatch import Stopwatch, rates, ratio, speeds
from bench.training import DOCUMENTS, synthetic_documents
from distill.backbone.device import pick_device
from distill.backbone.model import Backbone, config_for, count_parameters
from distill.config import StudentSettings
from distill.errors import BadInput
from distill.exam.metrics.likelihood import SoftTargets
from distill.exam.scoring import BATCH_TOKENS, LOGITS_AT_ONCE, POSITIONS_AT_ONCE, score_answers
from distill.tokens.packing import Documents


def bench_score(
    watch: Stopwatch,
    preset: str = "nano",
    prompts: int = 64,
    vocab_size: int = 8192,
    context: int = 512,
    device: str = "auto",
) -> BenchResult:
    """Tokens read a second by both, and the ratio of each round (scored / bare).

    prompts: how many answers are scored, after a mined dream each. Raises BadInput for an unknown preset or device,
    or more prompts than there are synthetic documents.
    """
    if not 1 <= prompts <= DOCUMENTS:
        raise BadInput(f"prompts: {prompts} answers can't be scored; choose 1 to {DOCUMENTS}")
    place = pick_device(device)
    config = config_for(StudentSettings(preset=preset, context=context), vocab_size, 0, 2)
    model = Backbone(config).initialize(0).to(place).eval()
    contexts, answers, targets = scored_rows(synthetic_documents(vocab_size), prompts)
    # The last token is only predicted, never read.
    tokens = sum(len(asked) + len(answer) - 1 for asked, answer in zip(contexts, answers, strict=True))

    def scored() -> None:
        for _ in score_answers(model, contexts, answers, targets):
            pass

    jobs = {"bare": bare_forward(model, tokens, tokens // prompts), "scored": scored}
    found = rates(tokens, watch.seconds(jobs, "bench score", str(place)))
    return watch.result(
        "score",
        [*speeds(found), ratio("scored over bare", found["scored"], found["bare"])],
        {"preset": preset, "vocab_size": vocab_size, "prompts": prompts},
        {"parameters": count_parameters(model), "tokens": tokens, "answer_tokens": sum(map(len, answers))},
        str(place),
    )


def scored_rows(documents: Documents, count: int) -> tuple[list[list[int]], list[list[int]], list[SoftTargets | None]]:
    """Contexts (a prompt and a dream), answers and their soft targets, of the first `count` documents."""
    contexts: list[list[int]] = []
    answers: list[list[int]] = []
    targets: list[SoftTargets | None] = []
    for i in range(count):
        contexts.append([*documents.prompt(i).tolist(), *documents.dream(i).tolist()])
        answers.append(documents.answer(i).tolist())
        span = documents.span(documents.answer_ends, i)
        ids = np.concatenate([documents.answer_ids[span, None], documents.slot_ids[span]], axis=1).astype(np.int64)
        logprobs = documents.slot_logprobs[span].astype(np.float64)
        targets.append(SoftTargets(ids, logprobs, ids[:, 1], np.isfinite(logprobs[:, 0])))
    return contexts, answers, targets


def bare_forward(model: Backbone, tokens: int, length: int) -> Callable[[], None]:
    """The model alone over `tokens` random tokens in full rows of `length` positions, with all their logits."""
    vocabulary, device = model.config.vocab_size, model.cos.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (tokens,), generator=generator).to(device)
    batch = max(1, BATCH_TOKENS // length) * length
    size = max(POSITIONS_AT_ONCE, LOGITS_AT_ONCE // vocabulary)

    @torch.inference_mode()
    def forward() -> None:
        for start in range(0, tokens, batch):
            part = ids[start : start + batch]
            # What is left over at the end makes a shorter row of its own.
            full = len(part) // length * length
            rows = [part[:full].view(-1, length), part[full:].view(1, -1)]
            for hidden in [model.hidden(row).flatten(0, 1) for row in rows if row.numel()]:
                for block in hidden.split(size):
                    model.lm_head(block)

    return forward
