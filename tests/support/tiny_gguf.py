"""A GGUF of a one-layer Llama of zeros around any vocabulary: enough for llama.cpp to tokenize and render with."""

from pathlib import Path

import gguf
import numpy as np

from distill.tokens.bpe import GgufVocabulary


def write_tiny_gguf(
    path: Path,
    vocabulary: GgufVocabulary,
    eos_id: int,
    pad_id: int,
    chat_template: str | None = None,
    begins: bool | None = False,
    bos_id: int | None = None,
) -> Path:
    """32 hidden units, 2 heads, context 512. begins: whether it wants BOS in front; None: not said."""
    hidden, ffn, size = 32, 64, len(vocabulary.tokens)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // 2)
    writer.add_vocab_size(size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_eos_token_id(eos_id)
    writer.add_pad_token_id(pad_id)
    if begins is not None:
        writer.add_add_bos_token(begins)
    if bos_id is not None:
        writer.add_bos_token_id(bos_id)
    writer.add_add_space_prefix(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    shapes = {
        "token_embd": (size, hidden),
        "output_norm": (hidden,),
        "blk.0.attn_norm": (hidden,),
        "blk.0.ffn_norm": (hidden,),
        **{f"blk.0.attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (ffn, hidden),
        "blk.0.ffn_up": (ffn, hidden),
        "blk.0.ffn_down": (hidden, ffn),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
