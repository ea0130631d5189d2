"""What a run's student was made with, whatever its settings have become since."""

import copy

from distill.config import Settings
from distill.run import Run

RECORDED = {"capture": ("system",), "mine": ("steps",), "train": ("dreams", "pause", "retrieve", "retrieve_limit")}
"""Stage → its settings that a student must be asked with, too."""


def made_with(run: Run) -> Settings:
    """The run's settings, those of RECORDED as the stages wrote them down: a command that would have made another
    student may have been stopped."""
    settings, records = copy.deepcopy(run.settings), run.records()
    for stage, names in RECORDED.items():
        recorded = records[stage].settings if stage in records else {}
        for name in recorded.keys() & names:
            setattr(getattr(settings, stage), name, recorded[name])
    return settings
