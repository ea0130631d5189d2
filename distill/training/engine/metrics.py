"""How well the dream engine dreams, on prompts that it was not trained on.

Shape legend: B prompts, S paths, T steps, 3 roles, E experts (one a lens), D = 512.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.dream.engine import Drafted, DreamEngine, drafted_dreams
from distill.dream.graph_reasoner import DreamGraphReasoner
from distill.dream.input_tokenizer import ROLES, Encoded
from distill.mining.triplets import LENSES
from distill.tokens.chat import Dream, think_ids
from distill.training.engine.data import DreamBatch, DreamData, first_triplets, outcomes
from distill.training.engine.losses import DreamTargets, right_paths, right_shares
from distill.training.engine.objectives import PromptStates, Reader, targets_of

ANSWERS = 16
"""Prompts whose answers are read, three times each."""

Metrics = dict[str, float]


@torch.no_grad()
def measure(phase: str, engine: DreamEngine, reader: Reader, data: DreamData, states: PromptStates) -> Metrics:
    """What the phase, and those before it, have taught; empty where there is no prompt to measure with.

    code_accuracy           share of the true codes that are dreamed, also by role and by lens
    exact_dreams            share of prompts whose every chain is right, lengths included (of a lens's paths, one)
    diversity_*             mean cosine distance of the paths' offsets, and of what they dream at one step
    gate_*                  each expert's mean weight
    brier                   mean squared distance of a path's score from the share of it that is right
    kept_share, right_kept  share of paths the backbone would read; share of these that is right (right_all: of all)
    answer_*                nats a token of the true answer once the backbone has read: the kept paths (engine), the
                            mined dream (mined), an empty dream (none)
    """
    if not len(data):
        return {}
    batch = data.batch(np.arange(len(data))).to(reader.table.device)
    drafted: Drafted = engine(*states.of(batch))
    targets = targets_of(batch, engine.generator.paths)
    found = _first(engine, drafted.encoded, batch)
    if phase != "input":
        found |= _codes(drafted, targets) | _paths(drafted)
    if phase == "end":
        found |= _arbitration(drafted, targets, engine.config.keep_above)
        found |= _image(engine, drafted, batch) | _answers(reader, drafted, batch, engine.config.keep_above)
    return {name: round(float(value), 6) for name, value in found.items()}


def _first(engine: DreamEngine, encoded: Encoded, batch: DreamBatch) -> dict[str, Tensor]:
    codes, phrases = first_triplets(batch)
    nearest = (encoded.triplet @ engine.generator.centroids.T).argmax(-1)
    return {
        "input_accuracy": (nearest == codes).float().mean(),
        "input_cosine": F.cosine_similarity(encoded.triplet, phrases, dim=-1).mean(),
    }


def _codes(drafted: Drafted, targets: DreamTargets) -> dict[str, Tensor]:
    there = targets.codes >= 0
    right = (drafted.dreams.codes() == targets.codes) & there
    found = {"code_accuracy": right.sum() / there.sum().clamp_min(1)}
    for role, name in enumerate(ROLES):
        found[f"code_accuracy_{name}"] = right[..., role].sum() / there[..., role].sum().clamp_min(1)
    for lens, name in enumerate(LENSES):
        own = slice(lens, None, len(LENSES))
        if there[:, own].any():
            found[f"code_accuracy_{name}"] = right[:, own].sum() / there[:, own].sum()
    exact = right_paths(drafted.dreams, targets)
    lenses = [exact[:, lens :: len(LENSES)].any(1) for lens in range(min(len(LENSES), exact.shape[1]))]
    found["exact_dreams"] = torch.stack(lenses).all(0).float().mean()
    found["length_accuracy"] = (drafted.dreams.live().sum(-1) == targets.steps.sum(-1)).float().mean()
    return found


def _paths(drafted: Drafted) -> dict[str, Tensor]:
    dreams = drafted.dreams
    unit = dreams.embeddings  # of length 1
    paths = unit.shape[1]
    cosines = torch.einsum("bstrd,bztrd->sz", unit, unit) / (unit.shape[0] * unit.shape[2] * unit.shape[3])
    apart = 1 - (cosines.sum() - cosines.trace()) / max(paths * (paths - 1), 1)
    found = {"diversity_offsets": dreams.diversity, "diversity_paths": apart}
    return found | {f"gate_{name}": dreams.gates[..., expert].mean() for expert, name in enumerate(LENSES)}


def _arbitration(drafted: Drafted, targets: DreamTargets, keep_above: float) -> dict[str, Tensor]:
    live = drafted.dreams.live()
    dreamed = live[..., 0]
    right = right_shares(drafted.dreams, targets)[1]
    kept = DreamGraphReasoner.arbitrate(drafted.reasoned, live, keep_above)
    total = dreamed.sum().clamp_min(1)
    return {
        "brier": ((drafted.reasoned.scores - right).square() * dreamed).sum() / total,
        "kept_share": kept.sum() / total,
        "right_kept": (right * kept).sum() / kept.sum().clamp_min(1),
        "right_all": (right * dreamed).sum() / total,
    }


def _image(engine: DreamEngine, drafted: Drafted, batch: DreamBatch) -> dict[str, Tensor]:
    codes, phrases = outcomes(batch)
    image = engine.decoder.image(drafted.reasoned.embedding)
    return {
        "image_cosine": F.cosine_similarity(image, phrases, dim=-1).mean(),
        "image_accuracy": ((image @ engine.generator.centroids.T).argmax(-1) == codes).float().mean(),
    }


def _answers(reader: Reader, drafted: Drafted, batch: DreamBatch, keep_above: float) -> dict[str, float]:
    """Of the first prompts."""
    engine = drafted_dreams(drafted, keep_above=keep_above)[:ANSWERS]
    dreams: dict[str, list[Dream | None]] = {
        "engine": [*engine],
        "mined": [mined_dream(codes) for codes in batch.codes[:ANSWERS]],
        "none": [None] * len(engine),
    }
    found: dict[str, float] = {}
    for name, given in dreams.items():
        thinks = [think_ids(reader.tokenizer, dream) for dream in given]
        nats, tokens = reader.read(batch.prompts[: len(given)], thinks, batch.answers[: len(given)])
        found[f"answer_{name}"] = float(nats) / max(tokens, 1)
    return found


def mined_dream(codes: Tensor) -> Dream:
    """The dream that codes (L, T, 3) are."""
    steps: list[list[list[int]]] = codes.tolist()
    return {
        lens: [(what, action, result) for what, action, result in chain if what >= 0]
        for lens, chain in zip(LENSES, steps, strict=True)
    }
