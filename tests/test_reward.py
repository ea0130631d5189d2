"""Learning by rewards: the loss against float64, judges, the model of pairs, the policy over paths, and the command."""

import copy
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from support.ablation_run import small_world
from support.dreaming_student import engine, parts
from support.small_student import small_model

from cli.main import dream
from distill.backbone.generate import generate
from distill.backbone.reinforce import CLIP, STEADY, Rollout, advantages, note_logprobs, policy_gradients
from distill.config import DreamingConfig, ImageTokenizerConfig
from distill.corpus.traces import TraceStore
from distill.corpus.truth import read_truths
from distill.dream.feedback import _rollout  # pyright: ignore[reportPrivateUsage]
from distill.dream.model import DreamingReasoningLLM
from distill.dream.policy import Choice, PolicyNetwork
from distill.dream.starter import starter_tokenizer
from distill.errors import BadInput, CorruptFile
from distill.events import Event, silent
from distill.exam.baselines import make_child
from distill.learning.feedback import FEEDBACK, Feedback, keep
from distill.learning.reinforce import reinforce
from distill.learning.reward_model import STRENGTHS, RewardModel, bradley_terry, calibration_error, read_pairs
from distill.learning.rewards import Reply, open_judge
from distill.learning.rl_learning import RLContinuousLearner
from distill.run import Run
from distill.student.grammar import DreamGrammar
from distill.tokens.chat import prompt_ids
from distill.tokens.packing import split_traces
from distill.training import checkpoint
from distill.training.loop import train
from distill.vision.vision_encoder import TripletEncoder

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = starter_tokenizer(["a ball", "release", "falls", "the rain", "wets", "the street"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small world, trained for a moment. Don't alter it."""
    run = small_world(tmp_path_factory.mktemp("reward") / "run")
    run.settings.capture.max_tokens = 12
    train(run)
    return run


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    return copied(trained, tmp_path / "run")


def copied(run: Run, folder: Path) -> Run:
    shutil.copytree(run.path, folder)
    return Run(folder, run.settings)


# The loss.


def written(grammar: DreamGrammar) -> list[Rollout]:
    """Replies of a small student, drawn under a grammar."""
    contexts = [prompt_ids(TOKENIZER, text) for text in ("Drop a ball?", "Why?")]
    how: dict[str, Any] = {"max_tokens": 40, "temperature": 1.0, "stop_ids": [TOKENIZER.eos_id], "grammar": grammar}
    replies = generate(small_model(TOKENIZER), [one for one in contexts for _ in range(3)], **how)
    return [Rollout(contexts[i // 3], ids, grammar.rows(ids)) for i, ids in enumerate(replies)]


def logprobs(model: torch.nn.Module, grammar: DreamGrammar, rollout: Rollout) -> torch.Tensor:
    """Of each token of a reply among those that the grammar allows, one after the other."""
    found: list[torch.Tensor] = []
    state = torch.tensor([grammar.start])
    logits = model(torch.tensor([[*rollout.context, *rollout.reply]]))[0]
    for n, token in enumerate(rollout.reply):
        masked = grammar.mask(logits[len(rollout.context) - 1 + n][None], state)
        found.append(masked.log_softmax(-1)[0, token])
        state = grammar.advance(state, torch.tensor([token]))
    return torch.stack(found)


def test_the_loss_and_its_gradient_are_those_of_the_formula() -> None:
    """Against float64 and one token at a time, as the paper and TRL (`loss_type="grpo"`) have it."""
    grammar, beta = DreamGrammar(TOKENIZER, 2), 0.3
    rollouts = written(grammar)
    rewards = [1.0, 0.0, 0.5, 0.2, 0.2, 0.9]
    for each, advantage in zip(rollouts, advantages(torch.tensor(rewards).view(2, 3)).flatten().tolist(), strict=True):
        each.advantage = advantage
    now, then, first = (small_model(TOKENIZER, seed=seed) for seed in (0, 1, 2))
    with torch.no_grad():  # three policies that differ a little, so that some ratios are clipped and some aren't
        for model, other in ((then, 0.2), (first, 0.2)):
            for own, theirs in zip(model.parameters(), now.parameters(), strict=True):
                own.copy_(theirs + other * (own - theirs))
    note_logprobs(then, rollouts, grammar.forbidden, "old")
    note_logprobs(first, rollouts, grammar.forbidden, "begun")
    now.zero_grad()
    policy, kl = policy_gradients(now, rollouts, grammar.forbidden, beta)
    ours = {name: one.grad.clone() for name, one in now.named_parameters() if one.grad is not None}

    groups = [np.array(rewards[:3]), np.array(rewards[3:])]
    gains = [(r - group.mean()) / (group.std(ddof=1) + STEADY) for group in groups for r in group]
    exact, old, begun = (model.double() for model in (now, then, first))
    exact.zero_grad()
    losses, leashes, ratios = list[torch.Tensor](), list[torch.Tensor](), list[float]()
    for each, gain in zip(rollouts, gains, strict=True):
        mine = logprobs(exact, grammar, each)
        with torch.no_grad():
            ratio_to, leash_to = logprobs(old, grammar, each), logprobs(begun, grammar, each)
        tokens, leash = list[torch.Tensor](), list[torch.Tensor]()
        for n in range(len(each.reply)):
            ratio = torch.exp(mine[n] - ratio_to[n])
            ratios.append(float(ratio.detach()))
            tokens.append(-min(ratio * gain, torch.clamp(ratio, 1 - CLIP, 1 + CLIP) * gain))
            leash.append(torch.exp(leash_to[n] - mine[n]) - (leash_to[n] - mine[n]) - 1)
        losses.append(sum(tokens, torch.zeros(())) / len(tokens))
        leashes.append(sum(leash, torch.zeros(())) / len(leash))
    expected = sum(losses, torch.zeros(())) / len(losses), sum(leashes, torch.zeros(())) / len(leashes)
    assert any(abs(ratio - 1) > CLIP for ratio in ratios)
    assert any(0 < abs(ratio - 1) < CLIP for ratio in ratios)
    assert (policy, kl) == pytest.approx([float(part.detach()) for part in expected], rel=1e-4)
    (expected[0] + beta * expected[1]).backward()
    for name, one in exact.named_parameters():
        assert one.grad is not None
        torch.testing.assert_close(ours[name].double(), one.grad, rtol=1e-3, atol=1e-5)


def test_replies_that_are_worth_the_same_teach_nothing() -> None:
    assert advantages(torch.tensor([[2.0, 2.0, 2.0], [0.0, 0.0, 3.0]]))[0].abs().max() == 0


# Judges.


def reply(answer: str, key: str = "", prompt: str = "Why?") -> Reply:
    return Reply(key, prompt, answer, [1], [2])


def test_the_true_answer_is_worth_one(run: Run) -> None:
    judge, _ = open_judge("exact", run)
    with TraceStore(run.traces, readonly=True) as store:
        first, second = split_traces(store)[0][:2]
    truths = read_truths(run)
    true, other = truths[first.key].answer, truths[second.key].answer
    assert judge([reply(f" {true}\n", first.key), reply(other + "!", second.key)]) == [1.0, 0.0]


def test_json_is_held_to_its_schema(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(
        json.dumps({"type": "object", "required": ["what"], "properties": {"what": {"type": "string"}}}),
        encoding="utf-8",
    )
    judge, source = open_judge(f"schema:{path}", run)
    assert source == path
    said = ['{"what": "ball"}', '{"what": 3}', "[1]", "It falls.", "[" * 10_000]
    assert judge([reply(text) for text in said]) == [1.0, 0.5, 0.5, 0.0, 0.0]
    path.write_text('{"$ref": "http://localhost:1/schema.json"}', encoding="utf-8")
    with pytest.raises(BadInput, match="refers to what isn't in it"):
        open_judge(f"schema:{path}", run)[0]([reply("{}")])
    none = "is no JSON schema: one is an object, true or false"
    odd = [(text, none) for text in ("null", "5", '["$schema"]')] + [('{"$schema": [1]}', "is no JSON schema")]
    for text, reason in (("{", "is no JSON schema"), ('{"type": "thing"}', "is no JSON schema: 'thing'"), *odd):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(BadInput, match=reason):
            open_judge(f"schema:{path}", run)


FUNCTIONS = """
def short(prompt, answer): return -len(answer)
def longer(prompt, answer): return len(answer)
def broken(prompt, answer): return 1 / 0
def endless(prompt, answer): return float("inf")
def text(prompt, answer): return "good"
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """my_rewards.py, where the command is run."""
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)


@pytest.mark.usefixtures("functions")
def test_a_function_of_the_users_judges(run: Run, tmp_path: Path) -> None:
    judge, source = open_judge("my_rewards:short", run)
    assert judge([reply("four"), reply("")]) == [-4.0, 0.0]
    assert source is not None
    assert source.resolve() == tmp_path / "my_rewards.py"
    for name in ("broken", "endless", "text"):
        with pytest.raises(BadInput, match=rf"my_rewards:{name}: \w+Error: .* for the answer 'a' to 'Why\?'; it takes"):
            open_judge(f"my_rewards:{name}", run)[0]([reply("a")])


@pytest.mark.parametrize(
    ("by", "reason"),
    [
        ("truth", "is no reward; give exact, feedback, pairs:FILE, schema:FILE or MODULE:FUNCTION"),
        ("none_such:f", "can't be had: ModuleNotFoundError"),
        ("json:none_such", "can't be had: AttributeError"),
        ("schema:none.json", "none.json: is no JSON schema"),
        ("pairs:none.jsonl", "none.jsonl: can't be read"),
        ("feedback", "feedback.jsonl: no feedback yet"),
    ],
)
def test_what_is_no_reward_is_named(run: Run, by: str, reason: str) -> None:
    said = CliRunner().invoke(dream, ["reward", str(run.path), "--by", by])
    assert isinstance(said.exception, BadInput)
    assert reason in str(said.exception)
    assert checkpoint.of_stage(run, "reward") == []


# The model of pairs.


def test_a_model_of_pairs_is_the_penalised_logistic_regression() -> None:
    """At its weights the gradient of the penalised likelihood is 0, at one of the strengths that it may choose."""
    random = np.random.default_rng(0)
    truth, apart = random.normal(size=6), random.normal(size=(200, 6))
    apart *= np.sign(apart @ truth + random.logistic(size=200))[:, None]
    weights = bradley_terry(apart, np.arange(200) // 2)
    missing = 1 / (1 + np.exp(apart @ weights))
    strength = float(weights @ weights / ((missing[:, None] * apart).sum(0) @ weights)) / 2
    assert min(abs(math.log(strength / one)) for one in STRENGTHS) < 0.05
    np.testing.assert_allclose(weights, 2 * strength * (missing[:, None] * apart).sum(0), rtol=0.05, atol=0.01)
    assert np.corrcoef(weights, truth)[0, 1] > 0.9


def test_chances_are_those_of_heads_that_never_saw_the_prompt(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    noise, noise_too = random.normal(size=(2, 60, 4))
    model = RewardModel(4)
    held_out = model.fit(noise, noise_too, [i // 2 for i in range(60)])
    assert (held_out > 0.5).mean() < 0.75, "there is nothing to learn"
    worse = random.normal(size=(60, 4))
    better = worse + np.eye(4)[0]
    assert (model.fit(better, worse, range(60)) > 0.5).all()
    model.save(tmp_path / "reward", {"pairs": 60})
    again, about = RewardModel.load(tmp_path / "reward")
    some = torch.from_numpy(better).float()
    torch.testing.assert_close(again(some), model(some))
    assert about == {"pairs": 60}
    (tmp_path / "reward" / "reward.safetensors").write_bytes(b"no")
    with pytest.raises(CorruptFile, match="learn one again"):
        RewardModel.load(tmp_path / "reward")


def test_the_calibration_error_is_the_mean_gap_of_its_bins() -> None:
    chances = np.random.default_rng(2).random(500) ** 0.5
    expected = 0.0
    for low in range(10):
        inside = [p for p in chances if 0.5 + low / 20 <= max(p, 1 - p) < 0.5 + (low + 1) / 20]
        if inside:
            right, sure = np.mean([p > 0.5 for p in inside]), np.mean([max(p, 1 - p) for p in inside])
            expected += len(inside) / 500 * abs(right - sure)
    assert calibration_error(chances) == pytest.approx(expected)
    assert calibration_error(np.ones(3)) == 0
    assert calibration_error(np.zeros(3)) == 1


def test_an_answer_that_was_cut_before_its_first_word_is_no_feedback(tmp_path: Path) -> None:
    path, asked = tmp_path / FEEDBACK, json.loads('[{"role": "user", "content": "Why?"}]')
    for verdict, better in (("good", ""), ("bad", ""), ("better", "So.")):
        with pytest.raises(BadInput, match="cut before its first word"):
            keep(path, Feedback(asked, "", " ", verdict, better, cut=True))
    assert not path.exists()


def test_thumbs_become_pairs(tmp_path: Path) -> None:
    path = tmp_path / FEEDBACK
    for i in range(10):
        asked: Any = [{"role": "user", "content": f"Why {i}?"}]
        keep(path, Feedback(asked, "", "Long, long.", "bad"))
        keep(path, Feedback(asked, "", "Short.", "good"))
    keep(path, Feedback(asked, "", "Wrong.", "better", "Right."))
    pairs = read_pairs(path, TOKENIZER, "", 256)
    texts = [(TOKENIZER.decode(pair.better[:-1]), TOKENIZER.decode(pair.worse[:-1])) for pair in pairs[9:]]
    assert len(pairs) == 13
    assert set(texts) == {(better, worse) for better in ("Short.", "Right.") for worse in ("Long, long.", "Wrong.")}
    assert {ids[-1] for pair in pairs for ids in (pair.better, pair.worse)} == {TOKENIZER.eos_id}
    keep(path, Feedback(asked, "", "So it", "better", "So it is. " * 200, cut=True))
    heard: list[Event] = []
    cut = [pair.worse for pair in read_pairs(path, TOKENIZER, "", 256, heard.append) if pair not in pairs]
    assert cut == [TOKENIZER.encode("So it")] * 2, "an answer that was cut has no end"
    assert [event.message for event in heard] == ["3 pairs don't fit the context of 256 tokens: left out"]
    with pytest.raises(BadInput, match="needs at least 10"):
        read_pairs(path, TOKENIZER, "", 40)
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "Why?", "better": "a", "worse": "b"}\n\n{"prompt": "Why?"}\n', encoding="utf-8")
    with pytest.raises(BadInput, match=r"pairs\.jsonl:3: is no"):
        read_pairs(file, TOKENIZER, "", 256)
    file.write_text('{"prompt": "Why?", "better": "a", "worse": "\\ud83d"}\n', encoding="utf-8")
    with pytest.raises(BadInput, match=r"pairs\.jsonl:1: is no .*half of a surrogate pair"):
        read_pairs(file, TOKENIZER, "", 256)
    path.write_text(path.read_text(encoding="utf-8").replace("Right.", "\\ud83d"), encoding="utf-8")
    with pytest.raises(BadInput, match=r"line 21: is no feedback \(holds .*half of a surrogate pair"):
        read_pairs(path, TOKENIZER, "", 256)


# The policy over paths.


def test_a_policy_learns_which_paths_pay() -> None:
    """Draws are as often as their chances say, the gradient is REINFORCE's, and what pays is taken."""
    torch.manual_seed(0)
    policy, paths = PolicyNetwork(8), torch.randn(1, 4, 8)
    state, prior, there = torch.randn(1, 8), torch.tensor([[0.5, -1.0, 0.0, 3.0]]), torch.tensor([[True] * 3 + [False]])
    taken = torch.tensor([[True, False, True, False]])
    loss, error = policy.losses(Choice(state, paths, prior, there, taken), torch.tensor([2.0]))
    chances = prior.sigmoid()[0]
    nats = torch.stack([chances[0], 1 - chances[1], chances[2]]).log().sum()
    assert float(loss.detach()) == pytest.approx(-2.0 * float(nats))
    assert float(error.detach()) == pytest.approx(4.0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for _ in range(150):
        some = Choice(*(one.expand(32, *one.shape[1:]) for one in (state, paths, prior, there)), torch.zeros(0))
        drawn = torch.rand(32, 4) < policy(state, paths, prior).detach().sigmoid()
        rewards = drawn[:, 1].float() - drawn[:, 0].float()
        choice = Choice(some.state, some.paths, some.prior, some.there, drawn)
        sum(policy.losses(choice, rewards), torch.zeros(())).backward()
        optimizer.step()
        optimizer.zero_grad()
    now = policy(state, paths, prior).sigmoid()[0]
    assert now[1] > 0.9
    assert now[0] < 0.1
    assert float(policy.value(state).detach()) == pytest.approx(1, abs=0.3), "what it has come to expect"


def dreamer(**how: Any) -> DreamingReasoningLLM:
    """Its backbone is a copy, for it will learn."""
    import copy

    backbone, tokenizer, codebook = parts()
    made: dict[str, Any] = {"backbone": copy.deepcopy(backbone), "tokenizer": tokenizer, "codebook": codebook}
    return DreamingReasoningLLM(**made, engine=engine(), enable_rl=True, device="cpu", **how)


def test_what_a_user_dreamed_is_not_learned_as_the_students_choice() -> None:
    model = dreamer()
    asked: dict[str, Any] = {"dreamer": "backbone", "max_length": 4}
    model.generate("Drop it?", **asked)
    model.generate("Push it?", guide="⟨a cup⟩", **asked)
    assert model._replies is not None  # pyright: ignore[reportPrivateUsage]
    own, guided = model._replies._said.values()  # pyright: ignore[reportPrivateUsage]
    image = set(model.parts.tokenizer.image_ids.tolist())
    assert image & {*_rollout(model.parts, own).reply}
    assert not image & {*_rollout(model.parts, guided).reply}
    assert image & {*guided.ids[guided.question : guided.read]}


def test_feedback_moves_words_and_paths(tmp_path: Path) -> None:
    """Dreams with a causal path are praised, others blamed: such are read oftener then, and a saved model knows."""
    model, prompts = dreamer(), [f"Drop ball {i}?" for i in range(16)]

    def causal() -> list[bool]:
        records = [model.generate(p, return_dreams=True, seed=i, max_length=4)["record"] for i, p in enumerate(prompts)]
        return [any(branch.kept for branch in record.branches if branch.lens == "causal") for record in records]

    before = causal()
    assert 0 < sum(before) < len(before), "it draws"
    examples = [{"prompt": p, "reward": float(right)} for p, right in zip(prompts, before, strict=True)]
    told = model.learn_from_feedback(examples, num_epochs=20)
    assert told["avg_reward"] == pytest.approx(np.mean(before))
    assert told.keys() == {"avg_reward", "avg_policy_loss", "avg_value_loss", "avg_kl"}
    assert sum(causal()) > sum(before)
    model.save_pretrained(tmp_path / "saved")
    again = DreamingReasoningLLM.load_pretrained(tmp_path / "saved", "cpu", enable_rl=True)
    how: dict[str, Any] = {"seed": 5, "max_length": 4}
    assert again.generate(prompts[5], **how) == model.generate(prompts[5], **how)
    assert again.parts.policy is not None
    assert model.parts.policy is not None
    for name, one in model.parts.policy.state_dict().items():
        torch.testing.assert_close(again.parts.policy.state_dict()[name], one)


def test_what_is_praised_is_said_oftener() -> None:
    model = dreamer()
    how: dict[str, Any] = {"dreamer": "backbone", "max_length": 12, "temperature": 1.5, "top_k": 0, "top_p": 1.0}
    said = {f"Drop {n}?": model.generate(f"Drop {n}?", **how) for n in range(6)}
    examples = [{"prompt": prompt, "reward": float(i % 2)} for i, prompt in enumerate(said)]
    assert model._replies is not None
    rollouts = [model._replies._said[prompt] for prompt in said]

    def nats() -> torch.Tensor:
        with torch.no_grad():
            return torch.tensor([
                float(model.parts.model(torch.tensor([each.ids]))[0].log_softmax(-1)[each.question - 1 : -1]
                      .gather(1, torch.tensor(each.ids[each.question :])[:, None]).sum()) for each in rollouts
            ])  # fmt: skip

    before = nats()
    told = model.learn_from_feedback(examples, num_epochs=8, lr=1e-4)
    moved = nats() - before
    assert moved[1::2].mean() > moved[::2].mean()
    assert told["avg_kl"] >= 0


def test_feedback_is_of_the_reply_that_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are read into the prompt: it is remembered as it was asked."""
    model = dreamer()
    monkeypatch.setattr("distill.dream.model.with_images", lambda _, prompt, *__: f"⟨a ball⟩\n{prompt}")
    for prompt in ("Drop it?", "Push it?"):
        model.generate(prompt, images=[b"a picture"], max_length=4)
    assert model._replies is not None
    assert [*model._replies._said] == ["Drop it?", "Push it?"]
    ball = model.parts.tokenizer.encode("⟨a ball⟩", special=True)
    assert all(set(ball) < set(one.ids[: one.question]) for one in model._replies._said.values())
    monkeypatch.setattr(model, "generate", lambda *_, **__: pytest.fail("it was asked anew"))
    examples = [{"prompt": prompt, "reward": i} for i, prompt in enumerate(model._replies._said)]
    assert model.learn_from_feedback(examples, num_epochs=1)["avg_reward"] == 0.5


def test_feedback_asks_for_words_whatever_the_model_shows() -> None:
    model = dreamer(config=DreamingConfig(output_mode="image"))
    examples = [{"prompt": prompt, "reward": i} for i, prompt in enumerate(("Drop it?", "Push it?"))]
    assert model.learn_from_feedback(examples, num_epochs=1)["avg_reward"] == 0.5


@pytest.mark.parametrize(
    ("examples", "reason"),
    [
        ([{"prompt": "Why?"}], "example 1 is no"),
        ([{"prompt": "Why?", "reward": 1}, {"prompt": "How?", "reward": math.nan}], "example 2 is no"),
        ([{"prompt": "Why?", "reward": 1}], "two examples at least whose rewards differ"),
    ],
)
def test_what_is_no_feedback_is_refused(examples: Any, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        dreamer().learn_from_feedback(examples)


def test_pictures_are_known_again_from_being_told() -> None:
    """Four things, shown with noise: walks go to the right one oftener, and the reward model comes to expect it."""
    torch.manual_seed(0)
    things = 0.5 * torch.rand(3, 1, 3, 32, 32) + 0.5 * torch.rand(4, 3, 1, 3, 32, 32)
    labels = [("cat", "chases", "mouse"), ("cat", "drinks", "milk"), ("rain", "wets", "street"), ("sun", "dries", "it")]
    learner = RLContinuousLearner(TripletEncoder(ImageTokenizerConfig(embedding_dim=64, patch_size=16)))

    def told(thing: int) -> float:
        seen = (things[thing] + 0.02 * torch.randn(3, 1, 3, 32, 32)).clamp(0, 1)
        return learner.online_inference_with_learning(*seen, ground_truth_label=labels[thing])[1]["final_reward"]

    rewards = [told(i % 4) for i in range(120)]
    assert np.mean(rewards[-40:]) > np.mean(rewards[:40]) + 0.2
    prediction, metrics = learner.online_inference_with_learning(*things[2])
    assert prediction in labels
    assert 0.5 < metrics["final_reward"] < 1, "expected, as nobody tells"
    with pytest.raises(BadInput, match=r"is no \(what, action, result\)"):
        learner.online_inference_with_learning(*things[2], ground_truth_label=("cat", "chases"))


# The command.


def weights_of(run: Run) -> dict[str, bytes]:
    return {"model": (checkpoint.best(run) / "model.safetensors").read_bytes()}


def command(run: Run, *args: str) -> Result:
    few = ["--prompts", "8", "--samples", "4", "--lr", "3e-3", "--beta", "0.01"]
    return CliRunner().invoke(dream, ["reward", str(run.path), *few, *args, "--json"])


@pytest.mark.usefixtures("functions")
def test_a_reward_is_learned_by_and_can_be_taken_back(run: Run) -> None:
    before, records = weights_of(run), run.records().keys()
    said = command(run, "--by", "my_rewards:short", "--rounds", "16")
    summary = json.loads(said.stdout)["summary"]
    assert summary["sampled_reward"] > summary["sampled_reward_before"] + 20, said.stderr
    assert {"final_reward", "reward_before", "bits_per_byte", "examples"} <= summary.keys()
    assert len(checkpoint.of_stage(run, "reward")) == 1
    assert list((run.path / "tensorboard" / "reward").iterdir())
    assert weights_of(run) != before
    assert json.loads(command(run, "--by", "my_rewards:short", "--rounds", "16").stdout)["skipped"]
    other = command(run, "--by", "exact", "--rounds", "18")
    assert "learned by another reward" in str(other.exception)
    refused = CliRunner().invoke(dream, ["train", str(run.path), "--steps", "9"])
    assert "`dream reward" in str(refused.exception)
    # The same number of steps, and another student: what is kept of the first isn't taken for the second's.
    told = json.loads(CliRunner().invoke(dream, ["evaluate", str(run.path), "--json"]).stdout)["summary"]
    steps = checkpoint.trained_steps(run)
    assert steps == checkpoint.read_loop(checkpoint.latest(run, "reward")).step
    name = checkpoint.best(run).name
    undone = CliRunner().invoke(dream, ["polish", str(run.path), "--undo", "--json"])
    assert json.loads(undone.stdout)["deleted"] == 0, "nothing was polished, and what was learned since stays"
    assert weights_of(run) != before
    child = make_child(run, run.path.parent / "child", copy.deepcopy(run.settings), steps, silent)
    assert weights_of(child) == before, "a cell is the training that it is named for"
    assert json.loads(command(run, "--undo").stdout)["deleted"] == 1
    run.forget("evaluate")
    assert (weights_of(run), run.records().keys()) == (before, records)
    command(run, "--by", "my_rewards:longer", "--rounds", "16")
    assert checkpoint.best(run).name == name
    assert json.loads(CliRunner().invoke(dream, ["evaluate", str(run.path), "--json"]).stdout)["summary"] != told


def test_one_that_was_stopped_ends_as_one_that_was_not(trained: Run, tmp_path: Path) -> None:
    whole, cut = (copied(trained, tmp_path / name) for name in ("whole", "cut"))

    def stop(event: Event) -> None:
        if event.kind == "progress" and event.done == 2:
            raise KeyboardInterrupt

    path = tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"Why {i}?", "better": "It is hot.", "worse": "It is."} for i in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    how: dict[str, Any] = {"by": f"pairs:{path}", "rounds": 3, "prompts": 4, "samples": 4, "lr": 1e-3}
    with pytest.raises(KeyboardInterrupt):
        reinforce(cut, stop, **how)
    assert "reward" not in cut.records()
    told, expected = reinforce(cut, **how), reinforce(whole, **how)
    assert told == expected
    assert (told["pairs"], told["pairs_right"]) == (12, 1.0)
    assert weights_of(cut) == weights_of(whole)
    more = reinforce(cut, **{**how, "rounds": 4})
    assert (more["rounds"], more["reward_before"]) == (4, told["reward_before"])
    assert RewardModel.load(cut.path / "reward")[1]["pairs"] == 12
    before, path = weights_of(cut), tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]), encoding="utf-8")
    for by, reason in ((f"pairs:{path}", "needs at least 10"), ("json:loads", "json:loads: TypeError")):
        with pytest.raises(BadInput, match=reason):
            reinforce(cut, **{**how, "by": by}, force=True)

    def at_once(event: Event) -> None:
        if (event.stage, event.kind) == ("reward", "start"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reinforce(cut, at_once, **how, force=True)
    kept = checkpoint.of_stage(cut, "reward")
    assert (weights_of(cut), cut.records()["reward"].summary) == (before, more), "nothing took its place"
    about = cut.path / "reward" / "reward.json"
    told_of = json.loads(about.read_text(encoding="utf-8"))
    about.write_text(json.dumps(told_of | {"pairs": 0}), encoding="utf-8")
    assert reinforce(cut, **{**how, "rounds": 0}, force=True)["pairs"] == 12, "fitted once more"
    assert (weights_of(cut), checkpoint.of_stage(cut, "reward")) == (before, kept)
    anew = reinforce(cut, **{**how, "rounds": 1}, force=True)
    same = ("reward_before", "sampled_reward_before")
    assert [anew[name] for name in ("rounds", *same)] == [1, *(told[name] for name in same)]
