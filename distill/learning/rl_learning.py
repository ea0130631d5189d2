"""Learning while it answers: which known triplet three pictures show, from being told what they do.

Shape legend: B triplets of pictures, S known triplets, D numbers of an embedding.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.dream.policy import PolicyNetwork
from distill.errors import BadInput
from distill.learning.continuous_learning import Grows, Label, told
from distill.learning.reward_model import RewardModel
from distill.vision.vision_encoder import TripletEncoder

SHARP = 10.0
"""Of the softmax over cosines that an untrained policy walks by."""


class RLContinuousLearner:
    """Walks one edge, a known triplet, from where three pictures lie; the policy draws which. Told what they show, it
    learns by REINFORCE with the policy's value network as the baseline, the reward model learns what walks come to, and
    the graph grows. graph_rag: whatever has an `add` of triplets; None: no graph. seed: of the draws.
    """

    def __init__(
        self,
        encoder: TripletEncoder,
        graph_rag: Grows | None = None,
        reward_model: RewardModel | None = None,
        policy_network: PolicyNetwork | None = None,
        *,
        lr: float = 1e-2,
        seed: int = 0,
    ) -> None:
        dim = encoder.vision.dim
        self.encoder, self.graph_rag = encoder.eval(), graph_rag
        self.reward_model = (reward_model or RewardModel(2 * dim)).to(encoder.role.device)
        self.policy_network = (policy_network or PolicyNetwork(dim)).to(encoder.role.device)
        learns = [*self.reward_model.parameters(), *self.policy_network.parameters()]
        self.optimizer = torch.optim.AdamW(learns, lr, weight_decay=0.0)
        self.known: dict[Label, Tensor] = {}
        """Triplet → the sum of the embeddings that it was shown by."""
        self._draw = torch.Generator().manual_seed(seed)

    def online_inference_with_learning(
        self, what_images: Any, action_images: Any, result_images: Any, ground_truth_label: Any = None
    ) -> tuple[Any, dict[str, float]]:
        """What pictures (B, 3, H, W) show, as far as it knows: (what, action, result), a list of them for several; None
        before it was told of any. ground_truth_label: what they do show, of each if there are several.

        metrics: final_reward, the share of the three that are right (what the reward model expects, where the truth
        isn't told); policy_loss and value_loss, 0 where there was nothing to learn. Raises BadInput for other labels.
        """
        with torch.no_grad():
            states = self.encoder(what_images, action_images, result_images)
        truths = None if ground_truth_label is None else _labels(ground_truth_label, len(states))
        found: list[Label | None] = [None] * len(states)
        metrics: dict[str, float] = dict.fromkeys(("final_reward", "policy_loss", "value_loss"), 0.0)
        if self.known:
            paths = F.normalize(torch.stack([*self.known.values()]), dim=-1).expand(len(states), -1, -1)
            prior = SHARP * (paths @ states[..., None])[..., 0]
            nats = self.policy_network(states, paths, prior).log_softmax(-1)
            chosen = torch.multinomial(nats.detach().exp().cpu(), 1, generator=self._draw).to(states.device)
            found = [[*self.known][walked] for walked in chosen[:, 0].tolist()]
            walks = torch.cat([states, paths.gather(1, chosen[..., None].expand(-1, -1, states.shape[-1]))[:, 0]], -1)
            expected = self.reward_model(walks)
            metrics["final_reward"] = float(expected.detach().sigmoid().mean())
            if truths is not None:
                metrics = self._learn(states, nats.gather(1, chosen)[:, 0], expected, _shares(found, truths))
        for state, truth in zip(states, truths or (), strict=bool(truths)):
            self.known[truth] = self.known.get(truth, torch.zeros_like(state)) + state
        if truths and self.graph_rag is not None:
            self.graph_rag.add(told(truths))
        return found[0] if len(found) == 1 else found, metrics

    def _learn(self, states: Tensor, nats: Tensor, expected: Tensor, right: Sequence[float]) -> dict[str, float]:
        rewards = torch.tensor(right, device=states.device)
        policy, error = self.policy_network.reinforce(states, -nats, rewards)
        (policy + error + F.binary_cross_entropy_with_logits(expected, rewards)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        metrics = {"final_reward": rewards.mean(), "policy_loss": policy, "value_loss": error}
        return {name: float(one.detach()) for name, one in metrics.items()}


def _labels(given: Any, count: int) -> list[Label]:
    """Of each of the pictures; one for all may stand alone."""
    listed: list[Any] = [given] if len(given) == 3 and all(isinstance(one, str) for one in given) else [*given]
    if len(listed) != count or not all(len(one) == 3 and all(isinstance(word, str) for word in one) for one in listed):
        raise BadInput(f"ground_truth_label: {given!r} is no (what, action, result) for each of {count} triplets")
    return [tuple(one) for one in listed]


def _shares(found: Sequence[Label | None], truths: Sequence[Label]) -> list[float]:
    return [
        sum(a == b for a, b in zip(one or (), truth, strict=False)) / 3
        for one, truth in zip(found, truths, strict=True)
    ]
