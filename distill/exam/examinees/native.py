"""Students of ours in a folder, as examinees: a run's checkpoint, a checkpoint by itself, or a bundle's weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.backbone.device import pick_device
from distill.backbone.generate import generate
from distill.backbone.model import count_parameters
from distill.dream.pretrained import load_parts
from distill.errors import TeacherError
from distill.exam.examinees.common import OwnDream, TokenExaminee, check_finite
from distill.exam.examinees.protocol import PASSING, AnswerScore, Card
from distill.exam.metrics.likelihood import SoftTargets
from distill.exam.questions import Question
from distill.exam.scoring import score_answers
from distill.exam.targets import How, Target
from distill.mining.triplets import Triplet
from distill.run import Run
from distill.student.grammar import DreamGrammar
from distill.student.made_with import made_with
from distill.student.sure import LONGEST, are_sure
from distill.teacher.gguf_tokenizer import Vocabulary
from distill.teacher.protocol import TeacherTokenizer
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import dream_ids, prompt_ids, think_block
from distill.tokens.image_tokens import Codebook, dream_of, load_codes
from distill.tokens.packing import recall_of
from distill.tokens.recall import Recall

MASKED = "what it writes is held to the grammar of dreams and answers by a mask, as natively always"
RETRIEVED = "its prompts carry what was retrieved for them, as in its training"


class NativeExaminee(TokenExaminee):
    """A student on our own backbone. Raises what `load_parts` does for broken folders.

    It dreams if its run trained it to; where the run isn't known, if it has image tokens.
    """

    def __init__(self, target: Target, how: How) -> None:
        assert target.path is not None
        folder = target.path
        parts = load_parts(folder, pick_device(how.device))
        check_finite(parts.model, folder)
        self.model, self.codebook, self.tokenizer = parts.model.eval(), parts.codebook, parts.tokenizer
        super().__init__(how, vocabulary_of(self.tokenizer))
        self.end_think = self.tokenizer.end_think_id
        self.context_size = self.model.config.context + 1  # the last token is only predicted, never read
        self._grammar = DreamGrammar(self.tokenizer, how.steps)
        self.sure = target.sure
        run = target.trained_in
        run = run and Run(run.path, made_with(run))
        self._codes = _codes_in(folder, self.codebook, run)
        dreams = self._find_dreams(run)
        self._recall = _recall_of(run, self._codes, self.tokenizer)
        self._headers: dict[tuple[str, str], list[int]] = {}
        self.card = Card(
            kind=target.kind,
            name=target.name,
            parameters=count_parameters(self.model),
            bytes=sum(file.stat().st_size for file in folder.glob("model*.safetensors")),
            context=self.model.config.context,
            quantization="float32",
            dreams=dreams,
            note=MASKED if self._recall is None else f"{MASKED}; {RETRIEVED}",
        )

    def _find_dreams(self, run: Run | None) -> bool:
        """Whether it dreams; notes why not, and why no mined dream can be had."""
        train, reason = None if run is None else run.settings.train, ""
        if train is not None and (train.pause or not train.dreams):
            reason = "it was trained " + ("on pause tokens instead of dreams" if train.pause else "without dreams")
        elif not len(self.tokenizer.image_ids):
            reason = "it has no image tokens to dream in"
        if reason:
            self.cannot |= {"dreams": reason, "mined": reason}
        elif self.codebook is None:
            self.cannot["mined"] = "it ships no codebook that says which image tokens stand for a phrase"
        elif not self._codes:
            try:
                self.codebook.encoder.encode(["a probe"])
            except TeacherError as error:
                self.cannot["mined"] = f"{PASSING}: {error}"
        return not reason

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        # As other targets spell a character that the end cuts off.
        return b"".join(map(self.tokenizer.token_bytes, ids)).decode(errors="replace")

    def header(self, question: Question) -> list[int]:
        """The prompt and, for a run with `train.retrieve`, what was retrieved for it, up to where the student goes
        on. Worked out once, as every phase asks anew."""
        key = (question.system, question.prompt)
        if key not in self._headers:
            prompt = question.prompt if self._recall is None else self._recall.prompt(question.prompt)
            self._headers[key] = prompt_ids(self.tokenizer, prompt, system=question.system)
        return self._headers[key]

    def opened(self, question: Question) -> list[int]:
        return [*self.header(question), self.tokenizer.think_id, self.tokenizer.newline_id]

    def context(self, question: Question, dream: Sequence[int]) -> list[int]:
        return [*self.header(question), *think_block(self.tokenizer, dream)]

    def labels(self, triplets: Sequence[Triplet]) -> list[str] | None:
        if self.codebook is None or "mined" in self.cannot:
            return None
        codes = (self.tokenizer.image_code(id) for id in self.mined(triplets))
        return [self.tokenizer.labels[code] for code in codes if code is not None]

    def mined(self, triplets: Sequence[Triplet]) -> list[int]:
        """Phrases that its tokenizer hasn't seen go to the nearest image token."""
        codebook = self.codebook
        if not triplets or codebook is None or not len(codebook):
            return []
        new = sorted({phrase for triplet in triplets for phrase in triplet.phrases} - self._codes.keys())
        if new and "mined" not in self.cannot:
            self._codes |= dict(zip(new, codebook.encode(new).tolist(), strict=True))
        return dream_ids(self.tokenizer, dream_of(triplets, self._codes))

    def _dreamed(self, questions: Sequence[Question], temperature: float, draw: int) -> list[OwnDream]:
        """None where it is sure of the answer, whose draw is the next."""
        sure = self.sure_of(questions, temperature, draw + 1)
        dreams = iter(
            super()._dreamed([q for q, each in zip(questions, sure, strict=True) if not each], temperature, draw)
        )
        return [OwnDream([], True) if each else next(dreams) for each in sure]

    def sure_of(self, questions: Sequence[Question], temperature: float, draw: int) -> list[bool]:
        """Whether it is sure enough of its answers without a dream."""
        if self.sure >= 1:
            return [False] * len(questions)
        contexts = [self.context(question, []) for question in questions]
        answers = self.write(contexts, self._seeds(questions, draw), temperature, LONGEST, dream=False)
        return are_sure(self.model, contexts, answers, self.tokenizer.eos_id, self.sure)

    def write(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], temperature: float, max_tokens: int, dream: bool
    ) -> list[list[int]]:
        return generate(
            self.model,
            prompts,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seeds,
            stop_ids=[self.tokenizer.end_think_id if dream else self.tokenizer.eos_id],
            grammar=self._grammar.inside if dream else self._grammar.answering,
        )

    def score_rows(
        self,
        contexts: Sequence[list[int]],
        answers: Sequence[list[int]],
        targets: Sequence[SoftTargets | None],
    ) -> list[AnswerScore]:
        found = dict(score_answers(self.model, contexts, answers, targets))
        return [found[i] for i in range(len(contexts))]


