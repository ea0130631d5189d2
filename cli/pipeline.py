"""All stages in order, and what is shown at the end."""

import json
import shlex
import time
from collections.abc import Callable
from typing import Any

from cli.output import command_line, install_lines, table
from cli.progress import Progress, duration
from cli.stages import StageResult, headline, run_stage, stages_of
from distill.errors import BadInput, CorruptFile, NothingHeldOut
from distill.events import Event, Listener
from distill.run import Run
from distill.turns import transcript


def run_all(run: Run, force: bool, quiet: bool, say: Callable[[str], Any] | None) -> dict[str, Any]:
    """Every stage, then the bundle's verification. Returns what each left, as JSON.

    Without a held-out answer there is no evaluation. A bundle that no longer verifies is exported again; raises
    ParityError where that doesn't help.
    """
    _check_settings(run)
    started = time.monotonic()
    stages: dict[str, Any] = {}
    with Progress(quiet) as listen:
        for stage in stages_of(run):
            try:
                result = run_stage(run, stage, force, listen)
            except NothingHeldOut as error:
                listen(Event(stage, "warning", f"skipped: {error}"))
                continue
            if stage == "export" and result.skipped:
                result = _verified(run, result, listen, say)
            stages[stage] = vars(result)
            if say:
                say(headline(result))
    return {
        "run": str(run.path),
        "stages": stages,
        "verified": True,
        "bundle": str(run.bundle),
        "seconds": round(time.monotonic() - started, 1),
    }


def _check_settings(run: Run) -> None:
    """Refuse now what a stage would refuse after hours of those before it. Raises BadInput."""
    from distill.exam.baselines import check_baselines
    from distill.teacher.find_weights import check_given
    from distill.training import plan
    from distill.training.engine import plan as engine_plan

    check_baselines(run.settings.evaluate.baselines)
    plan.check_settings(run.settings.train)
    engine_plan.check_settings(run.settings.dreaming)
    check_given(run.settings.teacher)


def _verified(run: Run, result: StageResult, listen: Listener, say: Callable[[str], Any] | None) -> StageResult:
    """An export that was up to date, once its bundle is verified: it may have been altered since."""
    from bundle.verify import verify

    try:
        report = verify(run.bundle, listen)
        ok, found = report.ok, report.summary
    except (BadInput, CorruptFile) as error:
        ok, found = False, str(error)
    if not ok:
        listen(Event("verify", "warning", f"{found}; exporting again"))
        return run_stage(run, "export", True, listen)
    if say:
        say(f"verify: {found}")
    return result


def report(run: Run, evaluated: bool = True) -> str:
    """A held-out question with the student's dream and answer, the evaluation, and what to do next."""
    seconds = sum(record.seconds for record in run.records().values())
    samples = _samples(run) if evaluated else []
    # Of a dataset's world only its own questions make sense.
    question = (
        samples[0]["prompt"] if samples and run.settings.capture.dataset else "What happens when you drop a ball?"
    )
    lines = [
        "",
        *(_measured(run, samples) if evaluated else []),
        f"Bundle: {run.bundle} (all stages took {duration(seconds)})",
        f"Next:   {command_line('chat', run.path)}",
        f"        {command_line('watch', run.path)} {shlex.quote(question)}",
        f"        {' && '.join(install_lines(run.path, run.name))}",
    ]
    return "\n".join(lines)


def _samples(run: Run) -> list[dict[str, Any]]:
    lines = (run.evaluation / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def _measured(run: Run, samples: list[dict[str, Any]]) -> list[str]:
    from distill.report.findings import fell
    from distill.report.tables import evaluation_rows

    results = json.loads((run.evaluation / "results.json").read_text(encoding="utf-8"))
    heading, *rows = evaluation_rows(results)
    return [*example(samples), "", table(rows, heading), "", fell(results)]


def example(samples: list[dict[str, Any]]) -> list[str]:
    """The first held-out question whose answer came with a dream, else the first."""
    if not samples:
        return []
    sample = next((sample for sample in samples if sample["systems"]["student"][0].get("dream")), samples[0])
    student = sample["systems"]["student"][0]
    lines = [f"Question, never trained on:  {transcript(sample['prompt'])}"]
    if student.get("dream"):
        lines.append(f"Dream:   {' '.join(student['dream'].split())}")
    return [*lines, f"Answer:  {' '.join(student.get('answer', '').split())}"]
