"""Learning to read pictures themselves: the `see` stage, after which Ollama can show them, too.

A trained student reads what the run's map saw of a picture, as image tokens. Here it learns to read the picture's patch
features, which a projector turns into embeddings like its words' own: the projector first, then both (LLaVA,
arXiv:2310.03744). The projector learns without the student to say of each patch what stands there, in words that the
student knows (`distill.vision.naming`). Then half of the steps show the picture alone, where Ollama puts it, before the
question; a quarter the image tokens beside it, a quarter the tokens alone, as before.

Shape legend: N pictures, P patches of each, W the encoder's width, D the student's, V vocabulary.
"""

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.backbone.generate import generate
from distill.corpus.traces import TraceStore
from distill.errors import BadInput, CorruptFile
from distill.events import Event, Listener, silent
from distill.learning.onward import Onward
from distill.run import Run, fingerprint, publish_folder, sha256_file, write_atomic
from distill.tokens.chat import PICTURE, Message, picture_ids, render
from distill.tokens.image_tokens import Codebook
from distill.tokens.packing import pack, split_traces
from distill.tokens.shown import NAMED, PLACES, show
from distill.training import checkpoint
from distill.training.batches import Batch
from distill.training.losses import tail_kernel
from distill.training.mixture import Mixture
from distill.training.step import forward_backward, make_optimizer, move
from distill.vision import PROJECTOR
from distill.vision.dinov2 import dinov2_small
from distill.vision.naming import name_patches, patch_truths
from distill.vision.seeing import found_in
from distill.vision.sight import TOGETHER, Sight, showing

VERSION = 3
ASIDE = "see"
"""Folder of a run: how far it has come."""
BLOCKS = 2 / 3
"""Share of the encoder's blocks that are looked through: what comes after tells kinds of things, less which one."""
KINDS = ("picture", "both", "tokens")
"""How a picture is read: by its patches, by its image tokens, by both."""
TURNS = ("picture", "both", "picture", "tokens")
"""What of pictures the steps show, in turn."""
LR = 1e-3
"""Where the training names none (`train.lr`)."""
RISING, LEAST_RATE = 20, 0.05
"""Steps over which the learning rate rises, and the share of it that is left at the end; it falls evenly."""
MOST = 20_000
"""Pictures whose features are held at once: 1 GB of 64 patches each."""
EVERY = 50
"""Steps after which it is kept how far it has come."""
ASKED = 100
"""Questions about pictures never trained on that are asked at the end."""
ROOM = 96
"""Tokens of a dream and its answer then."""


def see(run: Run, listen: Listener = silent, force: bool = False) -> dict[str, Any]:
    """Teach the run's best student to read pictures; what comes out is the run's best checkpoint, with mmproj.gguf.
    Returns how well it tells what pictures show.

    Raises MissingStage before a training, BadInput for a run without pictures or a context without room for one,
    RunMismatch where the student has gone on to learn since.
    """
    settings = run.settings.see
    run.require("train")
    how = {**asdict(settings), "weights": run.settings.vision.weights, "seed": run.settings.seed, "version": VERSION}
    if not force and (record := run.fresh("see", how)) is not None:
        listen(Event("see", "done", "nothing changed: kept", data=record.summary))
        return record.summary
    if not settings.steps:
        return {"skipped": "see.steps is 0"}
    checkpoint.refuse(run, "see")
    started = time.monotonic()
    pack(run, listen)
    seeing = Seeing(run, how, listen)
    if force:
        run.forget("see")
        shutil.rmtree(seeing.aside, ignore_errors=True)
    summary = seeing.perform()
    seeing.record("see", how, summary, time.monotonic() - started)
    shutil.rmtree(seeing.aside, ignore_errors=True)
    listen(Event("see", "done", f"{summary['steps']} steps", data=summary))
    return summary


def undo(run: Run) -> int:
    """Go back to the student before: delete what this left, and what went on from there; returns how many checkpoints
    that were."""
    shutil.rmtree(run.path / ASIDE, ignore_errors=True)
    return checkpoint.drop(run, "see")


class Reader(nn.Embedding):
    """Embeddings of tokens; from V on, ids are patches: rows of `features` (N · P, W), through the projector."""

    def __init__(self, words: nn.Embedding, projector: nn.Module, features: Tensor) -> None:
        super().__init__(words.num_embeddings, words.embedding_dim, _weight=words.weight)
        self.weight = words.weight  # itself: the head may be tied to it
        self.projector, self.features = projector, features

    def forward(self, input: Tensor) -> Tensor:
        first = self.num_embeddings
        read = super().forward(input.clamp_max(first - 1))
        seen = input >= first
        if seen.any():
            patches = self.features[(input[seen] - first).cpu()].to(read.device, torch.float32)
            read = read.masked_scatter(seen.unsqueeze(-1), self.projector(patches).to(read.dtype))
        return read


