"""The `engine` stage: train the dream engine on the run's finished backbone, phase by phase.

RUN/engine/ is one published folder: engine.safetensors and engine.json (what is shipped), optimizer.safetensors,
loop.json (where the training stands), checksums.json of these, and metrics.jsonl. What step N of a phase does follows
from the folder as saved before it, so a training that was killed ends with the bits of one never disturbed.
"""

import json
import math
import os
import shutil
import time
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from distill.backbone.device import pick_device
from distill.backbone.model import count_parameters, load_backbone
from distill.dream.engine import ABOUT, WEIGHTS, DreamEngine
from distill.errors import BadInput, CorruptFile, DistillError
from distill.events import Event, Listener, silent
from distill.run import Run, publish_folder, sha256_file, sweep
from distill.stopping import Interrupt
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.image_tokens import Codebook
from distill.training import checkpoint
from distill.training.engine.data import Order, load_data
from distill.training.engine.metrics import measure
from distill.training.engine.objectives import PromptStates, Reader, phase_loss
from distill.training.engine.plan import (
    FREE,
    PARTS,
    PHASES,
    REMEDY,
    VERSION,
    EngineState,
    check_settings,
    engine_settings,
    nothing_to_do,
    set_aside,
    untouched,
)
from distill.training.plan import data_fingerprint

WARMUP, WARMUP_SHARE = 20, 0.1
"""Steps in which the learning rate rises, and the most of a phase that they may be."""
DECAY_SHARE = 0.3
"""Last share of a phase in which the learning rate falls; constant before, it learns the world in half the steps."""
CLIP = 1.0
WEIGHT_DECAY = 0.01
TUNED = 0.3
"""Learning rate in the last phase of what the phases before have trained, as a share of the others'."""
LAST_SHARE = 3
"""The last phase, whose steps cost most, makes one in so many of the passes that the others make."""


def train_engine(run: Run, listen: Listener = silent, force: bool = False, phase: str = "all") -> dict[str, Any]:
    """Train the run's dream engine up to and including a phase, or go on where it stopped; returns the summary.

    Phases before it that are not done yet are trained first. The stage is recorded once the last one is done.
    Without dreams to learn from, or with dreaming.dream_steps=0, it is recorded as skipped. Raises MissingStage
    without a trained backbone, BadInput for an unknown phase, RunMismatch where an engine was begun with other
    settings (with `force` it is deleted), CorruptFile where its files were altered.
    """
    last = PHASES[-1] if phase == "all" else phase
    if last not in PHASES:
        raise BadInput(f"phase {phase!r}: choose all, {', '.join(PHASES)}")
    run.require("train")
    if int(os.environ.get("RANK", "0")) > 0:
        return {}  # of several processes that trained the backbone, the first goes on
    sweep(run.engine)  # a kill while it was saved may have left it beside its place
    record = None if force else run.fresh("engine", engine_settings(run))
    if record is not None and untouched(run, record):
        listen(Event("engine", "done", "nothing changed: kept", data=record.summary))
        return record.summary
    started = time.monotonic()
    check_settings(run.settings.dreaming)
    if reason := nothing_to_do(run):
        set_aside(run, "it no longer belongs to the student", listen)
        listen(Event("engine", "note", f"skipped: {reason}"))
        return _finish(run, {}, {"skipped": reason}, started, listen)
    if force:
        shutil.rmtree(run.engine, ignore_errors=True)
    trainer = EngineTrainer(run, listen)
    summary = trainer.fit(last, started)
    if last != PHASES[-1]:
        listen(Event("engine", "done", f"trained up to the {last} phase", data=summary))
        return summary
    outputs = {f"{run.engine.name}/{name}": sha256_file(run.engine / name) for name in (WEIGHTS, ABOUT)}
    return _finish(run, outputs, summary, started, listen)


def _finish(
    run: Run, outputs: dict[str, str], summary: dict[str, Any], started: float, listen: Listener
) -> dict[str, Any]:
    run.record("engine", engine_settings(run), outputs, summary, time.monotonic() - started)
    listen(Event("engine", "done", summary.get("skipped", ""), data=summary))
    return summary


