"""`dream sizes`."""

from typing import TYPE_CHECKING

import click

from cli.options import json_option, quiet_option, run_argument, settings_options
from cli.output import emit_json, table

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
    from cli.progress import Progress
    from distill.training.sizes import measure_sizes

    with Progress(quiet) as listen:
        found = measure_sizes(run, listen, layers, ffn)
    megabytes = [{dtype: round(file_bytes(size.config, dtype) / 1e6, 1) for dtype in SHOWN} for size in found]
    if as_json:
        rows = [
            {
                "layers": size.layers,
                "ffn": size.ffn,
                "parameters": size.parameters,
                "megabytes": sizes_on_disk,
                "bits_per_byte": size.bits_per_byte,
                "top1": size.top1,
            }
            for size, sizes_on_disk in zip(found, megabytes, strict=True)
        ]
        emit_json({"run": str(run.path), "sizes": rows})
        return
    heading = ("layers", "neurons", "parameters", *(f"MB {dtype}" for dtype in SHOWN), "bits per byte", "top-1")
    lines = [
        (
            size.layers,
            size.ffn,
            f"{size.parameters / 1e6:.1f} M",
            *(f"{on_disk[dtype]:.1f}" for dtype in SHOWN),
            f"{size.bits_per_byte:.3f}",
            f"{100 * size.top1:.1f} %",
        )
        for size, on_disk in zip(found, megabytes, strict=True)
    ]
    click.echo(table(lines, heading))
