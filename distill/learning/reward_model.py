"""A reward learned from pairs: which of two answers people prefer.

Bradley and Terry's model (Biometrika 39, 1952): the better answer wins with probability σ(r(better) − r(worse)). r is
a linear head on the student's hidden states of an answer, their mean over its tokens and the last one. The backbone
stays as it is, so the fit is a logistic regression; how much it is held back (L2), cross-validation decides.

Shape legend: n pairs, H hidden, W = 2 H features.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.backbone.generate import states_before
from distill.backbone.model import Backbone
from distill.errors import BadInput, CorruptFile
from distill.events import Event, Listener, silent
from distill.learning.feedback import FEEDBACK, answer_ids, read_feedback
from distill.run import publish_folder
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import prompt_ids, render, think_block
from distill.written import whole

WEIGHTS, ABOUT = "reward.safetensors", "reward.json"
FOLDS = 5
LEAST = 10
"""Different prompts that pairs are learned from, at least."""
STRENGTHS = np.logspace(-4, 2, 7)
"""Inverse strengths of L2 to choose from, features scaled to a deviation of 1."""
BINS = 10

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """Two answers to a question (ids, up to where a reply begins)."""

    question: list[int]
    better: list[int]
    worse: list[int]


class RewardModel(nn.Module):
    """(…, W) features of answers → (…) rewards. width: W, twice the hidden size of the student that reads them."""

    def __init__(self, width: int = 1024) -> None:
        super().__init__()
        self.head = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features)[..., 0]

    def fit(self, better: Floats, worse: Floats, prompts: Sequence[int]) -> Floats:
        """Learn from the features (n, W) of both sides. prompts (n,): pairs of one prompt share a number, and are held
        out together. Returns (n,) chances that the better one is preferred, of heads that never saw its prompt."""
        from sklearn.model_selection import GroupKFold

        scale = np.concatenate([better, worse]).std(0) + 1e-6
        apart, groups = (better - worse) / scale, np.asarray(prompts)
        chances = np.zeros(len(apart))
        for learned, held in GroupKFold(FOLDS).split(apart, groups=groups):
            weights = bradley_terry(apart[learned], groups[learned])
            chances[held] = 1 / (1 + np.exp(-apart[held] @ weights))
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(bradley_terry(apart, groups) / scale)[None])
        return chances

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Publish reward.safetensors and reward.json, whole or not at all."""
        with publish_folder(folder) as aside:
            save_file({"head": self.head.weight.detach().cpu().contiguous()}, aside / WEIGHTS)
            (aside / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> tuple["RewardModel", dict[str, Any]]:
        """What `save` wrote. Raises CorruptFile."""
        try:
            weight = load_file(folder / WEIGHTS)["head"]
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            model = cls(weight.shape[1])
            model.load_state_dict({"head.weight": weight})
        except Exception as error:
            raise CorruptFile(f"{folder}: holds no reward model ({error}); delete it to learn one again") from error
        return model, about


def bradley_terry(apart: Floats, groups: NDArray[Any]) -> Floats:
    """(W,) of r from differences of features (n, W), better less worse; the strength of L2 by cross-validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    def fit(some: Floats, strength: float) -> Floats:
        # Each pair both ways round: two classes, and nothing for an intercept to find.
        both, labels = np.concatenate([some, -some]), np.repeat([1, 0], len(some))
        return LogisticRegression(C=strength, fit_intercept=False, max_iter=1000).fit(both, labels).coef_[0]

    folds = list(GroupKFold(FOLDS).split(apart, groups=groups))
    losses = [
        sum(np.logaddexp(0, -apart[held] @ fit(apart[learned], strength)).sum() for learned, held in folds)
        for strength in STRENGTHS
    ]
    return fit(apart, STRENGTHS[int(np.argmin(losses))])


def answer_features(model: Backbone, questions: Sequence[list[int]], answers: Sequence[list[int]]) -> Tensor:
    """(n, W) of answers after their questions, read as after no dream."""
    found = torch.zeros(len(answers), 2 * model.config.hidden, device=model.cos.device)
    # With one token more to predict, the states of the last one are among them; the first ones are of the question.
    for some, hidden in states_before(model, questions, [[*answer, 0] for answer in answers]):
        for i, states in zip(some, hidden.float().split([len(answers[i]) + 1 for i in some]), strict=True):
            said = states[1:] if len(states) > 1 else states
            found[i] = torch.cat([said.mean(0), said[-1]])
    return found


def calibration_error(chances: Floats) -> float:
    """Expected calibration error of the chances of the better answers: |how often right − how sure|, averaged over ten
    bins of sureness between ½ and 1 by what is in them (arXiv:1706.04599)."""
    sure, right = np.maximum(chances, 1 - chances), chances > 0.5
    bins = np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)
    return sum(abs(float((right - sure)[bins == one].sum())) for one in range(BINS)) / len(chances)


def read_pairs(
    path: Path, tokenizer: StudentTokenizer, system: str, context: int, listen: Listener = silent
) -> list[Pair]:
    """Of a file of lines {"prompt", "better", "worse"}, or of what was said in chats: /better makes a pair, and so do a
    good and a bad answer to the same question. What doesn't fit the context is left out, which
    is said.

    Raises BadInput, naming file and line.
    """
    none = think_block(tokenizer, [])
    found = (_of_chats if path.name == FEEDBACK else _of_file)(path, tokenizer, system)
    pairs = [Pair([*question, *none], *both) for question, *both in found]
    pairs = [pair for pair in pairs if len(pair.question) + max(len(pair.better), len(pair.worse)) < context]
    if left_out := len(found) - len(pairs):
        listen(Event("reward", "warning", f"{left_out} pairs don't fit the context of {context} tokens: left out"))
    if (count := len({tuple(pair.question) for pair in pairs})) < LEAST:
        text = f"{count} prompts with a better and a worse answer that fit the student's context"
        raise BadInput(f"{path}: {text}; a reward model needs at least {LEAST}")
    return pairs


def _of_chats(path: Path, tokenizer: StudentTokenizer, _system: str) -> list[tuple[list[int], list[int], list[int]]]:
    thumbs: dict[str, dict[str, list[tuple[str, bool]]]] = {}
    for line in read_feedback(path):
        said = thumbs.setdefault(render(line.messages), {"good": [], "bad": [], "better": []})
        said[line.verdict].append((line.better, False) if line.verdict == "better" else (line.answer, line.cut))
        if line.verdict == "better":
            said["bad"].append((line.answer, line.cut))
    return [
        (tokenizer.encode(question, special=True), answer_ids(tokenizer, *better), answer_ids(tokenizer, *worse))
        for question, said in thumbs.items()
        for better, worse in product([*said["good"], *said["better"]], said["bad"])
        if better[0].strip() != worse[0].strip()
    ]


def _of_file(path: Path, tokenizer: StudentTokenizer, system: str) -> list[tuple[list[int], list[int], list[int]]]:
    found: list[tuple[list[int], list[int], list[int]]] = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                texts = [json.loads(line)[name] for name in ("prompt", "better", "worse")]
                if not all(isinstance(text, str) for text in texts):
                    raise ValueError("all three are text")
                texts = [whole(text) for text in texts]
            except (ValueError, TypeError, KeyError) as error:
                raise BadInput(f'{path}:{number}: is no {{"prompt", "better", "worse"}} ({error})') from error
            better, worse = (answer_ids(tokenizer, text) for text in texts[1:])
            found.append((prompt_ids(tokenizer, texts[0], system=system), better, worse))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: can't be read: {error}") from error
    return found
