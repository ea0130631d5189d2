"""A generator's image tokens for one prompt, and nothing else of what it knows: what the backbone checks.

Small products cost the start of each operation and the reading of their weights. So norms are folded into what follows
them, products of one input are one, and tokens are read and said by tables: what a role's token adds to the next step,
and how near each token is to what a state says (its length, which changes no order, is left out).

Shape legend: M memory positions, S paths, W width, N narrow, C codes, E experts, 3 roles.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.dream.generator import DreamGenerator
from distill.dream.input_tokenizer import HEADS, Encoded
from distill.dream.record import ROLES
from distill.tokens.chat import Triple

Product = tuple[Tensor, Tensor]
"""A matrix (inputs, outputs) and what is added."""


def _folded(weight: Tensor, bias: Tensor, norm: nn.LayerNorm | None = None) -> Product:
    """Of weight (outputs, inputs); norm: whose weight and bias the input lacks."""
    if norm is not None:
        weight, bias = weight * norm.weight, bias + weight @ norm.bias
    return weight.t().contiguous(), bias


def _normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


class Drafter:
    """The generator's weights must not change from now on."""

    @torch.inference_mode()
    def __init__(self, generator: DreamGenerator) -> None:
        self.generator, parts = generator, generator.transitions
        width, narrow = generator.offsets.shape[1], generator.read_token.out_features
        norm, up, _, down = cast("tuple[nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear]", tuple(generator.feed))
        keys, values = generator.memory_keys, generator.memory_values
        self.memory = _folded(torch.cat((keys.weight, values.weight)), torch.cat((keys.bias, values.bias)))
        self.look = _folded(generator.look.weight, generator.look.bias, generator.look_norm)
        self.mix = _folded(generator.mix.weight, generator.mix.bias)
        self.up, self.down = _folded(up.weight, up.bias, norm), _folded(down.weight, down.bias)
        # Of a step's input: its share in the gates of the state, and what the experts propose.
        shares = parts.reset_keep.weight.split(width, 1)
        weight = torch.cat((shares[0], parts.from_input.weight))
        bias = torch.cat((parts.reset_keep.bias, parts.from_input.bias + parts.from_state.bias))
        self.enter = _folded(weight, bias, generator.input_norm)
        self.turn, self.propose = shares[1].t().contiguous(), parts.from_state.weight.t().contiguous()
        weight = torch.cat((generator.say_roles.weight, generator.more.weight))
        self.say = _folded(weight, torch.cat((generator.say_roles.bias, generator.more.bias)), generator.slot_norm)
        centroids = generator.centroids
        self.name = _folded(centroids @ generator.say_token.weight, centroids @ generator.say_token.bias)
        read = generator.read_token(centroids)
        tables = [read @ share.t() for share in generator.read_roles.weight.split(narrow, 1)]
        tables[0] = tables[0] + generator.read_roles.bias
        self.reading = torch.cat(tables)  # (3 · C, W)
        self.first = torch.arange(len(ROLES), device=centroids.device) * len(centroids)
        self.places = generator.offsets + generator.step_embeddings.unsqueeze(1)  # (T, S, W)

    @torch.inference_mode()
    def __call__(self, encoded: Encoded) -> list[list[Triple]]:
        """The codes of each path, as far as it lives, of one prompt's encoding, all of it real."""
        generator = self.generator
        width = generator.offsets.shape[1]
        start = generator.read(encoded.triplet.unsqueeze(1))[0]
        state = (start + generator.offsets).tanh()
        gates = generator.gate(start + generator.offsets).softmax(-1).unsqueeze(1)  # (S, 1, E)
        memory = _product(encoded.memory[0], self.memory).view(-1, 2, HEADS, width // HEADS).permute(1, 2, 0, 3)
        paths: list[list[Triple]] = [[] for _ in range(generator.paths)]
        alive, fed = [True] * generator.paths, start
        for place in self.places:
            x = fed + state + place
            seen = _product(_normed(x), self.look).view(-1, 3, HEADS, width // HEADS).permute(1, 2, 0, 3)
            k, v = torch.cat((memory, seen[1:]), 2)
            mixed = F.scaled_dot_product_attention(seen[:1], k.unsqueeze(0), v.unsqueeze(0))
            x = x + _product(mixed[0].transpose(0, 1).reshape(-1, width), self.mix)
            x = x + _product(F.gelu(_product(_normed(x), self.up)), self.down)
            gating, proposals = _product(_normed(x), self.enter).tensor_split((2 * width,), 1)
            reset, keep = torch.addmm(gating, state, self.turn).sigmoid_().chunk(2, 1)
            proposals = torch.addmm(proposals, reset * state, self.propose).tanh_()
            state = torch.lerp(torch.bmm(gates, proposals.view(*gates.shape[::2], width)).squeeze(1), state, keep)
            said = _product(_normed(state), self.say)
            alive = [was and more > 0 for was, more in zip(alive, said[:, -1].tolist(), strict=True)]
            if not any(alive):
                break
            roles = F.gelu(said[:, :-1].reshape(len(said) * len(ROLES), -1))
            codes = _product(roles, self.name).argmax(-1).view(-1, len(ROLES))
            for path, lives, (what, action, result) in zip(paths, alive, codes.tolist(), strict=True):
                if lives:
                    path.append((what, action, result))
            fed = self.reading[codes + self.first].sum(1)
        return paths


def _product(x: Tensor, product: Product) -> Tensor:
    return torch.addmm(product[1], x, product[0])
