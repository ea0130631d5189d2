"""What a server says of its students: the fields that Ollama tells of a model, from a student's own weights."""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from gguf import LlamaFileType

from distill.backbone.gguf_names import tensor_name
from distill.serve.student import Offer, Student
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import STOP, go_template


def timestamp(seconds: float) -> str:
    """As Go writes a time, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


@dataclass(frozen=True)
class About:
    """bytes: of the weights. details: as /api/tags has them; /api/show leaves out what it tells elsewhere."""

    digest: str
    bytes: int
    modified: float
    details: dict[str, Any]
    capabilities: list[str]
    info: dict[str, Any]
    tensors: list[dict[str, Any]]
    parameters: str
    modelfile: str

    @classmethod
    def of(cls, student: Student, offer: Offer, known: str = "") -> "About":
        """known: its digest, which isn't computed again then."""
        config, hashed, size, count = student.model.config, hashlib.sha256(), 0, 0
        tensors: list[dict[str, Any]] = []
        for name, weight in student.model.state_dict().items():
            if name == "lm_head.weight" and config.tie_embeddings:
                continue
            flat = weight.detach().float().cpu().contiguous()
            if not known:
                hashed.update(name.encode())
                hashed.update(memoryview(flat.numpy()).cast("B"))
            size, count = size + flat.nbytes, count + flat.numel()
            tensors.append({"name": tensor_name(name), "type": "F32", "shape": [*reversed(flat.shape)]})
        hashed.update(student.tokenizer.hf.to_str().encode())
        digest = known or hashed.hexdigest()
        details = {
            "parent_model": "",
            "format": "safetensors",
            "family": config.architecture,
            "families": [config.architecture],
            "parameter_size": f"{count / 1e6:.2f}M" if count < 1e9 else f"{count / 1e9:.1f}B",
            "quantization_level": "F32",
            "context_length": config.context,
            "embedding_length": config.hidden,
        }
        settings = [*(("stop", quoted(stop)) for stop in STOP), ("temperature", f"{offer.temperature:g}")]
        return cls(
            digest,
            size,
            offer.modified,
            details,
            ["completion", *["vision"] * student.sees, *["thinking"] * offer.dreams, *["feedback"] * bool(offer.keep)],
            model_info(student, count),
            tensors,
            "\n".join(f"{name:<30} {value}" for name, value in settings),
            modelfile(digest, student.system, settings),
        )

    def tag(self, name: str) -> dict[str, Any]:
        """Its entry in /api/tags."""
        return {
            "name": name,
            "model": name,
            "modified_at": timestamp(self.modified),
            "size": self.bytes,
            "digest": self.digest,
            "details": self.details,
            "capabilities": self.capabilities,
        }

    def running(self, name: str, expires: str) -> dict[str, Any]:
        """Its entry in /api/ps."""
        details = {key: value for key, value in self.details.items() if not key.endswith("_length")}
        told = {"name": name, "model": name, "size": self.bytes, "digest": self.digest, "details": details}
        return {**told, "expires_at": expires, "size_vram": 0, "context_length": self.details["context_length"]}

    def show(self, system: str, words: StudentTokenizer | None) -> dict[str, Any]:
        """/api/show. words: the vocabulary, for who asks for all."""
        info = dict(self.info)
        if words is not None:
            told = words.gguf()
            lists = {"merges": told.merges, "scores": told.scores, "token_type": told.types, "tokens": told.tokens}
            info |= {f"tokenizer.ggml.{name}": values for name, values in lists.items()}
        return {
            "modelfile": self.modelfile,
            "parameters": self.parameters,
            "template": go_template(),
            **({"system": system} if system else {}),
            "details": {key: value for key, value in self.details.items() if not key.endswith("_length")},
            "model_info": info,
            "tensors": self.tensors,
            "capabilities": self.capabilities,
            "modified_at": timestamp(self.modified),
        }


def model_info(student: Student, count: int) -> dict[str, Any]:
    """What its GGUF would say; the lists of words are left out, as they are long."""
    config, tokenizer = student.model.config, student.tokenizer
    own = {
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.head_dim": config.head_dim,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.value_length": config.head_dim,
        "block_count": config.layers,
        "context_length": config.context,
        "embedding_length": config.hidden,
        "feed_forward_length": config.ffn,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
        "vocab_size": config.vocab_size,
    }
    return {
        "general.architecture": config.architecture,
        "general.file_type": int(LlamaFileType.ALL_F32),
        "general.parameter_count": count,
        "general.quantization_version": 2,
        **{f"{config.architecture}.{name}": value for name, value in own.items()},
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.model": "gpt2" if tokenizer.kind == "aligned" else "llama",
        "tokenizer.ggml.padding_token_id": tokenizer.pad_id,
        "tokenizer.ggml.pre": tokenizer.origin.pre,
        "tokenizer.ggml.scores": None,
        "tokenizer.ggml.token_type": None,
        "tokenizer.ggml.tokens": None,
    }


def modelfile(digest: str, system: str, settings: list[tuple[str, str]]) -> str:
    """As `ollama show` prints one; its weights have no path that a client could use."""
    said = f'SYSTEM """{system}"""\n' if system else ""
    parameters = "".join(f"PARAMETER {name} {value.strip(chr(34))}\n" for name, value in settings)
    return (
        f'# What `dream serve` answers with\n\nFROM sha256-{digest}\nTEMPLATE """{go_template()}"""\n{said}{parameters}'
    )
