"""Students of 100 million and of 1 billion parameters on this machine's GPU, in one call of some minutes:

    python -m bench.gpu FOLDER

It needs torch, numpy, scipy, tokenizers and safetensors; nothing has to be installed of this project. First it
compares FlexAttention with the masked product (outputs and gradients, and seconds), then it times training steps. Each
result is written into FOLDER when it is there (attention.json, train-small.json, train-large.json), as `dream bench
--out` writes them. What fails is told, and the rest is measured all the same; then the exit code is 1.
"""

import gc
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.result import BenchResult, Series, row, write_result
from bench.stopwatch import Stopwatch, listed, ratio
from bench.training import FixedTokens, bench_train, synthetic_documents
from distill.backbone import flex
from distill.backbone.attention import Documents, attend
from distill.backbone.device import pick_device
from distill.config import TrainSettings
from distill.errors import DistillError
from distill.events import Event
from distill.training.batches import Batches
from distill.training.mixture import Mixture

LOG = logging.getLogger(__name__)
VOCABULARY = 8192


@dataclass(frozen=True)
class Case:
    """A preset, packed rows a step, tokens of a row."""

    preset: str
    rows: int
    context: int = 2048


CASES = (Case("small", 32), Case("large", 8))
HEADS = {"rows": 16, "length": 2048, "heads": 16, "kv_heads": 8, "size": 128}


def main(
    folder: Path,
    cases: tuple[Case, ...] = CASES,
    heads: Mapping[str, int] = HEADS,
    settings: TrainSettings | None = None,
    repeat: int = 20,
) -> int:
    """The exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    watch = Stopwatch(repeat, 3, _tell)
    jobs: dict[str, Callable[[], BenchResult]] = {"attention": partial(bench_attention, watch, **heads)}
    jobs |= {f"train-{case.preset}": partial(_train, watch, case, settings) for case in cases}
    failed = 0
    for name, job in jobs.items():
        LOG.info("== %s", name)
        try:
            result = job()
        except Exception:  # the others are still worth their time
            LOG.exception("%s failed", name)
            failed = 1
            _forget()
            continue
        write_result(result, folder / f"{name}.json")
        for told in (*("  ".join(row(one)) for one in result.series), result.settings, result.about, result.machine):
            LOG.info("%s", told)
        _forget()
    return failed


def _forget() -> None:
    """Give back what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _train(watch: Stopwatch, case: Case, settings: TrainSettings | None) -> BenchResult:
    """With half the rows where memory doesn't suffice."""
    rows = case.rows
    while True:
        try:
            return bench_train(watch, case.preset, VOCABULARY, rows, case.context, settings, alone=True)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            LOG.info("%d rows don't fit: %d", rows, rows // 2)
        rows //= 2
        _forget()


def bench_attention(watch: Stopwatch, rows: int, length: int, heads: int, kv_heads: int, size: int) -> BenchResult:
    """Seconds of attention there and back over packed rows, bfloat16 on a GPU: as we compute it, and as one masked
    product; and how far their outputs and gradients are apart. Raises DistillError where that is too far."""
    device = pick_device("auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    mixture = Mixture(True, 0.25, 0.0, bottleneck=0.5)
    batches = Batches(synthetic_documents(VOCABULARY), FixedTokens(VOCABULARY), length, mixture, 0, 0.8)
    planned = batches.epoch(0)
    spans = batches.assemble([planned[i % len(planned)] for i in range(rows)], 1.0).spans
    spans.device = device
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, direction = (
        torch.randn(rows, length, count, size, generator=generator, device=device, dtype=dtype).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads, heads)
    )

    def there_and_back(how: Callable[[Tensor, Tensor, Tensor, Documents], Tensor], wide: bool = False) -> list[Tensor]:
        parts = [(part.float() if wide else part).detach().requires_grad_() for part in (q, k, v)]
        out = how(parts[0], parts[1], parts[2], spans)
        return [out, *torch.autograd.grad(out, parts, direction.to(out.dtype))]

    exact = there_and_back(_masked, wide=True)
    apart = {
        name: [_apart(part, true) for part, true in zip(there_and_back(how), exact, strict=True)]
        for name, how in (("ours", attend), ("a masked product", _masked))
    }
    if any(mine > max(2 * theirs, 1e-4) for mine, theirs in zip(*apart.values(), strict=True)):
        raise DistillError(f"attention: outputs and gradients by q, k, v are wrong, by {apart}")
    jobs = {"ours": lambda: there_and_back(attend), "a masked product": lambda: there_and_back(_masked)}
    seconds = watch.seconds(jobs, "bench attention", str(device))
    series: list[Series] = listed(seconds)
    return watch.result(
        "attention",
        [*series, ratio("a masked product over ours", seconds["a masked product"], seconds["ours"])],
        {"rows": rows, "length": length, "heads": heads, "kv_heads": kv_heads, "size": size},
        {"apart from float32": apart, "attention": flex.told(device)},
        str(device),
    )


def _masked(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=documents.mask, enable_gqa=True)


def _apart(found: Tensor, true: Tensor) -> float:
    """‖found − true‖ / ‖true‖."""
    return float(f"{float((found.detach().float() - true.detach()).norm() / true.detach().norm()):.3g}")


def _tell(event: Event) -> None:
    if event.message:
        LOG.info("%s", event.message)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.gpu FOLDER")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main(Path(sys.argv[1])))
