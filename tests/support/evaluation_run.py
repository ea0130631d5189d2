"""A run with a real teacher's traces and a student trained for a moment: enough to be evaluated."""

from pathlib import Path

from support.shared import made_once

from distill.config import EvaluateSettings, Settings, StudentSettings, TokenizeSettings, TrainSettings
from distill.exam.baselines import copy_file
from distill.knowledge.mine import mine
from distill.run import Run
from distill.tokens.build import build_tokenizer
from distill.training.loop import train

STEPS = 24


def trained_run(source: Run, folder: Path) -> Run:
    """The traces of `source` (captured already), mined, tokenized, and a tiny student trained on them."""
    return Run.open(made_once("trained", lambda kept: _train(source, kept), folder))


def _train(source: Run, folder: Path) -> None:
    settings = Settings(
        teacher=source.settings.teacher,
        capture=source.settings.capture,
        tokenize=TokenizeSettings(vocab_size=1024, image_tokens=24),
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
    run = Run.create(folder, settings)
    copy_file(source.traces, run.traces)
    copy_file(source.path / "run.json", folder / "run.json")
    mine(run)
    build_tokenizer(run)
    train(run)
