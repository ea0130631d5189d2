"""What a run's student was made with, whatever its settings have become since."""

import copy
import json
from typing import Any

from distill.config import Settings
from distill.run import Run

RECORDED = {"capture": ("system",), "mine": ("steps",), "train": ("dreams", "pause", "retrieve", "retrieve_limit")}
"""Stage → its settings that a student must be asked with, too."""


def made_with(run: Run) -> Settings:
    """The run's settings, those of RECORDED as the packed data and the stages wrote them down: a command that would
    have made another student may have been stopped, and has no record then."""
    settings, records = copy.deepcopy(run.settings), run.records()
    packed = _packed(run)
    for stage, names in RECORDED.items():
        recorded = (records[stage].settings if stage in records else {}) | (packed if stage != "train" else {})
        for name in recorded.keys() & names:
            setattr(getattr(settings, stage), name, recorded[name])
    return settings


def taught_to_dream(settings: Settings) -> bool:
    """Whether a student of these settings dreams; pauses are no dreams."""
    return settings.train.dreams and not settings.train.pause


def _packed(run: Run) -> dict[str, Any]:
    """Of the data that is there, or nothing."""
    try:
        return json.loads((run.data / "data.json").read_text(encoding="utf-8")).get("made", {})
    except (OSError, ValueError):
        return {}
