"""How an inherited student's rows for image tokens begin, so that it can tell an image token from its label's word.

A row that is its label's mean gives an image token the very logit of its word, and half of the word's places. So the
rows are moved along one shared direction: the one along which the teacher's last hidden states h (mean μ, covariance
Σ), wherever it speaks, lie farthest to one side for their spread. That is Fisher's discriminant between them and zero,
u = Σ⁻¹μ: h·u has the mean and the variance μᵀΣ⁻¹μ. Less of it in a row is less of a logit, alike at all places of an
answer; dreaming is learned as stepping over to the other side.

Within a dream the question is what kind of token comes next, an image token or a lens, of which hundreds and few share
no direction either. So they are moved apart along a second one, and codes that are actions from those that are things
along a third, both across the first: of what the states spread over, two of middling variance. Then the form of a dream
is two numbers to learn (docs/inheriting.md tells what that saves).

Shape legend: M positions, D hidden, V vocabulary, C codes.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distill.backbone.model import Backbone
from distill.student.cut import Sample, final_states
from distill.tokens.bpe import StudentTokenizer

SHIFT = 6.0
"""Nats by which an image token is less likely than the word on its label where the teacher speaks."""
KIND = 2.0
"""How far rows are moved for their kind, image token or lens, action or thing. A word's row is about 3 long."""
DAMPING = 1e-2
"""Added to the covariance's diagonal, as a share of its mean."""


@torch.no_grad()
def begin_image_rows(
    model: Backbone, tokenizer: StudentTokenizer, samples: Sequence[Sample], kind: str, action: Tensor
) -> Backbone:
    """The model with its rows of image tokens, lenses and think tags moved; `untied`: in an output matrix of their own,
    while they are read as their labels. action (C,): 1 for a code that always is an action, −1 for one that never is.
    """
    if kind == "label":
        return model
    if kind == "untied" and model.config.tie_embeddings:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model = Backbone(replace(model.config, tie_embeddings=False))
        model.load_state_dict(state)
    states = torch.cat(final_states(model, samples))
    step, rows = direction(states), model.lm_head.weight
    image, acts = across(states, step)
    rows[tokenizer.think_id :] -= SHIFT * step
    rows[[tokenizer.think_id, tokenizer.end_think_id, *tokenizer.lens_ids]] -= KIND * image
    rows[tokenizer.image_ids] += KIND * (image + action[:, None] * acts)
    return model.eval()


def direction(states: Tensor) -> Tensor:
    """(D,) of states (M, D): u with h·u of mean 1 over the states and as little variance as can be."""
    wide = states.double()
    mean = wide.mean(0)
    spread = torch.cov(wide.t())
    spread.diagonal().add_(DAMPING * spread.diagonal().mean())
    found = torch.linalg.solve(spread, mean)
    return (found / (found @ mean)).to(states.dtype)


def across(states: Tensor, step: Tensor) -> Tensor:
    """(2, D), orthonormal: principal components of states (M, D) of middling variance, across their mean and `step`
    (D,), so that on average they make no token likelier."""
    wide = states.double()
    _, components = torch.linalg.eigh(torch.cov(wide.t()))
    middle = len(components) // 2
    taken = torch.stack((step.double(), wide.mean(0), *components[:, middle : middle + 2].t()), dim=1)
    return torch.linalg.qr(taken)[0][:, 2:].t().to(states.dtype)
