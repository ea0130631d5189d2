"""Learning by rewards: the `reward` stage.

The student answers training prompts several times each, dreams and answers both drawn from what it would write under
its grammar; each reply is judged, and those that are better than others to the same prompt become likelier
(GRPO, distill/backbone/reinforce.py). A leash holds it to where it began.

A round is so many prompts, the replies to them, and the steps that learn from these; at its end there is a checkpoint,
so that a learning that was stopped goes on with the round that it was in.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.backbone.generate import generate
from distill.backbone.model import load_backbone
from distill.backbone.reinforce import Rollout, advantages, note_logprobs, policy_gradients
from distill.corpus.traces import TraceStore
from distill.errors import BadInput, RunMismatch
from distill.events import Event, Listener, silent
from distill.learning.onward import Onward
from distill.learning.reward_model import RewardModel, answer_features, calibration_error, read_pairs
from distill.learning.rewards import Judge, Reply, learned_from, open_judge
from distill.run import Run, sha256_file
from distill.student.grammar import dream_size
from distill.student.made_with import made_with
from distill.tokens.chat import think_block
from distill.tokens.packing import Asked, Documents, pack, split_traces
from distill.training import checkpoint

VERSION = 1
TOGETHER = 64
"""Replies a step."""
WARMUP = 10
"""Steps until the learning rate is whole: the first ones know nothing yet of how much gradients vary."""
SHOWN = 3
"""Validation prompts whose answers are shown, before and after."""


def reinforce(
    run: Run,
    listen: Listener = silent,
    force: bool = False,
    by: str = "",
    rounds: int = 30,
    prompts: int = 16,
    samples: int = 8,
    lr: float = 2e-5,
    beta: float = 0.04,
) -> dict[str, Any]:
    """Let the run's best checkpoint learn by a reward, or go on; what comes out is the run's best checkpoint then.
    Returns what it changed: the reward of its likeliest replies to validation prompts, before and after.

    by: `exact`, `feedback`, `pairs:FILE`, `schema:FILE` or `MODULE:FUNCTION`. Raises MissingStage before a training,
    BadInput for what is no reward, RunMismatch where a learning by another one is there (with `force` it goes once the
    first round is done).
    """
    run.require("train")
    pairs = learned_from(by, run)
    judge, source = (None, pairs) if pairs else open_judge(by, run)
    same = {"by": by, "prompts": prompts, "samples": samples, "lr": lr, "beta": beta}
    same |= {"source": _digest(source), "seed": run.settings.seed, "version": VERSION}
    how = {**same, "rounds": rounds}
    if not force and (record := run.fresh("reward", how)) is not None:
        listen(Event("reward", "done", "nothing changed: kept", data=record.summary))
        return record.summary
    pack(run, listen)
    learning = Reinforcing(run, same, listen, force)
    summary = {} if pairs is None else learning.learn_reward(pairs)
    learning.judge = judge or learning.by_model
    if rounds and "before" not in learning.told:
        learning.told["before"] = learning.measured()
    if rounds:
        summary |= learning.perform(rounds)
    learning.record("reward", how, summary, learning.told["seconds"])
    listen(Event("reward", "done", f"{rounds} rounds", data=summary))
    return summary


def _digest(source: Path | None) -> str:
    try:
        return sha256_file(source) if source else ""
    except OSError as error:
        raise BadInput(f"{source}: can't be read: {error.strerror}") from error


class Reinforcing(Onward):
    """One learning of a run. told: what its checkpoints know of it; judge: who says what a reply is worth. anew: it
    begins with the student before any reward."""

    judge: Judge

    def __init__(self, run: Run, same: Mapping[str, Any], listen: Listener, anew: bool) -> None:
        super().__init__(run, same["lr"], anew="reward" if anew else "")
        self.listen, self.how = listen, same
        self.told: dict[str, Any] = {"how": same, "round": 0, "steps": 0, "seconds": 0.0, "rewards": []}
        self.told["begun"] = self.begun.name
        if checkpoint.stage_of(self.begun) == "reward":
            self.told = checkpoint.read_loop(self.begun).settings["reward"]
            if self.told["how"] != same:
                text = f"{self.begun}: learned by another reward, or otherwise; --force begins again where that began"
                raise RunMismatch(f"{text}, `dream reward {run.path} --undo` goes back there")
            checkpoint.load_optimizer(self.begun, self.model, self.optimizer)
        begun = run.checkpoints / self.told["begun"]
        checkpoint.verify_checkpoint(begun)
        self.before = load_backbone(begun).to(self.model.cos.device).eval()
        self.base = checkpoint.read_loop(checkpoint.latest(run, "reward"))
        with TraceStore(run.traces, readonly=True) as store:
            self.traces = split_traces(store)
        self.model.eval()

    def learn_reward(self, path: Path) -> dict[str, Any]:
        """Fit a reward model to the pairs in a file and keep it in RUN/reward, or take it up again where it is of these
        and this student, and nothing begins anew; how right it is on pairs held out."""
        folder, device = self.run.path / "reward", self.model.cos.device
        of = {"student": sha256_file(self.run.checkpoints / self.told["begun"] / "model.safetensors")}
        of["source"] = self.how["source"]
        if folder.is_dir() and not self.anew:
            kept, about = RewardModel.load(folder)
            if of.items() <= about.items():
                self.model_of_rewards = kept.to(device)
                return {name: value for name, value in about.items() if name not in of}
        system = made_with(self.run).capture.system
        pairs = read_pairs(path, self.tokenizer, system, self.model.config.context, self.listen)
        questions = [pair.question for pair in pairs]
        better, worse = (
            answer_features(self.before, questions, answers).double().cpu().numpy()
            for answers in ([pair.better for pair in pairs], [pair.worse for pair in pairs])
        )
        numbers = {question: i for i, question in enumerate(dict.fromkeys(map(tuple, questions)))}
        self.model_of_rewards = RewardModel(better.shape[1]).to(device)
        chances = self.model_of_rewards.fit(better, worse, [numbers[tuple(question)] for question in questions])
        right, error = float((chances > 0.5).mean()), calibration_error(chances)
        told = {"pairs": len(pairs), "pairs_right": round(right, 3), "calibration_error": round(error, 3)}
        self.model_of_rewards.save(folder, {**told, **of})
        text = f"of {len(pairs)} pairs {right:.1%} are told right by a reward that hasn't seen them"
        self.listen(Event("reward", "note", text))
        return told

    @torch.no_grad()
    def by_model(self, replies: Sequence[Reply]) -> list[float]:
        """Rewards by the pairs' model, which reads with the student as it was."""
        features = answer_features(self.before, [each.question for each in replies], [each.words for each in replies])
        return self.model_of_rewards(features).tolist()

    def perform(self, rounds: int) -> dict[str, Any]:
        """Round after round, each kept; the summary."""
        told = self.told
        self.listen(Event("reward", "start", "the student answers, and learns from what its answers are worth"))
        with self.board("reward", told["round"]) as board:
            while told["round"] < rounds:
                started = time.monotonic()
                data = self._round(told["round"])
                told["round"] += 1
                told["rewards"].append(round(data["reward"], 4))
                told["seconds"] = round(told["seconds"] + time.monotonic() - started, 1)
                self.keep(self.base, told["round"], "reward", told)
                for name, value in data.items():
                    board.add_scalar(name, value, told["round"])
                self.listen(Event("reward", "progress", done=told["round"], total=rounds, unit="rounds", data=data))
            before, now = told["before"], self.measured()
            board.add_scalar("final_reward", now["reward"], told["round"])
        shown = zip(before["said"], now["said"], strict=False)
        counts = {"rounds": told["round"], "steps": told["steps"]}
        summary = {**counts, "reward_before": before["reward"], "final_reward": now["reward"]}
        summary |= {"sampled_reward_before": told["rewards"][0], "sampled_reward": told["rewards"][-1]}
        summary |= {"bits_per_byte_before": before["bits_per_byte"], "bits_per_byte": now["bits_per_byte"]}
        return summary | {"examples": [{"prompt": one, "before": old, "after": new} for (one, old), (_, new) in shown]}

    def measured(self) -> dict[str, Any]:
        """Of the likeliest replies to validation prompts: their mean reward, and some of them; bits per byte."""
        documents, traces = self.validation.documents, self.traces[1]
        chosen = self.fitting(documents)
        _, replies = self._write(documents, traces, chosen, self.run.settings.train.dreams, 1, 0.0, 0)
        said = [[each.prompt, each.answer] for each in replies[:SHOWN]]
        reward = round(float(np.mean(self.judge(replies))), 4)
        return {"reward": reward, "said": said, "bits_per_byte": self.bits_per_byte()}

    def _write(
        self, documents: Documents, traces: Sequence[Asked], chosen: Sequence[int], dream: bool, samples: int,
        temperature: float, seed: int,
    ) -> tuple[list[Rollout], list[Reply]]:  # fmt: skip
        """So many replies to each of the documents' prompts, dreamt before or not, and what they are to a judge."""
        tokenizer, none = self.tokenizer, think_block(self.tokenizer, [])
        grammar = self.grammar.inside if dream else self.grammar.answering
        head = none[:2] if dream else none
        each = [i for i in chosen for _ in range(samples)]
        prompts = [documents.prompt(i).tolist() for i in each]
        written = generate(
            self.model,
            contexts := [[*prompt, *head] for prompt in prompts],
            max_tokens=self.run.settings.capture.max_tokens + (dream_size(self.grammar.steps) if dream else 0),
            temperature=temperature,
            seed=seed,
            stop_ids=[tokenizer.eos_id],
            batch_rows=128,
            grammar=grammar,
        )
        replies: list[Reply] = []
        for i, prompt, ids in zip(each, prompts, written, strict=True):
            woken = ids.index(tokenizer.end_think_id) + 2 if tokenizer.end_think_id in ids else len(ids) * dream
            words, trace = ids[woken:], traces[i]
            said = tokenizer.decode(words, skip_special=True).strip()
            replies.append(Reply(trace.key, trace.prompt, said, [*prompt, *none], words))
        rollouts = [Rollout(context, ids, grammar.rows(ids)) for context, ids in zip(contexts, written, strict=True)]
        return rollouts, replies

    def _round(self, number: int) -> dict[str, float]:
        """Replies, what they are worth, and what is learned from it: means of rewards, losses and divergences."""
        random, documents = np.random.default_rng([self.run.settings.seed, number]), self.given.documents
        fit, samples, train = self.fitting(documents), self.how["samples"], self.run.settings.train
        chosen = random.choice(fit, min(self.how["prompts"], len(fit)), replace=False).tolist()
        awake = random.random(len(chosen)) < (train.empty_dreams if train.dreams else 1.0)
        rollouts, rewards = list[Rollout](), list[float]()
        for dream in (True, False):
            some = [i for i, empty in zip(chosen, awake, strict=True) if empty != dream]
            seed = int(random.integers(2**40))
            written, replies = self._write(documents, self.traces[0], some, dream, samples, 1.0, seed)
            rollouts += written
            rewards += self.judge(replies) if replies else []
        found = advantages(torch.tensor(rewards, dtype=torch.float64).view(-1, samples)).flatten().tolist()
        for each, advantage in zip(rollouts, found, strict=True):
            each.advantage = advantage
        # Where all replies to a prompt are worth the same there is nothing to learn.
        telling = [rollouts[i] for i in random.permutation(len(rollouts)).tolist() if rollouts[i].advantage]
        for model, name in ((self.model, "old"), (self.before, "begun")):
            note_logprobs(model, telling, self.grammar.forbidden, name)
        losses = [(0.0, 0.0)] if not telling else []
        self.model.train()  # which forgets what was laid out for decoding
        for start in range(0, len(telling), TOGETHER):
            some = telling[start : start + TOGETHER]
            losses.append(policy_gradients(self.model, some, self.grammar.forbidden, self.how["beta"]))
            self.told["steps"] += 1
            self.descend(self.how["lr"] * min(1.0, self.told["steps"] / WARMUP))
        self.model.eval()
        policy, kl = np.mean(losses, 0).tolist()
        return {"reward": float(np.mean(rewards)), "policy_loss": policy, "kl": kl}
