"""A small causal world, tokenized and ready to be trained on for a moment: no teacher is asked."""

from pathlib import Path

import pytest
from support.shared import made_once

from distill.config import (
    CaptureSettings,
    DreamingConfig,
    EvaluateSettings,
    Settings,
    StudentSettings,
    TokenizeSettings,
    TrainSettings,
)
from distill.corpus.capture import capture
from distill.corpus.datasets import stage
from distill.knowledge.mine import mine
from distill.run import Run
from distill.tokens.build import build_tokenizer

STEPS = 6


def small_world(folder: Path) -> Run:
    """40 questions to train on and 8 of each split held out."""
    return Run.open(made_once("world", _make, folder))


def _make(folder: Path) -> None:
    settings = Settings(
        capture=CaptureSettings(dataset="causal-world", dataset_size=40),
        tokenize=TokenizeSettings(vocab_size=512, image_tokens=80),
        student=StudentSettings(hidden=32, layers=1, heads=2, kv_heads=1, ffn=64, context=256),
        train=TrainSettings(
            steps=STEPS,
            warmup=0.2,
            batch_rows=2,
            lr=4e-3,
            checkpoint_every=STEPS,
            validate_every=STEPS,
            drafts_from=1.0,
            precision="float32",
            compile="never",
        ),
        dreaming=DreamingConfig(input_steps=1, dream_steps=1, end_steps=1, batch=4),
        evaluate=EvaluateSettings(prompts=12, dreams=0, max_tokens=12, bootstrap=200),
    )
    run = Run.create(folder, settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "HELD_OUT", 8)
        capture(run)
        mine(run)
    build_tokenizer(run)
