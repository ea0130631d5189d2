"""What values settings may have, where no stage checks them soon enough."""

from operator import attrgetter
from typing import Any

from distill.config import TokenizeSettings
from distill.errors import BadInput

AT_LEAST_0 = """teacher.context teacher.threads teacher.timeout teacher.retries teacher.in_flight mine.minutes
    mine.processes mine.graph_nodes train.minutes redream.prior redream.minutes polish.minutes polish.lr
    polish.temperature evaluate.prompts evaluate.dreams evaluate.temperature export.temperature export.context
    vision.embedding_dim vision.image_size see.steps"""
AT_LEAST_1 = """teacher.thinking_tokens mine.steps train.steps train.retrieve_limit redream.samples polish.answers
    evaluate.max_tokens evaluate.bootstrap vision.patch_size see.image_size"""
LEAST = dict.fromkeys(AT_LEAST_0.split(), 0) | dict.fromkeys(AT_LEAST_1.split(), 1)
"""The smallest value of settings whose stage comes late, or has no place to check them."""
CHOICES = {
    "mine.miner": ("syntax", "teacher"),
    "mine.choose": ("rarity", "likelihood", "all"),
    "tokenize.kind": ("auto", "aligned", "sentencepiece"),
    "student.image_rows": ("apart", "label", "untied"),
    "train.retrieve": ("", "neighbourhood", "walk", "sample", "attention"),
    "export.dtype": ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
}
"""What settings of late stages may be."""


def check_ranges(settings: Any) -> None:
    """Raises BadInput for what of the tree of settings is below LEAST, none of CHOICES, or no probability."""
    for name, least in LEAST.items():
        if (value := attrgetter(name)(settings)) < least:
            raise BadInput(f"{name}={value}: must be at least {least}")
    for name in CHOICES:
        check_choice(name, attrgetter(name)(settings))
    if not 0 < (sure := settings.dreaming.sure) <= 1:
        raise BadInput(f"dreaming.sure={sure}: must be above 0, and 1 at most")
    if sorted(lenses := settings.tokenize.lenses) != sorted(every := TokenizeSettings().lenses):
        raise BadInput(f"tokenize.lenses={lenses}: must be {', '.join(every)}, each once, in the order that you want")


def check_choice(name: str, value: str) -> None:
    """Raises BadInput for what a setting can't be."""
    if value not in CHOICES[name]:
        none = ", or '' for none" if "" in CHOICES[name] else ""
        raise BadInput(f"{name}={value}: choose one of {', '.join(filter(None, CHOICES[name]))}{none}")
