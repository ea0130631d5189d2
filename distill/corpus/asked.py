"""What a run's capture asks, and all that its answers depend on."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from distill.corpus.prompt_files import HUB
from distill.corpus.prompt_rows import Reading
from distill.corpus.prompts import Prompt, load_prompts
from distill.errors import DistillError
from distill.events import Listener, silent
from distill.run import Run, fingerprint_of
from distill.teacher.find_weights import wants_teacher
from distill.teacher.thinking import thinking_asked

NOT_ASKED = ("dataset", "gathered", "answers", "turns")
"""Settings that change no question, or are in the texts."""


def prompts_of(run: Run, listen: Listener = silent) -> list[Prompt]:
    """Raises what `load_prompts` does."""
    settings = run.settings.capture
    how = Reading(settings.answers == "given", settings.turns == "all")
    return load_prompts(settings.prompts, settings.held_out, settings.limit, listen, how)


def depends_on(run: Run, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """All that the answers to these prompts depend on."""
    settings, teacher = run.settings.capture, run.settings.teacher
    given = settings.answers == "given"
    # Whose words given answers are told in: by default those of the teacher, which is named.
    weights = {"weights": teacher.weights} if teacher.weights else {}
    words = weights if wants_teacher(run.settings) else {"words": "own"}
    return {
        **{key: value for key, value in asdict(settings).items() if not key.startswith(NOT_ASKED)},
        # What doesn't fit the context is refused or cut; everything else is answered as in any other.
        "teacher": {
            "model": teacher.model,
            **({"context": teacher.context} if teacher.context else {}),
            # With them an OpenAI server's tokens can be told.
            **({"weights": True} if teacher.weights and teacher.model.startswith("openai:") else {}),
            **(words if given else {}),
            **thinking_asked(teacher),
        },
        "seed": run.settings.seed,
        "texts": _texts(prompts, given),
    }


def _texts(prompts: Sequence[Prompt], given: bool) -> str:
    return fingerprint_of([p.text, p.held_out, *([p.answer] if given else [])] for p in prompts)


def changed(run: Run) -> list[str]:
    """Why a finished capture would ask anew that `Run.stale` can't tell: the content of files. Empty where they are as
    they were, lie on a hub or can't be read."""
    settings, record = run.settings.capture, run.records().get("capture")
    if record is None or settings.gathered:
        return []
    with suppress(DistillError):
        if settings.dataset and (before := record.settings.get("digest")):
            from distill.corpus.datasets.stage import info

            return ["the dataset changed"] if info(run).digest != before else []
        known = None if any(name.startswith(HUB) for name in settings.prompts) else record.settings.get("texts")
        if known and _texts(prompts_of(run), settings.answers == "given") != known:
            return ["the prompts changed"]
    return []