class EngineTrainer:
    """One training: engine, optimizer, the frozen backbone, data and where it stands."""

    def __init__(self, run: Run, listen: Listener) -> None:
        self.run, self.listen = run, listen
        self.config, seed = run.settings.dreaming, run.settings.seed
        ((best, digest),) = run.require("train").outputs.items()
        if sha256_file(run.path / best) != digest:
            raise CorruptFile(f"{run.path / best}: was altered; run `dream train --force` to train it anew")
        self.device = pick_device(run.settings.train.device, "train.device")
        tokenizer, codebook = StudentTokenizer.load(run.tokenizer), Codebook.load(run.tokenizer, run.settings.teacher)
        backbone = load_backbone((run.path / best).parent).requires_grad_(False).to(self.device)
        self.state = self._resume(EngineState(backbone=digest, data=data_fingerprint(run)))
        hidden = backbone.config.hidden
        if run.engine.exists():
            self.engine = DreamEngine.load(run.engine, codebook, hidden)
        else:
            self.engine = DreamEngine.new(self.config, hidden, codebook, seed)
        self.renewed = self.engine.config != self.config  # in what may change
        self.engine.config = self.config
        self.engine.to(self.device).train()
        self.reader = Reader(backbone, tokenizer)
        data = load_data(run, codebook, self.config.dream_length, backbone.config.context)
        self.data, self.validation = data["train"], data["validation"]
        if self.data.left_out:
            text = f"{self.data.left_out} prompts leave no room for a dream in student.context and are left out"
            listen(Event("engine", "warning", text))
        self.states, self.validation_states = (PromptStates(backbone, part) for part in data.values())
        self.order = Order(len(self.data), self.config.batch, seed)
        self.measured: dict[str, float] = {}

    def _resume(self, fresh: EngineState) -> EngineState:
        """The state of the engine that is there, if it was trained on this backbone; else `fresh`."""
        if not self.run.engine.exists():
            return fresh
        checkpoint.verify_checkpoint(self.run.engine, REMEDY)
        path = self.run.engine / "loop.json"
        try:
            state = EngineState(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CorruptFile(f"{path}: can't be read ({error}); delete {self.run.engine} to {REMEDY}") from error
        if (state.backbone, state.data) != (fresh.backbone, fresh.data):
            set_aside(self.run, "the backbone changed: training the engine anew", self.listen)
            return fresh
        self.run.check_same("dreaming", self._fixed(state.phase), state.settings)
        return state

    def _fixed(self, phase: str) -> dict[str, Any]:
        """Settings that must not change any more: the lengths of later phases still may."""
        later = PHASES[PHASES.index(phase) + 1 :]
        left_out = {*FREE, *(f"{name}_steps" for name in later)}
        settings = {key: value for key, value in asdict(self.config).items() if key not in left_out}
        return {**settings, "seed": self.run.settings.seed, "version": VERSION}

    def steps(self, phase: str) -> int:
        """Of a phase: what the settings say, or as many as its epochs have."""
        wanted: int = getattr(self.config, f"{phase}_steps")
        if not self.config.epochs:
            return wanted
        epochs = self.config.epochs * self.order.batches
        return min(wanted, max(1, epochs // LAST_SHARE) if phase == PHASES[-1] else epochs)

    # The loop.
    def fit(self, last: str, started: float) -> dict[str, Any]:
        """Train up to and including the phase `last`."""
        wanted = PHASES[: PHASES.index(last) + 1]
        self.total = sum(map(self.steps, wanted))
        self.started = started - self.state.seconds
        data = {"prompts": len(self.data), "steps": {phase: self.steps(phase) for phase in wanted}}
        self.listen(Event("engine", "start", f"{len(self.data)} prompts, {self.total} steps", data=data))
        metrics = self.run.engine / "metrics.jsonl"
        checkpoint.trim_metrics(metrics, lambda row: self.state.reached(row["phase"], row["step"]))
        with Interrupt() as stop:
            for phase in wanted:
                if PHASES.index(phase) >= PHASES.index(self.state.phase):
                    self._train(phase, stop)
        return self._summary(last)

    def _train(self, phase: str, stop: Interrupt) -> None:
        """One phase, from where it stands to its end."""
        state, total = self.state, self.steps(phase)
        if state.phase != phase:
            state.phase, state.step = phase, 0
        begun = state.step > 0
        if state.step < total:
            text = f"the {phase} phase, {f'from step {state.step} of' if begun else ''} {total} steps"
            self.listen(Event("engine", "note", " ".join(text.split())))
        state.settings = self._fixed(phase)
        self.trained = nn.ModuleDict({name: getattr(self.engine, name) for name in PARTS[phase]})
        self.optimizer = self._make_optimizer(phase)
        if begun and state.step < total:
            checkpoint.load_optimizer(self.run.engine, self.trained, self.optimizer, REMEDY)
        if not begun or (self.renewed and state.step == total):
            self._save()
        while state.step < total:
            self._one_step(total)
            if state.step % self.config.checkpoint_every == 0 or state.step == total or stop.asked:
                self._save()
            if stop.asked:
                raise stop.asked

    def _make_optimizer(self, phase: str) -> torch.optim.AdamW:
        """AdamW; what has one dimension doesn't decay."""
        groups: list[dict[str, Any]] = []
        for name in PARTS[phase]:
            share = TUNED if phase == "end" and name in PARTS["dream"] else 1.0
            parameters = list(getattr(self.engine, name).parameters())
            for decay, wide in ((WEIGHT_DECAY, True), (0.0, False)):
                chosen = [p for p in parameters if (p.dim() > 1) == wide]
                groups.append({"params": chosen, "weight_decay": decay, "share": share})
        return torch.optim.AdamW(groups, lr=self.config.lr, betas=(0.9, 0.95), fused=True)

    def _one_step(self, total: int) -> None:
        state, phase = self.state, self.state.phase
        places = self.order.at(PHASES.index(phase), state.step)
        batch = self.data.batch(places).to(self.device)
        rate = self.config.lr * min(1.0, (state.step + 1) / min(WARMUP, max(1.0, WARMUP_SHARE * total)))
        rate *= min(1.0, (1 - state.step / total) / DECAY_SHARE)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        self.optimizer.zero_grad()
        parts = phase_loss(phase, self.engine, self.reader, batch, self.states.of(batch))
        parts["total"].backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained.parameters(), CLIP)
        losses = {name: float(part.detach()) for name, part in parts.items()}
        if not math.isfinite(losses["total"]) or not math.isfinite(float(norm)):
            text = f"the loss is {losses['total']} at step {state.step + 1} of the {phase} phase"
            raise DistillError(f"dream engine: {text}; lower dreaming.lr and start again with --force")
        self.optimizer.step()
        state.step += 1
        state.seconds = time.monotonic() - self.started
        self._report(losses, {"lr": rate, "gradient_norm": float(norm)}, state.step == total)

    # What it leaves behind.
    def _report(self, losses: dict[str, float], entry: dict[str, float], ends: bool) -> None:
        state = self.state
        before = sum(self.steps(phase) for phase in PHASES[: PHASES.index(state.phase)])
        shown = {"phase": state.phase, "loss": losses["total"]}
        event = Event("engine", "progress", done=before + state.step, total=self.total, unit="step", data=shown)
        self.listen(event)
        judged = ends or state.step % self.config.checkpoint_every == 0
        if not judged and state.step % self.run.settings.train.log_every:
            return
        row: dict[str, Any] = {"phase": state.phase, "step": state.step, "seconds": round(state.seconds, 3)}
        row |= {f"{name}_loss" if name != "total" else "loss": round(loss, 6) for name, loss in losses.items()}
        row |= {name: round(value, 8) for name, value in entry.items()}
        if judged:
            row |= {f"validation_{name}": value for name, value in self._measure().items()}
        with (self.run.engine / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _measure(self) -> dict[str, float]:
        return measure(self.state.phase, self.engine, self.reader, self.validation, self.validation_states)

    def _save(self) -> None:
        """Publish RUN/engine/ anew, its metrics so far included."""
        metrics = self.run.engine / "metrics.jsonl"
        with publish_folder(self.run.engine) as folder:
            self.engine.save(folder)
            moments = checkpoint.optimizer_tensors(self.trained, self.optimizer)
            save_file(moments, folder / "optimizer.safetensors")
            (folder / "loop.json").write_text(json.dumps(asdict(self.state), indent=2) + "\n", encoding="utf-8")
            checkpoint.write_checksums(folder)
            if metrics.exists():
                shutil.copyfile(metrics, folder / metrics.name)

    def _summary(self, last: str) -> dict[str, Any]:
        wanted = PHASES[: PHASES.index(last) + 1]
        return {
            "prompts": len(self.data),
            "steps": {phase: self.steps(phase) for phase in wanted},
            "parameters": count_parameters(self.engine),
            "training_seconds": round(self.state.seconds, 1),
            "device": str(self.device),
            **self._measure(),
        }
