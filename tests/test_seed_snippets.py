"""The users' own snippets about the dreaming model run as they wrote them, but for where they import from.

Each list is one document's snippets in order; those of a list share their names, as a reader's session would.
What this version can't do yet (pixels of who can't see) is refused in one line.
"""

import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from support.fake_ollama import engine

from bundle.manifest import read_manifest
from distill.config import DreamingConfig, ImageTokenizerConfig, Settings
from distill.dream.graph_reasoner import DreamGraphReasoner
from distill.dream.model import DreamingReasoningLLM
from distill.dream.policy import PolicyNetwork
from distill.dream.record import Branch, DreamRecord
from distill.errors import BadInput
from distill.events import Event
from distill.knowledge.graph_rag import GraphRAGEnhanced
from distill.learning.reward_model import RewardModel
from distill.mining.triplets import Triplet

WHERE = {
    "image_token_llm.dreaming_model": "distill.dream.model",
    "image_token_llm.config": "distill.config",
    "image_token_llm.model": "bundle.reasoning",
    "image_token_llm.vision_encoder": "distill.vision.vision_encoder",
    "image_token_llm.rl_learning": "distill.learning.rl_learning",
    "image_token_llm.continuous_learning": "distill.learning.continuous_learning",
    "image_token_llm.graph_attention": "distill.knowledge.graph_rag",
}

BASIC = """
from image_token_llm.dreaming_model import DreamingReasoningLLM

# Create model
model = DreamingReasoningLLM(device="cuda")

# Generate text response
output = model.generate(
    prompt="What happens when you drop a ball?",
    max_length=50,
    temperature=0.8
)
print(output)
"""

WITH_DREAMS = """
result = model.generate(
    prompt="How does a plant grow?",
    return_dreams=True
)

print(f"Output: {result['output']}")
print(f"Dreams explored: {len(result['dreams'])} paths")
print(f"Reasoning graph: {result['graph_data']['num_nodes']} nodes")
"""

VIEWING = """
# Create model with dream viewer enabled
model = DreamingReasoningLLM(
    device="cuda",
    enable_dream_viewer=True  # Enable dream viewing!
)

# Watch dreams stream live during generation
result = model.generate(
    prompt="What happens when you drop a ball?",
    watch_dreams=True  # Live stream to console!
)

# Export recorded dreams
model.export_recorded_dreams("dreams.json", format="json")

# Create visualization heatmap
model.visualize_dream_evolution(save_path="dreams.png")

# Get dream statistics
viewer = model.get_dream_viewer()
summary = viewer.get_dream_summary()
print(f"Total dreams: {summary['total_dreams']}")
print(f"Avg mean: {summary['avg_mean']:.4f}")
"""

IMAGE_INPUT = """
import torch

# Load images (B=1, N=3 images, C=3, H=W=224)
images = torch.randn(1, 3, 3, 224, 224)

description = model.generate(
    images=images,
    output_mode="text"
)
print(description)
"""

IMAGE_OUTPUT = """
what, action, result = model.generate(
    prompt="A bird flying",
    output_mode="image"
)
# Returns image triplet embeddings (B, 512) each
"""

CONFIG = """
from image_token_llm.config import DreamingConfig

config = DreamingConfig(
    num_dream_sequences=4,    # Number of parallel reasoning paths
    dream_length=5,            # Steps per dream sequence
    graph_reasoning_hops=3,    # Multi-hop attention iterations
    output_mode="text",        # "text", "image", or "both"
    enable_visualization=True  # Return dream data
)
"""

IMPORTANT = """
def importance_fn(node, data):
  # Example: prioritize nodes with high reward or attention
  return data.get("reward", 0.0) + data.get("attention", 0.0)

reasoner.save_important_knowledge_to_graphml(
  dream_sequences,
  filepath="important_knowledge.graphml",
  importance_fn=importance_fn,
  max_nodes=1000
)
"""

