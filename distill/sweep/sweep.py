"""A sweep: many settings trained on the same data, each a run of its own, and compared at the end.

Everything lies in one folder: sweep.json says what became of each cell, cells/NAME is a cell's run, data/ what cells
share, results.json and report.md compare them. A sweep that was stopped, or killed, goes on where it was.
"""

import copy
import json
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from distill.config import Settings
from distill.errors import BadInput, CorruptFile, DistillError, RunMismatch
from distill.events import Event, Listener, silent
from distill.exam.baselines import SHARED_STAGES
from distill.exam.examine import VERSION as EXAMINATION
from distill.exam.examine import dream_tokens_of
from distill.exam.questions import load_exam
from distill.exam.targets import find_target
from distill.run import Run, fingerprint, write_atomic
from distill.sweep.cells import (
    CellFailed,
    Job,
    Together,
    best_source,
    data_key,
    one_line,
    prepare_data,
    shared_files,
    train_apart,
    train_cell,
)
from distill.sweep.plan import Cell, Plan, by_system
from distill.sweep.table import rows_of, to_csv, to_markdown

VERSION = 1


def sweep(
    plan: Plan,
    folder: Path,
    listen: Listener = silent,
    *,
    jobs: int = 1,
    compare: bool = True,
    force: bool = False,
) -> dict[str, Any]:
    """Train all cells of the plan that are not trained yet, then compare them; returns sweep.json's content.

    jobs: cells at once, each in a process of its own. compare: False only trains, and writes the tables. force: train
    cells anew whose settings changed, and measure again. A cell that fails is written down and the others go on.
    Raises BadInput and RunMismatch before anything is begun, and DistillError where another process works on it.
    """
    return Sweep(plan, folder, listen).run(jobs, compare, force)


def overview(plan: Plan, folder: Path) -> dict[str, Any]:
    """What a sweep would do, as JSON; writes nothing. bytes: that copies of shared data would take."""
    self = Sweep(plan, folder, silent)
    sources = [plan.base] if plan.base is not None else []
    cells: list[dict[str, Any]] = []
    for cell in plan.cells:
        source, stages = best_source([*sources, *self.data_runs()], cell.data)
        trained = "train" in Run(self.path_of(cell), cell.settings).records()
        size = 0 if trained or source is None else sum(_size(path) for path in shared_files(source, stages))
        entry = self.state["cells"].get(cell.name, {})
        cells.append(
            {
                "cell": cell.name,
                "system": cell.system,
                "seed": cell.seed,
                "changes": cell.changes,
                "state": entry.get("state", "new"),
                "data": str(source.path) if source is not None else "",
                "shared": stages,
                "runs": [stage for stage in SHARED_STAGES if stage not in stages] + ["train"] * (not trained),
                "steps": cell.settings.train.steps,
                "bytes": size,
                "differs": self.differences(cell),
            }
        )
    size = sum(cell["bytes"] for cell in cells)
    return {"folder": str(folder), "cells": cells, "left_alone": self.left_alone(), "bytes": size}


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


