"""CLIP's text side as an embedding model: phrases in the space that its pictures are in."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from distill.backbone.from_transformers import load_model, one_line
from distill.errors import CorruptFile


def clip_text(source: str) -> Callable[[Sequence[str]], NDArray[np.float32]]:
    """n phrases → (n, d) projected. source: a folder of transformers', or a name on the hub. Raises CorruptFile."""
    from transformers import AutoTokenizer, CLIPModel

    here, loader = Path(source).exists(), cast("Any", AutoTokenizer)
    remedy = "name a folder with config.json, model.safetensors and the tokenizer: tokenize.encoder=clip:FOLDER"
    model = load_model(CLIPModel, source, "a CLIP model", remedy, local=here)
    try:
        tokenizer = loader.from_pretrained(source, local_files_only=here, trust_remote_code=False)
    except Exception as error:  # whatever the many tokenizers there raise
        raise CorruptFile(f"{source}: its tokenizer can't be loaded ({one_line(error)}); {remedy}") from error
    most = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt")
        seen = model.text_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return model.text_projection(seen.pooler_output).numpy()

    return embed
