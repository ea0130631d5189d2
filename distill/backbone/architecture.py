"""What kind of language model a backbone is: sizes, and what sets one architecture apart from another.

All of them are decoders with rotary positions, RMS norms, gated feed-forwards and grouped queries. `llama` is the
plain one (Mistral computes the same and is read as it), `qwen2` (arXiv:2407.10671) adds biases to the projections of
queries, keys and values, `qwen3` (arXiv:2505.09388) norms each head's queries and keys.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.errors import BadInput

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Architecture, by the name that config.json and GGUF both give it → transformers' class."""

READABLE = "llama (Mistral too), qwen2 and qwen3"
READ_AS = {"mistral": "llama"}

PLAIN: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), ("silu", "swish")),
    **dict.fromkeys(("attention_bias", "mlp_bias", "qk_layernorm", "use_qk_norm", "alibi"), (False,)),
    **dict.fromkeys(("partial_rotary_factor", "logit_scale", "logits_scaling"), (1,)),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier"), (1,)),
    **dict.fromkeys(("attention_multiplier", "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv"), ()),
}
"""What config.json may say of the arithmetic → the values that say what we compute; null always does."""


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies, lowered so that positions beyond those of pre-training mean something.

    kind `linear`: all by `factor`. `llama3`: those that turn less than `low` times in `original` positions by `factor`,
    those that turn more than `high` times not at all, between them smoothly.
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def divisors(self, frequencies: Tensor) -> Tensor:
        """What frequencies (radians a position) are divided by, of the same shape."""
        if self.kind == "linear":
            return torch.full_like(frequencies, self.factor)
        kept = ((self.original * frequencies / (2 * math.pi) - self.low) / (self.high - self.low)).clamp(0, 1)
        return 1 / ((1 - kept) / self.factor + kept)

    @classmethod
    def fitted(cls, divisors: Tensor, frequencies: Tensor) -> "RopeScaling | None":
        """The scaling of kind llama3, with `low` 1, that has these divisors; None where there is none.

        Between the bounds, 1 / divisor is linear in the frequency: two frequencies there tell all.
        """
        factor = float(divisors.max())
        kept = (1 / divisors.double() - 1 / factor) / (1 - 1 / factor)
        between = (kept > 1e-4) & (kept < 1 - 1e-4)
        if factor <= 1 or int(between.sum()) < 2:
            return None
        turns, kept = (frequencies.double() / (2 * math.pi))[between], kept[between]
        slope = (kept[0] - kept[-1]) / (turns[0] - turns[-1])
        width = 1 / (slope * turns[0] - kept[0])
        found = cls("llama3", factor, 1.0, round(1 + float(width), 4), round(float(slope * width)))
        return found if torch.allclose(found.divisors(frequencies), divisors, rtol=1e-4) else None

    def to_hf(self) -> dict[str, Any]:
        if self.kind == "linear":
            return {"rope_type": "linear", "factor": self.factor}
        return {
            "rope_type": "llama3",
            "factor": self.factor,
            "low_freq_factor": self.low,
            "high_freq_factor": self.high,
            "original_max_position_embeddings": self.original,
        }

    @classmethod
    def from_hf(cls, rope: dict[str, Any]) -> "RopeScaling | None":
        """None for plain rotary positions. Raises BadInput for a kind that we don't know, KeyError."""
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return None
        if kind == "linear":
            return cls("linear", float(rope["factor"]))
        if kind == "llama3":
            low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
            return cls("llama3", float(rope["factor"]), low, high, int(rope["original_max_position_embeddings"]))
        raise BadInput(f"rotary positions scaled as {kind!r} can't be read; linear and llama3 can")