READ_BACK = """
import networkx as nx
G = nx.read_graphml("important_knowledge.graphml")
# Use G to seed or augment the next reasoning session
"""

BASIC_RL = """
from image_token_llm.dreaming_model import DreamingReasoningLLM

# Create model with RL enabled
model = DreamingReasoningLLM(device="cuda", enable_rl=True)

# Generate response
output = model.generate(
    prompt="What causes rain?",
    max_length=50,
    temperature=0.8
)
print(output)
"""

FEEDBACK = """
# Collect examples with rewards
examples = [
    {"prompt": "Explain photosynthesis", "reward": 0.9},
    {"prompt": "What is gravity?", "reward": 0.7},
    {"prompt": "How do birds fly?", "reward": 0.85},
]

# Continuous learning from feedback
metrics = model.learn_from_feedback(examples, num_epochs=10)
print(f"Average reward: {metrics['avg_reward']:.3f}")
print(f"Policy loss: {metrics['avg_policy_loss']:.3f}")
"""

WITH_DREAMS_2 = """
result = model.generate(
    prompt="How does a plant grow?",
    return_dreams=True
)

print(f"Output: {result['output']}")
print(f"Dreams: {len(result['dreams'])} sequences")
print(f"Graph: {result['graph_data']['num_nodes']} nodes")
"""

IMAGE_INPUT_2 = """
import torch

# Input images (B=1, N=3 images, C=3, H=W=224)
images = load_images(["scene1.jpg", "scene2.jpg", "scene3.jpg"])

description = model.generate(
    images=images,
    output_mode="text",
    max_length=100
)
print(description)
"""

IMAGE_OUTPUT_2 = """
triplet = model.generate(
    prompt="A bird flying over water",
    output_mode="image"
)

what, action, result = triplet
# what: (B, 512) - bird in sky
# action: (B, 512) - flapping wings
# result: (B, 512) - moving forward
"""


ONLINE = """
from image_token_llm.rl_learning import RLContinuousLearner
from image_token_llm.vision_encoder import TripletEncoder

# Initialize components
encoder = TripletEncoder(config)
graph_rag = GraphRAGEnhanced(config)
reward_model = RewardModel()
policy_network = PolicyNetwork()

learner = RLContinuousLearner(encoder, graph_rag, reward_model, policy_network)

# Online inference with learning
prediction, metrics = learner.online_inference_with_learning(
    what_images, action_images, result_images,
    ground_truth_label=("cat", "chases", "mouse")
)

print(f"Reward: {metrics['final_reward']:.3f}")
print(f"Policy Loss: {metrics['policy_loss']:.3f}")
"""

TRIPLET_ENCODER = """
from image_token_llm.vision_encoder import TripletEncoder

# Initialize components
encoder = TripletEncoder(config)
"""

CONTINUOUS = """
from image_token_llm.continuous_learning import IncrementalLearner, OnlineLearningLoop
from image_token_llm.vision_encoder import TripletEncoder

# Initialize components
encoder = TripletEncoder(config)
graph = GraphRAGEnhanced(graph_config)
learner = IncrementalLearner(encoder, graph)
online_loop = OnlineLearningLoop(learner)

# Process streaming data
for what_img, action_img, result_img, label in data_stream:
    metrics = online_loop.step(what_img, action_img, result_img, label)
"""

GRAPH_RAG = """
from image_token_llm.graph_attention import GraphRAGEnhanced

# Initialize components
graph_rag = GraphRAGEnhanced(config)
"""


def run(snippet: str, names: dict[str, Any]) -> None:
    for theirs, ours in WHERE.items():
        snippet = snippet.replace(theirs, ours)
    exec(compile(snippet, "<snippet>", "exec"), names)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Snippets write where they stand."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def basic() -> dict[str, Any]:
    """What the first snippet leaves."""
    names: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(BASIC, names)
    said = [str(warning.message) for warning in caught]
    assert sum("untrained" in text for text in said) == 1
    assert any("device='cuda'" in text for text in said) == (not torch.cuda.is_available())
    return names


