"""The dream engine: a prompt's states → all paths of a dream in one pass, and which of them are worth reading.

Its parts meet at image tokens only: the generator's embeddings are quantized before the graph sees them.

Shape legend: B prompts, P prompt positions, H hidden of the backbone, S sequences (paths), T steps, D = 512,
C codes.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from distill.backbone.model import Backbone
from distill.config import DreamingConfig
from distill.dream.drafter import Drafter
from distill.dream.generator import DreamGenerator, Dreams
from distill.dream.graph_reasoner import DreamGraphReasoner, Reasoned
from distill.dream.input_tokenizer import WIDTH, Encoded, InputTokenizer, width_for
from distill.dream.output_decoder import OutputDecoder
from distill.errors import BadInput, CorruptFile, RunMismatch
from distill.mining.triplets import LENSES
from distill.run import write_atomic
from distill.tokens.chat import Dream, Triple
from distill.tokens.image_tokens import Codebook

WEIGHTS, ABOUT = "engine.safetensors", "engine.json"
FORMAT = 1


@dataclass
class Drafted:
    """One pass over B prompts: the paths, what the graph made of them, and what was known of the prompts."""

    dreams: Dreams
    reasoned: Reasoned
    encoded: Encoded


class DreamEngine(nn.Module):
    """hidden: H, of the backbone it reads. width: W; 0 is `width_for` it. Raises BadInput for a codebook without image
    tokens."""

    def __init__(self, config: DreamingConfig, hidden: int, codebook: Codebook, width: int = 0) -> None:
        super().__init__()
        self.config, self.hidden, self.width = config, hidden, width or width_for(hidden)
        self.codes, self.codebook = len(codebook), codebook_digest(codebook)
        centroids = torch.from_numpy(codebook.centroids)
        dim = centroids.shape[-1]
        self.input_tokenizer = InputTokenizer(hidden, dim, width=self.width)
        self.generator = DreamGenerator(config, centroids, dim, width=self.width)
        self.reasoner = DreamGraphReasoner(dim, hops=config.graph_reasoning_hops)
        self.decoder = OutputDecoder(dim)
        self._drafter: Drafter | None = None

    @classmethod
    def new(cls, config: DreamingConfig, hidden: int, codebook: Codebook, seed: int, width: int = 0) -> "DreamEngine":
        """Untrained, the same for the same seed; the process's own random numbers stay as they were."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(config, hidden, codebook, width)

    def forward(
        self,
        states: Tensor | None,
        real: Tensor | None,
        images: Tensor | None = None,
        guide: Tensor | None = None,
        on_step: Callable[[int, Dreams], None] | None = None,
        whole: bool = True,
    ) -> Drafted:
        """states (B, P, H) and real (B, P) of `prompt_states`; images (B, N, D). Raises BadInput as its parts do.

        guide (≤ 3,) int64: codes that each path must begin with. on_step(t, dreams so far): called step by step.
        Not whole: steps that no path lives to aren't made.
        """
        encoded = self.input_tokenizer(states, real, images)
        dreams: Dreams = self.generator(encoded, guide, on_step, whole)
        reasoned = self.reasoner(dreams.quantized(), dreams.live(), encoded.triplet)
        return Drafted(dreams, reasoned, encoded)

    def train(self, mode: bool = True) -> "DreamEngine":
        self._drafter = None  # weights are about to change, or have changed
        return super().train(mode)

    @torch.inference_mode()
    def guess(self, states: Tensor) -> list[list[Triple]]:
        """The steps of each path that it dreams of one prompt's states (1, P, H); the graph isn't asked. Once that was
        done, its weights must stay until `train` or `eval` is called."""
        if self._drafter is None or self._drafter.places.device != states.device:
            self._drafter = Drafter(self.generator)
        return self._drafter(self.input_tokenizer(states, None))

    def save(self, folder: Path) -> None:
        """Write engine.safetensors (float32) and engine.json, which names the codebook that it was trained with."""
        weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in self.state_dict().items()}
        data = save(weights, metadata={"format": "pt"})
        about = {
            "format": FORMAT,
            "config": asdict(self.config),
            "hidden": self.hidden,
            "width": self.width,
            "codes": self.codes,
            "codebook": self.codebook,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        write_atomic(folder / WEIGHTS, data)
        write_atomic(folder / ABOUT, json.dumps(about, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, codebook: Codebook, hidden: int) -> "DreamEngine":
        """What `save` wrote, for evaluation.

        Raises CorruptFile where files are missing or altered, RunMismatch where the engine was trained with another
        codebook or for a backbone of another width.
        """
        about, weights = _read(folder)
        if about["codebook"] != codebook_digest(codebook):
            raise RunMismatch(
                f"{folder / ABOUT}: the engine was trained with another codebook of {about['codes']} image tokens "
                f"(here {len(codebook)}); use the one it came with, or run `dream train --phase all` again"
            )
        if about["hidden"] != hidden:
            raise RunMismatch(
                f"{folder / ABOUT}: the engine reads a backbone of hidden size {about['hidden']}, this one has "
                f"{hidden}; use the one it came with, or run `dream train --phase all` again"
            )
        try:
            engine = cls.new(DreamingConfig(**about["config"]), hidden, codebook, 0, about.get("width", WIDTH))
            engine.load_state_dict(weights)
        except (TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise CorruptFile(f"{folder}: weights don't fit engine.json ({reason}); train the engine again") from error
        return engine.eval()

    def laid_out(self) -> "DreamEngine":
        """Itself, its matrices in memory as few rows want them: their products take up to half the time, and are
        rounded otherwise."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                part.weight.data = part.weight.data.t().contiguous().t()
        return self


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """engine.json and the weights. Raises CorruptFile."""
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        data = (folder / WEIGHTS).read_bytes()
        missing = {"format", "config", "hidden", "codes", "codebook", "sha256"} - about.keys()
        if missing:
            raise ValueError(f"no {', '.join(sorted(missing))}")
        if hashlib.sha256(data).hexdigest() != about["sha256"]:
            raise ValueError(f"{WEIGHTS} is not the one it was written with")
        return about, load(data)
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise CorruptFile(f"{folder}: not a whole dream engine ({error}); run `dream train --phase all`") from error


def codebook_digest(codebook: Codebook) -> str:
    """Hex SHA-256 of the labels and centroids: what a code means."""
    digest = hashlib.sha256(json.dumps(codebook.labels, ensure_ascii=False).encode())
    digest.update(codebook.centroids.astype("<f4").tobytes())
    return digest.hexdigest()


def drafted_dreams(drafted: Drafted, keep: bool = True, keep_above: float = 0.5) -> list[Dream]:
    """The dream of each prompt, as the backbone reads it: lens → codes, at most one path a lens.

    keep: only paths that the graph scores `keep_above` or more; otherwise the best path of every lens.
    """
    dreams, live = drafted.dreams, drafted.dreams.live()
    kept = DreamGraphReasoner.arbitrate(drafted.reasoned, live, keep_above if keep else 0.0).tolist()
    lengths: list[list[int]] = live.sum(-1).tolist()
    codes: list[list[list[list[int]]]] = dreams.codes().tolist()
    found: list[Dream] = []
    for b in range(len(codes)):
        dream: Dream = {lens: [] for lens in LENSES}
        for path, length in enumerate(lengths[b]):
            if kept[b][path]:
                steps = codes[b][path][:length]
                dream[LENSES[path % len(LENSES)]] = [(what, action, result) for what, action, result in steps]
        found.append(dream)
    return found


@torch.no_grad()
def prompt_states(backbone: Backbone, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Last hidden states (B, P, H) of prompts' ids, padded on the right, and what is real (B, P) bool.

    Raises BadInput for no prompts, an empty one, or one longer than the backbone's context.
    """
    longest, context = max(map(len, prompts), default=0), backbone.config.context
    if not prompts or not all(prompts):
        raise BadInput("prompt: is empty; the student needs at least one token to dream of")
    if longest > context:
        raise BadInput(f"prompt: {longest} tokens don't fit in a context of {context}; shorten it")
    device = backbone.cos.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    real = torch.arange(longest, device=device) < lengths[:, None]
    rows = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
    return backbone.hidden(torch.tensor(rows, device=device)).float(), real
