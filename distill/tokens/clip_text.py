"""CLIP's text side as an embedding model: phrases in the space that its pictures are in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distill.backbone.from_transformers import load_model, one_line
from distill.errors import CorruptFile


class ClipText:
    """`clip:SOURCE`, a folder of transformers' or a name on the hub, loaded when first asked. Raises CorruptFile."""

    def __init__(self, source: str) -> None:
        self.source, self._loaded = source, None

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import AutoTokenizer, CLIPModel

            here = Path(self.source).exists()
            remedy = "name a folder with config.json, model.safetensors and the tokenizer: tokenize.encoder=clip:FOLDER"
            model = load_model(CLIPModel, self.source, "a CLIP model", remedy, local=here)
            loader: Any = AutoTokenizer
            try:
                tokenizer = loader.from_pretrained(self.source, local_files_only=here, trust_remote_code=False)
            except Exception as error:  # whatever the many tokenizers there raise
                raise CorruptFile(
                    f"{self.source}: its tokenizer can't be loaded ({one_line(error)}); {remedy}"
                ) from error
            self._loaded = model, tokenizer
        return self._loaded

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, d) projected."""
        model, tokenizer = self._load()
        most = model.config.text_config.max_position_embeddings
        inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt")
        seen = model.text_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return model.text_projection(seen.pooler_output).numpy()
