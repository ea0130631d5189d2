"""Whether a teacher thinks before it answers: what is asked for, and what the model can do."""

from typing import Any

from distill.config import TeacherSettings
from distill.errors import BadInput
from distill.teacher.protocol import TeacherInfo

LEVELS = ("low", "medium", "high")
CHOICES = ("auto", "true", "false", *LEVELS)


def check_thinking(settings: TeacherSettings) -> None:
    """Raises BadInput for a setting that is none."""
    if settings.think not in CHOICES:
        raise BadInput(f"teacher.think={settings.think}: is none of {', '.join(CHOICES)}")


def thinking_asked(settings: TeacherSettings) -> dict[str, Any]:
    """What is asked for, where it isn't the default."""
    default = TeacherSettings()
    names = ("think", "thinking_tokens")
    return {name: getattr(settings, name) for name in names if getattr(settings, name) != getattr(default, name)}


def how_to_think(settings: TeacherSettings, info: TeacherInfo) -> str:
    """`GenerateOptions.think` for a model. Raises BadInput where it can't think and is to."""
    if settings.think == "false" or (settings.think == "auto" and not info.can_think):
        return ""
    if not info.can_think:
        raise BadInput(f"teacher.think={settings.think}: {info.spec} can't think; leave it at auto")
    return "true" if settings.think == "auto" else settings.think
