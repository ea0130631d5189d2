"""What students of several sizes would begin as: for a user who has to choose one before training.

Quality is measured on the validation answers, right after the cut. Training then mends most of what the cut broke, and
more of it the less was broken.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill.backbone.model import Backbone, BackboneConfig, count_parameters
from distill.corpus.teachers_source import teachers_source
from distill.errors import BadInput
from distill.events import Event, Listener, silent
from distill.run import Run, fingerprint, write_atomic
from distill.student.cut import narrowed, quality
from distill.student.initialize import transplant
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.packing import Documents, pack
from distill.training.start import JUDGED_TOKENS, cut_to, samples, start_settings

LAYERS = (0.8, 0.6, 0.4)
"""Shares of the teacher's layers that are tried with all of their neurons."""
NEURONS = (2 / 3, 1 / 2, 1 / 3, 1 / 4, 1 / 6)
"""Shares of the neurons that are tried in all layers."""
TOKENS = 12_288
"""Positions whose activations decide here which neurons stay: a third of those that do where a student begins."""


@dataclass(frozen=True)
class Size:
    """A student before training. bits_per_byte, top1: of the teacher's validation answers without a dream."""

    layers: int
    ffn: int
    parameters: int
    bits_per_byte: float
    top1: float
    config: BackboneConfig


def measure_sizes(
    run: Run, listen: Listener = silent, layers: Sequence[int] = (), neurons: Sequence[int] = ()
) -> list[Size]:
    """The teacher itself under our vocabulary, then with fewer layers, then with fewer neurons in all of them: the
    numbers given, or the shares above. What was measured before is kept in sizes.json.

    Raises MissingStage without a tokenizer, BadInput where the teacher's weights can't be read, or haven't so many.
    """
    run.require("tokenize")
    source = teachers_source(run, listen)
    if isinstance(source, str):
        raise BadInput(f"{run.path}: its student can't begin as its teacher: {source}")
    pack(run)
    whole, tokenizer = source.config, StudentTokenizer.load(run.tokenizer)
    if not layers and not neurons:
        layers = [round(share * whole.layers) for share in LAYERS]
        neurons = [max(64, round(share * whole.ffn / 64) * 64) for share in NEURONS]
    wanted = [(whole.layers, whole.ffn), *((count, whole.ffn) for count in layers)]
    wanted = list(dict.fromkeys([*wanted, *((whole.layers, count) for count in neurons)]))
    kept = run.path / "sizes.json"
    key = fingerprint([start_settings(run), run.require("tokenize").outputs])
    known = _known(kept, key)
    found: list[Size] = []
    for number, (count, ffn) in enumerate(wanted):
        listen(Event("sizes", "progress", done=number, total=len(wanted), unit="sizes"))
        name = f"{count}x{ffn}"
        cut = (count, ffn) != (whole.layers, whole.ffn)
        heads = run.settings.student.heads if cut and run.settings.student.heads else whole.heads
        if name not in known:
            model = transplant(source, tokenizer, run.settings.student.context)
            model = cut_to(run, model, tokenizer, (count, ffn, heads), TOKENS, silent).model
            known[name] = {"parameters": count_parameters(model), **_quality(run, model, tokenizer)}
            write_atomic(kept, json.dumps({"key": key, "sizes": known}, indent=2) + "\n")
        config = narrowed(whole, ffn, heads)
        config = replace(config, layers=count, vocab_size=tokenizer.vocab_size)
        found.append(Size(count, ffn, **known[name], config=config))
    listen(Event("sizes", "done", f"{len(found)} sizes", done=len(found), total=len(found)))
    return found


def _known(path: Path, key: str) -> dict[str, dict[str, Any]]:
    """What was measured of the same student on the same answers; nothing where the file can't be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["sizes"] if content["key"] == key else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _quality(run: Run, model: Backbone, tokenizer: StudentTokenizer) -> dict[str, float]:
    documents = Documents.load(run.data / "validation")
    found = quality(model, samples(run, tokenizer, model.config.context, 2 * JUDGED_TOKENS, "validation"))
    tokens_a_byte = len(documents.answer_ids) / max(int(documents.answer_bytes.sum()), 1)
    return {"bits_per_byte": round(found.nats * tokens_a_byte / math.log(2), 4), "top1": round(found.top1, 4)}
