"""One training: packed batches, fused distillation loss, checkpoints, and a resume that changes nothing.

Whatever step N does follows from the checkpoint before it: batches from (seed, epoch), the learning rate from the
progress, drafts from the checkpoint. Only with `train.minutes` does the clock decide, so such a training resumes
where it was, but two of them are not equal to the last bit.
"""

import contextlib
import json
import math
import signal
import time
from typing import Any

import torch
from torch import Tensor

from distill.backbone.model import count_parameters, load_backbone
from distill.errors import BadInput, CorruptFile, DistillError
from distill.events import Event, Listener
from distill.run import Run, sha256_file, write_atomic
from distill.student.grammar import DreamGrammar, longest_path
from distill.student.initialize import new_student
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.packing import Documents
from distill.training import checkpoint, drafts, numerics
from distill.training.average import Average
from distill.training.batches import Batch, Batches, Mixture, Row
from distill.training.checkpoint import LoopState
from distill.training.distributed import World
from distill.training.features import Features
from distill.training.muon import Muon
from distill.training.plan import (
    CHANCE_LR,
    FREE,
    INHERITED_LR,
    check_settings,
    data_fingerprint,
    learning_rate,
    optimizer_for,
    train_settings,
)
from distill.training.start import is_inherited, started_at
from distill.training.step import forward_backward, make_optimizer, move, pick_device