def test_basic_usage(basic: dict[str, Any]) -> None:
    model, output = basic["model"], basic["output"]
    assert isinstance(model, DreamingReasoningLLM)
    assert isinstance(output, str)
    said = [output, *(model.generate("What happens when you drop a ball?", max_length=50, seed=i) for i in range(1, 6))]
    assert sum(map(bool, said)) >= 5, "one whose weights are drawn ends at once no more often than it says any word"
    assert model.generate("What happens when you drop a ball?", max_length=50, temperature=0.8) == output


@pytest.mark.parametrize("snippet", [WITH_DREAMS, WITH_DREAMS_2])
def test_with_dream_visualization(basic: dict[str, Any], snippet: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = {**basic}
    run(snippet, names)
    result = names["result"]
    assert isinstance(result["output"], str)
    assert len(result["dreams"]) == 4
    assert {branch.lens for branch in result["dreams"]} == {"spatial", "temporal", "causal", "abstract"}
    nodes = sum(len(branch.steps) for branch in result["dreams"])
    assert 0 < nodes == result["graph_data"]["num_nodes"] == len(result["graph_data"]["nodes"])
    assert f" {nodes} nodes" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:no student was given", "ignore:device='cuda'")
def test_live_dream_viewing(elsewhere: Path, basic: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    names = {**basic}
    run(VIEWING, names)
    told = capsys.readouterr().out
    (record,) = names["viewer"].records
    for branch in record.branches:
        assert f"{branch.lens}: " in told
        assert all(f"⟨{step.what.label}⟩ ⟨{step.action.label}⟩ ⟨{step.result.label}⟩" in told for step in branch.steps)
    assert "Total dreams: 1" in told
    assert -1 < names["summary"]["avg_mean"] < 1
    assert names["result"] == record.answer
    assert (elsewhere / "dreams.png").read_bytes().startswith(b"\x89PNG")
    assert record.prompt in (elsewhere / "dreams.json").read_text(encoding="utf-8")


def test_image_input_is_pixels_for_who_can_see_and_else_embeddings(basic: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="this student can't see"):
        run(IMAGE_INPUT, {**basic})
    with pytest.raises(BadInput, match=r"Pillow, or embeddings of shape \(prompts, images, 512\)"):
        run(IMAGE_INPUT_2, {**basic, "load_images": lambda names: torch.zeros(2, len(names), 3, 224, 224)})
    names = {**basic, "load_images": lambda names: torch.randn(1, len(names), 512)}
    run(IMAGE_INPUT_2, names)
    assert isinstance(names["description"], str)


@pytest.mark.parametrize("snippet", [IMAGE_OUTPUT, IMAGE_OUTPUT_2])
def test_image_generation(basic: dict[str, Any], snippet: str) -> None:
    names = {**basic}
    run(snippet, names)
    for role in ("what", "action", "result"):
        assert names[role].shape == (1, 512)
        assert abs(float(names[role].norm()) - 1) < 1e-5


@pytest.mark.filterwarnings("ignore:no student was given")
def test_configuration() -> None:
    names: dict[str, Any] = {}
    run(CONFIG, names)
    config = names["config"]
    assert config == DreamingConfig(enable_visualization=True), "they wrote the defaults down"
    model = DreamingReasoningLLM(config, device="cpu")
    model.generate("A ball", max_length=2)
    assert model.get_dream_viewer().get_dream_summary()["total_dreams"] == 1


def test_knowledge_graph(elsewhere: Path, basic: dict[str, Any]) -> None:
    record = basic["model"].generate("How does a plant grow?", return_dreams=True)["record"]
    assert isinstance(record, DreamRecord)
    assert all(isinstance(branch, Branch) for branch in record.branches)
    names: dict[str, Any] = {"reasoner": basic["model"].parts.engine.reasoner, "dream_sequences": record.branches}
    assert isinstance(names["reasoner"], DreamGraphReasoner)
    run(IMPORTANT, names)
    run(READ_BACK, names)
    said = {slot.label for branch in record.branches for step in branch.steps for slot in step.slots}
    assert {data["label"] for _, data in names["G"].nodes(data=True)} == said
    before = {node: data["count"] for node, data in names["G"].nodes(data=True)}
    run(IMPORTANT, names)
    grown: Any = nx.read_graphml(elsewhere / "important_knowledge.graphml")
    assert {node: data["count"] for node, data in grown.nodes(data=True)} == {
        n: 2 * count for n, count in before.items()
    }


@pytest.mark.filterwarnings("ignore:no student was given", "ignore:device='cuda'")
def test_reinforcement_learning(basic: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    run(BASIC_RL, names)
    assert isinstance(names["output"], str)
    before = {name: one.detach().clone() for name, one in names["model"].parts.model.named_parameters()}
    run(FEEDBACK, names)
    assert names["metrics"]["avg_reward"] == pytest.approx((0.9 + 0.7 + 0.85) / 3)
    assert "Average reward: 0.817\nPolicy loss: " in capsys.readouterr().out
    assert any(not torch.equal(one, before[name]) for name, one in names["model"].parts.model.named_parameters())
    with pytest.raises(BadInput, match="enable_rl=True"):
        run(FEEDBACK, {**basic})


def test_online_inference_with_learning(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {
        "config": ImageTokenizerConfig(embedding_dim=512, patch_size=16),
        **{"GraphRAGEnhanced": GraphRAGEnhanced, "RewardModel": RewardModel, "PolicyNetwork": PolicyNetwork},
        **dict(zip(("what_images", "action_images", "result_images"), torch.rand(3, 1, 3, 64, 64), strict=True)),
    }
    run(ONLINE, names)
    assert names["prediction"] is None, "it was told of nothing yet"
    run(ONLINE.partition("# Online inference with learning")[2], names)
    assert names["prediction"] == ("cat", "chases", "mouse")
    assert names["graph_rag"].retrieve("A cat?") == [("cat", "chases", "mouse")]
    assert "Reward: 1.000\nPolicy Loss: " in capsys.readouterr().out


def test_the_triplet_encoder() -> None:
    """Of the snippets that learn while they answer, the part that there is: the encoder of what, action and result."""
    names: dict[str, Any] = {"config": ImageTokenizerConfig(embedding_dim=512, patch_size=16)}
    run(TRIPLET_ENCODER, names)
    what_images, action_images, result_images = torch.rand(3, 4, 3, 224, 224)
    assert names["encoder"](what_images, action_images, result_images).shape == (4, 512)


@pytest.mark.usefixtures("one_thread")
def test_learning_from_a_stream_of_pictures() -> None:
    shown = torch.rand(2, 3, 3, 64, 64)
    labels = [("cat", "chases", "mouse"), ("dog", "eats", "bone")]
    stream = [(*shown[i % 2], labels[i % 2]) for i in range(5)]
    names: dict[str, Any] = {"config": ImageTokenizerConfig(embedding_dim=64, patch_size=16), "graph_config": None}
    names |= {"GraphRAGEnhanced": GraphRAGEnhanced, "data_stream": stream}
    run(CONTINUOUS, names)
    assert names["metrics"]["reconstruction"] >= 0
    assert sorted(names["graph"].retrieve("A cat and a dog?")) == labels


def test_the_graph_with_attention() -> None:
    """Of the same snippets, the graph; and one that was given another config, or none."""
    names: dict[str, Any] = {"config": ImageTokenizerConfig(embedding_dim=512, patch_size=16)}
    run(GRAPH_RAG, names)
    found = names["graph_rag"].add([Triplet("cat", "chases", "mouse", "causal", 0, "t", -1, "")]).retrieve("A cat?")
    assert found == [("cat", "chases", "mouse")]
    assert names["graph_rag"].prompt_vectors([["cat"]]).shape == (1, 512)


DISTILL = """
# Create new model from Ollama teacher
model = ImageTokenReasoningLLM(device="cuda")

prompts = [
    "What is AI?",
    "Explain machine learning",
    # ... more prompts
]

metrics = model.distill_from_ollama(
    prompts=prompts,
    teacher_model="llama3.2:1b",
)

# Export bundle
model.export_ollama_bundle(
    output_dir="./my_models",
    bundle_name="custom-llm",
)
"""

FROM_BUNDLE = """
from image_token_llm.model import ImageTokenReasoningLLM

# Load pretrained model
model = ImageTokenReasoningLLM.load_from_bundle(
    bundle_dir="./my_models/custom-llm",
    device="cuda",  # or "cpu"
)

# Generate text
output = model.generate(
    prompt="What is quantum computing?",
    max_new_tokens=100,
    temperature=0.7,
)
print(output)

# Streaming generation
result = model.generate(
    prompt="Write a story",
    max_new_tokens=200,
    temperature=0.9,
    stream=True,
)
for chunk in result:
    print(chunk, end="", flush=True)
"""

TRIPLETS = """
result = model.generate("Describe the scene", image_triplets=triplets)
"""


@pytest.mark.usefixtures("one_thread")
def test_the_older_model(
    elsewhere: Path, dreamer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Distilled, exported, loaded and asked, as its snippets do; a student of words says that it can't see triplets."""
    from bundle import reasoning

    settings = Settings()
    settings.capture.max_tokens, settings.tokenize.vocab_size, settings.train.steps = 24, 600, 2
    settings.student.init, settings.student.context, settings.train.batch_rows = "chance", 128, 2
    monkeypatch.setattr(reasoning, "Settings", lambda: copy.deepcopy(settings))
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    names: dict[str, Any] = {"ImageTokenReasoningLLM": reasoning.ImageTokenReasoningLLM}
    with engine({"llama3.2:1b": dreamer}) as server, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        run(DISTILL, names)
    assert names["metrics"]["steps"] == 2
    run(FROM_BUNDLE, names)
    assert isinstance(names["output"], str)
    assert names["output"] in capsys.readouterr().out
    # A bundle that is exported again says what it said; what is no bundle is left alone.
    bundle = elsewhere / "my_models" / "custom-llm"
    loaded = reasoning.ImageTokenReasoningLLM.load_from_bundle(bundle)
    again = loaded.export_ollama_bundle(elsewhere, "again")
    first, second = read_manifest(bundle), read_manifest(again)
    assert (second.provenance, second.verification_answers) == (first.provenance, first.verification_answers)
    assert second.files.keys() == first.files.keys()
    (again / "notes.md").write_text("mine", encoding="utf-8")
    said: list[Event] = []
    loaded.export_ollama_bundle(elsewhere, "again", said.append)
    assert (elsewhere / "again.kept" / "notes.md").read_text(encoding="utf-8") == "mine"
    assert any("again.kept" in event.message for event in said if event.kind == "warning")
    (again / "notes.md").write_text("mine, too", encoding="utf-8")
    loaded.export_ollama_bundle(elsewhere, "again")
    kept = [(elsewhere / "again.kept" / name).read_text(encoding="utf-8") for name in ("notes.md", "notes.md.1")]
    assert kept == ["mine", "mine, too"]
    (elsewhere / "thesis").mkdir()
    (elsewhere / "thesis" / "one.tex").write_text("mine", encoding="utf-8")
    for name, reason in (("thesis", "something else than a bundle"), ("", "give a name"), ("../x", "give a name")):
        with pytest.raises(BadInput, match=reason):
            loaded.export_ollama_bundle(elsewhere, name)
    assert (elsewhere / "thesis" / "one.tex").exists()
    pictures = torch.rand(1, 3, 64, 64)
    with pytest.raises(BadInput, match="this student can't see"):
        run(TRIPLETS, {**names, "triplets": [(pictures, pictures, pictures)]})