def vocabulary_of(tokenizer: StudentTokenizer) -> Vocabulary:
    """A student's own, as its GGUF has it."""
    told = tokenizer.gguf()
    return Vocabulary(TeacherTokenizer(told.model, told.pre, told.tokens, told.merges, told.types, tokenizer.eos_id))


def _codes_in(folder: Path, codebook: Codebook | None, run: Run | None = None) -> dict[str, int]:
    """phrases.json of a student's folder. A bundle has none and takes its run's, where that has the same image tokens
    still: phrases go by their role there, which the codebook alone doesn't know. {} where there is none."""
    for words in (folder / "tokenizer", folder):
        if codebook is not None and (words / "phrases.json").is_file():
            return load_codes(words, codebook)
    if codebook is None or run is None or not (run.tokenizer / "phrases.json").is_file():
        return {}
    theirs = Codebook.load(run.tokenizer, run.settings.teacher)
    return load_codes(run.tokenizer, theirs) if theirs.labels == codebook.labels else {}


def _recall_of(run: Run | None, codes: Mapping[str, int], tokenizer: StudentTokenizer) -> Recall | None:
    """What a student that learned with retrieval is given to read; None where it did not, or its run can't tell."""
    if run is None or not run.settings.train.retrieve or not run.traces.exists() or not run.triplets.exists():
        return None
    # A copy: the examinee's own grow by phrases that training never saw.
    codes = dict(codes) or _codes_in(run.tokenizer, Codebook.load(run.tokenizer, run.settings.teacher))
    return recall_of(run, codes, tokenizer.labels)