class Interrupt:
    """Within it the first Ctrl-C only asks; a second one is a KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> "Interrupt":
        with contextlib.suppress(ValueError):  # signals belong to the main thread; elsewhere there is none to catch
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


class Trainer:
    """One training: model, optimizer, data and where it stands."""

    def __init__(self, run: Run, world: World, listen: Listener) -> None:
        self.run, self.world, self.listen = run, world, listen
        self.settings = settings = run.settings.train
        check_settings(settings)
        self.device = pick_device(settings.device)
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
        self.model.train().to(self.device)
        betas = (settings.betas[0], settings.betas[1])
        self.lr = settings.lr or (INHERITED_LR if inherited else CHANCE_LR)
        muon = self.state.optimizer == "muon"
        self.optimizer = make_optimizer(self.model, self.lr, betas, settings.weight_decay, muon)
        self.average = Average(self.model, settings.average)
        length = self.model.config.context
        drafts_share = 0.0 if settings.pause else settings.drafts_share
        mixture = Mixture(settings.dreams, settings.empty_dreams, drafts_share, settings.pause)
        grammar = None if settings.pause else DreamGrammar(self.tokenizer, longest_path(run.settings))
        data = (Documents.load(run.data / name) for name in ("train", "validation"))
        self.batches, self.validation = (
            Batches(documents, self.tokenizer, length, mixture, seed, settings.soft_weight, grammar, settings.strict)
            for documents in data
        )
        self.drafts: drafts.Drafts = {}
        if found:
            if settings.average:
                self.average.restore(checkpoint.load_raw(found[-1]))
            if self.state.step:
                checkpoint.load_optimizer(found[-1], self.model, self.optimizer)
            self._take_drafts(checkpoint.load_drafts(found[-1]))
        if left_out := self.batches.left_out:
            text = f"{left_out} prompts fill student.context={length} and are left out; raise it to train on them"
            listen(Event("train", "warning", text))
        self.rows = self.batches.epoch(self.state.epoch)
        self.kernel: Any = None
        self.features = Features.of(run, self.tokenizer, self.device, listen) if settings.match else None

    def _fixed(self) -> dict[str, Any]:
        settings = {key: value for key, value in train_settings(self.run).items() if key not in FREE}
        settings["data"] = data_fingerprint(self.run)
        start = started_at(self.run)
        settings["start"] = sha256_file(start / "model.safetensors") if start else None
        return settings

    # The loop.
    def fit(self) -> dict[str, Any]:
        """Train to the end of `steps` or `minutes`. The clock runs while it trains, not while it finds out how."""
        settings, state = self.settings, self.state
        chosen = numerics.load(self.run.checkpoints / "numerics.json") if state.step else None
        self.numerics = chosen or self._choose_numerics()
        self.kernel = numerics.apply(self.numerics, self.model)
        if isinstance(self.optimizer, Muon):
            self.optimizer.precision = getattr(torch, self.numerics.precision)
        if self.numerics.compiled:
            self._pass(self.numerics, self.kernel, settings.batch_rows)  # compiles
        with contextlib.ExitStack() as stack:
            board = self._open_logs(stack)
            saved = state.step
            if state.step == 0 and self.world.first:
                numerics.save(self.numerics, self.run.checkpoints / "numerics.json")
                self._save()
            stop = stack.enter_context(Interrupt())
            self.started = time.monotonic() - state.seconds
            while self.progress() < 1.0:
                self._one_step(board)
                stopped = self._anyone(stop.asked)
                if stopped or state.step % settings.checkpoint_every == 0:
                    self._checkpoint(board, judge=state.step % settings.checkpoint_every == 0)
                    saved = state.step
                if stopped:
                    raise KeyboardInterrupt
            if saved != state.step:
                self._checkpoint(board)
        return self._summary()

    def _anyone(self, asked: bool) -> bool:
        """Whether any process was asked to stop: all must stop at the same step."""
        return asked if self.world.size == 1 else bool(self.world.sum(torch.tensor(float(asked), device=self.device)))

    def progress(self) -> float:
        """Share of the training that is done; the first process's clock counts."""
        state, settings = self.state, self.settings
        if settings.minutes <= 0:
            return state.step / max(settings.steps, 1)
        state.seconds = self._clock()
        share = torch.tensor(state.seconds / (60 * settings.minutes), dtype=torch.float64, device=self.device)
        return float(self.world.share(share))

    def _clock(self) -> float:
        return time.monotonic() - self.started

    def _one_step(self, board: Any) -> None:
        settings, state = self.settings, self.state
        progress = self.progress()
        if not state.drafts and self._drafts_wanted() and progress >= settings.drafts_from:
            self._draft()
        begun = time.perf_counter()
        rate = learning_rate(settings, self.lr, state.step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self._batch(self._next_rows())
        matched = (self.features, settings.match)
        result = forward_backward(self.model, batch, self.numerics.precision, self.kernel, True, *matched)
        parameters = list(self.model.parameters())
        self.world.sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        loss = float(self.world.sum(result["loss"]))
        if not math.isfinite(loss) or not math.isfinite(float(norm)):
            raise DistillError(f"training: the loss is {loss} at step {state.step + 1}; lower train.lr and start again")
        self.optimizer.step()
        self.optimizer.zero_grad()
        state.step += 1
        self.average.update(state.step)
        state.tokens += settings.batch_rows * self.model.config.context
        state.seconds = self._clock()
        speed = settings.batch_rows * self.model.config.context / (time.perf_counter() - begun)
        self._report(board, batch, result, {"loss": loss, "lr": rate, "gradient_norm": float(norm)}, speed)

    def _next_rows(self) -> list[Row]:
        """The rows of the next global batch; an epoch's end is followed by the next epoch's start."""
        state, wanted = self.state, self.settings.batch_rows
        rows: list[Row] = []
        while len(rows) < wanted:
            if state.row >= len(self.rows):
                state.epoch, state.row = state.epoch + 1, 0
                self.rows = self.batches.epoch(state.epoch)
            taken = self.rows[state.row : state.row + wanted - len(rows)]
            state.row += len(taken)
            rows += taken
        return rows

    def _batch(self, rows: list[Row], data: Batches | None = None) -> Batch:
        """This process's share of the rows, on the device; weights count over all processes."""
        mine = rows[self.world.rank :: self.world.size]
        if not mine:
            raise BadInput(f"train.batch_rows: {len(rows)} rows can't feed {self.world.size} processes; raise it")
        batch = (data or self.batches).assemble(mine)
        total = self.world.sum(torch.tensor(float(batch.loss_positions), device=self.device))
        batch.targets.weight *= batch.loss_positions / max(float(total), 1.0)
        return move(batch, self.device)

    def _drafts_wanted(self) -> bool:
        mixture = self.batches.mixture
        return mixture.dreams and mixture.drafts > 0

    def _draft(self) -> None:
        """From the next epoch on, some documents hold a dream of the student's own."""
        state = self.state
        self.listen(Event("train", "note", "the student drafts its own dreams"))
        made: drafts.Drafts = {}
        if self.world.first:
            steps, seed = self.run.settings.mine.steps, self.run.settings.seed
            with self.average.shipped():
                made = drafts.dream_on(self.model, self.batches.documents, self.tokenizer, steps, seed)
        self._take_drafts(drafts.share(made, self.world, self.device))
        state.drafts, state.epoch, state.row = True, state.epoch + 1, 0
        self.rows = self.batches.epoch(state.epoch)

    def _take_drafts(self, made: drafts.Drafts) -> None:
        self.drafts, self.batches.drafts = made, drafts.by_document(made)

    # Measuring.
    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # batches of another size would each compile anew
    def validate(self) -> dict[str, float]:
        """Loss and cross-entropies on the validation documents: nats a token; bits per byte of the answers."""
        with self.average.shipped():
            return self._validate()

    def _validate(self) -> dict[str, float]:
        totals = torch.zeros(4, dtype=torch.float64)
        rows = self.validation.epoch(0)
        size = max(self.settings.batch_rows, 1)
        self.model.eval()
        for start in range(0, len(rows), size):
            batch = move(self.validation.assemble(rows[start : start + size]), self.device)
            result = forward_backward(self.model, batch, self.numerics.precision, self.kernel, backward=False)
            real = batch.targets.weight > 0
            answers = real & batch.answers
            totals += torch.tensor(
                [
                    float(result["loss"]) * batch.loss_positions,
                    batch.loss_positions,
                    float(result["ce"][answers].sum()),
                    float(answers.sum()),
                ],
                dtype=torch.float64,
            )
        self.model.train()
        documents = self.validation.documents
        tokens_a_byte = len(documents.answer_ids) / max(int(documents.answer_bytes.sum()), 1)
        cross_entropy = float(totals[2] / totals[3].clamp_min(1))
        return {
            "validation_loss": float(totals[0] / totals[1].clamp_min(1)),
            "validation_bits_per_byte": cross_entropy * tokens_a_byte / math.log(2),
        }

    def _choose_numerics(self) -> numerics.Numerics:
        settings = self.settings

        def training(step: float) -> float:
            return 60 * settings.minutes if settings.minutes > 0 else settings.steps * step

        def share(seconds: float) -> float:
            return float(self.world.share(torch.tensor(seconds, dtype=torch.float64, device=self.device)))

        part = min(self.world.size, settings.batch_rows)  # a row for each process
        trial = numerics.Trial(self.model, self._pass, settings.batch_rows, part, training, share, self.listen)
        return numerics.choose(settings, trial)

    def _pass(self, candidate: numerics.Numerics, kernel: Any, rows: int) -> None:
        """Forward and backward over the epoch's first rows, from which nothing is learned."""
        batch = self._batch([self.rows[i % len(self.rows)] for i in range(rows)])
        forward_backward(self.model, batch, candidate.precision, kernel)
        self.world.sum_gradients(list(self.model.parameters()))
        self.optimizer.zero_grad()

    # What it leaves behind.
    def _open_logs(self, stack: contextlib.ExitStack) -> Any:
        """TensorBoard's writer, on the first process; metrics.jsonl loses what came after the checkpoint."""
        if not self.world.first:
            return None
        from torch.utils.tensorboard import SummaryWriter

        if self.run.metrics.exists():
            lines = self.run.metrics.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= self.state.step]
            write_atomic(self.run.metrics, "".join(f"{line}\n" for line in kept))
        board = SummaryWriter(str(self.run.path / "tensorboard"), purge_step=self.state.step + 1)
        stack.callback(board.close)
        return board

    def _report(
        self, board: Any, batch: Batch, result: dict[str, Tensor], entry: dict[str, float], speed: float
    ) -> None:
        state, settings = self.state, self.settings
        total = 60 * settings.minutes if settings.minutes > 0 else settings.steps
        done = min(state.seconds, total) if settings.minutes > 0 else state.step
        shown = {"step": state.step, "loss": entry["loss"], "tokens_per_second": speed}
        unit = "s" if settings.minutes > 0 else "step"
        self.listen(Event("train", "progress", done=done, total=total, unit=unit, data=shown))
        if not self.world.first or (state.step % settings.log_every and state.step % settings.validate_every):
            return
        real = batch.targets.weight > 0
        answers, dreams = real & batch.answers, real & ~batch.answers
        soft = answers & (batch.targets.soft_weight > 0) if batch.chunks is None else None
        entry["kl"] = float(result["kl"][soft].mean() if soft is not None and soft.any() else result["kl"].mean())
        entry["answer_cross_entropy"] = float(result["ce"][answers].mean())
        if "match" in result:
            entry["match"] = float(result["match"])
        if dreams.any():
            entry["dream_cross_entropy"] = float(result["ce"][dreams].mean())
        if state.step % settings.validate_every == 0:
            entry |= self.validate()
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
        if self.world.first:
            loss = self.validate()["validation_loss"] if judge else math.inf
            if loss < state.best_loss:
                state.best_loss, state.best_step = loss, state.step
            self._save()
            checkpoint.prune(self.run, self.settings.keep_last, state.best_step)
            board.flush()
        self.world.wait()

    def _save(self) -> None:
        with self.average.shipped():
            raw = self.average.beside
            checkpoint.save_checkpoint(self.run, self.model, self.optimizer, self.state, self.drafts, raw)

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


def _step_of(line: str) -> float:
    """A metrics line's step; infinite for a line that a kill cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
