"""How each teacher's BPE splits text before it merges, by the name that GGUF gives it (`tokenizer.ggml.pre`).

Each entry is the equivalent, in the `tokenizers` library, of what llama.cpp does for that name; tests compare
the two on fuzzed text for each way of splitting. A name that is not listed can't be promised to be exact.
"""

import hashlib
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from distill.teacher.protocol import TeacherTokenizer

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
"""As tokenizer.json files spell them, and Ollama knows them (see `imported_as`). One text is split otherwise than by
llama.cpp, whose S has two cases only: the long s after an apostrophe ('ſ)."""
_WITHOUT_FLAG = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
"""The same, as our own files had it before."""
_WORDS = (
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # the cl100k shape
)


@dataclass(frozen=True)
class PreTokenization:
    """`ignore_merges`: a piece that is itself in the vocabulary is taken whole, whatever the merges say."""

    digits: str
    """`runs`, `single`, `three` (how digits are grouped)."""
    shape: str
    """`gpt2` or `cl100k`."""
    ignore_merges: bool = False

    @property
    def pattern(self) -> str:
        """Regular expression of a piece, in the shape `cl100k`."""
        return _CONTRACTIONS + _WORDS.replace("{DIGITS}", "{1,3}" if self.digits == "three" else "")

    def build(self) -> PreTokenizer:
        if self.shape == "gpt2":
            words: PreTokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
            return Sequence([Digits(individual_digits=True), words]) if self.digits == "single" else words
        words = Split(Regex(self.pattern), behavior="isolated")
        return Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])


_GPT2 = PreTokenization("runs", "gpt2")
_SMOLLM = PreTokenization("single", "gpt2")
_LLAMA3 = PreTokenization("three", "cl100k", ignore_merges=True)
_DBRX = PreTokenization("three", "cl100k")
_QWEN2 = PreTokenization("single", "cl100k")

PRE_TOKENIZATIONS: dict[str, PreTokenization] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _SMOLLM),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _DBRX),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
}

_NAMES = {_GPT2: "gpt-2", _SMOLLM: "smollm", _LLAMA3: "llama-bpe", _DBRX: "dbrx", _QWEN2: "qwen2"}


def name_of(pre_tokenizer: Any, ignore_merges: bool) -> str:
    """GGUF's name of what tokenizer.json says in `pre_tokenizer`; "" where we don't know it to be exact."""
    try:
        steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
        kinds, last = [step["type"] for step in steps], steps[-1]
        if last["type"] != "ByteLevel" or last["add_prefix_space"]:
            return ""
        found = None
        if last.get("use_regex", True):
            if kinds == ["ByteLevel"]:
                found = PreTokenization("runs", "gpt2", ignore_merges)
            elif kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
                found = PreTokenization("single", "gpt2", ignore_merges)
        elif kinds == ["Split", "ByteLevel"] and (steps[0]["behavior"], steps[0]["invert"]) == ("Isolated", False):
            pattern = steps[0]["pattern"]["Regex"].replace(_WITHOUT_FLAG, _CONTRACTIONS)
            shapes = [PreTokenization(digits, "cl100k", ignore_merges) for digits in ("three", "single")]
            found = next((shape for shape in shapes if shape.pattern == pattern), None)
    except (KeyError, TypeError, IndexError, AttributeError):
        return ""
    return "" if found is None else _NAMES.get(found, "")


IMPORTED = {
    "d98f9631be1e9607a9848c26c1f9eac1aa9fc21ac6ba82a2fc0741af9780a48f": "llama-bpe",
    "03df5c5863ad70781dcfdef491ead25140f895fe8010964be0daefe27be32b02": "deepseek-llm",
    "21cde974d587f0d54dc8d56b183cc1e6239600172035c68fbd6d4b9f8da0576e": "deepseek-coder",
    "1ff7f41064896984db5d1bb6ff64fa4bc29007d08c1b439e505b7392777a319e": "qwen2",
}
"""What Ollama's importer of safetensors (its convert/tokenizer.go) knows: SHA-256 of the patterns → GGUF's name."""


def imported_as(pre_tokenizer: Any) -> str:
    """GGUF's name of what tokenizer.json says in `pre_tokenizer`, as Ollama's importer finds it: by the SHA-256 of the
    regular expressions of the `Split` steps of a `Sequence`, one after the other; "default" for all others."""
    steps = (pre_tokenizer or {}).get("pretokenizers") or []
    patterns = [step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split"]
    return IMPORTED.get(hashlib.sha256("".join(patterns).encode()).hexdigest(), "default")


def byte_level_bpe(vocabulary: dict[str, int], merges: Several[tuple[str, str]], pre: str) -> Tokenizer:
    """A tokenizer of the `tokenizers` library that does what llama.cpp does for `pre`. No added tokens."""
    pre_tokenization = PRE_TOKENIZATIONS[pre]
    model = BPE(vocab=vocabulary, merges=list(merges), ignore_merges=pre_tokenization.ignore_merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenization.build()
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


def why_unknown(tokenizer: TeacherTokenizer) -> str | None:
    """Why how it splits text can't be reproduced exactly, or None where it can."""
    if tokenizer.model != "gpt2":
        return f"the teacher's tokenizer is of the kind {tokenizer.model!r}, not a byte-level BPE"
    if tokenizer.pre not in PRE_TOKENIZATIONS:
        return f"how the teacher's tokenizer {tokenizer.pre!r} splits words isn't known exactly"
    return None
