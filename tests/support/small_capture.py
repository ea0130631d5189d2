"""A small real capture: the embedded teacher answers questions that make it write more than plain English.

Its answers are kept in fixtures/small_capture.zip, so that nobody waits for them, and they are the same on every
machine. `python -m support.small_capture`, run in tests/, asks again.
"""

import contextlib
import tempfile
import zipfile
from pathlib import Path

from support.shared import made_once

from distill.config import CaptureSettings, Settings, TeacherSettings, TokenizeSettings
from distill.corpus.capture import capture
from distill.knowledge.mine import mine
from distill.run import Run
from distill.tokens.build import build_tokenizer

KEPT = Path(__file__).parents[1] / "fixtures" / "small_capture.zip"
TOKENIZE = TokenizeSettings(vocab_size=1024, image_tokens=24)
QUESTIONS = """\
What happens when you drop a ball?
What happens if you leave ice in the sun?
Why do cups break when they fall?
What happens when you push a door?
What happens when a cat sees a mouse?
Why does bread rise in the oven?
What happens if it rains all night?
Where does a river go?
What happens before sunrise?
Tell me what a "what-if" question is, don't be long.
How do you say "good morning" in Japanese, Russian, Greek and Arabic?
Write three emoji and say what each of them means: 🎈, 🌍, 👩‍🚀?
Translate "I'd like a coffee, please" to French, Spanish and German.
What is 1234 times 56? Show the steps with digits.
Write a Python function that adds two numbers.
Write a small HTML page with a title.
List the numbers from 1995 to 2012.
Write the first ten digits of pi, and e = 2.71828.
Give me a table of three fruits with prices in € and £.
Write a haiku about snow.
Wie heißt die Hauptstadt von Österreich?
¿Qué pasa si dejas caer un vaso?
写一首关于雪的短诗。
What does a C program look like?
"""


def captured_small(folder: Path) -> Run:
    """24 questions and their answers of at most 48 tokens, as a run folder that is made anew."""
    with zipfile.ZipFile(KEPT) as kept:
        kept.extractall(folder)
    return Run.open(folder)


def mined_small(folder: Path) -> Run:
    """The same, mined; once for all tests."""
    return Run.open(made_once("mined", lambda kept: mine(captured_small(kept)), folder))


def tokenized_small(folder: Path) -> Run:
    """The same, with a small tokenizer (TOKENIZE)."""

    def make(kept: Path) -> None:
        mined = mined_small(kept)
        mined.settings.tokenize = TOKENIZE
        build_tokenizer(Run.create(kept, mined.settings))

    return Run.open(made_once("tokenized", make, folder))


def keep(folder: Path) -> None:
    """Ask the teacher, and keep what it answered."""
    questions = folder / "questions.txt"
    questions.write_text(QUESTIONS, encoding="utf-8")
    run = Run.create(
        folder / "run",
        Settings(
            teacher=TeacherSettings(threads=1, engine="llama.cpp"),
            capture=CaptureSettings(prompts=[questions.name], max_tokens=48, held_out=0.2),
        ),
    )
    with contextlib.chdir(folder):
        capture(run)
    with zipfile.ZipFile(KEPT, "w", zipfile.ZIP_DEFLATED) as kept:
        for name in ("config.yaml", "run.json", run.traces.name):
            kept.write(run.path / name, name)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        keep(Path(folder))
