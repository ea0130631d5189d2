"""One training: packed batches, fused distillation loss, checkpoints, and a resume that changes nothing.

Whatever step N does follows from the checkpoint before it: batches from (seed, epoch), the learning rate from the
progress, drafts from the checkpoint. Only with `train.minutes` does the clock decide, so such a training resumes
where it was, but two of them are not equal to the last bit.
"""

import contextlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from distill.backbone.device import pick_device
from distill.backbone.model import count_parameters, load_backbone
from distill.errors import BadInput, CorruptFile, DistillError
from distill.events import Event, Listener
from distill.run import Run, sha256_file
from distill.stopping import Interrupt
from distill.student.grammar import DreamGrammar, longest_path
from distill.student.initialize import new_student
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.packing import Documents
from distill.training import checkpoint, drafts, numerics, sharding
from distill.training.ahead import Ahead
from distill.training.average import Average
from distill.training.batches import Batch, Batches, Row
from distill.training.checkpoint import LoopState
from distill.training.distributed import World
from distill.training.features import Features
from distill.training.mixture import Mixture
from distill.training.muon import Muon
from distill.training.plan import (
    CHANCE_LR,
    INHERITED_LR,
    NEW_ROWS,
    check_settings,
    data_fingerprint,
    fixed_settings,
    learning_rate,
    optimizer_for,
    unread,
)
from distill.training.start import is_inherited, started_at
from distill.training.step import Results, forward_backward, make_optimizer, means, move, quicker
from distill.training.validate import validate


