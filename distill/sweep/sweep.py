"""A sweep: many settings trained on the same data, each a run of its own, and compared at the end.

Everything lies in one folder: sweep.json says what became of each cell, cells/NAME is a cell's run, data/ what cells
share, results.json and report.md compare them. A sweep that was stopped, or killed, goes on where it was.
"""

import copy
import json
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from distill.config import Settings
from distill.errors import BadInput, CorruptFile, DistillError, RunMismatch
from distill.events import Event, Listener, silent
from distill.exam.baselines import SHARED_STAGES
from distill.exam.metrics.catalogue import metric_of
from distill.exam.questions import load_exam
from distill.exam.targets import Target
from distill.report.compare import compare as compare_systems
from distill.report.measure import Measurement
from distill.report.tables import markdown_table
from distill.run import Run, write_atomic
from distill.sweep.cells import Job, best_source, data_key, prepare_data, train_cell
from distill.sweep.plan import Cell, Plan, by_system, told
from distill.sweep.table import rows, values_of
from distill.training.checkpoint import as_trained

VERSION = 1


def sweep(
    plan: Plan, folder: Path, listen: Listener = silent, *, compare: bool = True, force: bool = False
) -> dict[str, Any]:
    """Train all cells of the plan that are not trained yet, then compare them; returns sweep.json's content, with
    `compared_with` where they were compared.

    compare: False only trains, and writes the table. force: train cells anew whose settings changed, and measure again.
    A cell that fails is written down and the others go on. Raises BadInput and RunMismatch before anything is begun,
    and DistillError where another process works on it.
    """
    return Sweep(plan, folder, listen).run(compare, force)


def overview(plan: Plan, folder: Path) -> dict[str, Any]:
    """What a sweep would do, as JSON; writes nothing."""
    self = Sweep(plan, folder, silent)
    cells: list[dict[str, Any]] = []
    for cell in plan.cells:
        source, shared = best_source(self.known, cell.data)
        done = Run(self.path_of(cell), cell.settings).records()
        learned = ["train", *(["engine"] if plan.engine else [])]
        planned: dict[str, Any] = {"cell": cell.name, "system": cell.system, "seed": cell.seed, "changes": cell.changes}
        planned["state"] = self.state["cells"].get(cell.name, {}).get("state", "new")
        planned |= {"data": str(source.path) if source is not None else "", "shared": shared}
        planned["runs"] = [stage for stage in SHARED_STAGES if stage not in shared]
        planned["runs"] += [stage for stage in learned if stage not in done]
        cells.append(planned | {"steps": cell.settings.train.steps, "differs": self.differences(cell)})
    return {"folder": str(folder), "cells": cells}


