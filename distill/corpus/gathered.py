"""The capture stage of a run that others' questions fill (`dream gather`)."""

import time
from collections import Counter
from typing import Any

from distill.corpus.prompts import is_held_out
from distill.corpus.traces import TraceStats, TraceStore
from distill.errors import MissingStage
from distill.events import Event, Listener
from distill.run import Run, write_atomic
from distill.settings import settings_yaml


def capture_gathered(run: Run, listen: Listener, force: bool = False) -> dict[str, Any]:
    """Take what is there by now, of one system message: `capture.system`, or where it is empty what most were asked
    with, which it becomes. Returns the summary. Raises MissingStage where nothing is there."""
    started, settings = time.monotonic(), run.settings.capture
    with TraceStore(run.traces) as store:
        asked = list(store.asked())
        if not asked:
            raise MissingStage(f"{run.path}: nothing is gathered yet; talk to `dream gather --to {run.path}`")
        systems = Counter(options["system"] for _, _, options in asked)
        ((common, _),) = systems.most_common(1)
        if common and not settings.system:
            settings.system = common
            write_atomic(run.path / "config.yaml", settings_yaml(run.settings))
            listen(Event("capture", "note", f"the student gets the system message of most questions: {common[:80]!r}"))
        wanted = {
            key: is_held_out(prompt, settings.held_out)
            for key, prompt, options in asked
            if options["system"] == settings.system
        }
        if not wanted:
            raise MissingStage(f"{run.path}: nothing is gathered with capture.system={settings.system[:80]!r}")
        if store.selected() != wanted:
            run.forget("capture")
            store.select(wanted)
        if others := len(asked) - len(wanted):
            listen(Event("capture", "note", f"{others} answers were asked for with other system messages: left out"))
        stats, digest = store.stats(), store.content_digest()
    depends = {"gathered": digest, "system": settings.system, "held_out": settings.held_out}
    record = None if force else run.fresh("capture", depends)
    if record is not None:
        listen(Event("capture", "done", "nothing new was gathered", data=record.summary))
        return record.summary
    summary = {"prompts": stats.prompts, **counted(stats)}
    run.record("capture", depends, {run.traces.name: digest}, summary, time.monotonic() - started)
    listen(Event("capture", "done", data=summary))
    return summary


def counted(stats: TraceStats) -> dict[str, Any]:
    """What a stage's summary tells of answers that a teacher gave."""
    return {
        "responses": stats.responses,
        "held_out": stats.held_out,
        "tokens": stats.tokens,
        "soft_share": round(stats.soft_tokens / max(1, stats.tokens), 4),
        "done_reasons": stats.done_reasons,
        "cut_share": round(stats.done_reasons.get("length", 0) / max(1, stats.responses), 4),
    }
