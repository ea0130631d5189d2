"""The student's tokenizer: BPE ids, then control tokens, then `<think>`, the lenses and the image tokens.

A tokenizer is a folder. `tokenizer.json` and `tokenizer_config.json` are what transformers reads;
`dream_tokenizer.json` holds what only we know, with the SHA-256 of its neighbours; `teacher_map.safetensors`
is there for the aligned kind.
"""

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer

from distill.errors import CorruptFile, RunMismatch
from distill.mining.triplets import LENSES
from distill.run import sha256_file, write_atomic
from distill.teacher.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, byte_alphabet
from distill.teacher.pre_tokenizers import PRE_TOKENIZATIONS, imported_as
from distill.tokens.chat_template import JINJA
from distill.tokens.shown import load_shown

PAD, START, END = CONTROL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>")
THINK, END_THINK = "<think>", "</think>"


def image_text(label: str) -> str:
    """How an image token (or a lens) is printed."""
    return f"⟨{label}⟩"


USER_TOKENS = (THINK, END_THINK, *map(image_text, LENSES))
ADDED = len(CONTROL_TOKENS) + len(USER_TOKENS)
"""Ids that every student has between its BPE and its image tokens."""

VERSION = 1
"""Of the folder's format."""

EVERY_BYTE = "".join(map(chr, range(256))) + "⟨a ball⟩ 日本🙂"
"""Text whose UTF-8 has nearly all bytes that occur there: it comes back only where the vocabulary is whole."""

FILES = ("tokenizer.json", "tokenizer_config.json", "teacher_map.safetensors")


@dataclass(frozen=True)
class GgufVocabulary:
    """What a GGUF file says of a tokenizer (`tokenizer.ggml.*`); it also wants add_bos_token and
    add_space_prefix false. `merges` is empty for "llama" (SentencePiece), `scores` for "gpt2" (byte-level BPE)."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]


@dataclass(frozen=True)
class Origin:
    """Where a tokenizer comes from; the part of `dream_tokenizer.json` that can't be had from its neighbours."""

    kind: str
    """`aligned` or `sentencepiece`."""
    pre: str
    """`tokenizer.ggml.pre`."""
    scores: list[float] = field(default_factory=list[float])
    """Of the BPE ids; sentencepiece only."""
    teacher: str = ""
    """Digest of the teacher whose tokens `teacher_map` maps."""


