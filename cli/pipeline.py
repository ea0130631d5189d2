"""All stages in order, and what is shown at the end."""

import json
import time
from collections.abc import Callable
from typing import Any

from cli.output import table
from cli.progress import Progress, duration
from cli.stages import STAGES, headline, run_stage
from distill.run import Run


def run_all(run: Run, force: bool, quiet: bool, say: Callable[[str], Any] | None) -> dict[str, Any]:
    """Every stage, then the bundle's verification. Returns what each left, as JSON."""
    from bundle.verify import verify

    started = time.monotonic()
    stages: dict[str, Any] = {}
    with Progress(quiet) as listen:
        for stage in STAGES:
            result = run_stage(run, stage, force, listen)
            stages[stage] = vars(result)
            if say:
                say(headline(result))
        # An export has just verified what it published; a bundle of old may have been altered since.
        verified = verify(run.bundle, listen) if stages["export"]["skipped"] else None
    if say and verified:
        say(f"verify: {verified.summary}")
    return {
        "run": str(run.path),
        "stages": stages,
        "verified": verified.ok if verified else True,
        "bundle": str(run.bundle),
        "seconds": round(time.monotonic() - started, 1),
    }


def report(run: Run) -> str:
    """A held-out question with the student's dream and answer, the evaluation, and what to do next."""
    from distill.evaluation.report import headline as evaluation_headline
    from distill.evaluation.report import table_rows

    results = json.loads((run.evaluation / "results.json").read_text())
    lines = (run.evaluation / "samples.jsonl").read_text().splitlines()
    heading, *rows = table_rows(results)
    seconds = sum(record.seconds for record in run.records().values())
    return "\n".join(
        [
            "",
            *example([json.loads(line) for line in lines]),
            "",
            table(rows, heading),
            "",
            evaluation_headline(results),
            f"Bundle: {run.bundle} (all stages took {duration(seconds)})",
            f"Next:   dream chat {run.path}",
            f"        dream install {run.path} && ollama run {run.name}",
        ]
    )


def example(samples: list[dict[str, Any]]) -> list[str]:
    """The first held-out question whose answer came with a dream, else the first."""
    if not samples:
        return []
    sample = next((sample for sample in samples if sample["systems"]["student"].get("dream")), samples[0])
    student = sample["systems"]["student"]
    lines = [f"Question, never trained on:  {sample['prompt']}"]
    if student.get("dream"):
        lines.append(f"Dream:   {' '.join(student['dream'].split())}")
    return [*lines, f"Answer:  {' '.join(student.get('answer', '').split())}"]
