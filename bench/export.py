"""How long a bundle takes: its GGUF in each precision, checking it, and all of it."""

import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from string import ascii_letters

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

IMAGE_TOKENS = 512
"""As many as settings ask for by default."""


def untrained_student(preset: str = "nano", vocab_size: int = 8192, context: int = 512) -> Student:
    """Random weights, and a vocabulary of the size and shape of a real one, of letters joined in alphabetical order.

    Raises BadInput for an unknown preset, and where the vocabulary is too small for what every student has.
    """
    bare = assembled([])
    if (merged := vocab_size - bare.vocab_size) < 1:
        raise BadInput(f"--vocab {vocab_size}: bytes and {IMAGE_TOKENS} image tokens alone are {bare.vocab_size}")
    pairs = [(one, two) for one, two in product(ascii_letters, repeat=2)]
    merges = [*pairs, *product(("".join(pair) for pair in pairs), ascii_letters)]
    if merged > len(merges):
        raise BadInput(f"--vocab {vocab_size}: at most {bare.vocab_size + len(merges)} can be made up")
    tokenizer = assembled(merges[:merged])
    sizes = config_for(StudentSettings(preset=preset, context=context), vocab_size, tokenizer.pad_id, tokenizer.eos_id)
    return Student("untrained", Backbone(sizes).initialize(0).eval(), tokenizer)


def assembled(merges: list[tuple[str, str]]) -> StudentTokenizer:
    """Bytes, these merges, what every student has, image tokens."""
    symbols = [*byte_alphabet(), *("".join(pair) for pair in merges)]
    bpe = byte_level_bpe({symbol: id for id, symbol in enumerate(symbols)}, merges, "gpt-2")
    return StudentTokenizer.assemble(
        bpe, [f"phrase {i}" for i in range(IMAGE_TOKENS)], VocabularyOrigin("aligned", "gpt-2")
    )


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
    if unknown := [dtype for dtype in dtypes if dtype not in DTYPES]:
        raise BadInput(f"--dtype {unknown[0]}: is none of {', '.join(DTYPES)}")
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
    seconds = watch.seconds(jobs, "bench export, GGUF")
    found: list[Series] = []
    for dtype, path in files.items():
        size = (float(path.stat().st_size),)
        found.append(Series(f"writing the GGUF, {dtype}", "s", -1, tuple(seconds[dtype]), {"dtype": dtype}))
        found.append(Series(f"size of the GGUF, {dtype}", "bytes", -1, size, {"dtype": dtype}))
    return found


def _bundles(watch: Stopwatch, student: Student, dtype: str, folder: Path) -> list[Series]:
    bundle, settings = folder / "bundle", ExportSettings(dtype=dtype, system=student.system)

    def write() -> None:
        write_bundle(bundle, student, settings, Origin(student.name))

    def check() -> None:
        report = verify(bundle)
        if not report.ok:
            raise ParityError(report.summary.replace(str(bundle), f"a bundle in {dtype}"))

    names = {"verifying it": check, "the whole bundle": write}  # the first round goes backwards
    seconds = watch.seconds(names, f"bench export, bundle in {dtype}")
    return [Series(f"{name}, {dtype}", "s", -1, tuple(seconds[name]), {"dtype": dtype}) for name in names]