class StudentTokenizer:
    """Text to ids and back. `teacher_map` is (teacher vocabulary,) int32, teacher id → ours or -1; aligned only."""

    def __init__(self, tokenizer: Tokenizer, origin: Origin, teacher_map: NDArray[np.int32] | None = None) -> None:
        self.hf = tokenizer
        self.origin = origin
        self.teacher_map = teacher_map
        self.shown: dict[str, str] = {}
        """Pictures' paths → how prompts show them (shown.py); where they lie in the folder that it is loaded from."""
        self.base_size = tokenizer.get_vocab_size(with_added_tokens=False)
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        self.pad_id, self.start_id, self.eos_id, self.think_id, self.end_think_id, *lenses = range(
            self.base_size, self.base_size + ADDED
        )
        self.lens_ids: tuple[int, int, int, int] = (lenses[0], lenses[1], lenses[2], lenses[3])
        self.lenses = tuple(str(tokenizer.id_to_token(id))[1:-1] for id in self.lens_ids)
        """In the order in which a dream has them."""
        self.image_ids = np.arange(self.base_size + ADDED, self.vocab_size, dtype=np.int32)

    @classmethod
    def assemble(
        cls,
        base: Tokenizer,
        labels: Sequence[str],
        origin: Origin,
        teacher_map: NDArray[np.int32] | None = None,
        lenses: Sequence[str] = LENSES,
    ) -> "StudentTokenizer":
        """Put the added tokens after the ids of `base`. Labels are the image tokens', in the order of codes; lenses are
        put in the order in which dreams shall have them."""
        assert sorted(lenses) == sorted(LENSES)
        size = base.get_vocab_size()
        texts = [*CONTROL_TOKENS, THINK, END_THINK, *map(image_text, (*lenses, *labels))]
        base.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL_TOKENS])
        base.add_tokens([AddedToken(t, special=False, normalized=False) for t in texts[len(CONTROL_TOKENS) :]])
        assert [base.token_to_id(text) for text in texts] == list(range(size, size + len(texts)))
        return cls(base, origin, teacher_map)

    def check_rows(self, rows: int, where: str) -> None:
        """Raises RunMismatch, beginning with `where`, for weights that have another number of tokens."""
        if rows != self.vocab_size:
            raise RunMismatch(
                f"{where}: the tokenizer has {self.vocab_size} tokens, the weights {rows}; put back the tokenizer that "
                "it was trained with"
            )

    # Text and ids.
    @property
    def kind(self) -> str:
        return self.origin.kind

    @cached_property
    def newline_id(self) -> int:
        """The one id of a line break by itself."""
        (id,) = self.encode("\n")
        return id

    @cached_property
    def _plain(self) -> Tokenizer:
        """The same without added tokens, for text in which `<think>` is seven characters and no more."""
        content = json.loads(self.hf.to_str())
        return Tokenizer.from_str(json.dumps({**content, "added_tokens": []}))

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`. `special`: texts of control, user-defined and image tokens become these tokens."""
        return (self.hf if special else self._plain).encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        batch = (self.hf if special else self._plain).encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, and of a character that the end cuts off nothing is
        left. `skip_special` leaves control tokens out."""
        control = range(self.pad_id, self.eos_id + 1)
        kept = (i for i in ids if not (skip_special and i in control))
        return codecs.utf_8_decode(b"".join(self._bytes[i] for i in kept), "replace", False)[0]

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for; of an added token, its text's."""
        return self._bytes[id]

    @cached_property
    def byte_lengths(self) -> NDArray[np.int64]:
        """(vocabulary,) how many bytes each token stands for."""
        return np.array([len(spelled) for spelled in self._bytes])

    @cached_property
    def tokens(self) -> list[str]:
        """Every token as the vocabulary spells it, by id."""
        vocabulary = self.hf.get_vocab(with_added_tokens=True)
        return sorted(vocabulary, key=vocabulary.__getitem__)

    @cached_property
    def _bytes(self) -> list[bytes]:
        base, added = self.tokens[: self.base_size], self.tokens[self.base_size :]
        if self.kind == "aligned":
            alphabet = byte_alphabet()
            spelled = [bytes(alphabet[character] for character in token) for token in base]
        else:
            spelled = [
                bytes([int(token[3:5], 16)]) if kind == BYTE else token.replace("▁", " ").encode()
                for token, kind in zip(base, self.types, strict=False)
            ]
        return spelled + [token.encode() for token in added]

    # Image tokens.
    def image_code(self, id: int) -> int | None:
        """The codebook's code of an image token, or None for any other token."""
        return id - int(self.image_ids[0]) if len(self.image_ids) and id >= self.image_ids[0] else None

    @property
    def labels(self) -> list[str]:
        """Of the image tokens, by code."""
        return [text[1:-1] for text in self.tokens[self.base_size + ADDED :]]

    # For a GGUF, and for who makes one.
    @property
    def importable(self) -> bool:
        """Whether Ollama, importing the folder's safetensors, gives text the same ids: it must know how it is split."""
        found = imported_as(json.loads(self.hf.to_str())["pre_tokenizer"])
        return found in PRE_TOKENIZATIONS and PRE_TOKENIZATIONS[found] == PRE_TOKENIZATIONS.get(self.origin.pre)

    @cached_property
    def types(self) -> list[int]:
        """GGUF token types, by id."""
        if self.kind == "aligned":
            base = [NORMAL] * self.base_size
        else:  # <unk>, then the 256 bytes, then the pieces
            base = [UNKNOWN, *[BYTE] * 256, *[NORMAL] * (self.base_size - 257)]
        added = self.vocab_size - self.base_size
        return base + [CONTROL] * len(CONTROL_TOKENS) + [USER_DEFINED] * (added - len(CONTROL_TOKENS))

    def gguf(self) -> GgufVocabulary:
        """The vocabulary as a GGUF file wants it."""
        if self.kind == "aligned":
            merges = [" ".join(pair) for pair in json.loads(self.hf.to_str())["model"]["merges"]]
            return GgufVocabulary("gpt2", self.origin.pre, self.tokens, self.types, merges, [])
        scores = self.origin.scores + [0.0] * (self.vocab_size - self.base_size)
        return GgufVocabulary("llama", self.origin.pre, self.tokens, self.types, [], scores)

    # Folders.
    def save(self, folder: Path, context: int = 1 << 30) -> None:
        """Write the tokenizer's files into `folder`, which may hold other things. context: of the model beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "tokenizer.json", self.hf.to_str(pretty=True) + "\n")
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": START,  # never added, and named to say so: Ollama's importer reads the next line only then
            "eos_token": END,
            "pad_token": PAD,
            "unk_token": None,
            "add_bos_token": False,
            "padding_side": "left",  # a batch's answers begin where its prompts end
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
            "chat_template": JINJA,
        }
        write_atomic(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        if self.teacher_map is not None:
            save_file({"teacher_map": self.teacher_map}, folder / "teacher_map.safetensors")
        ours = {
            "version": VERSION,
            "origin": vars(self.origin),
            "files": {name: sha256_file(folder / name) for name in FILES if (folder / name).exists()},
        }
        write_atomic(folder / "dream_tokenizer.json", json.dumps(ours, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "StudentTokenizer":
        """Read what `save` wrote. Raises CorruptFile where a file is missing, cut short or altered."""
        meta = folder / "dream_tokenizer.json"
        try:
            ours = json.loads(meta.read_text(encoding="utf-8"))
            if ours["version"] != VERSION:
                raise ValueError(f"its version is {ours['version']}, this program's {VERSION}")
            origin, digests = Origin(**ours["origin"]), dict(ours["files"])
            for name, digest in digests.items():
                if sha256_file(folder / name) != digest:
                    raise CorruptFile(f"{folder / name}: altered since it was written; run `dream tokenize` again")
            teacher_map = load_file(folder / FILES[2])["teacher_map"] if FILES[2] in digests else None
            found = cls(Tokenizer.from_str((folder / FILES[0]).read_text(encoding="utf-8")), origin, teacher_map)
            found.shown = load_shown(folder)
            if found.decode(found.encode(EVERY_BYTE)) != EVERY_BYTE:
                raise ValueError(f"what {FILES[0]} writes isn't what it reads")
            if sorted(found.lenses) != sorted(LENSES):
                raise ValueError(f"its lenses are {', '.join(found.lenses)}")
            return found
        except FileNotFoundError as error:
            raise CorruptFile(f"{error.filename}: missing; run `dream tokenize` again") from error
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CorruptFile(f"{meta}: can't be read ({error}); run `dream tokenize` again") from error
