"""The dream engine: what it gives, what it may not depend on, what it refuses, and that it learns to simulate."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.backbone.model import Backbone, BackboneConfig
from distill.config import DreamingConfig
from distill.dream.engine import DreamEngine, drafted_dreams, prompt_states
from distill.dream.generator import DreamGenerator, Dreams, ExpertTransitions, straight_through
from distill.dream.input_tokenizer import Encoded, InputTokenizer
from distill.errors import BadInput, CorruptFile, DistillError, RunMismatch
from distill.mining.triplets import LENSES
from distill.tokens.concepts import LocalEncoder, unit_rows
from distill.tokens.image_tokens import Codebook
from distill.training.engine.losses import DreamTargets, engine_loss

HIDDEN, CODES, PROMPT = 32, 20, 9
S, T, D = 4, 5, 512


def some_codebook(codes: int = CODES, seed: int = 0) -> Codebook:
    centroids = unit_rows(np.random.default_rng(seed).normal(size=(codes, D)))
    labels = [f"label {i}" for i in range(codes)]
    return Codebook(labels, centroids, np.ones(codes, np.int64), LocalEncoder.fit([], [], 0))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def engine() -> DreamEngine:
    """Untrained, but for paths that end somewhere instead of at once or never."""
    engine = DreamEngine.new(DreamingConfig(), HIDDEN, some_codebook(), seed=3, width=256).eval()
    with torch.no_grad():
        engine.generator.more.weight.copy_(draw(1, engine.width, seed=4) / engine.width**0.5)
        engine.generator.more.bias.fill_(0.5)
    return engine.requires_grad_(False)


@pytest.fixture(scope="module")
def states() -> tuple[Tensor, Tensor]:
    """Three prompts of 9, 4 and 6 positions, padded on the right."""
    real = torch.arange(PROMPT) < torch.tensor([[9], [4], [6]])
    return draw(3, PROMPT, HIDDEN, seed=1), real


# Prompts.
def test_prompts_and_images_come_through_the_same_door() -> None:
    tokenizer = InputTokenizer(HIDDEN).eval()
    text, images = draw(2, 5, HIDDEN), draw(2, 3, D)
    for encoded, length in (
        (tokenizer(text, None), 5),
        (tokenizer(None, None, images), 3),
        (tokenizer(text, None, images), 8),
    ):
        assert encoded.triplet.shape == (2, 3, D)
        assert encoded.memory.shape[:2] == encoded.real.shape == (2, length)
        assert encoded.real.all()
        torch.testing.assert_close(encoded.triplet.norm(dim=-1), torch.ones(2, 3))
    both, other = tokenizer(text, None, images), tokenizer(text, None, images.flip(0))
    assert not torch.allclose(both.triplet, other.triplet), "images are looked at"
    assert not torch.allclose(both.triplet[:, 0], both.triplet[:, 1]), "roles differ"


@pytest.mark.parametrize("left", [False, True])
def test_padding_on_either_side_changes_nothing(left: bool) -> None:
    tokenizer = InputTokenizer(HIDDEN).eval()
    alone, padding = draw(1, 5, HIDDEN), draw(1, 4, HIDDEN, seed=5) * 100
    padded = torch.cat((padding, alone) if left else (alone, padding), 1)
    real = torch.tensor([[False] * 4 + [True] * 5]) if left else torch.tensor([[True] * 5 + [False] * 4])
    torch.testing.assert_close(tokenizer(padded, real).triplet, tokenizer(alone, None).triplet, rtol=1e-4, atol=1e-5)


def test_the_order_of_words_counts() -> None:
    tokenizer = InputTokenizer(HIDDEN).eval()
    prompt = draw(1, 5, HIDDEN)
    assert not torch.allclose(tokenizer(prompt, None).triplet, tokenizer(prompt.flip(1), None).triplet, atol=1e-5)


@pytest.mark.parametrize(
    ("states", "images", "named"),
    [
        (None, None, "nothing to dream of"),
        (torch.zeros(1, 5, HIDDEN + 1), None, f"hidden size {HIDDEN}"),
        (None, torch.zeros(1, 3, 224), "512"),
        (None, torch.zeros(3, 512), "512"),
        (torch.zeros(2, 5, HIDDEN), torch.zeros(3, 1, D), "3"),
        (torch.zeros(1, 0, HIDDEN), None, "nothing to dream of"),
    ],
)
def test_unreadable_prompts_are_named(states: Tensor | None, images: Tensor | None, named: str) -> None:
    with pytest.raises(BadInput, match=named) as error:
        InputTokenizer(HIDDEN)(states, None, images)
    assert "\n" not in str(error.value)


# Dreams.
def test_dreams_have_their_shapes_and_fit_together(engine: DreamEngine, states: tuple[Tensor, Tensor]) -> None:
    drafted = engine(*states)
    dreams = drafted.dreams
    assert dreams.embeddings.shape == (3, S, T, 3, D)
    assert dreams.logits.shape == (3, S, T, 3, CODES)
    torch.testing.assert_close(dreams.embeddings.norm(dim=-1), torch.ones(3, S, T, 3))
    centroids = torch.from_numpy(some_codebook().centroids)
    torch.testing.assert_close(dreams.logits, engine.generator.scale * dreams.embeddings @ centroids.T)
    torch.testing.assert_close(dreams.quantized(), centroids[dreams.codes()])
    torch.testing.assert_close(dreams.gates.sum(-1), torch.ones(3, S))
    assert drafted.reasoned.embedding.shape == (3, D)
    assert len({tuple(path.flatten().tolist()) for path in dreams.codes()[0]}) == S, "paths differ"


def test_a_path_ends_before_its_first_step_that_is_unlikely() -> None:
    more = torch.tensor([[[1.0, 2.0, -1.0, 3.0, 1.0], [-1.0, 1.0, 1.0, 1.0, 1.0]]])
    empty = torch.zeros(1)
    live = Dreams(empty, empty, more, empty, empty, empty).live()
    assert live.tolist() == [[[True, True, False, False, False], [False] * 5]]


def test_steps_that_no_path_lives_to_are_spared_and_change_nothing(states: tuple[Tensor, Tensor]) -> None:
    engine = DreamEngine.new(DreamingConfig(), HIDDEN, some_codebook(), seed=0).eval()
    lengths: set[int] = set()
    for bias in (-9.0, -0.6, -0.5, -0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 9.0):
        engine.generator.more.bias.data.fill_(bias)
        with torch.inference_mode():
            whole, spared = engine(*states), engine(*states, whole=False)
        length = spared.dreams.more.shape[-1]
        assert length == max(1, int(whole.dreams.live().sum(-1).amax()))
        lengths.add(length)
        assert not whole.dreams.live()[..., length:].any()
        assert torch.equal(whole.dreams.live()[..., :length], spared.dreams.live())
        torch.testing.assert_close(whole.dreams.logits[:, :, :length], spared.dreams.logits)
        torch.testing.assert_close(whole.reasoned.scores, spared.reasoned.scores)
        torch.testing.assert_close(whole.reasoned.embedding, spared.reasoned.embedding)
    assert {1, T} < lengths, "some end between"


@pytest.mark.parametrize("width", [128, 256])
def test_a_guess_is_the_generators_dream(width: int) -> None:
    """The tables and folded norms of one prompt's draft, beside the generator itself; norms that aren't new."""
    engine = DreamEngine.new(DreamingConfig(), HIDDEN, some_codebook(), seed=5, width=width).eval()
    for i, part in enumerate(engine.modules()):
        if isinstance(part, torch.nn.LayerNorm):
            part.weight.data, part.bias.data = 1 + draw(len(part.bias), seed=i) / 4, draw(len(part.bias), seed=-i) / 4
    engine.generator.more.weight.data.copy_(draw(1, width, seed=1) / width**0.5)
    lengths: set[int] = set()
    for seed, bias in enumerate((-9.0, *np.linspace(-0.9, 0.9, 13), 9.0)):
        engine.eval().generator.more.bias.data.fill_(float(bias))
        states = draw(1, PROMPT, HIDDEN, seed=seed)
        with torch.inference_mode():
            dreams = engine(states, None).dreams
        sizes = dreams.live()[0].sum(-1).tolist()
        whole = [path[:size] for path, size in zip(dreams.codes()[0].tolist(), sizes, strict=True)]
        assert [[list(step) for step in path] for path in engine.guess(states)] == whole
        lengths.update(sizes)
    assert {0, T} < lengths, "some end between"


def test_a_prompt_dreams_the_same_in_any_company(engine: DreamEngine, states: tuple[Tensor, Tensor]) -> None:
    together = engine(*states).dreams
    for row, length in enumerate(states[1].sum(1).tolist()):
        alone = engine(states[0][row : row + 1, :length], None).dreams
        torch.testing.assert_close(together.logits[row], alone.logits[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(together.more[row], alone.more[0], rtol=1e-3, atol=1e-3)


def test_steps_are_shown_as_they_form(engine: DreamEngine, states: tuple[Tensor, Tensor]) -> None:
    seen: list[tuple[int, Dreams]] = []
    last = engine(*states, on_step=lambda t, dreams: seen.append((t, dreams))).dreams
    assert [t for t, _ in seen] == list(range(T))
    for t, dreams in seen:
        assert torch.equal(dreams.codes(), last.codes()[:, :, : t + 1])
        assert torch.equal(dreams.live(), last.live()[:, :, : t + 1])


@pytest.mark.parametrize("guide", [[7], [7, 3], [7, 3, 19]])
def test_a_guide_is_what_every_path_begins_with(
    engine: DreamEngine, states: tuple[Tensor, Tensor], guide: list[int]
) -> None:
    free, guided = engine(*states).dreams, engine(*states, guide=torch.tensor(guide)).dreams
    assert (guided.codes()[:, :, 0, : len(guide)] == torch.tensor(guide)).all()
    assert guided.live()[..., 0].all(), "a guided path has a first step"
    chance = guided.logits[:, :, 0, : len(guide)].softmax(-1).amax(-1)
    assert (chance > 0.999).all()
    assert (guided.codes()[:, :, 1:] != free.codes()[:, :, 1:]).any(), "what follows depends on it"


@pytest.mark.parametrize("guide", [[], [1, 2, 3, 4], [CODES], [-1]])
def test_a_guide_of_no_codes_is_refused(engine: DreamEngine, states: tuple[Tensor, Tensor], guide: list[int]) -> None:
    with pytest.raises(BadInput, match="guide"):
        engine(*states, guide=torch.tensor(guide, dtype=torch.long))


def test_quantizing_lets_the_gradient_of_the_mixture_through() -> None:
    logits = draw(6, CODES).requires_grad_()
    centroids, wanted = draw(CODES, 8, seed=1), draw(6, 8, seed=2)
    tokens = straight_through(logits, centroids)
    torch.testing.assert_close(tokens, centroids[logits.argmax(-1)])
    (through,) = torch.autograd.grad((tokens * wanted).sum(), logits)
    p = logits.detach().double().softmax(-1)
    worth = wanted.double() @ centroids.double().T  # of each code
    expected = p * (worth - (p * worth).sum(-1, keepdim=True))
    torch.testing.assert_close(through.double(), expected, rtol=1e-4, atol=1e-6)


def test_transitions_are_a_gated_unit_with_the_experts_proposals_mixed() -> None:
    width, experts = 6, 4
    unit = ExpertTransitions(width, experts).double()
    x, state = draw(2, 3, width).double(), draw(2, 3, width, seed=1).double()
    gates = draw(2, 3, experts, seed=2).double().softmax(-1)
    new = unit(x, state, gates)
    for b in range(2):
        for s in range(3):
            both = torch.cat((x[b, s], state[b, s]))
            reset, keep = (unit.reset_keep.weight @ both + unit.reset_keep.bias).sigmoid().split(width)
            mixed = torch.zeros(width).double()
            for e in range(experts):
                rows = slice(e * width, (e + 1) * width)
                proposal = unit.from_input.weight[rows] @ x[b, s] + unit.from_input.bias[rows]
                proposal = proposal + unit.from_state.weight[rows] @ (reset * state[b, s]) + unit.from_state.bias[rows]
                mixed = mixed + gates[b, s, e] * proposal.tanh()
            torch.testing.assert_close(new[b, s], keep * state[b, s] + (1 - keep) * mixed)


def test_paths_start_apart_each_nearest_to_its_lens_expert(engine: DreamEngine, states: tuple[Tensor, Tensor]) -> None:
    dreams = engine(*states).dreams
    assert dreams.diversity.item() == pytest.approx(1.0, abs=1e-4), "at right angles"
    assert dreams.gates.argmax(-1).tolist() == [[0, 1, 2, 3]] * 3
    alike = replace(dreams, offsets=torch.ones(S, 8))
    assert alike.diversity.item() == pytest.approx(0.0, abs=1e-6)
    assert replace(dreams, offsets=torch.ones(1, 8)).diversity.item() == 0


@pytest.mark.parametrize(("paths", "steps"), [(1, 1), (2, 3), (6, 2)])
def test_any_number_of_paths_and_steps(paths: int, steps: int, states: tuple[Tensor, Tensor]) -> None:
    config = DreamingConfig(num_dream_sequences=paths, dream_length=steps)
    drafted = DreamEngine.new(config, HIDDEN, some_codebook(), seed=0)(*states)
    assert drafted.dreams.codes().shape == (3, paths, steps, 3)
    assert [list(dream) for dream in drafted_dreams(drafted, keep=False)] == [list(LENSES)] * 3


@pytest.mark.parametrize("centroids", [torch.zeros(0, D), torch.zeros(5, 100)])
def test_a_codebook_without_image_tokens_is_refused_in_one_line(centroids: Tensor) -> None:
    with pytest.raises(BadInput, match=r"codebook has \d image tokens") as error:
        DreamGenerator(DreamingConfig(), centroids)
    assert "\n" not in str(error.value)


def test_drafted_dreams_are_the_kept_paths_up_to_their_ends(engine: DreamEngine, states: tuple[Tensor, Tensor]) -> None:
    drafted = engine(*states)
    codes, live = drafted.dreams.codes(), drafted.dreams.live()
    for b, dream in enumerate(drafted_dreams(drafted, keep=False)):
        expected = [[tuple(step) for step in codes[b, s, : int(live[b, s].sum())].tolist()] for s in range(S)]
        assert dream == dict(zip(LENSES, expected, strict=True))
    assert 0 < live.sum() < live.numel(), "some paths are shorter than others"
    scores = drafted.reasoned.scores.masked_fill(~live.any(-1), -1.0)
    bar = float(scores.flatten().sort().values[-3])
    kept = drafted_dreams(drafted, keep_above=bar)
    assert sum(bool(steps) for dream in kept for steps in dream.values()) == 3


# Learning.
SMALL, RATE, STEPS = 32, 4e-3, 220


def small_world(states: int = 4) -> Callable[[Tensor], tuple[Tensor, DreamTargets]]:
    """Two counters that actions move: a prompt names both starts and three actions. The second counter moves only
    while the first one, of the other path, is even: paths must tell each other where they are."""
    words, actions = draw(2 * states + 3, HIDDEN, seed=8), 3
    centroids = F.normalize(draw(CODES, SMALL, seed=9), dim=-1)

    def task(prompts: Tensor) -> tuple[Tensor, DreamTargets]:
        """prompts (B, 5): two starts, three actions."""
        at = prompts[:, :2].clone()
        codes = torch.full((len(prompts), S, T, 3), -1)
        for t in range(3):
            action = prompts[:, 2 + t]
            even = at[:, 0] % 2 == 0
            after = torch.stack(((at[:, 0] + action) % states, (at[:, 1] + even * (action + 1)) % states), 1)
            for path in range(2):
                codes[:, path, t] = torch.stack(
                    (at[:, path] + states * path, action + 2 * states, after[:, path] + states * path), 1
                )
            at = after
        tokens = torch.cat((prompts[:, :1], prompts[:, 1:2] + states, prompts[:, 2:] + 2 * states), 1)
        assert int(tokens.max()) < 2 * states + actions
        return words[tokens], DreamTargets(codes, centroids[codes.clamp_min(0)], codes[..., 0] >= 0)

    return task


def test_the_engine_learns_to_simulate_what_it_was_never_shown() -> None:
    """Trained on half of all prompts of a small world, it dreams the other half right."""
    task, random = small_world(), torch.Generator().manual_seed(0)
    every = torch.cartesian_prod(*(torch.arange(n) for n in (4, 4, 3, 3, 3)))
    every = every[torch.randperm(len(every), generator=random)]
    train, test = every[: len(every) // 2], every[len(every) // 2 :]
    torch.manual_seed(0)
    config = DreamingConfig(num_dream_sequences=2, dream_length=4)
    tokenizer = InputTokenizer(HIDDEN, dim=SMALL, width=64)
    generator = DreamGenerator(config, F.normalize(draw(CODES, SMALL, seed=9), dim=-1), dim=SMALL, width=64)
    learned = [*tokenizer.parameters(), *generator.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=RATE)
    for step in range(STEPS):
        chosen = torch.randint(0, len(train), (32,), generator=random)
        prompts, targets = task(train[chosen])
        targets = DreamTargets(targets.codes[:, :2, :4], targets.phrases[:, :2, :4], targets.steps[:, :2, :4])
        losses = engine_loss(generator(tokenizer(prompts, None)), targets)
        optimizer.zero_grad()
        losses["total"].backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20, 2 * (1 - step / STEPS))
        optimizer.step()
    with torch.no_grad():
        prompts, targets = task(test)
        dreams = generator(tokenizer(prompts, None))
    steps = targets.steps[:, :2, :4]
    assert torch.equal(dreams.live(), steps)
    right = (dreams.codes() == targets.codes[:, :2, :4])[steps].float().mean()
    assert right > 0.93, f"{right:.3f} of the codes are right"


# The backbone's side, and the disk.
def small_backbone() -> Backbone:
    config = BackboneConfig(50, HIDDEN, layers=2, heads=2, kv_heads=1, ffn=48, context=24)
    return Backbone(config).initialize(0).eval()


def test_prompt_states_are_each_prompts_own() -> None:
    backbone, prompts = small_backbone(), [[3, 4, 5], [6], [7, 8, 9, 10, 11]]
    states, real = prompt_states(backbone, prompts)
    assert real.sum(1).tolist() == [3, 1, 5]
    assert not states.requires_grad
    for row, prompt in enumerate(prompts):
        expected = backbone.hidden(torch.tensor([prompt]))[0]
        torch.testing.assert_close(states[row, : len(prompt)], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prompts", [[], [[1], []], [list(range(25))]])
def test_prompts_that_cannot_be_read_are_named(prompts: list[list[int]]) -> None:
    with pytest.raises(BadInput, match="prompt"):
        prompt_states(small_backbone(), prompts)


def test_an_engine_comes_back_from_disk_as_it_was(
    engine: DreamEngine, states: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    engine.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"engine.safetensors", "engine.json"}
    again = DreamEngine.load(tmp_path, some_codebook(), HIDDEN)
    assert not again.training
    assert again.config == engine.config
    with torch.no_grad():
        assert torch.equal(again(*states).dreams.logits, engine(*states).dreams.logits)
        assert torch.equal(again(*states).reasoned.scores, engine(*states).reasoned.scores)


def test_an_engine_is_as_wide_as_what_it_drafts_for() -> None:
    engines = [DreamEngine.new(DreamingConfig(), hidden, some_codebook(), seed=0) for hidden in (32, 150, 576)]
    assert [engine.width for engine in engines] == [128, 144, 256]
    assert engines[0].generator.offsets.shape == (S, 128)
    assert sum(p.numel() for p in engines[0].generator.parameters()) * 3 < sum(
        p.numel() for p in engines[2].generator.parameters()
    )


def test_an_engine_whose_file_names_no_width_is_of_that_which_all_had(tmp_path: Path) -> None:
    DreamEngine.new(DreamingConfig(), HIDDEN, some_codebook(), seed=0, width=256).save(tmp_path)
    about = json.loads((tmp_path / "engine.json").read_text(encoding="utf-8"))
    assert about.pop("width") == 256
    (tmp_path / "engine.json").write_text(json.dumps(about), encoding="utf-8")
    assert DreamEngine.load(tmp_path, some_codebook(), HIDDEN).width == 256


def test_new_engines_are_the_same_for_the_same_seed_and_leave_the_random_numbers_alone() -> None:
    before = torch.random.get_rng_state()
    a, b, c = (DreamEngine.new(DreamingConfig(), HIDDEN, some_codebook(), seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.generator.say_roles.weight, c.generator.say_roles.weight)


def spoil_weights(folder: Path) -> None:
    data = bytearray((folder / "engine.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "engine.safetensors").write_bytes(data)


def spoil_config(folder: Path) -> None:
    about = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
    about["config"]["dream_length"] = 4
    (folder / "engine.json").write_text(json.dumps(about), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (spoil_weights, CorruptFile),
        (spoil_config, CorruptFile),
        (lambda folder: (folder / "engine.safetensors").unlink(), CorruptFile),
        (lambda folder: (folder / "engine.json").unlink(), CorruptFile),
        (lambda folder: (folder / "engine.json").write_text("{", encoding="utf-8"), CorruptFile),
        (lambda folder: (folder / "engine.json").write_text("[]", encoding="utf-8"), CorruptFile),
    ],
)
def test_a_spoilt_engine_is_named(
    engine: DreamEngine, tmp_path: Path, spoil: Callable[[Path], None], error: type[DistillError]
) -> None:
    engine.save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=str(tmp_path)) as found:
        DreamEngine.load(tmp_path, some_codebook(), HIDDEN)
    assert "\n" not in str(found.value)


def test_an_engine_knows_its_codebook_and_its_backbone(engine: DreamEngine, tmp_path: Path) -> None:
    engine.save(tmp_path)
    relabelled = replace(some_codebook(), labels=[f"other {i}" for i in range(CODES)])
    for codebook in (some_codebook(CODES + 1), some_codebook(seed=1), relabelled):
        with pytest.raises(RunMismatch, match="another codebook"):
            DreamEngine.load(tmp_path, codebook, HIDDEN)
    with pytest.raises(RunMismatch, match=f"hidden size {HIDDEN}, this one has 64"):
        DreamEngine.load(tmp_path, some_codebook(), 64)


def test_tokens_are_all_that_passes_from_step_to_step_and_to_the_graph(engine: DreamEngine) -> None:
    """The graph is given centroids only: it says the same of any dream with the same codes."""
    encoded = Encoded(F.normalize(draw(1, 3, D), dim=-1), draw(1, 6, engine.width), torch.ones(1, 6, dtype=torch.bool))
    dreams = engine.generator(encoded)
    centroids = torch.from_numpy(some_codebook().centroids)
    table = engine.reasoner(centroids[dreams.codes()], dreams.live(), encoded.triplet)
    assert torch.allclose(table.scores, engine.reasoner(dreams.quantized(), dreams.live(), encoded.triplet).scores)
