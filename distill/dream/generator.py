"""Dreams all paths of all prompts at once: a recurrent state a path, four experts, and image tokens at every step.

A step of a path reads three things: the triplet that the path has just dreamed (as image tokens, the only
interface), the prompt, and where the other paths of its prompt stand. A gated recurrent unit (arXiv:1406.1078)
turns that into the next state; what it proposes is a mixture of experts (Jacobs et al. 1991), one a lens.

Shape legend: B prompts, M memory positions, S sequences (paths), T steps, 3 roles (what, action, result), D = 512,
C codes, E experts, W width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.config import DreamingConfig
from distill.dream.input_tokenizer import HEADS, WIDTH, Encoded, join_heads, split_heads
from distill.dream.record import ROLES
from distill.errors import BadInput
from distill.mining.triplets import LENSES

EXPERTS = len(LENSES)
NARROWER = 2
"""Than a state, a role's vector between a state and a token: whole maps from one to the other would be half of all
weights."""
FIRST_SCALE, MAX_SCALE = 20.0, 100.0
"""Of the cosines that become logits; learned, and clamped as in CLIP (Radford et al. 2021, arXiv:2103.00020)."""
SURE = 1e4
"""Logit between a code that is forced and all others."""


@dataclass
class Dreams:
    """The paths of all prompts.

    embeddings (B, S, T, 3, D) of length 1; logits (B, S, T, 3, C); more (B, S, T): logit that the step exists;
    gates (B, S, E): each expert's weight; offsets (S, W): where the paths start; tokens (B, S, T, 3, D): as fed
    to the next step.
    """

    embeddings: Tensor
    logits: Tensor
    more: Tensor
    gates: Tensor
    offsets: Tensor
    tokens: Tensor

    def codes(self) -> Tensor:
        """(B, S, T, 3) int64: the image token of each slot."""
        return self.logits.argmax(-1)

    def live(self) -> Tensor:
        """(B, S, T) bool: a path ends before its first step that is less likely than not."""
        return (self.more > 0).cumprod(-1).bool()

    def quantized(self) -> Tensor:
        """(B, S, T, 3, D): the image tokens' centroids; the gradient is that of the codes' softmax mixture."""
        return self.tokens

    @property
    def diversity(self) -> Tensor:
        """Mean cosine distance, 0 to 2, between the offsets of two paths; 0 where there is one path."""
        count = len(self.offsets)
        unit = F.normalize(self.offsets, dim=-1)
        cosines = (unit @ unit.T).sum() - count
        return 1 - cosines / (count * (count - 1)) if count > 1 else cosines * 0


def straight_through(logits: Tensor, centroids: Tensor) -> Tensor:
    """(…, D): the centroid of the best code, with the gradient of the softmax mixture (arXiv:1308.3432)."""
    hard = centroids[logits.argmax(-1)]
    if not logits.requires_grad:
        return hard
    mixture = logits.softmax(-1) @ centroids
    return mixture + (hard - mixture).detach()


class ExpertTransitions(nn.Module):
    """A gated recurrent unit whose candidate state is proposed by all experts, mixed by the gates in one product."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.reset_keep = nn.Linear(2 * width, 2 * width)
        self.from_input = nn.Linear(width, experts * width)
        self.from_state = nn.Linear(width, experts * width)

    def forward(self, x: Tensor, state: Tensor, gates: Tensor) -> Tensor:
        """x, state (B, S, W), gates (B, S, E) → (B, S, W)."""
        reset, keep = self.reset_keep(torch.cat((x, state), -1)).sigmoid().chunk(2, -1)
        proposals = (self.from_input(x) + self.from_state(reset * state)).tanh()
        candidate = (gates.unsqueeze(-2) @ proposals.unflatten(-1, (self.experts, -1))).squeeze(-2)
        return candidate + keep * (state - candidate)


