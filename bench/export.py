"""How long a bundle takes: its GGUF in each precision, checking it, and all of it."""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench.result import BenchResult, Series
from bench.stopwatch import Stopwatch
from bundle.export import Origin, write_bundle
from bundle.gguf import DTYPES, write_gguf
from bundle.load import Student
from bundle.verify import verify
from distill.backbone.model import Backbone, config_for, count_parameters
from distill.config import ExportSettings, StudentSettings
from distill.errors import BadInput, ParityError
from distill.teacher.gguf_tokenizer import byte_alphabet
from distill.teacher.pre_tokenizers import byte_level_bpe
from distill.tokens.bpe import Origin as VocabularyOrigin
from distill.tokens.bpe import StudentTokenizer


def untrained_student(preset: str = "nano", vocab_size: int = 8192) -> Student:
    """Random weights, and a vocabulary of bytes and image tokens. Raises BadInput for an unknown preset, and where the
    vocabulary is too small."""
    if vocab_size < (least := _tokenizer(0).vocab_size):
        raise BadInput(f"--vocab {vocab_size}: bytes and control tokens alone are {least}")
    tokenizer = _tokenizer(vocab_size - least)
    sizes = config_for(StudentSettings(preset=preset), vocab_size, tokenizer.pad_id, tokenizer.eos_id)
    return Student("untrained", Backbone(sizes).initialize(0).eval(), tokenizer)


def _tokenizer(image_tokens: int) -> StudentTokenizer:
    symbols = [*byte_alphabet(), "th"]  # llama.cpp loads no vocabulary without a merge
    bpe = byte_level_bpe({symbol: id for id, symbol in enumerate(symbols)}, [("t", "h")], "gpt-2")
    labels = [f"phrase {i}" for i in range(image_tokens)]
    return StudentTokenizer.assemble(bpe, labels, VocabularyOrigin("aligned", "gpt-2"))


def bench_export(
    watch: Stopwatch,
    student: Student | None = None,
    dtypes: Sequence[str] = tuple(DTYPES),
    preset: str = "nano",
    vocab_size: int = 8192,
) -> BenchResult:
    """Per dtype: seconds to write the GGUF, and its bytes. Of the first dtype also: seconds to write, verify and
    publish a bundle, and to verify it alone; both hardly depend on it.

    student: None: an untrained one. The disk's flushing is part of a bundle. Raises BadInput for an unknown dtype,
    and ParityError where a bundle doesn't answer as the student does: then a time would be worth nothing.
    """
    kind = preset if student is None else "a trained one"
    student = student or untrained_student(preset, vocab_size)
    with tempfile.TemporaryDirectory() as name:
        series = _files(watch, student, dtypes, Path(name)) + _bundles(watch, student, dtypes[0], Path(name))
    sizes = {"parameters": count_parameters(student.model), "vocab_size": student.model.config.vocab_size}
    return watch.result("export", series, {"student": kind, **sizes})


def _files(watch: Stopwatch, student: Student, dtypes: Sequence[str], folder: Path) -> list[Series]:
    model, files = student.model, {dtype: folder / f"{dtype}.gguf" for dtype in dtypes}
    jobs = {
        dtype: partial(write_gguf, model.state_dict(), model.config, student.tokenizer, path, dtype)
        for dtype, path in files.items()
    }
    found: list[Series] = []
    for dtype, seconds in watch.seconds(jobs, "bench export, GGUF").items():
        size = (files[dtype].stat().st_size,)
        found.append(Series(f"writing the GGUF, {dtype}", "s", -1, tuple(seconds), {"dtype": dtype}))
        found.append(Series(f"size of the GGUF, {dtype}", "bytes", -1, size, {"dtype": dtype}))
    return found


def _bundles(watch: Stopwatch, student: Student, dtype: str, folder: Path) -> list[Series]:
    bundle, settings = folder / "bundle", ExportSettings(dtype=dtype, system=student.system)

    def check() -> None:
        if not (report := verify(bundle)).ok:
            raise ParityError(report.summary.replace(str(bundle), f"a bundle in {dtype}"))

    write = partial(write_bundle, bundle, student, settings, Origin(student.name))
    names = {"verifying it": check, "the whole bundle": write}  # the first round goes backwards
    seconds = watch.seconds(names, f"bench export, bundle in {dtype}")
    return [Series(f"{name}, {dtype}", "s", -1, tuple(seconds[name]), {"dtype": dtype}) for name in names]
