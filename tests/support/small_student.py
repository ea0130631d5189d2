"""A small student with random weights and a real tokenizer: enough to package, load and talk to."""

import copy
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from distill.backbone.model import Backbone, BackboneConfig, save_backbone
from distill.teacher.gguf_tokenizer import read_tokenizer
from distill.tokens.aligned import CHAT_WORDS, AlignedCut
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import prompt_ids

TEXTS = (
    "What happens when you drop a ball?",
    "The ball falls to the floor because of gravity, bounces twice, and then settles.",
    "How do plants grow in the garden? They take water and light, and slowly their leaves unfold.",
    "If it rains all night, the street is wet in the morning. Café, naïve, 12 + 30 = 42!",
)

LABELS = ("a ball", "release", "falls to the floor", "the rain", "wets", "the street", "a plant", "grows", "naïve")


@cache
def whole(teacher: Path) -> AlignedCut:
    """A GGUF's vocabulary, read once; don't alter what it keeps."""
    return AlignedCut(read_tokenizer(teacher))


def small_tokenizer(teacher: Path, texts: Sequence[str] = TEXTS, labels: Sequence[str] = LABELS) -> StudentTokenizer:
    """SmolLM2's tokenizer (a GGUF), cut down to `texts`."""
    cut = copy.copy(whole(teacher))
    cut.kept = {*cut.kept}
    cut.keep_text([*texts, *CHAT_WORDS])
    return cut.build(labels)


def small_model(tokenizer: StudentTokenizer, seed: int = 0, **sizes: int) -> Backbone:
    """Random weights, larger than at the start of a training, so that what it says varies."""
    config = BackboneConfig(
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id,
        **{"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 160, "context": 256, **sizes},
    )
    return enlarge(Backbone(config).initialize(seed)).eval()


@torch.no_grad()
def enlarge(model: Backbone, factor: float = 8.0) -> Backbone:
    """Scale matrices up and shake the norms, so that attention and every norm matter to the result."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.mul_(factor if "embed" not in name else 1.0)
        else:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


DREAM = "⟨spatial⟩⟨a ball⟩⟨release⟩⟨falls to the floor⟩⟨temporal⟩⟨causal⟩⟨abstract⟩"
ANSWER = "The ball falls to the floor."


def dreaming_model(tokenizer: StudentTokenizer, prompts: Sequence[str], steps: int = 150) -> Backbone:
    """A model that learned to dream DREAM before it says ANSWER, and to say it at once where it shall not think."""
    torch.manual_seed(0)
    ends = {True: f"<think>\n{DREAM}\n</think>\n{ANSWER}", False: ANSWER}
    rows = [
        (prompt_ids(tokenizer, prompt, think), [*tokenizer.encode(end, special=True), tokenizer.eos_id])
        for prompt in prompts
        for think, end in ends.items()
    ]
    ids = torch.full((len(rows), max(len(asked) + len(said) for asked, said in rows)), tokenizer.pad_id)
    targets = ids.clone()  # of what it says alone: the prompt has no loss
    for i, (asked, said) in enumerate(rows):
        ids[i, : len(asked) + len(said)] = torch.tensor(asked + said)
        targets[i, len(asked) : len(asked) + len(said)] = torch.tensor(said)
    model = small_model(tokenizer).initialize(0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        logits = model(ids[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(logits, targets[:, 1:].flatten(), ignore_index=tokenizer.pad_id)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def write_checkpoint(folder: Path, model: Backbone, tokenizer: StudentTokenizer) -> Path:
    """A folder as training leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_backbone(model, folder)
    tokenizer.save(folder / "tokenizer")
    return folder
