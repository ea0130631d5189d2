"""`dream sizes`."""

from typing import TYPE_CHECKING, Any

import click

from cli.options import json_option, quiet_option, run_argument, settings_options
from cli.output import answer, table
from cli.progress import Progress

if TYPE_CHECKING:
    from distill.run import Run

SHOWN = ("f16", "q8_0", "q4_0")


@click.command()
@run_argument
@click.option("--layers", multiple=True, type=click.IntRange(1), metavar="N", help="Try N layers. Repeatable.")
@click.option("--ffn", multiple=True, type=click.IntRange(1), metavar="N", help="Try N neurons a layer. Repeatable.")
@settings_options()
@quiet_option
@json_option
def sizes(run: "Run", layers: tuple[int, ...], ffn: tuple[int, ...], as_json: bool, quiet: bool) -> None:
    """Show what RUN's student would begin as with fewer of its teacher's layers, or narrower ones: how large, how good.

    Measured on validation answers right after the cut, before any training, which mends most of it. Choose with
    `dream train RUN --layers N` or `--ffn N`.

    \b
    Examples:
      dream sizes my-student
      dream sizes my-student --layers 12 --layers 20 --ffn 640
    """
    from bundle.gguf import file_bytes
    from distill.training.sizes import measure_sizes

    with Progress(quiet) as listen:
        found = measure_sizes(run, listen, layers, ffn)
    rows: list[dict[str, Any]] = [
        {
            "layers": size.layers,
            "ffn": size.ffn,
            "parameters": size.parameters,
            "megabytes": {dtype: round(file_bytes(size.config, dtype) / 1e6, 1) for dtype in SHOWN},
            "bits_per_byte": size.bits_per_byte,
            "top1": size.top1,
        }
        for size in found
    ]
    heading = ("layers", "neurons", "parameters", *(f"MB {dtype}" for dtype in SHOWN), "bits per byte", "top-1")
    answer(as_json, {"run": str(run.path), "sizes": rows}, table([_line(**row) for row in rows], heading))


def _line(
    layers: int, ffn: int, parameters: int, megabytes: dict[str, float], bits_per_byte: float, top1: float
) -> tuple[int | str, ...]:
    on_disk = (f"{size:.1f}" for size in megabytes.values())
    return layers, ffn, f"{parameters / 1e6:.1f} M", *on_disk, f"{bits_per_byte:.3f}", f"{100 * top1:.1f} %"
