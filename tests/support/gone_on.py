"""Checkpoints of stages that go on from a trained student, without their work."""

import json
import shutil
from pathlib import Path
from typing import Any

from distill.run import Run
from distill.training import checkpoint


def went_on(run: Run, stage: str, **told: Any) -> Path:
    """The best checkpoint once more, ten steps after the last and the best now. told: what it knows of the stage."""
    step = checkpoint.read_loop(checkpoint.latest(run)).step + 10
    folder = Path(shutil.copytree(checkpoint.best(run), checkpoint.folder_of(run, step)))
    loop = json.loads((folder / "loop.json").read_text(encoding="utf-8"))
    loop |= {"step": step, "best_step": step, "settings": {**loop["settings"], stage: told}}
    (folder / "loop.json").write_text(json.dumps(loop), encoding="utf-8")
    (folder / "checksums.json").unlink()
    checkpoint.write_checksums(folder)
    return folder
