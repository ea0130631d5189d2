"""What a target was trained on, and how its training went: from the run that it came out of."""

import json
from typing import Any

from distill.evaluation.examination.targets import Target
from distill.evaluation.provenance import changed_settings

SHOWN = ("step", "tokens", "loss", "validation_loss", "validation_bits_per_byte")
MOST = 400
"""Points of a learning curve at most."""


def trained_on(target: Target) -> dict[str, Any] | None:
    """Teacher, data, tokens and settings of a training; None where the target says nothing of it."""
    run = target.run
    if run is None:
        return _of_bundle(target) if target.kind == "bundle" else None
    records = run.records()
    capture, train = (records[stage].summary if stage in records else {} for stage in ("capture", "train"))
    counted = run.data / "data.json"
    data: dict[str, Any] = json.loads(counted.read_text()) if counted.is_file() else {}
    documents: dict[str, Any] = data.get("counts", {}).get("train", {})
    return {
        "teacher": run.settings.source,
        "answers": documents.get("documents") or capture.get("responses", 0) - capture.get("held_out", 0) or None,
        "answer_tokens": documents.get("answer_tokens"),
        "tokens": train.get("tokens"),
        "steps": train.get("steps"),
        "epochs": train.get("epochs"),
        "seconds": records["train"].seconds if "train" in records else None,
        "numerics": train.get("numerics"),
        "parameters": train.get("parameters"),
        "settings": changed_settings(run.settings),
        "data": str(data.get("fingerprint", ""))[:16] or None,
    }


def _of_bundle(target: Target) -> dict[str, Any] | None:
    assert target.path is not None
    content: dict[str, Any] = json.loads((target.path / "bundle.json").read_text(encoding="utf-8"))
    provenance: dict[str, Any] = content.get("provenance") or {}
    if not provenance:
        return None
    teacher = provenance.get("teacher")
    name = teacher.get("name") if isinstance(teacher, dict) else teacher
    return {"teacher": name, "settings": {}, "data": None, "tokens": None, "answers": None}


def curve(target: Target) -> dict[str, Any]:
    """The training's metrics.jsonl, thinned to at most MOST points; those with a validation are kept."""
    points: list[dict[str, Any]] = []
    run = target.run
    if run is not None and run.metrics.is_file():
        for line in run.metrics.read_text(encoding="utf-8").splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue  # cut short by a kill; training writes it again
            points.append({name: value.get(name) for name in SHOWN})
    every = max(1, -(-len(points) // MOST))
    kept = [p for i, p in enumerate(points) if i % every == 0 or p["validation_bits_per_byte"] is not None]
    return {"target": target.name, "points": kept}