class Seeing(Onward):
    """One learning to see of a run. aside: where it is kept how far it has come, so that it goes on from there."""

    def __init__(self, run: Run, how: Mapping[str, Any], listen: Listener) -> None:
        super().__init__(run, LR, anew="see")
        self.aside = run.path / ASIDE
        learned = asdict(run.settings.train), run.settings.capture.system, sha256_file(self.begun / "checksums.json")
        self.same = fingerprint([how, *learned])
        self.listen, self.settings = listen, run.settings.see
        self.base = checkpoint.read_loop(checkpoint.latest(run, "see"))
        own = run.settings.vision.weights if run.settings.vision.backbone == "dinov2" else ""
        source, whose = own or str(dinov2_small(listen)), f"that of {Path(own).name}" if own else ""
        hidden, size = self.model.config.hidden, self.settings.image_size
        self.sight = Sight.new(source, size, hidden, run.settings.seed, whose, BLOCKS)
        with TraceStore(run.traces, readonly=True) as store:
            self.asked = split_traces(store)[0]
            held = [trace for trace in store.traces(held_out=True) if NAMED.search(trace.prompt)]
        self.held = held[:: max(1, len(held) // ASKED)][:ASKED]
        pictures = dict.fromkeys(path for trace in self.asked for path in NAMED.findall(trace.prompt))
        if not pictures or not self.held:
            raise BadInput(f"{run.path}: its questions name no pictures; see `dream run --config emoji-scenes`")
        if len(pictures) > MOST:
            text = f"of {len(pictures)} pictures only the first {MOST} are looked at, of the others the tokens are read"
            listen(Event("see", "warning", text))
        self.places = {path: place for place, path in enumerate(list(pictures)[:MOST])}
        self.features = self._features()
        self.sight.projector = self._named()
        self.sources = {kind: self._rows(kind) for kind in KINDS}

    def _features(self) -> Tensor:
        """(N · P, W) float16 of the training's pictures."""
        files, parts = [str(self.run.path / path) for path in self.places], list[Tensor]()
        while (done := len(parts) * TOGETHER) < len(files):
            self.listen(Event("see", "progress", "looking", done=done, total=len(files), unit="pictures"))
            parts.append(self.sight.features(files[done : done + TOGETHER]).half())
        return torch.cat(parts).flatten(0, 1)

    def _named(self) -> nn.Sequential:
        """The projector that says of patches what the training's pictures are known to show."""
        tokenizer, codebook = self.tokenizer, Codebook.load(self.run.tokenizer, self.run.settings.teacher)
        shown, _ = found_in(self.run)
        names = sorted({name for path in self.places for name in shown[path]})
        code = dict(zip(names, codebook.encode(names).tolist(), strict=True))
        pictures = ((self.run.path / path, shown[path]) for path in self.places)
        truths = patch_truths(pictures, code, self.sight.size // self.sight.patch)
        places = [tokenizer.encode(f" {place}")[0] for place in PLACES]
        words = [tokenizer.newline_id, *tokenizer.image_ids.tolist(), *places]
        rows = self.model.model.embed_tokens.weight.detach().cpu()[words]
        return name_patches(self.features, truths, rows, len(places), self.run.settings.seed, self.listen)

    def _rows(self, kind: str) -> Iterator[Batch]:
        """Batches without an end in which pictures are read so."""
        documents = self.given.documents
        prompts = [self._prompt(trace.prompt, kind, self.places) for trace in self.asked]
        ids, ends = np.concatenate(prompts), np.cumsum([len(prompt) for prompt in prompts])
        train, size = self.run.settings.train, self.run.settings.train.batch_rows
        own = self.batches(replace(documents, prompt_ids=ids, prompt_ends=ends), Mixture.of(train), train.soft_weight)
        if own.left_out:
            text = f"{own.left_out} prompts, read by {kind}, fill the context of {own.length} tokens: left out"
            self.listen(Event("see", "warning", text))
        rows = chain.from_iterable(own.epoch(epoch) for epoch in count())
        return (own.assemble(list(islice(rows, size))) for _ in count())

    def _prompt(self, prompt: str, kind: str, places: Mapping[str, int]) -> list[int]:
        """Ids of a question; the patches of a picture are those from V on that its place says."""
        paths, patches = NAMED.findall(prompt), self.sight.patches
        if not all(path in places for path in paths):
            kind = "tokens"
        said = NAMED.sub("", prompt).strip() if kind == "picture" else show(prompt, self.tokenizer.shown)
        firsts = [] if kind == "tokens" else [self.tokenizer.vocab_size + places[path] * patches for path in paths]
        system: list[Message] = [{"role": "system", "content": self.run.settings.capture.system}]
        turn: Message = {"role": "user", "content": PICTURE * len(firsts) + said}
        text = render([*(system if system[0]["content"] else []), turn])
        return picture_ids(self.tokenizer, text, [range(first, first + patches) for first in firsts])

    def perform(self) -> dict[str, Any]:
        """All steps, and a checkpoint. Returns the summary."""
        stack, steps, losses = self.model.model, self.settings.steps, list[float]()
        words = stack.embed_tokens
        self.model.train()
        stack.embed_tokens = Reader(words, self.sight.projector.to(words.weight.device), self.features)
        # As it was trained: Muon teaches a student from chance to see in far fewer steps.
        muon, betas = self.base.optimizer == "muon", self.run.settings.train.betas
        peak = self.run.settings.train.lr or LR
        self.optimizer = make_optimizer(self.model, peak, (betas[0], betas[1]), 0.0, muon)
        kept = self._kept()
        for step in range(steps):
            batch = next(self.sources[TURNS[step % len(TURNS)]])
            if step < kept:  # read before it was stopped
                continue
            batch = move(batch, words.weight.device)
            losses.append(float(forward_backward(self.model, batch, self.precision, tail_kernel)["loss"]))
            self.descend(peak * min((step + 1) / RISING, max(LEAST_RATE, 1 - step / steps)))
            self.listen(
                Event("see", "progress", done=step + 1, total=steps, unit="steps", data={"loss": round(losses[-1], 3)})
            )
            if (step + 1) % EVERY == 0:
                self._keep(step + 1)
        stack.embed_tokens = words
        self.sight.projector.cpu().requires_grad_(False)
        self.keep(self.base, steps, "see", asdict(self.settings))
        return {"steps": steps, "pictures": len(self.places), "patches": self.sight.patches, **self._told()}

    def beside(self, folder: Path) -> None:
        self.sight.save(folder / PROJECTOR)

    def _keep(self, step: int) -> None:
        with publish_folder(self.aside) as folder:
            weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
            save_file(weights, folder / "model.safetensors")
            save_file(checkpoint.optimizer_tensors(self.model, self.optimizer), folder / "optimizer.safetensors")
            write_atomic(folder / "loop.json", json.dumps({"step": step, "same": self.same}) + "\n")

    def _kept(self) -> int:
        """Steps that were done, with these settings from this student, before it was stopped; it is as it was then."""
        path = self.aside / "loop.json"
        try:
            told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if told.get("same") != self.same:
                return 0
            weights = load_file(self.aside / "model.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise CorruptFile(f"{self.aside}: can't be read ({error}); delete it to begin again") from error
        self.model.load_state_dict(weights)
        checkpoint.load_optimizer(self.aside, self.model, self.optimizer, "begin again")
        return told["step"]

    def _told(self) -> dict[str, float]:
        """Share of questions about pictures never trained on that are answered exactly right."""
        self.model.eval()
        paths = list(dict.fromkeys(path for trace in self.held for path in NAMED.findall(trace.prompt)))
        places = {path: place for place, path in enumerate(paths)}
        shown = showing(self.model, self.sight.rows([str(self.run.path / path) for path in paths]))
        found: dict[str, float] = {"asked": len(self.held)}
        for kind in KINDS:
            prompts = [self._prompt(trace.prompt, kind, places) for trace in self.held]
            said = generate(
                shown, prompts, max_tokens=ROOM, stop_ids=[self.tokenizer.eos_id], grammar=self.grammar, batch_rows=16
            )
            right = [
                self._answer(ids) == trace.response.text.strip() for ids, trace in zip(said, self.held, strict=True)
            ]
            found[f"right_by_{kind}"] = round(float(np.mean(right)), 3)
        return found

    def _answer(self, ids: Sequence[int]) -> str:
        """What comes after the dream."""
        end = self.tokenizer.end_think_id
        return self.tokenizer.decode(ids[ids.index(end) + 1 if end in ids else 0 :], skip_special=True).strip()