class DreamGenerator(nn.Module):
    """config: how many paths and steps. centroids (C, D): the codebook's. width: W, the tokenizer's.

    Raises BadInput for a codebook without codes, or of another width than `dim`.
    """

    centroids: Tensor

    def __init__(self, config: DreamingConfig, centroids: Tensor, dim: int = 512, width: int = WIDTH) -> None:
        super().__init__()
        if centroids.ndim != 2 or centroids.shape[1] != dim or not len(centroids):
            raise BadInput(
                f"the codebook has {len(centroids)} image tokens of shape {tuple(centroids.shape[1:])}; a dream "
                f"engine needs at least one, of {dim} dimensions: mine triplets, then run `dream tokenize --force`"
            )
        self.paths, self.steps, self.dim = config.num_dream_sequences, config.dream_length, dim
        self.register_buffer("centroids", F.normalize(centroids.float(), dim=-1), persistent=False)
        self.offsets = nn.Parameter(torch.empty(self.paths, width))
        self.step_embeddings = nn.Parameter(torch.randn(self.steps, width) * 0.1)
        narrow = width // NARROWER
        self.read_token, self.read_roles = nn.Linear(dim, narrow), nn.Linear(len(ROLES) * narrow, width)
        self.gate = nn.Linear(width, EXPERTS)
        self.memory_keys, self.memory_values = nn.Linear(width, width), nn.Linear(width, width)
        self.look_norm = nn.LayerNorm(width)
        self.look = nn.Linear(width, 3 * width)  # query, and the key and value shown to the other paths
        self.mix = nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.input_norm = nn.LayerNorm(width)
        self.transitions = ExpertTransitions(width, EXPERTS)
        self.slot_norm = nn.LayerNorm(width)
        self.say_roles, self.say_token = nn.Linear(width, len(ROLES) * narrow), nn.Linear(narrow, dim)
        self.more = nn.Linear(width, 1)
        self.log_scale = nn.Parameter(torch.tensor(FIRST_SCALE).log())
        self._start(width)

    @torch.no_grad()
    def _start(self, width: int) -> None:
        """Offsets at right angles as far as there is room, and path k nearest to expert k mod E."""
        nn.init.orthogonal_(self.offsets)
        self.offsets.mul_(width**0.5)
        for expert in range(min(EXPERTS, self.paths)):
            self.gate.weight[expert] = self.offsets[expert::EXPERTS].sum(0) * (2.0 / width)
        self.gate.bias.zero_()

    def forward(
        self,
        encoded: Encoded,
        guide: Tensor | None = None,
        on_step: Callable[[int, Dreams], None] | None = None,
        whole: bool = True,
    ) -> Dreams:
        """Dream of each prompt. guide (≤ 3,) int64: codes that each path's first what, action and result must be.

        on_step(t, dreams so far) is called after each step. Not whole: T is as many steps as the longest path lives,
        1 at least. Raises BadInput for a guide that is no code's.
        """
        self._check_guide(guide)
        triplet = encoded.triplet
        if guide is not None:
            triplet = torch.cat((self.centroids[guide].expand(len(triplet), -1, -1), triplet[:, len(guide) :]), 1)
        batch = len(triplet)
        start = self.read(triplet.unsqueeze(1))  # (B, 1, W)
        state = (start + self.offsets).tanh()
        gates = self.gate(start + self.offsets).softmax(-1)
        keys, values = (split_heads(f(encoded.memory), HEADS) for f in (self.memory_keys, self.memory_values))
        seen = torch.cat((encoded.real, encoded.real.new_ones(batch, self.paths)), 1)[:, None, None, :]
        places = self.offsets + self.step_embeddings.unsqueeze(1)  # (T, S, W)
        codes = self.scale * self.centroids.T
        fed = start.expand(-1, self.paths, -1)
        steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        lives = torch.ones((), dtype=torch.bool, device=state.device)
        for t in range(self.steps):
            x = self._look_around(fed + state + places[t], keys, values, seen)
            state = self.transitions(self.input_norm(x + self.feed(x)), state, gates)
            steps.append(self._speak(state, codes, guide if t == 0 else None))
            fed = self.read(steps[-1][3])
            if on_step is not None:
                on_step(t, self._dreams(steps, gates))
            lives = lives & (steps[-1][2] > 0)
            if not (whole or lives.any()):
                del steps[max(t, 1) :]
                break
        return self._dreams(steps, gates)

    def read(self, tokens: Tensor) -> Tensor:
        """(B, S, 3, D) → (B, S, W)."""
        return self.read_roles(self.read_token(tokens).flatten(2))

    def _look_around(self, x: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        """x (B, S, W) with what each path reads in the prompt and in all paths. keys, values (B, heads, M, ·)."""
        q, k, v = (split_heads(part, HEADS) for part in self.look(self.look_norm(x)).chunk(3, -1))
        k, v = torch.cat((keys, k), 2), torch.cat((values, v), 2)
        return x + self.mix(join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=seen)))

    def _speak(self, state: Tensor, codes: Tensor, guide: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embeddings (B, S, 3, D), logits (B, S, 3, C), more (B, S) and tokens (B, S, 3, D) of a step.

        codes (D, C): centroids times the scale.
        """
        state = self.slot_norm(state)
        said = F.gelu(self.say_roles(state)).unflatten(-1, (len(ROLES), -1))
        embeddings = F.normalize(self.say_token(said), dim=-1)
        logits = embeddings @ codes
        more = self.more(state).squeeze(-1)
        if guide is not None:
            count = len(guide)
            forced = F.one_hot(guide, len(self.centroids)).bool()
            forced_logits = torch.where(forced, SURE, logits[..., :count, :] * 0)
            logits = torch.cat((forced_logits, logits[..., count:, :]), -2)
            held = self.centroids[guide].expand(*state.shape[:2], -1, -1)
            embeddings = torch.cat((held, embeddings[..., count:, :]), -2)
            more = more.clamp_min(1.0)
        return embeddings, logits, more, straight_through(logits, self.centroids)

    def _dreams(self, steps: list[tuple[Tensor, Tensor, Tensor, Tensor]], gates: Tensor) -> Dreams:
        embeddings, logits, more, tokens = (torch.stack(parts, 2) for parts in zip(*steps, strict=True))
        return Dreams(embeddings, logits, more, gates, self.offsets, tokens)

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied by, 1 to 100."""
        return self.log_scale.exp().clamp(1.0, MAX_SCALE)

    def _check_guide(self, guide: Tensor | None) -> None:
        if guide is None:
            return
        if guide.ndim != 1 or not 1 <= len(guide) <= len(ROLES):
            raise BadInput(f"guide of {tuple(guide.shape)} image tokens: give one to three (what, action, result)")
        if int(guide.min()) < 0 or int(guide.max()) >= len(self.centroids):
            raise BadInput(f"guide {guide.tolist()}: the codebook has the image tokens 0 to {len(self.centroids) - 1}")
