"""How much of a device's arithmetic a training step uses: model FLOPs utilization (PaLM, arXiv:2204.02311, appendix B).

What the model needs is counted, and not what is computed besides: recomputed activations, masked pairs, padding. A
weight of a product takes 6 floating-point operations a position, 2 of them on the way there; the output layer only
where there is loss. Attention takes 12 a layer, an element of a head and a pair of positions of which one reads the
other: in a row that is one document these are T (T + 1) / 2, the causal half of PaLM's 12 · L · H · Q · T a token.
"""

import re
from collections.abc import Sequence

import torch

from distill.backbone.model import Backbone
from distill.backbone.products import product_seconds
from distill.training.batches import Batch

SHEETS: tuple[tuple[str, float], ...] = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H200 NVL", 835e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10", 125e12),
    ("A6000", 155e12),
    ("4090", 165e12),
    ("3090", 71e12),
)
"""Words of a GPU's name → FLOP/s of dense bfloat16 products that are summed in float32, by NVIDIA's data sheets."""
SIDE = {"cpu": 1024, "cuda": 8192}
"""Of a square product that tells what a device of neither name reaches."""


def model_flops(model: Backbone, batches: Sequence[Batch]) -> float:
    """Floating-point operations that a step over these batches needs."""
    config = model.config
    weights = sum(parameter.numel() for parameter in model.model.layers.parameters() if parameter.dim() > 1)
    pairs = 0
    for spans in (batch.spans for batch in batches):
        pairs += sum((end - start) * (end - start + 1) // 2 for _, start, end in spans.spans)
        pairs -= sum(
            (end - start - after) * (until - begin) for (_, start, end), (after, begin, until) in spans.hidden.items()
        )
    positions = sum(batch.ids.numel() for batch in batches)
    projected = sum(batch.loss_positions for batch in batches) * model.lm_head.weight.numel()
    return 6.0 * (weights * positions + projected) + 12.0 * config.layers * config.heads * config.head_dim * pairs


def peak(device: torch.device, precision: str) -> tuple[float, str]:
    """FLOP/s that are possible, and who says so: the data sheet, or a large product here, which takes a second."""
    if device.type == "cuda" and precision == "bfloat16":
        name = torch.cuda.get_device_name(device)
        words = set(re.split(r"[ -]", name))
        for key, flops in SHEETS:
            if words.issuperset(key.split()) and "Laptop" not in words:
                return flops, f"data sheet of {name}"
    side = SIDE.get(device.type, 2048)
    seconds = product_seconds(side, side, side, getattr(torch, precision), device)
    return 2.0 * side**3 / seconds, f"a {precision} product of {side}³ here"
