"""A small student that learned one dream and one answer, with a byte vocabulary, a codebook and an engine."""

import tempfile
from functools import cache
from pathlib import Path

import torch
from support.shared import made_once
from support.small_student import dreaming_model

from distill.backbone.model import Backbone, load_backbone, save_backbone
from distill.config import DreamingConfig
from distill.dream.engine import DreamEngine
from distill.dream.starter import starter_codebook, starter_tokenizer
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.image_tokens import Codebook

PROMPTS = ("Drop a ball?", "Why is it wet?")


@cache
def parts() -> tuple[Backbone, StudentTokenizer, Codebook]:
    """Trained to dream `small_student.DREAM` and to answer `small_student.ANSWER`. Shared: don't alter them."""
    codebook = starter_codebook()
    tokenizer = starter_tokenizer(codebook.labels)

    def make(folder: Path) -> None:
        folder.mkdir()
        save_backbone(dreaming_model(tokenizer, PROMPTS, steps=120), folder)

    with tempfile.TemporaryDirectory() as folder:
        model = load_backbone(made_once("dreaming", make, Path(folder) / "model"))
    return model.eval(), tokenizer, codebook


def engine(seed: int = 0, config: DreamingConfig | None = None) -> DreamEngine:
    """Untrained, but for this: all paths have all of their steps."""
    backbone, _, codebook = parts()
    made = DreamEngine.new(config or DreamingConfig(), backbone.config.hidden, codebook, seed).eval()
    with torch.no_grad():
        made.generator.more.bias.fill_(5.0)
    return made