class Sweep:
    """One sweep in one folder."""

    def __init__(self, plan: Plan, folder: Path, listen: Listener) -> None:
        self.plan, self.folder, self.listen = plan, folder, listen
        found = list(folder.iterdir()) if folder.is_dir() else [folder] if folder.exists() else []
        if not (folder / "sweep.json").exists() and any(not path.name.startswith(".") for path in found):
            raise BadInput(f"{folder}: is not empty and holds no sweep; choose another name: in {plan.file}")
        self.state = self._read()
        self.known = [plan.base] if plan.base is not None else []
        self.known += [Run.open(path.parent) for path in sorted(folder.glob("data/*/config.yaml"))]
        self.sources: dict[str, Run] = {}

    def path_of(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.name

    # What is there.
    def _read(self) -> dict[str, Any]:
        path = self.folder / "sweep.json"
        if not path.exists():
            return {"version": VERSION, "cells": {}}
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if not all(isinstance(entry["state"], str) for entry in state["cells"].values()):
                raise TypeError("a cell without a state")
            return state
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptFile(f"{path}: can't be read ({error}); delete it: finished cells are kept") from error

    def _write(self) -> None:
        write_atomic(self.folder / "sweep.json", json.dumps(self.state, indent=2, ensure_ascii=False) + "\n")

    def _note(self, cell: Cell, **values: Any) -> None:
        self.state["cells"][cell.name].update(values)
        self._write()

    def differences(self, cell: Cell) -> list[str]:
        """In which settings the cell's folder was made otherwise than the file says now."""
        path = self.path_of(cell)
        failed = self.state["cells"].get(cell.name, {}).get("state") == "failed"  # there is nothing to lose
        if failed or not (path / "config.yaml").exists():
            return []
        there = Cell(cell.system, cell.seed, cell.changes, Run.open(path).settings, cell.data)
        was, now = (other.depends(self.plan.engine) for other in (there, cell))
        return [f"{key} was {was[key]!r}, is {now[key]!r}" for key in now if was[key] != now[key]]

    def _check(self, force: bool) -> None:
        for cell in self.plan.cells:
            if not force and (found := self.differences(cell)):
                raise RunMismatch(
                    f"{self.path_of(cell)}: was trained with other settings ({', '.join(found[:3])}); --force trains "
                    f"such cells anew, another name: in {self.plan.file} keeps both"
                )

    def _tell(self, kind: Literal["note", "warning"], text: str) -> None:
        self.listen(Event("sweep", kind, text))

    # Doing it.
    def run(self, compare: bool, force: bool) -> dict[str, Any]:
        created = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with Run(self.folder, Settings()).working():
                self._check(force)
                self._begin()
                for job, problem in self._learned():
                    self._train(job, problem)
                self._table(None)
                if compare and (results := self._compared(force)) is not None:
                    self._table(results)
                return self.state
        finally:
            if created and not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _begin(self) -> None:
        plan = self.plan
        about = {"name": plan.name, "file": plan.file.name, "metric": plan.metric, "baseline": plan.baseline}
        self.state |= {"version": VERSION, **about, "base": str(plan.base.path) if plan.base else ""}
        self.state.pop("compared_with", None)  # what is trained now, nothing was compared with yet
        for cell in plan.cells:
            before = dict(self.state["cells"].get(cell.name, {}))
            before.pop("error", None)
            finished = before.get("state") == "trained" and not self.differences(cell)
            entry = {"system": cell.system, "seed": cell.seed, "changes": cell.changes}
            self.state["cells"][cell.name] = before | entry | {"state": "trained" if finished else "waiting"}
        self._write()

    def _jobs(self) -> Iterator[Job]:
        """Cells whose data is there; the data of a cell is made just before it is needed first."""
        made: dict[str, Run | str] = {}
        for number, cell in enumerate(self.plan.cells, 1):
            stage = f"cell {number} of {len(self.plan.cells)}, {cell.name}"
            key = data_key(cell.data)
            if key not in made:
                sources = [*self.known, *(run for run in made.values() if isinstance(run, Run))]
                try:
                    made[key] = prepare_data(self.folder / "data" / key, cell.data, sources, self.listen)
                except DistillError as error:
                    made[key] = str(error)
            source = made[key]
            if isinstance(source, Run):
                self.sources[cell.name] = source
                yield Job(cell, source, self.path_of(cell), self.plan.engine, stage)
            else:
                self._failed(cell, source)

    def _learned(self) -> Iterator[tuple[Job, Exception | None]]:
        """What is to be trained, or was elsewhere, and why it couldn't be."""
        if where := self.plan.common.runtime.cluster:
            from distill.cluster import open_cluster
            from distill.sweep.elsewhere import learned_elsewhere

            return learned_elsewhere(open_cluster(where, self.listen), self._untrained(), self.listen)
        return ((job, None) for job in self._untrained())

    def _untrained(self) -> Iterator[Job]:
        for job in self._jobs():
            if self.state["cells"][job.cell.name]["state"] == "trained":
                self._train(job)
            else:
                self._note(job.cell, state="training")
                self.listen(Event(job.stage, "note", told(job.cell.changes) or "settings as they are"))
                yield job

    def _train(self, job: Job, problem: Exception | None = None) -> None:
        cell = job.cell
        try:
            if problem is not None:
                raise problem
            found = train_cell(job, self.listen)
        except DistillError as error:
            self._failed(cell, str(error))
        except Exception as error:
            path = self.folder / "errors" / f"{cell.name}.txt"
            write_atomic(path, traceback.format_exc())
            said = " ".join(str(error).split())[:300]
            self._failed(cell, f"{type(error).__name__}: {said} (all of it is in {path})")
        else:
            self._note(cell, state="trained", **found)

    def _failed(self, cell: Cell, error: str) -> None:
        self._note(cell, state="failed", error=error)
        self.listen(Event(cell.name, "warning", f"failed: {error}"))

    # What came out.
    def _compared(self, force: bool) -> dict[str, Any] | None:
        """The comparison's results; what was measured before is kept there."""
        states, common = self.state["cells"], self.plan.common
        trained = by_system(cell for cell in self.plan.cells if states[cell.name]["state"] == "trained")
        if len(trained) < 2:
            self._tell("note", f"{len(trained)} systems are trained: nothing to compare")
            return None
        baseline = self.plan.baseline if self.plan.baseline in trained else next(iter(trained))
        warnings = self._incomplete(trained, baseline)
        exam = load_exam(self._exam_run(trained[baseline][0]))
        systems = {name: [self._target(cell) for cell in cells] for name, cells in trained.items()}
        targets = [target for each in systems.values() for target in each]
        measurement = Measurement.of(exam, common, targets, self.listen, force)
        results = compare_systems(measurement, systems, self.folder, baseline=baseline, warnings=warnings, strict=False)
        self.state["compared_with"] = results["baseline"]
        for cell in (cell for cells in trained.values() for cell in cells):
            if error := results["failed"].get(str(self.path_of(cell))):
                self._failed(cell, error)
        for name, entry in results["systems"].items():
            entry["sweep_seeds"] = [cell.seed for cell in trained[name] if states[cell.name]["state"] == "trained"]
        return results

    def _target(self, cell: Cell) -> Target:
        path = self.path_of(cell)
        return Target(str(path), "run", as_trained(run := Run.open(path)), run=run)

    def _incomplete(self, trained: Mapping[str, list[Cell]], baseline: str) -> list[str]:
        """What failed cells change of the comparison; told, and handed on to its reports."""
        warnings: list[str] = []
        if baseline != self.plan.baseline:
            lost = f"{self.plan.baseline}, the baseline, has no trained cell"
            warnings.append(f"{lost}: compared with {baseline} in its place.")
        for system, cells in self.plan.systems.items():
            there = len(trained.get(system, []))
            if not there and system != self.plan.baseline:
                warnings.append(f"{system} has no trained cell and is left out.")
            elif 0 < there < len(cells):
                warnings.append(f"{system} has {there} of {len(cells)} seeds: the others failed.")
        for text in warnings:
            self._tell("warning", text)
        return warnings

    def _exam_run(self, cell: Cell) -> Run:
        """Whose held-out prompts all are asked: those of the baseline's data."""
        settings = copy.deepcopy(cell.data)
        settings.evaluate = self.plan.common.evaluate
        return Run(self.sources[cell.name].path, settings)

    def _table(self, results: dict[str, Any] | None) -> None:
        plan, metric = self.plan, self.plan.metric
        cells = {cell.name: self.state["cells"][cell.name] for cell in plan.cells}
        if results is not None and all(metric not in entry["metrics"] for entry in results["systems"].values()):
            reasons = {entry["missing"].get(metric, "not measured") for entry in results["systems"].values()}
            self._tell("warning", f"metric: no cell has {metric} ({'; '.join(sorted(reasons))})")
        found = values_of(cells, results, metric)
        for name, values in found.items():
            cells[name].update(values)
        self.state["order"] = list(found)
        self._write()
        by = f" by {metric_of(metric).label}" if results else ""
        text = f"# {plan.name}: {len(cells)} cells{by}\n\n{markdown_table(rows(self.state))}\n"
        write_atomic(self.folder / "summary.md", text)
