"""Where a student's first weights come from: chance, or another Llama's body under our vocabulary."""

from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from distill.backbone.model import Backbone, config_for, load_backbone
from distill.config import StudentSettings
from distill.errors import BadInput, CorruptFile
from distill.tokens.bpe import StudentTokenizer


def new_student(settings: StudentSettings, tokenizer: StudentTokenizer, seed: int) -> Backbone:
    """A Backbone for the tokenizer: `settings.init`'s weights, or random ones. Raises BadInput, CorruptFile."""
    if settings.init:
        return transplant(Path(settings.init), tokenizer, settings.context)
    config = config_for(settings, tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id)
    return Backbone(config).initialize(seed)


@torch.no_grad()
def transplant(folder: Path, tokenizer: StudentTokenizer, context: int) -> Backbone:
    """The checkpoint's body; embeddings by token: its own row where it has the token, else the mean of the rows of
    the tokens that it splits our token's text into."""
    source = load_backbone(folder)
    path = folder / "tokenizer.json"
    if not path.exists():
        raise BadInput(f"{folder}: student.init needs a tokenizer.json beside the weights")
    try:
        theirs = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise CorruptFile(f"{path}: can't be read ({error})") from error
    if theirs.get_vocab_size() > source.config.vocab_size:
        raise BadInput(f"{path}: has more tokens than config.json's vocab_size; is it this checkpoint's tokenizer?")
    config = replace(
        source.config,
        vocab_size=tokenizer.vocab_size,
        context=min(context, source.config.context),
        pad_id=tokenizer.pad_id,
        bos_id=None,
        eos_id=tokenizer.eos_id,
    )
    model = Backbone(config)
    state = source.state_dict()
    rows = _rows(theirs, tokenizer)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = state[name]
        mean = table.mean(0)
        state[name] = torch.stack([table[ids].mean(0) if ids else mean for ids in rows])
    model.load_state_dict(state)
    return model


def _rows(theirs: Tokenizer, ours: StudentTokenizer) -> list[list[int]]:
    """For each of our tokens, the ids of theirs that stand for it."""
    rows: list[list[int]] = []
    for id, token in enumerate(ours.tokens):
        same = theirs.token_to_id(token)
        text = ours.token_bytes(id).decode(errors="ignore")
        rows.append([same] if same is not None else theirs.encode(text, add_special_tokens=False).ids)
    return rows
