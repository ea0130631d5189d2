"""What a run folder holds, read without any heavy import."""

from typing import Any

from cli.output import command_line, facts, table
from cli.progress import duration, shown
from cli.stages import ASKED_FOR, stages_of
from distill.run import COMMANDS, UPSTREAM, Run

HEADLINES: dict[str, tuple[str, ...]] = {
    "capture": ("responses", "held_out", "tokens", "bytes_per_token"),
    "mine": ("triplets", "yield", "grounding"),
    "tokenize": ("kind", "vocab_size", "image_tokens"),
    "train": ("steps", "tokens", "parameters", "validation_loss", "tokens_per_second"),
    "engine": ("skipped", "prompts", "parameters", "code_accuracy", "exact_dreams", "kept_share"),
    "evaluate": ("bits_per_byte_at_start", "bits_per_byte", "kl", "agreement"),
    "export": ("dtype", "bytes", "identical", "prompts", "largest_difference"),
}
"""Entries of a stage's summary that say the most of it."""


def overview(run: Run) -> dict[str, Any]:
    """Stages, traces, checkpoints and bundle of a run, as JSON."""
    from distill.corpus.asked import changed

    records = run.records()
    stages: dict[str, Any] = {}
    for stage in sorted({*stages_of(run), *(ASKED_FOR.keys() & records.keys())}, key=[*UPSTREAM].index):
        if stage not in records:
            stages[stage] = {"state": "missing"}
            continue
        record = records[stage]
        reasons = run.stale(stage) or (changed(run) if stage == "capture" else [])
        if not reasons and any(stages.get(earlier, {}).get("state") == "stale" for earlier in UPSTREAM[stage]):
            reasons = ["an earlier stage is stale"]
        stages[stage] = {
            "state": "stale" if reasons else "done",
            "why": reasons,
            "finished": record.finished,
            "seconds": record.seconds,
            "summary": record.summary,
        }
    return {
        "run": str(run.path),
        "teacher": run.settings.source,
        "stages": stages,
        "traces": _traces(run),
        "checkpoints": _checkpoints(run),
        "bundle": str(run.bundle) if (run.bundle / "bundle.json").exists() else None,
    }


def _traces(run: Run) -> dict[str, Any] | None:
    if not run.traces.exists():
        return None
    from dataclasses import asdict

    from distill.corpus.traces import TraceStore

    with TraceStore(run.traces, readonly=True) as store:
        return asdict(store.stats(whole=run.settings.capture.gathered))


def _checkpoints(run: Run) -> list[dict[str, Any]]:
    return [
        {"name": path.name, "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file())}
        for path in sorted(run.checkpoints.glob("step-*"))
    ]


def counts(stage: str, summary: dict[str, Any]) -> str:
    """The few entries of a summary that fit on a line."""
    wanted = {key: summary[key] for key in HEADLINES.get(stage, ()) if key in summary}
    return ", ".join(f"{name} {value}" for name, value in (facts(wanted) or facts(summary))[:5])


def render(found: dict[str, Any]) -> str:
    """`overview` for people."""
    lines = [f"{found['run']}  (teacher {found['teacher']})", ""]
    rows: list[tuple[str, ...]] = []
    for stage, state in found["stages"].items():
        if state["state"] == "missing":
            rows.append((stage, "missing", "", "", command_line(COMMANDS.get(stage, stage), found["run"])))
            continue
        what = "; ".join(state["why"]) or counts(stage, state["summary"])
        rows.append((stage, state["state"], state["finished"], duration(state["seconds"]), what))
    lines.append(table(rows, ("stage", "state", "finished", "took", "")))
    if traces := found["traces"]:
        lines.append(
            f"\ntraces: {shown(traces['responses'])} responses ({shown(traces['held_out'])} held out) to "
            f"{shown(traces['prompts'])} prompts, {shown(traces['tokens'])} tokens, "
            f"{traces['bytes_per_token']:.1f} bytes a token"
        )
    if found["checkpoints"]:
        names = ", ".join(f"{entry['name']} ({entry['bytes'] / 2**20:.0f} MiB)" for entry in found["checkpoints"])
        lines.append(f"checkpoints: {names}")
    if found["bundle"]:
        lines.append(f"bundle: {found['bundle']}")
    return "\n".join(lines)
