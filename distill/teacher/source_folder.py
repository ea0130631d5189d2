"""A teacher's weights in a folder of safetensors, as transformers saves it: config.json beside model*.safetensors."""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from distill.backbone.architecture import BackboneConfig
from distill.backbone.model import misfit, read_config
from distill.backbone.weights import stored_tensors
from distill.errors import BadInput, CorruptFile
from distill.teacher.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED, tokenizer_from_metadata
from distill.teacher.licenses import License
from distill.teacher.pre_tokenizers import name_of
from distill.teacher.protocol import TeacherTokenizer
from distill.teacher.source import Source

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def open_folder(folder: Path) -> Source:
    """Raises BadInput for what we can't read, CorruptFile for a broken file."""
    config = read_config(folder)
    stored = stored_tensors(folder, config.tie_embeddings)
    if wrong := misfit(config, {name: tensor.shape for name, tensor in stored.items()}):
        raise CorruptFile(f"{folder}: weights don't fit config.json ({wrong})")
    license = License.of_folder(folder)
    return Source(
        folder, config, str(license) if license.name else "", stored, partial(folder_tokenizer, folder, config)
    )


def folder_tokenizer(folder: Path, config: BackboneConfig) -> TeacherTokenizer:
    """The vocabulary in tokenizer.json, as GGUF would spell it.

    `pre` is "" where how it splits words isn't known exactly. Raises BadInput where there is none, or it is no BPE;
    CorruptFile.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BadInput(f"{folder}: has no tokenizer.json; save the tokenizer beside the weights with transformers")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        model: dict[str, Any] = content["model"]
        if model.get("type", "BPE") != "BPE":
            raise BadInput(f"{path}: is a tokenizer of the kind {model['type']!r}; only BPE can be read")
        fields = _fields(content, config.vocab_size)
        ends = _ends(folder, fields["tokenizer.ggml.tokens"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CorruptFile(f"{path}: can't be read ({error}); download the model again") from error
    if not ends:
        raise BadInput(f"{folder}: names no token that ends a text; set eos_token_id in its config.json")
    fields["tokenizer.ggml.eos_token_id"] = ends[0]
    fields["tokenizer.ggml.bos_token_id"] = config.bos_id
    tokenizer = tokenizer_from_metadata(fields)
    more = {*tokenizer.extra_stop_ids, *ends} - {tokenizer.eos_id}
    pre = name_of(content.get("pre_tokenizer"), bool(model.get("ignore_merges")))
    return replace(tokenizer, pre=pre, extra_stop_ids=tuple(sorted(more)))


def chat_template(folder: Path) -> str:
    """As transformers finds it, in a file of its own or in tokenizer_config.json; "" where there is none. Raises
    CorruptFile."""
    own, path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    try:
        if own.is_file():
            return own.read_text(encoding="utf-8")
        found: Any = _json(path).get("chat_template") or ""
        if isinstance(found, list):  # by name
            found = {each["name"]: each["template"] for each in found}.get("default", "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(f"{folder}: its chat template can't be read ({error}); download the model again") from error
    return str(found)


def _fields(content: dict[str, Any], size: int) -> dict[str, Any]:
    """`tokenizer.ggml.*`: as many tokens as the embedding has rows (size), those that no text makes UNUSED."""
    model: dict[str, Any] = content["model"]
    pieces = bool(model.get("byte_fallback"))
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    vocabulary: dict[str, int] = model["vocab"]
    for token, id in vocabulary.items():
        tokens[id], types[id] = token, BYTE if pieces and BYTE_TOKEN.fullmatch(token) else NORMAL
    for added in content.get("added_tokens") or []:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return {
        "tokenizer.ggml.model": "llama" if pieces else "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
    }


def _ends(folder: Path, tokens: list[str]) -> list[int]:
    """Ids that end an answer, first the one that tokenizer_config.json or else config.json calls EOS."""
    named = _json(folder / "tokenizer_config.json").get("eos_token")
    token = named.get("content") if isinstance(named, dict) else named
    found = [tokens.index(token)] if token in tokens else []
    for name in ("config.json", "generation_config.json"):
        ids: Any = _json(folder / name).get("eos_token_id")
        listed: Iterable[Any] = ids if isinstance(ids, list) else [ids]
        found += [int(i) for i in listed if i is not None and 0 <= int(i) < len(tokens)]
    return list(dict.fromkeys(found))


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
