"""What dreaming is worth, as the tables of the docs have it, from the results of an ablation.

    python -m bench.dreams world RUN       docs/results/world.json, world-differences.json, world-dreams.json
    python -m bench.dreams inherited RUN   the same of a student that began as another model: inherited-world….json
    python -m bench.dreams students RUN…   of other students of the world, a row each: world-students.json
    python -m bench.dreams read RUN        of docs/several-answers.yaml: dreams-read-whole.json
    python -m bench.dreams own RUN         of configs/demo.yaml: dreams-own.json
    python -m bench.dreams told RUN        by how much the teacher's own answers cost less by told targets

RUN: `dream ablate RUN` went before, for `read` with --arms nodream,oracle,empty,sibling,oracle_other,oracle_shuffled,
or, for `told`, `dream train RUN --set train.told=true`.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.figures import write_table
from distill.errors import BadInput
from distill.exam.questions import load_exam
from distill.run import Run
from distill.sweep.ablation.arms import ARMS
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.packing import Documents
from distill.training.told import Told, tilted

LOG = logging.getLogger(__name__)

NAMES = {
    "nodream": "no dream",
    "pause": "as many pause tokens",
    "backbone": "dreams that it decodes",
    "engine": "dreams that its engine drafts",
    "oracle": "true dreams (oracle)",
    "empty": "its own dream, left out",
    "shuffled": "its own dream, shuffled",
    "other": "another prompt's dream",
}
READ = {
    "nodream": "none, by a student trained without dreams",
    "empty": "none",
    "oracle": "its own true dream",
    "oracle_shuffled": "that, its image tokens in another order",
    "sibling": "the true dream of another answer to the prompt",
    "oracle_other": "the true dream of another prompt",
    "backbone": "a dream of the student's own, greedy",
}
SPLITS = {"combination": "unseen combinations", "depth": "five actions", "familiar": "familiar"}
BITS = "bits_per_byte_used"


def interval(told: Mapping[str, Any], scale: float = 1.0, digits: int = 1) -> list[float]:
    """Value, low and high."""
    return [round(scale * told[name], digits) for name in ("value", "low", "high")]


class Ablated:
    """What an ablation found: systems[arm][metric] and differences[arm, against][metric], each with its interval."""

    def __init__(self, run: Run) -> None:
        results = run.path / "ablation" / "results.json"
        if not results.exists():
            raise BadInput(f"{results}: isn't there; run `dream ablate {run.path}`")
        found = json.loads(results.read_text(encoding="utf-8"))
        self.systems = {arm: entry["metrics"] for arm, entry in found["systems"].items()}
        self.differences: dict[tuple[str, str], dict[str, Any]] = {}
        for each in found["differences"]:
            self.differences.setdefault((each["system"], each["against"]), {})[each["metric"]] = each
        first = next(iter(found["systems"].values()))
        seeds, trained = first["seeds"], first["trained_on"]
        self.trained_on: dict[str, Any] = trained
        self.seeds: int = seeds
        self.machine = (
            f"{os.cpu_count()} shared cores; training seeds: {seeds}; {trained['steps']:,} steps and "
            f"{trained['tokens']:,} packed tokens, {trained['parameters']:,} parameters, "
            f"{found['exam']['prompts']} prompts"
        )
        arms = ",".join(arm for arm in ARMS if arm in self.systems)
        self.command = f"dream ablate {run.name} --seeds {seeds} --steps {trained['steps']} --arms {arms}"


def world(run: Run, name: str = "world") -> None:
    found = Ablated(run)
    exact = {f"exact_match_{split}": label for split, label in SPLITS.items()} | {"exact_match": "all"}

    def table(suffix: str, first: str, columns: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        write_table(name + suffix, found.command, found.machine, {"name": {"label": first}, **columns}, rows)

    table(
        "",
        "exact match, %",
        {metric: {"label": label, "digits": 1} for metric, label in exact.items()},
        [
            {"name": label, **{metric: interval(found.systems[arm][metric], 100) for metric in exact}}
            for arm, label in NAMES.items()
            if arm in found.systems
        ],
    )
    table(
        "-differences",
        "difference",
        {metric: {"label": f"{label}, points", "digits": 1, "signed": True} for metric, label in exact.items()}
        | {BITS: {"label": "all, bits per byte", "digits": 3, "signed": True}},
        [
            {
                "name": f"{NAMES[one]} − {NAMES[other]}",
                **{metric: interval(each[metric], 100) for metric in exact},
                BITS: interval(each[BITS], digits=3),
            }
            for (one, other), each in found.differences.items()
            if one in NAMES and other in NAMES
        ],
    )
    percent = {"codes_right": "codes right, %", "dreams_right": "whole dreams right, %"}
    table(
        "-dreams",
        "dreams",
        {metric: {"label": label, "digits": 1} for metric, label in percent.items()}
        | {"tokens_dreamed": {"label": "tokens of the dream", "digits": 1}},
        [
            {
                "name": NAMES[arm],
                **{metric: interval(found.systems[arm][metric], 100) for metric in percent},
                "tokens_dreamed": interval(found.systems[arm]["tokens_dreamed"]),
            }
            for arm in ("backbone", "engine")
            if arm in found.systems
        ],
    )


def students(runs: Sequence[Run]) -> None:
    given = {"nodream": "no dream", "backbone": "decoded", "oracle": "true"}
    columns: dict[str, Any] = {
        f"{arm} {split}": {"label": f"{label}: {SPLITS[split]}, %", "digits": 1}
        for split in ("combination", "depth")
        for arm, label in given.items()
    }
    rows = list[dict[str, Any]]()
    for run in runs:
        found = Ablated(run)
        how = found.trained_on["settings"]
        row: dict[str, Any] = {
            "layers": how["student.layers"],
            "steps": found.trained_on["steps"],
            "stutter": how.get("train.stutter", 0.0),
            "seeds": found.seeds,
        }
        for key in columns:
            arm, split = key.split()
            row[key] = interval(found.systems[arm][f"exact_match_{split}"], 100)
        rows.append(row)
    first = {
        "layers": {"label": "layers", "digits": 0},
        "steps": {"label": "steps", "digits": 0},
        "stutter": {"label": "train.stutter", "digits": 1},
        "seeds": {"label": "seeds", "digits": 0},
    }
    command = "dream ablate world --arms nodream,backbone,oracle --seeds … --steps … --set student.layers=…"
    write_table("world-students", command, f"{os.cpu_count()} shared cores; 200 prompts of each", first | columns, rows)


def read(run: Run, name: str, config: str) -> None:
    found, rows = Ablated(run), list[dict[str, Any]]()
    for arm, label in READ.items():
        if arm not in found.systems:
            continue
        told = found.systems[arm]
        rows.append({"arm": label, "bits": interval(told[BITS], digits=3), "chrf": interval(told["chrf"])})
        for suffix, control in (("", "empty"), ("_dreamless", "nodream")):
            if BITS in (less := found.differences.get((arm, control), {})):
                rows[-1][f"minus{suffix}"] = interval(less[BITS], digits=4)
                rows[-1][f"share{suffix}"] = round(100 * less[BITS]["value"] / less[BITS]["other"], 1)
    asked = load_exam(run).questions
    if all(question.tokens for question in asked):
        nats = -sum(float(question.tokens.logprobs.sum(dtype=float)) for question in asked if question.tokens)
        bits = nats / math.log(2) / sum(question.bytes for question in asked)
        rows.append({"arm": "none, by the teacher itself", "bits": round(bits, 3)})
    columns = {
        "arm": {"label": "what is read before the answer"},
        "bits": {"label": "bits per byte", "digits": 3},
        "minus": {"label": "minus none's", "digits": 4, "signed": True},
        "share": {"label": "of none's, %", "digits": 1, "signed": True},
        "minus_dreamless": {"label": "minus the dreamless student's", "digits": 4, "signed": True},
        "share_dreamless": {"label": "of the dreamless student's, %", "digits": 1, "signed": True},
        "chrf": {"label": "chrF2 of greedy answers", "digits": 1},
    }
    command = f"dream run --config {config} --name {run.name}, then {found.command}"
    shown = {key: column for key, column in columns.items() if any(key in row for row in rows)}
    write_table(name, command, found.machine, shown, rows)


def told(run: Run) -> tuple[float, float]:
    """Nats a token of the training answers by their teacher, who read no dream, and by its soft targets as told."""
    documents, teller = Documents.load(run.data / "train"), Told(StudentTokenizer.load(run.tokenizer))
    sums, count = np.zeros(2), 0
    for i in range(len(documents)):
        span = documents.span(documents.answer_ends, i)
        logprobs = documents.slot_logprobs[span].astype(np.float32)
        if not np.isnan(logprobs[:, 0]).any():
            answer, slots = (ids[span].astype(np.int64) for ids in (documents.answer_ids, documents.slot_ids))
            gains = teller.gains(documents.prompt(i), documents.dream(i).tolist(), answer, slots)
            sums -= logprobs[:, 0].sum(), tilted(logprobs, gains)[:, 0].sum()
            count += len(answer)
    before, after = (sums / count).tolist()
    length = len(documents.dream_ids) / len(documents)
    LOG.info("%.3f nats a token, %.3f told: %.1f %% less", before, after, 100 * (1 - after / before))
    LOG.info("%.1f tokens of a dream", length)
    return before, after


def main(what: str, *paths: str) -> None:
    run, *others = (Run.open(Path(path)) for path in paths)
    if what == "students":
        students([run, *others])
    elif what == "read":
        read(run, "dreams-read-whole", "docs/several-answers.yaml")
    elif what == "own":
        read(run, "dreams-own", "demo --set capture.minutes=0 --set evaluate.prompts=0")
    elif what == "told":
        told(run)
    else:
        world(run, {"world": "world", "inherited": "inherited-world"}[what])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(*sys.argv[1:])
