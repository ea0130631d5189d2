"""Is a bundle whole, and does it answer everywhere as the native student does?"""

import math
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bundle import parity
from bundle.gguf import write_gguf
from bundle.load import Student, load_student
from bundle.looking import PictureEngine
from bundle.manifest import GGUF, Manifest, check_files, read_manifest
from distill.backbone.generate import generate
from distill.backbone.model import count_parameters
from distill.errors import CorruptFile, DistillError, RunMismatch
from distill.events import Event, Listener, silent
from distill.teacher.llama_cpp import LlamaCpp
from distill.teacher.names import fitting_name
from distill.tokens.chat import prompt_ids
from distill.vision import PROJECTOR

MAX_TOKENS = 48
LEAST_ROOM = 16
"""Tokens that the context has left after a prompt, at least, where none leaves MAX_TOKENS."""
MAX_DIFFERENCE = 1e-3
"""Log-probabilities of the float32 GGUF may differ so much from the native ones."""

ODD = (
    "It's 12345 o'clock, isn't it? She'LL pay 67.89 for 1,000,000,",
    "two  spaces,\ta tab,\n\nand an empty line\r\n(then brackets)...",
    "naïve café, 日本語 and Привет, 🙂👍🏽, x²",
)
"""Prompts whose ids are compared, too: what readers of a tokenizer disagree about."""

PROBED_PROMPTS = 4
"""Prompts whose whole distributions are compared."""

ONE_THREAD = 20_000_000
"""Below so many parameters llama.cpp's threads wait for each other longer than they compute."""

SCORED = 64
"""Tokens of a held-out answer that are scored, its first."""

WORSE = {"f32": 0.01, "f16": 0.01, "bf16": 0.02, "q8_0": 0.03, "q5_1": 0.25, "q5_0": 0.25, "q4_1": 0.5, "q4_0": 0.5}
"""Share by which what ships may spend more bits on held-out answers than the float32 student. SmolLM2, whose file is
in 4 bits already, spends 9 to 14 % more in 5 bits and 31 % more in q4_0; broken blocks cost a multiple."""

SLACK = 0.01
"""Bits per byte that it may spend more in any case: for a student that knows its answers by heart shares say little."""

QUESTIONS = (
    "What happens when you drop a ball?",
    "What happens if it rains all night?",
    "Why do plants need light?",
    "How do you boil an egg?",
)
"""Asked where a bundle names no held-out prompts, or none that leaves LEAST_ROOM."""


@dataclass(frozen=True)
class Check:
    """One line of the report. A check that isn't `required` informs and can't fail a bundle."""

    name: str
    ok: bool
    detail: str
    required: bool = True


@dataclass
class VerifyReport:
    """All checks. `numbers` are the measured values, for bundle.json and --json."""

    bundle: str
    checks: list[Check] = field(default_factory=list[Check])
    numbers: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(check.ok for check in self.checks if check.required)

    @property
    def summary(self) -> str:
        """One line."""
        if self.ok:
            return f"{self.bundle} answers as its student does ({len(self.checks)} checks)"
        failed = [f"{check.name}: {check.detail}" for check in self.checks if check.required and not check.ok]
        return "; ".join(failed) or f"{self.bundle}: nothing was checked"

    def rows(self) -> list[tuple[str, str, str]]:
        """(check, verdict, detail) for a table."""
        return [(c.name, "ok" if c.ok else "FAILED" if c.required else "differs", c.detail) for c in self.checks]

    def add(self, name: str, ok: bool, detail: str, required: bool = True) -> None:
        self.checks.append(Check(name, ok, detail, required))


