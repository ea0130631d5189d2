"""What an untrained student starts with: a vocabulary of bytes, and image tokens for some everyday phrases."""

from distill.config import DreamingConfig, StudentSettings
from distill.dream.engine import DreamEngine
from distill.dream.pretrained import Parts
from distill.mining.triplets import LENSES, Triplet
from distill.student.initialize import new_student
from distill.teacher.gguf_tokenizer import byte_alphabet
from distill.teacher.pre_tokenizers import byte_level_bpe
from distill.tokens.bpe import Origin, StudentTokenizer
from distill.tokens.image_tokens import Codebook, build_codebook

EVERYDAY: dict[str, tuple[tuple[str, str, str], ...]] = {
    "spatial": (
        ("a ball", "release", "falls to the floor"),
        ("a cup", "stand on", "the table"),
        ("a bird", "fly over", "the water"),
        ("a door", "push", "swings open"),
        ("a book", "put on", "the shelf"),
        ("a car", "turn around", "the corner"),
    ),
    "temporal": (
        ("a seed", "water", "sprouts"),
        ("a plant", "grow", "blossoms"),
        ("the sun", "rise", "the morning"),
        ("the night", "pass", "a new day"),
        ("dough", "bake", "bread"),
        ("a child", "grow up", "an adult"),
    ),
    "causal": (
        ("the rain", "fall", "the street is wet"),
        ("water", "heat", "steam"),
        ("ice", "warm", "melts"),
        ("a glass", "drop", "breaks"),
        ("fire", "burn", "smoke"),
        ("a switch", "press", "the light is on"),
    ),
    "abstract": (
        ("a question", "ask", "an answer"),
        ("practice", "repeat", "skill"),
        ("a friend", "help", "trust"),
        ("a problem", "think about", "a solution"),
        ("work", "finish", "rest"),
        ("a mistake", "notice", "learning"),
    ),
}
"""Lens → triplets."""


def starter_tokenizer(labels: list[str]) -> StudentTokenizer:
    """The 256 bytes, then what every student has, then image tokens of these labels."""
    vocabulary = {symbol: id for id, symbol in enumerate(byte_alphabet())}
    return StudentTokenizer.assemble(byte_level_bpe(vocabulary, [], "gpt-2"), labels, Origin("aligned", "gpt-2"))


def starter_codebook(seed: int = 0) -> Codebook:
    """An image token for each of the everyday phrases."""
    triplets = [
        Triplet(*phrases, lens=lens, step=0, trace=f"{lens}-{i}", sentence=0, miner="starter")
        for lens in LENSES
        for i, phrases in enumerate(EVERYDAY[lens])
    ]
    phrases = {phrase for triplet in triplets for phrase in triplet.phrases}
    return build_codebook(triplets, size=len(phrases), seed=seed)[0]


def starter_parts(config: DreamingConfig, seed: int = 0) -> Parts:
    """A nano student and its engine with random weights: everything works, and what it says means nothing."""
    codebook = starter_codebook(seed)
    tokenizer = starter_tokenizer(codebook.labels)
    model = new_student(StudentSettings(), tokenizer, seed).eval()
    engine = DreamEngine.new(config, model.config.hidden, codebook, seed).eval()
    return Parts(model, tokenizer, codebook, engine, config)