@dataclass(frozen=True)
class BackboneConfig:
    """Dimensions. Rows that quantize to K-quants want `hidden` and `ffn` in multiples of 256.

    head_size: of a head, where it is not hidden / heads. context: positions, at most as many as it was trained with.
    """

    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    context: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    pad_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    architecture: str = "llama"
    head_size: int | None = None
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        if self.head_size is not None and self.head_size % 2:
            raise BadInput(f"head_dim: {self.head_size} is odd, and rotary positions turn pairs")
        if (self.head_size is None and self.hidden % self.heads) or self.head_dim % 2:
            raise BadInput(f"student.heads: {self.heads} heads don't divide a hidden size of {self.hidden} evenly")
        if self.heads % self.kv_heads:
            raise BadInput(f"student.kv_heads: {self.heads} heads can't share {self.kv_heads} key/value heads evenly")
        if self.rope_scaling and self.rope_scaling.kind == "llama3" and self.architecture != "llama":
            raise BadInput(f"{self.architecture} with Llama 3's rotary scaling can't be exported; llama with it can")

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden // self.heads

    @property
    def qkv_bias(self) -> bool:
        return self.architecture == "qwen2"

    @property
    def head_norms(self) -> bool:
        return self.architecture == "qwen3"

    @property
    def swaps_rows(self) -> bool:
        """Whether GGUF keeps the rows of query and key projections in another order (see gguf_names)."""
        return self.architecture == "llama"

    def frequencies(self) -> Tensor:
        """Radians that each of a head's pairs turns a position, (E / 2,) float32, before any scaling: θ^(−2i/E)."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device="cpu").float() / self.head_dim
        return 1.0 / self.rope_theta**exponents

    def to_hf(self) -> dict[str, Any]:
        """config.json. `rope_theta` stands at the top too: Ollama's importer reads it there."""
        scaling = self.rope_scaling.to_hf() if self.rope_scaling else None
        own: dict[str, Any] = {
            "llama": {"attention_bias": False, "mlp_bias": False},
            "qwen2": {"use_sliding_window": False, "sliding_window": None},
            "qwen3": {"attention_bias": False, "use_sliding_window": False, "sliding_window": None},
        }[self.architecture]
        return {
            "architectures": [CLASSES[self.architecture]],
            "model_type": self.architecture,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": self.rope_theta},
            "rope_scaling": scaling,
            **own,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": self.tie_embeddings,
            "pad_token_id": self.pad_id,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_id,
            "torch_dtype": "float32",
            "use_cache": True,
        }

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str = "config.json") -> "BackboneConfig":
        """Read config.json. Raises BadInput where the architecture is none that we know.

        A model that looks back through a window only is read with a context of at most that window, within which it
        sees everything.
        """
        if not isinstance(config, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise BadInput(f"{where}: is no JSON object ({{…}}); give a model's own config.json")
        try:
            return cls._from_hf(config)
        except KeyError as error:
            raise BadInput(f"{where}: has no {error.args[0]!r}; is it a language model's config?") from error
        except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise BadInput(f"{where}: holds something unusable ({error})") from error
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from error

    @classmethod
    def _from_hf(cls, config: dict[str, Any]) -> "BackboneConfig":
        kind = config.get("model_type")
        architecture = READ_AS.get(str(kind), str(kind))
        if architecture not in CLASSES:
            raise BadInput(f"model_type {kind!r} can't be read; {READABLE} can")
        given: list[dict[str, Any]] = [config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key)]
        for name, plain in PLAIN.items():
            for value in (said.get(name) for said in (config, *given)):
                if value is not None and value not in plain:
                    instead = f"; {plain[0]} is" if plain else ""
                    raise BadInput(f"{name} {value!r} is not supported{instead}")
        if any(isinstance(value, dict) for said in given for value in said.values()):
            raise BadInput("rotary positions of another kind in each kind of layer can't be read")
        scalings = [RopeScaling.from_hf(said) for said in given]
        if len(set(scalings)) > 1:
            raise BadInput("rope_parameters and rope_scaling contradict each other; take one of them out")
        thetas = [float(said["rope_theta"]) for said in (*given, config) if said.get("rope_theta")]
        window = config.get("use_sliding_window", kind == "mistral") and config.get("sliding_window", 4096)
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        size = int(config.get("head_dim") or (128 if architecture == "qwen3" else hidden // heads))
        context, eos = int(config["max_position_embeddings"]), config.get("eos_token_id")
        return cls(
            vocab_size=int(config["vocab_size"]),
            hidden=hidden,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            ffn=int(config["intermediate_size"]),
            context=min(context, int(window)) if window else context,
            rope_theta=thetas[0] if thetas else 10_000.0,
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            pad_id=config.get("pad_token_id"),
            bos_id=config.get("bos_token_id"),
            eos_id=eos[0] if isinstance(eos, list) else eos,
            architecture=architecture,
            head_size=None if size * heads == hidden else size,
            rope_scaling=scalings[0] if scalings else None,
        )