class Trainer:
    """One training: model, optimizer, data and where it stands."""

    def __init__(self, run: Run, world: World, listen: Listener) -> None:
        self.run, self.world, self.listen = run, world, listen
        self.settings = settings = run.settings.train
        check_settings(settings)
        self.device = pick_device(settings.device, "train.device")
        self.tokenizer = StudentTokenizer.load(run.tokenizer)
        seed = run.settings.seed
        fixed, inherited = self._fixed(), is_inherited(run)
        self.state = LoopState(settings=fixed)
        found = checkpoint.list_checkpoints(run)
        if found:
            self.state = checkpoint.read_loop(found[-1])
            run.check_same("train", fixed, self.state.settings)
            checkpoint.verify_checkpoint(found[-1])
            self.model = load_backbone(found[-1])
        else:
            start = started_at(run)
            self.model = load_backbone(start) if start else new_student(run.settings.student, self.tokenizer, seed)
            self.state.optimizer = optimizer_for(settings, inherited)
        if self.model.config.vocab_size != self.tokenizer.vocab_size:
            raise CorruptFile(f"{found[-1]}: its tokenizer isn't the run's; use --force to train anew")
        self.kept = numerics.load(run.checkpoints / "numerics.json") if self.state.step else None
        half = numerics.precisions(settings, self.device.type, self.kept) == ["bfloat16"]
        sharding.place(self.model.train(), self.device, world, settings.shard, half, listen)
        self.model.recompute = settings.recompute
        betas = (settings.betas[0], settings.betas[1])
        self.lr = settings.lr or (INHERITED_LR if inherited else CHANCE_LR)
        muon = self.state.optimizer == "muon"
        self.optimizer = make_optimizer(self.model, self.lr, betas, settings.weight_decay, muon)
        tables = {self.model.model.embed_tokens.weight, self.model.lm_head.weight} if started_at(run) else set()
        self.new_rows = [sharding.rows_from(table, self.tokenizer.think_id) for table in tables]
        self.average = Average(self.model, settings.average)
        length = self.model.config.context
        soft, mixture = settings.soft_weight, Mixture.of(settings)
        grammar = None if settings.pause else DreamGrammar(self.tokenizer, longest_path(run.settings), whole=False)
        self.batches, self.validation = (
            Batches(Documents.load(run.data / name), self.tokenizer, length, mix, seed, soft, grammar, settings.strict)
            for name, mix in (("train", mixture), ("validation", mixture.exact))
        )
        self.stop, self.drafts = Interrupt(), dict[int, list[int]]()
        if found:
            if settings.average:
                self.average.restore(checkpoint.load_raw(found[-1]))
            if self.state.step:
                checkpoint.load_optimizer(found[-1], self.model, self.optimizer)
            self.drafts = drafts.by_document(checkpoint.load_drafts(found[-1]))
        if length < (asked := run.settings.student.context):
            text = f"student.context={asked}: what the student begins as reads {length} tokens, and so does the student"
            listen(Event("train", "warning", text))
        if left_out := self.batches.left_out:
            more = "; raise student.context to train on them" if length == asked else ""
            listen(Event("train", "warning", f"{left_out} prompts fill the context of {length} tokens: left out{more}"))
        if in_windows := self.batches.in_windows:
            text = f"{in_windows} answers are longer than the context of {length} tokens: read in several windows"
            listen(Event("train", "note", text))
        if settings.told and self.tokenizer.kind != "aligned":
            listen(Event("train", "warning", "train.told=true: isn't used without the teacher's own tokens"))
        self.ahead = Ahead(self._parts, self.device)
        self.rows = self.batches.epoch(self.state.epoch)
        if self.state.drafts:
            self.rows = self.batches.drafted(self.state.epoch, self.rows, self.state.drafts_row, self.drafts)
        self.kernel: Any = None
        self.validated = -1, dict[str, float]()
        self.features = Features.of(run, self.tokenizer, self.device, listen) if settings.match else None

    def _fixed(self) -> dict[str, Any]:
        settings = fixed_settings(self.run)
        settings["data"] = data_fingerprint(self.run)
        start = started_at(self.run)
        settings["start"] = sha256_file(start / "model.safetensors") if start else None
        return settings

    # The loop.
    def fit(self) -> dict[str, Any]:
        """Train to the end of `steps` or `minutes`. The clock runs while it trains, not while it finds out how."""
        settings, state, kept = self.settings, self.state, self.kept
        self.numerics = kept if kept and self._finished() else self._choose_numerics(kept)
        self.kernel = numerics.apply(self.numerics, self.model)
        if isinstance(self.optimizer, Muon):
            self.optimizer.precision = getattr(torch, self.numerics.precision)
        if self.numerics.compiled:
            self._try(self.numerics, self.kernel, settings.batch_rows)  # compiles
        if self.world.first and self.numerics != kept:
            numerics.save(self.numerics, self.run.checkpoints / "numerics.json")
        with contextlib.ExitStack() as stack:
            board = self._open_logs(stack)
            saved = state.step
            if state.step == 0:
                self._save()
            stack.enter_context(self.stop)
            self.started = time.monotonic() - state.seconds
            while self.progress() < 1.0:
                stopped = not self._one_step(board) or self._stopped()
                planned = state.step % settings.checkpoint_every == 0
                if saved != state.step and (stopped or planned):
                    self._checkpoint(board, planned)
                    saved = state.step
                if stopped:
                    raise self.stop.asked or KeyboardInterrupt
            if saved != state.step or state.stopped:
                self._checkpoint(board)
        if self.world.first:  # keep_last may have changed, or a kill come between a checkpoint and this
            checkpoint.prune(self.run, settings.keep_last, state.best_step)
        return self._summary()

    def _stopped(self) -> bool:
        """Whether any process was asked to stop: all must stop at the same step."""
        asked = self.stop.asked is not None
        return asked if self.world.size == 1 else bool(self.world.sum(torch.tensor(float(asked), device=self.device)))

    def progress(self) -> float:
        """Share of the training that is done; the first process's clock counts."""
        if self.settings.minutes <= 0:
            return self._done()
        self.state.seconds = self._clock()
        return float(self.world.share(torch.tensor(self._done(), dtype=torch.float64, device=self.device)))

    def _done(self) -> float:
        state, settings = self.state, self.settings
        return state.seconds / (60 * settings.minutes) if settings.minutes > 0 else state.step / max(settings.steps, 1)

    def _finished(self) -> bool:
        """Whether nothing is left to train; told, where more was trained already than is asked for now."""
        done, step = self._done(), self.state.step
        if step and done * (step - 1) / step >= 1:
            text = f"{step} steps are done, more than are asked for now: they stay; --force trains anew"
            self.listen(Event("train", "warning", text))
        return done >= 1

    def _clock(self) -> float:
        return time.monotonic() - self.started

    def _one_step(self, board: Any) -> bool:
        """False where a stop came while drafts were made: then nothing has changed."""
        settings, state = self.settings, self.state
        progress = self.progress()
        before = replace(state), self.rows, self.drafts
        try:
            if not state.drafts and self.batches.drafts_wanted and progress >= settings.drafts_from:
                self.listen(Event("train", "note", "the student drafts its own dreams"))
                state.drafts = True
                self._begin_epoch(state.epoch, state.row)
            rows = self._next_rows()
        except drafts.Stopped:
            vars(state).update(vars(before[0]))
            self.rows, self.drafts = before[1:]
            return False
        begun = time.perf_counter()
        rate = learning_rate(settings, self.lr, state.step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        hidden = unread(settings, progress) if settings.bottleneck or settings.prompt_dropout else 0.0
        results = self._pass(rows, self.numerics.precision, self.kernel, hidden)
        norm = sharding.full(torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip))
        following = self.rows[state.row : state.row + settings.batch_rows]
        if len(following) == settings.batch_rows and not hidden:  # else another share is hidden by then
            self.ahead.prepare(following)
        loss = float(self.world.sum(torch.stack([result["loss"] for _, result in results]).sum()))
        if not math.isfinite(loss) or not math.isfinite(float(norm)):
            raise DistillError(f"training: the loss is {loss} at step {state.step + 1}; lower train.lr and start again")
        with quicker(self.new_rows, NEW_ROWS):
            self.optimizer.step()
        self.optimizer.zero_grad()
        state.step += 1
        self.average.update(state.step)
        state.tokens += settings.batch_rows * self.model.config.context
        state.seconds = self._clock()
        speed = settings.batch_rows * self.model.config.context / (time.perf_counter() - begun)
        self._report(board, results, {"loss": loss, "lr": rate, "gradient_norm": float(norm)}, speed)
        return True

    def _next_rows(self) -> list[Row]:
        """The rows of the next global batch; an epoch's end is followed by the next epoch's start."""
        state, wanted = self.state, self.settings.batch_rows
        rows: list[Row] = []
        while len(rows) < wanted:
            if state.row >= len(self.rows):
                self._begin_epoch(state.epoch + 1, 0)
            taken = self.rows[state.row : state.row + wanted - len(rows)]
            state.row += len(taken)
            rows += taken
        return rows

    def _parts(self, rows: list[Row], unread: float) -> list[Batch]:
        """This process's share of the rows, `micro_rows` of them at once."""
        mine = rows[self.world.rank :: self.world.size]
        if not mine:
            raise BadInput(f"train.batch_rows: {len(rows)} rows can't feed {self.world.size} processes; raise it")
        most = len(rows[:: self.world.size])  # that a process has; all make as many passes, as FSDP2 must
        size = self.settings.micro_rows or most
        parts = [self.batches.assemble(mine[i : i + size] or mine[:1], unread) for i in range(0, most, size)]
        if (len(parts) - 1) * size >= len(mine):
            parts[-1].loss_positions = 0  # it was read before, and counts nothing
        return [move(part, self.device) for part in parts]

    def _pass(self, rows: list[Row], precision: str, kernel: Any, unread: float = 0.0) -> Results:
        """Forward and backward over this process's share of the rows, by parts: gradients are summed, and weights
        count, over all parts and processes."""
        parts, match = self.ahead.take(rows, unread), self.settings.match
        total = float(sum(part.loss_positions for part in parts))
        if self.world.size > 1:  # alone, it needn't wait for the device
            total = float(self.world.sum(torch.tensor(total, device=self.device)))
        results: Results = []
        for batch in parts:
            batch.targets.scale(batch.loss_positions / max(total, 1.0))
            share = match * len(batch.ids) / len(rows) * (batch.loss_positions > 0)
            with sharding.summing(self.model, self.world, batch is parts[-1]):
                found = forward_backward(self.model, batch, precision, kernel, True, self.features, share)
            results.append((batch, found))
        return results

    def _begin_epoch(self, epoch: int, row: int) -> None:
        """Pack an epoch; once the student drafts its own dreams, some of what is read from `row` on holds them."""
        rows = self.batches.epoch(epoch)
        if self.state.drafts:
            self.drafts = self._drafted(self.batches.to_draft(epoch, rows[: row + self._rows_left()], row), epoch)
            rows = self.batches.drafted(epoch, rows, row, self.drafts)
        self.rows = rows
        self.state.epoch, self.state.row, self.state.drafts_row = epoch, row, row

    def _rows_left(self) -> int:
        """How many rows will be read to the end; by the clock as many as at its pace so far."""
        step, steps = self.state.step, self.settings.steps - self.state.step
        if self.settings.minutes > 0 and (done := self.progress()):
            steps = math.ceil(step / done) - step
        return self.settings.batch_rows * max(steps, 0)

    def _drafted(self, chosen: list[int], epoch: int) -> dict[int, list[int]]:
        """The student's own dreams for documents. Raises Stopped."""
        run, documents = self.run.settings, self.batches.documents
        seed = run.seed + epoch * len(documents)

        with self.average.shipped():
            model = sharding.whole(self.model, self.device)

            def dream(some: Sequence[int]) -> dict[int, list[int]]:
                return drafts.dream_on(model, documents.prompt, self.tokenizer, run.mine.steps, seed, some)

            return drafts.share_out(chosen, dream, self.world, self.device, self._stopped)

    # Measuring.
    @torch.compiler.set_stance("force_eager")  # batches of another size would each compile anew
    def validate(self) -> dict[str, float]:
        """Loss and cross-entropies on the validation documents: nats a token; bits per byte of the answers. Measured
        once at a step."""
        if self.validated[0] != self.state.step:
            with self.average.shipped():
                rows, how = self.settings.batch_rows, (self.numerics.precision, self.kernel, self.world)
                self.validated = self.state.step, validate(self.model, self.validation, rows, *how)
        return self.validated[1]

    def _choose_numerics(self, kept: numerics.Numerics | None) -> numerics.Numerics:
        settings = self.settings

        def training(step: float) -> float:
            return 60 * settings.minutes if settings.minutes > 0 else settings.steps * step

        def share(seconds: float) -> float:
            return float(self.world.share(torch.tensor(seconds, dtype=torch.float64, device=self.device)))

        part = min(self.world.size, settings.batch_rows)  # a row for each process
        trial = numerics.Trial(self.model, self._try, settings.batch_rows, part, training, share, self.listen)
        return numerics.choose(settings, trial, kept)

    def _try(self, candidate: numerics.Numerics, kernel: Any, rows: int) -> None:
        """Forward and backward over the epoch's first rows, from which nothing is learned."""
        self._pass([self.rows[i % len(self.rows)] for i in range(rows)], candidate.precision, kernel)
        self.optimizer.zero_grad()

    # What it leaves behind.
    def _open_logs(self, stack: contextlib.ExitStack) -> Any:
        """TensorBoard's writer, on the first process; metrics.jsonl loses what came after the checkpoint."""
        if not self.world.first:
            return None
        from torch.utils.tensorboard import SummaryWriter

        checkpoint.trim_metrics(self.run.metrics, lambda row: row["step"] <= self.state.step)
        board = SummaryWriter(str(self.run.path / "tensorboard"), purge_step=self.state.step + 1)
        stack.callback(board.close)
        return board

    def _report(self, board: Any, results: Results, entry: dict[str, float], speed: float) -> None:
        state, settings = self.state, self.settings
        total = 60 * settings.minutes if settings.minutes > 0 else settings.steps
        done = min(state.seconds, total) if settings.minutes > 0 else state.step
        shown = {"step": state.step, "loss": entry["loss"], "tokens_per_second": speed}
        unit = "s" if settings.minutes > 0 else "step"
        self.listen(Event("train", "progress", done=done, total=total, unit=unit, data=shown))
        measured = {} if state.step % settings.validate_every else self.validate()
        if not self.world.first or (state.step % settings.log_every and not measured):
            return
        entry |= means(results) | measured
        self._write(board, {**entry, "tokens_per_second": speed})

    def _write(self, board: Any, entry: dict[str, float]) -> None:
        state = self.state
        row = {"step": state.step, "tokens": state.tokens, "epoch": state.epoch, "seconds": round(state.seconds, 3)}
        with self.run.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, **{key: round(value, 6) for key, value in entry.items()}}) + "\n")
        for key, value in entry.items():
            board.add_scalar(key, value, state.step)

    def _checkpoint(self, board: Any, judge: bool = True) -> None:
        """Save. `judge`: it may become the best; one made by a stop may not, as without the stop it weren't there."""
        state = self.state
        state.stopped = not judge
        loss = self.validate()["validation_loss"] if judge else math.inf
        if loss < state.best_loss:
            state.best_loss, state.best_step = loss, state.step
        self._save()
        if self.world.first:
            checkpoint.prune(self.run, self.settings.keep_last, state.best_step)
            board.flush()
        self.world.wait()

    def _save(self) -> None:
        with self.average.shipped():
            raw, made = self.average.beside, drafts.stored(self.drafts) if self.drafts else {}
            checkpoint.save_checkpoint(self.run, self.model, self.optimizer, self.state, made, raw, world=self.world)

    def _summary(self) -> dict[str, Any]:
        state = self.state
        return {
            "steps": state.step,
            "tokens": state.tokens,
            "epochs": state.epoch,
            "parameters": count_parameters(self.model),
            "best_step": state.best_step,
            "validation_loss": round(state.best_loss, 6),
            "tokens_per_second": round(state.tokens / max(state.seconds, 1e-9), 1),
            "optimizer": state.optimizer,
            "numerics": self.numerics.label,
            "trial": self.numerics.trial,
            "trial_seconds": self.numerics.seconds,
            "device": str(self.device),
            "processes": self.world.size,
        }
