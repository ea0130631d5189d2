"""A run with a real teacher's traces and a student trained for a moment: enough to be evaluated."""

from pathlib import Path

from support.shared import made_once
from support.small_capture import tokenized_small

from distill.config import EvaluateSettings, Settings, StudentSettings, TrainSettings
from distill.run import Run
from distill.training.loop import train

STEPS = 24


def trained_run(folder: Path) -> Run:
    """The small capture, mined, tokenized, and a tiny student trained on it."""
    return Run.open(made_once("trained", _train, folder))


def _train(folder: Path) -> None:
    source = tokenized_small(folder)
    settings = Settings(
        teacher=source.settings.teacher,
        capture=source.settings.capture,
        tokenize=source.settings.tokenize,
        student=StudentSettings(hidden=64, layers=2, heads=4, kv_heads=2, ffn=128, context=384),
        train=TrainSettings(
            steps=STEPS,
            warmup=0.2,
            batch_rows=2,
            lr=4e-3,
            checkpoint_every=12,
            validate_every=12,
            drafts_from=1.0,
            strict=0.0,  # so few steps learn words or form, not both
            noise=0.0,
            precision="float32",
            compile="never",
        ),
        evaluate=EvaluateSettings(dreams=2, max_tokens=24, bootstrap=200),
    )
    train(Run.create(folder, settings))
