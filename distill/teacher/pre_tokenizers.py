"""How each teacher's BPE splits text before it merges, by the name that GGUF gives it (`tokenizer.ggml.pre`).

Each entry is the equivalent, in the `tokenizers` library, of what llama.cpp does for that name; tests compare
the two on fuzzed text for each way of splitting. A name that is not listed can't be promised to be exact.
"""

from collections.abc import Sequence as Several
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from distill.teacher.protocol import TeacherTokenizer

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
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

    def build(self) -> PreTokenizer:
        if self.shape == "gpt2":
            words: PreTokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
            return Sequence([Digits(individual_digits=True), words]) if self.digits == "single" else words
        pattern = _CONTRACTIONS + _WORDS.replace("{DIGITS}", "{1,3}" if self.digits == "three" else "")
        return Sequence(
            [Split(Regex(pattern), behavior="isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
        )


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
