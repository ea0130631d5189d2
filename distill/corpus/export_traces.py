"""Traces for other programs: Parquet and JSON lines, with the tokens spelled out."""

import json
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from distill.corpus.traces import Trace, TraceStore
from distill.errors import BadInput, DistillError
from distill.events import Event, Listener, silent
from distill.teacher.protocol import UNKNOWN_ID, TeacherTokenizer, TokenTargets

FORMATS = ("parquet", "jsonl")
_BATCH = 256
_LISTS = ("ids", "tokens", "logprobs", "soft", "top_ids", "top_tokens", "top_logprobs")
"""One entry a token."""
_THOUGHT = "thinking_"
"""Before the names of what is told of the thinking's tokens."""


def export_traces(path: Path, out: Path, format: str, listen: Listener = silent, shards: int = 1) -> int:
    """Write the selected traces of a trace database to `out`, whole or not at all; says how many. shards: to so many
    files, about equally long, whose names tell their place: traces.jsonl is traces-00000-of-00004.jsonl and so on.

    A row holds key, prompt, sample, held_out, text, done_reason, teacher, options (JSON), thinking, model and, an entry
    a token: ids, tokens (as the vocabulary spells them), logprobs, soft, top_ids, top_tokens, top_logprobs; the same of
    the thinking, named thinking_ids and so on. Null stands for what isn't there: the logprob of a hard-only position,
    all of them where the teacher gives no tokens.
    Alternatives that are absent are left out. Raises BadInput for another format, DistillError for a full disk.
    """
    if format not in FORMATS:
        raise BadInput(f"{out}: traces are exported to files that end in .{' or .'.join(FORMATS)}")
    write = _write_parquet if format == "parquet" else _write_jsonl
    names = [f"{out.stem}-{n:05d}-of-{shards:05d}{out.suffix}" for n in range(shards)] if shards > 1 else [out.name]
    with TraceStore(path, readonly=True) as store, ExitStack() as stack:
        parts = [stack.enter_context(_aside(out.with_name(name))) for name in names]
        total = store.stats().responses
        if left := store.left_out():
            text = (
                f"{left} responses aren't selected: left out; `dream capture {path.parent}` selects what was gathered"
            )
            listen(Event("traces", "warning", text))
        tokenizer = store.tokenizer()

        def rows() -> Iterator[dict[str, Any]]:
            for done, trace in enumerate(store.traces(), start=1):
                yield _row(trace, tokenizer)
                if done % _BATCH == 0 or done == total:
                    listen(Event("traces", "progress", done=done, total=total, unit="responses"))

        told, ends = rows(), [total * n // shards for n in range(1, shards)]
        counts = [end - start for start, end in pairwise([0, *ends])]
        return sum(write(part, islice(told, count)) for part, count in zip(parts, [*counts, None], strict=True))


@contextmanager
def _aside(out: Path) -> Generator[Path]:
    aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        os.replace(aside, out)
    except OSError as error:
        raise DistillError(f"{out}: can't write it: {error} (free some space, or check the rights)") from error
    finally:
        aside.unlink(missing_ok=True)


def _write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    strings, ids, numbers = pa.list_(pa.string()), pa.list_(pa.int32()), pa.list_(pa.float32())
    kinds = (ids, strings, numbers, pa.list_(pa.bool_()), pa.list_(ids), pa.list_(strings), pa.list_(numbers))
    lists = dict(zip(_LISTS, kinds, strict=True))
    schema: Any = pa.schema(
        [
            *((name, pa.string()) for name in ("key", "prompt")),
            ("sample", pa.int32()),
            ("held_out", pa.bool_()),
            *((name, pa.string()) for name in ("text", "done_reason", "teacher", "options", "thinking", "model")),
            *((f"{of}{name}", kind) for of in ("", _THOUGHT) for name, kind in lists.items()),
        ]
    )
    count = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while batch := list(islice(rows, _BATCH)):
            writer.write_table(cast(Any, pa.Table).from_pylist(batch, schema=schema))
            count += len(batch)
    return count


def _row(trace: Trace, tokenizer: TeacherTokenizer | None) -> dict[str, Any]:
    spell = _speller(tokenizer)
    response = trace.response
    return {
        "key": trace.key,
        "prompt": trace.prompt,
        "sample": trace.sample,
        "held_out": trace.held_out,
        "text": response.text,
        "done_reason": response.done_reason,
        "teacher": trace.teacher,
        "options": json.dumps(trace.options.spelled(), sort_keys=True),
        "thinking": response.thinking or None,
        "model": response.model or None,
        **_told(response.tokens, spell),
        **{f"{_THOUGHT}{name}": told for name, told in _told(response.thought, spell).items()},
    }


def _told(targets: TokenTargets | None, spell: Callable[[int], str | None]) -> dict[str, Any]:
    if targets is None:
        return dict.fromkeys(_LISTS)
    there = np.isfinite(targets.top_logprobs)
    top_ids = [ids[keep].tolist() for ids, keep in zip(targets.top_ids, there, strict=True)]
    return {
        "ids": targets.ids.tolist(),
        "tokens": [spell(i) for i in targets.ids.tolist()],
        "logprobs": [value if np.isfinite(value) else None for value in _decimals(targets.logprobs)],
        "soft": targets.soft.tolist(),
        "top_ids": top_ids,
        "top_tokens": [[spell(i) for i in ids] for ids in top_ids],
        "top_logprobs": [_decimals(values[keep]) for values, keep in zip(targets.top_logprobs, there, strict=True)],
    }


def _decimals(values: NDArray[np.float32]) -> list[float]:
    """The shortest decimals that are still the stored float16 values."""
    return [float(str(value)) for value in values.astype(np.float16)]


def _speller(tokenizer: TeacherTokenizer | None) -> Callable[[int], str | None]:
    tokens = [] if tokenizer is None else tokenizer.tokens
    return lambda i: tokens[i] if UNKNOWN_ID < i < len(tokens) else None
