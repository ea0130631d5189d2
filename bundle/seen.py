"""Does a projector in llama.cpp make of pictures what we make of them?

What llama.cpp's server tells of a prompt are texts and the states of words, never what it reads of a picture. So a text
model is written for the purpose, of one layer that copies: its attention gives each word what stood P places before
it, the words themselves are zeros, and norms are made linear by an ε that outweighs all. After a picture of P patches,
P words come out as the picture's embeddings.

Shape legend: N pictures, P patches of each, D the student's hidden size.
"""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from gguf import RopeScalingType
from numpy.typing import NDArray

from bundle import parity
from bundle.load import Student
from bundle.looking import PictureEngine
from bundle.parity import Agreement
from distill.backbone.generate import generate
from distill.teacher.gguf_file import writing_gguf
from distill.tokens.chat import PICTURE, Message, picture_ids, render
from distill.vision.pictures import Picture, as_image, png
from distill.vision.sight import Sight, showing

MAX_ERROR, MAX_WORST = 1e-3, 5e-3
"""Of embeddings in float32, relative to their length: the root mean square over pictures, and of any one. On a CPU
llama.cpp looks GELU up in a table of 16-bit numbers: a trained projector reached 8e-4 and 1.7e-3."""
SHARP = 50.0
"""Nats by which a place is likelier to be read than the one beside it."""
EPS = 1e12


def write_copier(path: Path, hidden: int, patches: int) -> None:
    """The text model that copies: of every head two numbers, its queries and keys biases alone, which turn by 1 / P a
    place: the score of a place d off is cos(d / P) · 2 P² SHARP, about −SHARP d² from its peak."""
    with writing_gguf(path, "llama") as writer:
        writer.add_vocab_size(2)
        writer.add_context_length(4 * patches + 8)
        writer.add_embedding_length(hidden)
        writer.add_block_count(1)
        writer.add_feed_forward_length(32)
        writer.add_head_count(hidden // 2)
        writer.add_head_count_kv(hidden // 2)
        writer.add_key_length(2)
        writer.add_value_length(2)
        writer.add_layer_norm_rms_eps(EPS)
        writer.add_rope_dimension_count(2)
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(patches))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(["a", "b"])
        writer.add_token_merges(["x y"])
        writer.add_eos_token_id(1)
        writer.add_add_bos_token(False)
        scale = math.sqrt(2) * 2 * patches**2 * SHARP  # scores are divided by √2
        zeros, one = np.zeros((hidden, hidden), np.float32), np.eye(hidden, dtype=np.float32)
        back = np.full(hidden, math.sqrt(EPS), np.float32)
        block = {
            "attn_norm.weight": back,
            "ffn_norm.weight": 0 * back,
            **{
                f"attn_{part}.weight": matrix
                for part, matrix in (("q", zeros), ("k", zeros), ("v", one), ("output", one))
            },
            "attn_q.bias": np.tile(np.array([math.cos(1), -math.sin(1)]) * scale, hidden // 2).astype(np.float32),
            "attn_k.bias": np.tile(np.array([1, 0], np.float32), hidden // 2),
            "attn_v.bias": 0 * back,
            **{f"ffn_{part}.weight": np.zeros((32, hidden), np.float32) for part in ("gate", "up")},
            "ffn_down.weight": np.zeros((hidden, 32), np.float32),
        }
        rows = np.zeros((2, hidden), np.float32)
        tensors = {"token_embd.weight": rows, "output.weight": rows, "output_norm.weight": back}
        for name, tensor in (tensors | {f"blk.0.{name}": tensor for name, tensor in block.items()}).items():
            writer.add_tensor(name, tensor)


def engine_rows(mmproj: Path, hidden: int, patches: int, pictures: Sequence[bytes]) -> NDArray[np.float64]:
    """(N, P, D): what llama.cpp reads of pictures, files' bytes, through a projector."""
    with tempfile.TemporaryDirectory(prefix="dream-verify-") as aside:
        write_copier(path := Path(aside) / "copier.gguf", hidden, patches)
        with PictureEngine(path, mmproj, context=4 * patches + 8, threads=1, embeds=True) as engine:
            words = ["", "a" * patches]
            return np.stack([engine.embeddings(engine.prompt(words, [each]))[-patches:] for each in pictures])


class Shown:
    """A student's questions about pictures, one each, as natively and by llama.cpp."""

    def __init__(self, student: Student, sight: Sight, questions: Sequence[tuple[str, Picture]]) -> None:
        self.student, self.sight = student, sight
        images = [as_image(picture) for _, picture in questions]
        self.rows = sight.rows(images)
        self.model = showing(student.model, self.rows)
        self.files = [png(image) for image in images]
        system: list[Message] = [{"role": "system", "content": student.system}] if student.system else []
        asked: list[Message] = [{"role": "user", "content": PICTURE + question} for question, _ in questions]
        self.texts = [render([*system, turn]) for turn in asked]
        first, patches = student.model.config.vocab_size, sight.patches
        places = [range(first + i * patches, first + (i + 1) * patches) for i in range(len(images))]
        self.ids = [picture_ids(student.tokenizer, text, [own]) for text, own in zip(self.texts, places, strict=True)]

    def errors(self, mmproj: Path) -> tuple[float, float]:
        """Of ‖llama.cpp's embeddings − ours‖ / ‖ours‖ of each picture the root mean square, and the largest."""
        ours = self.rows.double().numpy().reshape(len(self.files), self.sight.patches, -1)
        apart = engine_rows(mmproj, ours.shape[2], self.sight.patches, self.files) - ours
        each = np.linalg.norm(apart, axis=(1, 2)) / np.linalg.norm(ours, axis=(1, 2))
        return float(np.sqrt(np.square(each).mean())), float(each.max())

    def ours(self, max_tokens: int) -> list[list[int]]:
        """Greedy answers, natively."""
        return generate(self.model, self.ids, max_tokens=max_tokens, stop_ids=[self.student.tokenizer.eos_id])

    def theirs(self, engine: PictureEngine, max_tokens: int) -> list[list[int]]:
        """Greedy answers by llama.cpp."""
        pairs = zip(self.texts, self.files, strict=True)
        prompts = (engine.prompt(text.split(PICTURE), [file]) for text, file in pairs)
        return [engine.complete(prompt, max_tokens=max_tokens).ids for prompt in prompts]

    def agreement(self, engine: PictureEngine, max_tokens: int) -> Agreement:
        """Of both; the prompts must be of the same length."""
        return parity.compare_answers(self.model, self.ids, self.ours(max_tokens), self.theirs(engine, max_tokens))