def verify(
    bundle_dir: Path,
    listen: Listener = silent,
    prompts: list[str] | None = None,
    ollama_host: str | None = None,
    model: str | None = None,
    most: int | None = None,
) -> VerifyReport:
    """Check a bundle's files, prompt ids, greedy tokens and probabilities.

    prompts: instead of the bundle's own held-out ones. most: how many are answered at most. With `model` (or
    `ollama_host`) the model of that name in Ollama is asked too. What is wrong with the bundle stands in the report;
    raises BadInput where there is none.
    """
    manifest = read_manifest(bundle_dir)
    report = VerifyReport(str(bundle_dir))
    listen(Event("verify", "start", str(bundle_dir)))
    try:
        check_files(bundle_dir, manifest)
        student = load_student(bundle_dir)
    except (CorruptFile, RunMismatch) as error:
        report.add("files", False, str(error))
    else:
        report.add("files", True, f"{len(manifest.files)} files as bundle.json lists them (SHA-256)")
        chosen = prompts or manifest.verification_prompts or list(QUESTIONS)
        _Verification(bundle_dir, manifest, student, chosen, report, listen, most).run(ollama_host, model)
    listen(Event("verify", "done", report.summary, data=report.numbers))
    return report


class _Verification:
    """The checks of one bundle, in order; prompts are asked with the bundle's system message, thinking on."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        student: Student,
        prompts: list[str],
        report: VerifyReport,
        listen: Listener,
        most: int | None,
    ) -> None:
        self.folder, self.manifest, self.student, self.report, self.listen = folder, manifest, student, report, listen
        context = student.model.config.context
        fit = [prompt for prompt in (*prompts, *ODD) if len(self._ids(prompt, False)) < context]
        self.conversations = [(student.system, prompt, think) for prompt in fit for think in (True, False)]
        held_out = self._roomy(prompts, MAX_TOKENS) or self._roomy(prompts, LEAST_ROOM)
        asked = held_out or self._roomy(QUESTIONS, MAX_TOKENS) or self._roomy((*prompts, *QUESTIONS), 1)
        self.asked = asked[:most]
        self.max_tokens = min(MAX_TOKENS, context - max(map(len, self.asked), default=0))

    def _ids(self, prompt: str, think: bool) -> list[int]:
        return prompt_ids(self.student.tokenizer, prompt, think, self.student.system)

    def _roomy(self, prompts: Sequence[str], tokens: int) -> list[list[int]]:
        """Of those that leave the context room for so many: one without would shorten what is compared of every
        prompt."""
        ids = (self._ids(prompt, True) for prompt in prompts)
        return [one for one in ids if len(one) + tokens <= self.student.model.config.context]

    def run(self, ollama_host: str | None, model: str | None) -> None:
        student, report = self.student, self.report
        self._weights()
        self._progress(1)
        ours = generate(student.model, self.asked, max_tokens=self.max_tokens, stop_ids=[student.tokenizer.eos_id])
        self._progress(2)
        with self._engine("f32") as engine:
            self._prompt_ids(engine)
            self._answers(engine, ours)
            if self.manifest.dtype == "f32":
                self._bits(engine)
        self._progress(3)
        if self.manifest.dtype != "f32":
            self._shipped(ours)
        if PROJECTOR in self.manifest.files:
            self._pictures()
        self._progress(4)
        if model is not None or ollama_host is not None:
            self._ollama(ollama_host, model or fitting_name(self.manifest.name), ours)
        report.numbers |= {"prompts": len(self.asked), "max_tokens": self.max_tokens}

    def _progress(self, done: int) -> None:
        self.listen(Event("verify", "progress", done=done, total=4, unit="steps"))

    @contextmanager
    def _engine(self, dtype: str, mmproj: Path | None = None) -> Generator[PictureEngine]:
        """llama.cpp with the weights in float32 (written aside, if the bundle ships others) or as shipped."""
        context = self.student.model.config.context
        with tempfile.TemporaryDirectory(prefix="dream-verify-") as aside:
            path = self.folder / GGUF
            if dtype != self.manifest.dtype:
                path = Path(aside) / GGUF
                model = self.student.model
                write_gguf(model.state_dict(), model.config, self.student.tokenizer, path, dtype)
            threads = 1 if count_parameters(self.student.model) < ONE_THREAD else 0
            with PictureEngine(path, mmproj, context=context, threads=threads) as engine:
                yield engine

    def _weights(self) -> None:
        """model.gguf holds the weights of model.safetensors, as exactly as its types allow."""
        model, report = self.student.model, self.report
        try:
            errors = parity.weight_errors(self.folder / GGUF, model.state_dict(), model.config)
        except CorruptFile as error:
            report.add("weights", False, str(error))
            return
        wrong = [name for name, (kind, error) in errors.items() if not error <= parity.TOLERANCE.get(kind, 0.0)]
        report.numbers["weight_error"] = largest = max(error for _, error in errors.values())
        detail = f"{self.manifest.dtype}: largest relative error of a tensor {largest:.1e}"
        report.add("weights", not wrong, detail + (f"; too large in {wrong[0]}" if wrong else ""))

    def _prompt_ids(self, engine: LlamaCpp) -> None:
        """Native, transformers and llama.cpp write the same prompt, dreaming and not."""
        self._same_ids("transformers", parity.transformers_prompt_ids(self.folder, self.conversations))
        self._same_ids("llama.cpp", parity.engine_prompt_ids(engine, self.conversations))

    def _same_ids(self, who: str, found: list[list[int]], but: int = 0) -> None:
        """Which prompts another writes with other ids. but: of the last ids, so many aren't compared."""
        native = [self._ids(prompt, think) for _, prompt, think in self.conversations]
        odd = [
            prompt
            for (_, prompt, _), ids, theirs in zip(self.conversations, native, found, strict=True)
            if (ids != theirs if not but else ids[:-but] != theirs[: len(ids) - but])
        ]
        told = f"{len(found) - len(odd)} of {len(found)} identical"
        others = f"; other ids for {', '.join(map(repr, dict.fromkeys(odd)))}" if odd else ""
        self.report.add(f"prompt ids, {who}", not odd, told + others)

    def _answers(self, engine: LlamaCpp, ours: list[list[int]]) -> None:
        """The exact engine answers token by token as the native student, from the same probabilities."""
        model = self.student.model
        theirs = parity.engine_answers(engine, self.asked, self.max_tokens)
        agreement = parity.compare_answers(model, self.asked, ours, theirs)
        same = agreement.identical + agreement.near_ties == agreement.prompts > 0
        self.report.add("greedy tokens, f32 GGUF", same, str(agreement))
        probed = slice(PROBED_PROMPTS)
        worst, positions = parity.largest_difference(model, engine, self.asked[probed], ours[probed])
        detail = f"at most {worst:.1e} over {positions} positions × {model.config.vocab_size} tokens"
        self.report.add("log-probabilities, f32 GGUF", positions > 0 and worst <= MAX_DIFFERENCE, detail)
        counts = {"identical": agreement.identical, "near_ties": agreement.near_ties}
        self.report.numbers |= {**counts, "largest_difference": worst}

    def _shipped(self, ours: list[list[int]]) -> None:
        """model.gguf loads and answers; how often as the float32 student does is for information."""
        name, model = f"greedy tokens, shipped {self.manifest.dtype}", self.student.model
        try:
            with self._engine(self.manifest.dtype) as engine:
                ids = parity.engine_prompt_ids(engine, self.conversations)
                self._same_ids(f"shipped {self.manifest.dtype}", ids)
                theirs = parity.engine_answers(engine, self.asked, self.max_tokens)
                worst, _ = parity.largest_difference(model, engine, self.asked[:2], ours[:2])
                self._bits(engine)
        except DistillError as error:
            self.report.add(name, False, str(error))
            return
        agreement = parity.compare_answers(model, self.asked, ours, theirs)
        self.report.numbers |= {"shipped_identical": agreement.identical, "shipped_largest_difference": worst}
        detail = f"{agreement}; log-probabilities differ by at most {worst:.1e}"
        self.report.add(name, agreement.identical == agreement.prompts, detail, required=False)

    def _pictures(self) -> None:
        """llama.cpp makes of pictures the embeddings that the student reads, and answers about them as it does; the
        pair as it is shipped informs."""
        from bundle.seen import MAX_ERROR, MAX_WORST, Shown
        from distill.vision.sight import Sight

        asked = [(question, self.folder / file) for question, file in self.manifest.verification_pictures]
        try:
            sight = Sight.load(shipped := self.folder / PROJECTOR)
            shown = Shown(self.student, sight, asked)
            with tempfile.TemporaryDirectory(prefix="dream-verify-") as aside:
                sight.save(wide := Path(aside) / PROJECTOR, "f32")
                error, worst = shown.errors(wide)
                with self._engine("f32", wide) as engine:
                    exact = shown.agreement(engine, self.max_tokens)
            with self._engine(self.manifest.dtype, shipped) as engine:
                pair = shown.agreement(engine, self.max_tokens)
        except DistillError as failure:
            self.report.add("pictures", False, str(failure))
            return
        found = (
            f"relative error {error:.1e}, at most {worst:.1e}, over {len(asked)} pictures × {sight.patches} embeddings"
        )
        self.report.add("picture embeddings, f32 mmproj", error <= MAX_ERROR and worst <= MAX_WORST, found)
        same = exact.identical + exact.near_ties == exact.prompts > 0
        self.report.add("greedy tokens about pictures, f32 pair", same, str(exact))
        told = f"greedy tokens about pictures, shipped {self.manifest.dtype}"
        self.report.add(told, pair.identical == pair.prompts, str(pair), required=False)
        self.report.numbers |= {"pictures": len(asked), "picture_error": error, "pictures_identical": exact.identical}

    def _bits(self, engine: LlamaCpp) -> None:
        """What the held-out answers cost in the shipped GGUF, beside the float32 student; both after an empty dream."""
        model, tokenizer = self.student.model, self.student.tokenizer
        contexts: list[list[int]] = []
        answers: list[list[int]] = []
        for prompt, answer in self.manifest.verification_answers:
            context = self._ids(prompt, False)
            scored = tokenizer.encode(answer)[: min(SCORED, model.config.context - len(context))]
            if scored and len(context) < model.config.context:
                contexts.append(context)
                answers.append(scored)
        if not answers:
            return
        size = sum(len(tokenizer.token_bytes(token)) for answer in answers for token in answer)
        native = parity.native_nats(model, contexts, answers) / math.log(2) / size
        shipped = parity.engine_nats(engine, contexts, answers) / math.log(2) / size
        dtype = self.manifest.dtype
        self.report.numbers |= {"bits_per_byte": native, "shipped_bits_per_byte": shipped, "scored": len(answers)}
        self.report.add(
            f"bits per byte, shipped {dtype}",
            shipped <= native * (1 + WORSE[dtype]) + SLACK,
            f"{shipped:.4f} where the float32 student spends {native:.4f}, on {len(answers)} held-out answers",
        )

    def _ollama(self, host: str | None, model: str, ours: list[list[int]]) -> None:
        """The installed model reads prompts with the same ids, and continues the same raw prompts alike; its engine
        rounds differently, so half will do."""
        from bundle.install import ids_of_prompts, raw_answers

        tokenizer, context, report = self.student.tokenizer, self.student.model.config.context, self.report
        try:
            # The line break that ends a prompt may become one token with what the reply begins with.
            self._same_ids(f"Ollama {model}", ids_of_prompts(model, host, self.conversations, context), but=1)
            texts = raw_answers(model, host, [tokenizer.decode(ids) for ids in self.asked], self.max_tokens, context)
        except DistillError as error:
            report.add(f"Ollama {model}", False, str(error))
            return
        pairs = zip(texts, ours, strict=True)
        same = sum(parity.plain(text) == parity.printable(tokenizer, ids) for text, ids in pairs)
        report.numbers["ollama_identical"] = same
        report.add(f"greedy text, Ollama {model}", 2 * same >= len(ours), f"{same} of {len(ours)} prompts identical")
