"""How fast given answers are scored, beside the bare model's forward pass over as many tokens, in the same run.

Bare: hidden states and the logits of every position, made in blocks and dropped, over rows of one length: no padding,
nothing computed from the logits. Scored: contexts and answers of a real run's lengths, with all of `AnswerScore`.
"""

from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from bench.result import BenchResult
from bench.stopwatch import Stopwatch, rates, ratio, speeds
from bench.training import synthetic_documents
from distill.backbone.device import pick_device
from distill.backbone.model import Backbone, config_for, count_parameters
from distill.config import StudentSettings
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

    prompts: how many answers are scored, after a mined dream each. Raises BadInput for an unknown preset or device.
    """
    place = pick_device(device)
    config = config_for(StudentSettings(preset=preset, context=context), vocab_size, 0, 2)
    model = Backbone(config).initialize(0).to(place).eval()
    contexts, answers, targets = scored_rows(synthetic_documents(vocab_size), prompts)
    # The last token is only predicted, never read.
    tokens = sum(len(asked) + len(answer) - 1 for asked, answer in zip(contexts, answers, strict=True))
    jobs = {
        "bare": bare_forward(model, prompts, round(tokens / prompts)),
        "scored": lambda: deque(score_answers(model, contexts, answers, targets), maxlen=0),
    }
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


def bare_forward(model: Backbone, rows: int, length: int) -> Callable[[], None]:
    """The model alone over `rows` rows of `length` random tokens, with all their logits."""
    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0)).to(model.cos.device)
    size = max(POSITIONS_AT_ONCE, LOGITS_AT_ONCE // vocabulary)

    @torch.inference_mode()
    def forward() -> None:
        for part in ids.split(max(1, BATCH_TOKENS // length)):
            for block in model.hidden(part).flatten(0, 1).split(size):
                model.lm_head(block)

    return forward