class Sweep:
    """One sweep in one folder."""

    def __init__(self, plan: Plan, folder: Path, listen: Listener) -> None:
        self.plan, self.folder, self.listen = plan, folder, listen
        if folder.exists() and not (folder / "sweep.json").exists():
            used = not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())
            if used:
                raise BadInput(f"{folder}: is not empty and holds no sweep; choose another name: in {plan.file}")
        self.state = self._read()
        self.sources: dict[str, Run] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def path_of(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.name

    def data_runs(self) -> list[Run]:
        """Data that the sweep made."""
        return [Run.open(path.parent) for path in sorted((self.folder / "data").glob("*/config.yaml"))]

    # What is there.
    def _read(self) -> dict[str, Any]:
        path = self.folder / "sweep.json"
        state: dict[str, Any] = {"version": VERSION, "cells": {}}
        if path.exists():
            try:
                state = json.loads(path.read_text(encoding="utf-8"))
                if not all(isinstance(entry["state"], str) for entry in state["cells"].values()):
                    raise TypeError("a cell without a state")
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise CorruptFile(f"{path}: can't be read ({error}); delete it: finished cells are kept") from error
        return state

    def _write(self) -> None:
        write_atomic(self.folder / "sweep.json", json.dumps(self.state, indent=2, ensure_ascii=False) + "\n")

    def _note(self, cell: Cell, **values: Any) -> None:
        with self._lock:
            self.state["cells"][cell.name].update(values)
            self._write()

    def differences(self, cell: Cell) -> list[str]:
        """In which settings the cell's folder was made otherwise than the file says now."""
        path = self.path_of(cell)
        failed = self.state["cells"].get(cell.name, {}).get("state") == "failed"  # there is nothing to lose
        if failed or not (path / "config.yaml").exists():
            return []
        there = Cell(cell.system, cell.seed, {}, Run.open(path).settings, cell.data)
        was, now = (other.depends(self.plan.engine) for other in (there, cell))
        return [f"{key} was {was[key]!r}, is {now[key]!r}" for key in now if was[key] != now[key]]

    def left_alone(self) -> list[str]:
        """Cells of the folder that the file has no more."""
        here = {cell.name for cell in self.plan.cells}
        return [name for name in self.state["cells"] if name not in here]

    def _check(self, force: bool) -> None:
        for cell in self.plan.cells:
            if not force and (found := self.differences(cell)):
                raise RunMismatch(
                    f"{self.path_of(cell)}: was trained with other settings ({', '.join(found[:3])}); --force trains "
                    f"such cells anew, another name: in {self.plan.file} keeps both"
                )
        left = self.left_alone()
        for name in left:
            self.state["cells"][name]["state"] = "left alone"
        if left:
            self._tell("note", f"{', '.join(left)}: no longer in {self.plan.file.name}, left alone")

    def _tell(self, kind: Literal["note", "warning"], text: str) -> None:
        self.listen(Event("sweep", kind, text))

    # Doing it.
    def run(self, jobs: int, compare: bool, force: bool) -> dict[str, Any]:
        created = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with Run(self.folder, Settings()).working():
                self._check(force)
                self._begin()
                self._train(jobs)
                self._finish(compare, force)
                return self.state
        finally:
            if created and not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _begin(self) -> None:
        plan = self.plan
        about = {"name": plan.name, "file": plan.file.name, "metric": plan.metric, "baseline": plan.baseline}
        self.state |= {"version": VERSION, **about, "base": str(plan.base.path) if plan.base else ""}
        for cell in plan.cells:
            before = self.state["cells"].get(cell.name, {})
            state = before.get("state", "waiting")
            entry = {"system": cell.system, "seed": cell.seed, "changes": cell.changes}
            kept = {key: value for key, value in before.items() if key not in ("error", "state")}
            finished = state == "trained" and not self.differences(cell)
            self.state["cells"][cell.name] = kept | entry | {"state": "trained" if finished else "waiting"}
        self._write()

    def _jobs(self) -> Iterator[Job]:
        """Cells whose data is there; the data of a cell is made just before it is needed first."""
        sources = [self.plan.base] if self.plan.base is not None else []
        made: dict[str, Run | str] = {}
        for number, cell in enumerate(self.plan.cells, 1):
            stage = f"cell {number} of {len(self.plan.cells)}, {cell.name}"
            key = data_key(cell.data)
            if key not in made:
                folder = self.folder / "data" / key
                found = [run for run in made.values() if isinstance(run, Run)]
                try:
                    made[key] = prepare_data(folder, cell.data, [*sources, *found], self._told(f"data {key}"))
                except DistillError as error:
                    made[key] = str(error)
            source = made[key]
            if isinstance(source, Run):
                self.sources[cell.name] = source
                yield Job(cell, source, self.path_of(cell), self.plan.engine, stage)
            else:
                self._failed(cell, source)

    def _told(self, prefix: str) -> Listener:
        """Tells of stages as of the data that they make."""
        return lambda event: self.listen(replace(event, stage=f"{prefix}, {event.stage}"))

    def _train(self, jobs: int) -> None:
        if jobs == 1:
            for job in self._jobs():
                self._one(job, lambda job: train_cell(job, self.listen))
            return
        import torch

        threads = max(1, torch.get_num_threads() // jobs)
        together = Together({cell.name: cell.settings.train.steps for cell in self.plan.cells}, self.listen)

        def apart(job: Job) -> dict[str, Any]:
            found = train_apart(job, threads, together.of(job.cell.name), self._stop)
            together.count(job.cell.name, job.cell.settings.train.steps)
            return found

        with ThreadPoolExecutor(jobs) as pool:
            try:
                waiting = [pool.submit(self._one, job, apart) for job in self._jobs()]
                for future in waiting:
                    future.result()
            except KeyboardInterrupt:  # it reaches the cells' processes too; each saves where it is
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _one(self, job: Job, perform: Callable[[Job], dict[str, Any]]) -> None:
        cell = job.cell
        if self._stop.is_set():
            return
        if self.state["cells"][cell.name]["state"] != "trained":
            self._note(cell, state="training")
            self.listen(Event(job.stage, "note", cell.told))
        try:
            found = perform(job)
        except DistillError as error:
            self._failed(cell, str(error), error.trace if isinstance(error, CellFailed) else "")
        except Exception as error:
            self._failed(cell, one_line(error), traceback.format_exc())
        else:
            self._note(cell, state="trained", **found)

    def _failed(self, cell: Cell, error: str, trace: str = "") -> None:
        if trace:
            path = self.folder / "errors" / f"{cell.name}.txt"
            write_atomic(path, trace)
            error = f"{error} (all of it is in {path})"
        self._note(cell, state="failed", error=error)
        self.listen(Event(cell.name, "warning", f"failed: {error}"))

    # What came out.
    def _finish(self, compare: bool, force: bool) -> None:
        """Compare what is trained, and write the tables."""
        self._tables(None)
        results = self._compared(force) if compare else None
        if results is not None:
            self._tables(results)

    def trained(self) -> dict[str, list[Cell]]:
        """System → its cells that can be compared."""
        return by_system(cell for cell in self.plan.cells if self.state["cells"][cell.name]["state"] == "trained")

    def _compared(self, force: bool) -> dict[str, Any] | None:
        """The comparison's results; those that are there, where nothing has changed since."""
        from distill.report.compare import compare
        from distill.report.measure import VERSION as COMPARISON
        from distill.report.measure import read_results

        trained, common = self.trained(), self.plan.common
        if len(trained) < 2:
            self._tell("note", f"{len(trained)} systems are trained: nothing to compare")
            return None
        baseline = self.plan.baseline if self.plan.baseline in trained else next(iter(trained))
        warnings = self._incomplete(trained, baseline)
        exam = load_exam(self._exam_run(trained[baseline][0]))
        systems = {
            system: [find_target(str(self.path_of(cell))) for cell in cells] for system, cells in trained.items()
        }
        device = common.train.device
        dream_tokens = dream_tokens_of(exam.run, [target for targets in systems.values() for target in targets])
        weights = {system: [self._weights(cell) for cell in cells] for system, cells in trained.items()}
        how = [asdict(common.evaluate), common.seed, baseline, dream_tokens, device, warnings]
        mark = fingerprint([VERSION, COMPARISON, EXAMINATION, weights, exam.digest, how])
        path = self.folder / "results.json"
        if not force and self.state.get("compared") == mark and path.is_file():
            results = read_results(path)
        else:
            results = compare(
                systems,
                exam,
                self.folder,
                common.evaluate,
                self.listen,
                seed=common.seed,
                baseline=baseline,
                dream_tokens=dream_tokens,
                device=device,
                force=force,
                warnings=warnings,
            )
            self.state |= {"compared": mark, "compared_with": baseline}
            self._write()
        for system, entry in results["systems"].items():
            entry["sweep_seeds"] = [cell.seed for cell in trained[system]]
        return results

    def _weights(self, cell: Cell) -> list[Any]:
        """Digests of what was trained."""
        records = Run(self.path_of(cell), cell.settings).records()
        return [records[stage].outputs for stage in ("train", "engine") if stage in records]

    def _incomplete(self, trained: Mapping[str, list[Cell]], baseline: str) -> list[str]:
        """What failed cells change of the comparison; told, and handed on to its reports."""
        warnings: list[str] = []
        if baseline != self.plan.baseline:
            told = f"{self.plan.baseline}, the baseline, has no trained cell: compared with {baseline} in its place."
            warnings.append(told)
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

    def _tables(self, results: dict[str, Any] | None) -> None:
        metric = self.plan.metric
        here = {cell.name for cell in self.plan.cells}
        cells = {name: entry for name, entry in self.state["cells"].items() if name in here}
        if results is not None and all(metric not in entry["metrics"] for entry in results["systems"].values()):
            reasons = {entry["missing"].get(metric, "not measured") for entry in results["systems"].values()}
            self._tell("warning", f"metric: no cell has {metric} ({'; '.join(sorted(reasons))})")
        rows = rows_of(cells, results, metric)
        write_atomic(self.folder / "sweep.csv", to_csv(rows, metric))
        write_atomic(self.folder / "summary.md", to_markdown(self.plan.name, rows, metric, results is not None))
        self.state["order"] = [row["cell"] for row in rows]
        for row in rows:
            self.state["cells"][row["cell"]] |= {key: row[key] for key in ("value", "low", "high", "seed_value")}
        self._write()
