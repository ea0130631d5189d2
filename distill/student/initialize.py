"""Where a student's first weights come from: chance, or another model's body under our vocabulary.

Rows of the embedding go by token: where the other model has the token too, its own row; else the mean of the rows of
the tokens that spell its text. An image token is spelled as its label, without the brackets: averaged in, they made
students write the bytes of ⟨ and ⟩ themselves. Tags begin as line breaks, lenses as the dashes of a list.
"""

from dataclasses import replace

import torch
from torch import Tensor

from distill.backbone.model import Backbone, config_for
from distill.config import StudentSettings
from distill.errors import BadInput
from distill.teacher.gguf_tokenizer import NORMAL, Vocabulary
from distill.teacher.open_source import open_source
from distill.teacher.protocol import TeacherTokenizer
from distill.teacher.source import Source
from distill.tokens.bpe import END, END_THINK, PAD, START, THINK, USER_TOKENS, StudentTokenizer, image_text

TURN_STARTS = (START, "<|start_header_id|>", "<start_of_turn>", "<|start|>", "[INST]")
"""Tokens with which models open a turn: what ours begins as."""

LIKE = dict.fromkeys(USER_TOKENS, b" -") | {THINK: b"\n", END_THINK: b"\n"}
"""What tags and lenses begin as, so that a dream is read as a list: read as they are spelled, they made answers that
followed them dearer (docs/inheriting.md)."""

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def new_student(settings: StudentSettings, tokenizer: StudentTokenizer, seed: int) -> Backbone:
    """A Backbone for the tokenizer: that of the folder or GGUF `settings.init`, or one with random weights, in which
    `image_rows="label"` puts image tokens near their labels' words.

    Raises BadInput, also for rows that such a beginning can't have, CorruptFile.
    """
    if settings.model:
        return transplant(open_source(settings.model), tokenizer, settings.context)
    config = config_for(settings, tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id)
    model = Backbone(config).initialize(seed)
    if settings.image_rows != "label":
        return model
    table = model.model.embed_tokens.weight.detach()
    for id, label in zip(tokenizer.image_ids, tokenizer.labels, strict=True):
        near = table[id] + table[tokenizer.encode(f" {label}")].mean(0)
        table[id] = near * (table[id].norm() / near.norm())
    return model


@torch.no_grad()
def transplant(source: Source, tokenizer: StudentTokenizer, context: int) -> Backbone:
    """The whole model under our vocabulary. Raises BadInput, CorruptFile."""
    theirs = source.tokenizer
    if len(theirs.tokens) > source.config.vocab_size:
        raise BadInput(
            f"{source.path}: its tokenizer has {len(theirs.tokens)} tokens, its weights rows for "
            f"{source.config.vocab_size}; put back the tokenizer that it was trained with"
        )
    config = replace(
        source.config,
        vocab_size=tokenizer.vocab_size,
        context=min(context, source.config.context),
        pad_id=tokenizer.pad_id,
        bos_id=None,
        eos_id=tokenizer.eos_id,
    )
    state, rows = source.weights(), rows_of(theirs, tokenizer)
    for name in EMBEDDINGS:
        if name in state:
            state[name] = mean_rows(state[name], rows)
    model = Backbone(config)
    model.load_state_dict(state, strict=not config.tie_embeddings)
    return model.eval()


def mean_rows(table: Tensor, rows: list[list[int]]) -> Tensor:
    """(n, D): the means of the table's rows named; of all of them where none is."""
    mean = table.mean(0)
    return torch.stack([table[ids].mean(0) if ids else mean for ids in rows])


def rows_of(theirs: TeacherTokenizer, ours: StudentTokenizer) -> list[list[int]]:
    """For each of our tokens, the ids of theirs that stand for it."""
    vocabulary = Vocabulary(theirs)
    normal = {token: id for id, token in enumerate(theirs.tokens) if theirs.types[id] == NORMAL}
    rows: list[list[int]] = []
    for id, token in enumerate(ours.tokens[: ours.base_size]):
        same = normal.get(token) if theirs.model == "gpt2" and ours.kind == "aligned" else None
        rows.append([same] if same is not None else vocabulary.spell(ours.token_bytes(id)))
    return rows + [_added(token, theirs, vocabulary) for token in ours.tokens[ours.base_size :]]


def _added(token: str, theirs: TeacherTokenizer, vocabulary: Vocabulary) -> list[int]:
    """Rows of a token that we add: control, tag, lens or image token."""
    known = theirs.token_to_id
    if token in known:
        return [known[token]]
    if token == END:
        return [theirs.eos_id]
    if token == START:
        return [known[name] for name in TURN_STARTS if name in known][:1]
    if token == PAD:
        return []
    if token in LIKE:
        return vocabulary.spell(LIKE[token])
    label = token[1:-1] if token == image_text(token[1:-1]) else ""
    # As within a sentence: most of a word's meaning lies in the token that holds its space.
    return vocabulary.spell(f" {label}".encode() if label else token.encode())
