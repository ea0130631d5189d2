"""The sentencepiece kind: a BPE with byte fallback, trained on the corpus, for teachers whose own BPE can't be cut.

The sentencepiece library trains; what it learned is then written as merges for the `tokenizers` library and as
scores for a GGUF ("llama"), and the model file itself is not kept: Ollama would prefer a `tokenizer.model` to ours.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import sentencepiece
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse
from tokenizers.decoders import Replace as ReplaceDecoder
from tokenizers.decoders import Sequence as DecoderSequence
from tokenizers.models import BPE
from tokenizers.normalizers import Replace

from distill.errors import BadInput
from distill.mining.triplets import LENSES
from distill.tokens.bpe import Origin, StudentTokenizer

FIXED = 257
"""Pieces before the learned ones: <unk> and the 256 bytes."""

LINE = 1000
"""Characters of a training line at most: the library passes over lines of more than 4,192 bytes."""

_processor = cast(Any, sentencepiece.SentencePieceProcessor)
_trainer = cast(Any, sentencepiece.SentencePieceTrainer)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Line breaks are left to the byte fallback: one token, whatever stands around them."""
    for text in texts:
        for line in text.split("\n"):
            yield from (line[i : i + LINE].replace("\0", " ") for i in range(0, len(line), LINE))


def train_model(texts: Iterable[str], size: int) -> bytes:
    """A sentencepiece model of at most `size` pieces, less where the corpus has no more to merge. Deterministic.

    Raises BadInput where `size` has no room for the bytes and the characters of the corpus.
    """
    model = io.BytesIO()
    try:
        _trainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise BadInput(
            f"tokenize.vocab_size: sentencepiece can't make {size} pieces of this corpus ({reason}); try a larger one"
        ) from error
    return model.getvalue()


def merges_of(pieces: Sequence[str]) -> list[tuple[str, str]]:
    """The merges of learned `pieces`, likeliest first, as pairs in order of rank.

    sentencepiece merges whichever neighbours spell the best piece, however that piece was learned: so each way to
    split a piece in two pieces is a merge, and all ways have the piece's rank. Where two of them overlap
    ("x·yx" and "xy·x" in "xyxyx"), it takes the leftmost; a list of merges takes the one listed first.
    """
    known = set(pieces)
    return [
        (piece[:i], piece[i:])
        for piece in pieces
        for i in range(1, len(piece))
        if piece[:i] in known and piece[i:] in known
    ]


def from_model(model: bytes, labels: Sequence[str], lenses: Sequence[str] = LENSES) -> StudentTokenizer:
    """The student's tokenizer that splits as a sentencepiece model does, without that library."""
    processor = _processor(model_proto=model)
    size = int(processor.get_piece_size())
    pieces = [str(processor.id_to_piece(i)) for i in range(size)]
    scores = [float(processor.get_score(i)) for i in range(size)]
    assert processor.unk_id() == 0
    assert all(processor.is_byte(i) for i in range(1, FIXED))
    # Learned pieces come best first: their order is their rank.
    assert all(better > worse for better, worse in zip(scores[FIXED:], scores[FIXED + 1 :], strict=False))
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = merges_of(pieces[FIXED:])
    base = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token=pieces[0], fuse_unk=True, byte_fallback=True))
    base.normalizer = Replace(" ", "▁")
    base.decoder = DecoderSequence([ReplaceDecoder("▁", " "), ByteFallback(), Fuse()])
    return StudentTokenizer.assemble(base, labels, Origin("sentencepiece", "default", scores=scores), lenses=lenses)
