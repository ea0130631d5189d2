"""Polishing by a teacher that can only be asked.

The student begins answers and is cut off early; the teacher goes on with them. What it says there, and would have said,
is what the student learns: to come back from its own words. While it learns from one round its teacher is at the next:
at most AHEAD of them are begun and not learned from.

checkpoints/polish.jsonl keeps all of it as it comes: what it is of, then a line for each round that was begun and for
each answer. So nothing that was said is asked again, however often a polishing is killed; it goes with the checkpoints.
"""

import base64
import contextlib
import json
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np

from distill.corpus.pack_targets import pack_targets, unpack_targets
from distill.corpus.traces import TraceStore
from distill.errors import AnswerBroken, BadInput, DistillError, PromptRefused, RunMismatch, TeacherError
from distill.events import Listener
from distill.journal import Journal
from distill.run import Run
from distill.student.made_with import made_with
from distill.teacher import opened, room_for
from distill.teacher.crew import TICK, Crew, Outcome
from distill.teacher.gguf_tokenizer import Vocabulary
from distill.teacher.protocol import GenerateOptions, Response, Teacher, TokenTargets
from distill.tokens.aligner import Aligned, Aligner
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.packing import Documents, documents_of, split_traces
from distill.training import checkpoint
from distill.turns import is_conversation

JOURNAL = "polish.jsonl"
AHEAD = 2
EARLY = 32
"""Tokens of its own that the student begins an answer with, at most."""
ON = 24
"""Tokens for which the teacher goes on with it."""
TRIAL = 16
"""Tokens of an answer on which it is tried whether the teacher goes on with it."""
ALIKE = 0.1
"""Total variation that may lie between what a teacher would say next, as it answers and as it goes on: rounding."""
NEVER = PromptRefused | AnswerBroken
"""What becomes of an answer that would fail each time. What else fails is a teacher that is gone."""
OTHERWISE = "polish with its weights: --teacher-weights FILE|DIR"


@dataclass(frozen=True)
class Begun:
    """An answer that the student began: to the prompt of that number, after that dream; ids."""

    prompt: int
    dream: list[int]
    words: list[int]


@dataclass(frozen=True)
class _Job:
    """The answer that has that place in its round, as it is put to the teacher."""

    number: int
    place: int
    prompt: str
    begun: str
    options: GenerateOptions


def early(ids: Sequence[int], tokenizer: StudentTokenizer, random: np.random.Generator) -> list[int]:
    """An answer up to a random place: its own end, or before a word, for half a word a teacher would have written
    otherwise. Where nothing parts words it is any."""
    pieces = [b" " if id == tokenizer.eos_id else tokenizer.token_bytes(id) for id in ids]
    places = [n for n in range(1, len(ids)) if pieces[n][:1].isspace()] or list(range(1, len(ids)))
    whole = [n for n in places if _is_text(b"".join(pieces[:n]))]
    return [int(id) for id in ids[: random.choice(whole)]] if whole else []


def _is_text(spelled: bytes) -> bool:
    try:
        return bool(spelled.decode())
    except UnicodeDecodeError:
        return False


@contextlib.contextmanager
def consulting(
    run: Run,
    tokenizer: StudentTokenizer,
    how: Mapping[str, Any],
    listen: Listener,
    force: bool = False,
    further: Sequence[str] = (),
) -> Generator["Consultation"]:
    """The run's teacher, asked while the student learns.

    how: of the polishing. force: once the teacher has answered, the journal begins again. further: prompts asked beside
    those of training. Raises BadInput where no teacher could be asked, TeacherError where it can't go on with an answer
    or tells no logprobs, RunMismatch where it is another than gave the answers, or `how` isn't what was begun.
    """
    capture = made_with(run).capture
    with TraceStore(run.traces, readonly=True) as store:
        teacher, words = store.teacher(), store.tokenizer()
        asked = [*(trace.prompt for trace in split_traces(store)[0]), *further]
    if teacher.is_dataset or teacher.is_given:
        raise BadInput(f"{run.path}: {teacher.spec} gave the answers, and no model; there is no teacher to polish by")
    options = GenerateOptions(ON, capture.temperature, capture.top_k, capture.top_p, system=capture.system)
    sums = checkpoint.latest(run, "polish") / "checksums.json"
    header = {"how": dict(how), "weights": json.loads(sums.read_text(encoding="utf-8"))["model.safetensors"]}
    context = room_for((capture.system + text for text in asked), capture.max_tokens + ON)
    path, there = run.checkpoints / JOURNAL, header
    if not force:
        with Journal(path) as journal:  # which is there from now on: it was begun so
            there = (journal.lines or [header])[0]
    if there["how"] != header["how"]:
        raise RunMismatch(f"{path}: polished with other settings; --force begins again where training ended")
    who = replace(run.settings.teacher, engine="llama.cpp")  # what an embedded one goes on with
    with opened(who, listen, context, run.settings.runtime) as those:
        fixed = run.settings.teacher.in_flight
        crew: Crew[_Job, Response] = Crew(those, _ask, stage="polish", listen=listen, fixed=fixed, service=_service)
        if (crew.info.digest, crew.info.template_digest) != (teacher.digest, teacher.template_digest):
            raise RunMismatch(f"{crew.info.spec}: is another model, or has another template, than gave the answers")
        check(crew.first.teacher, next((text for text in asked if not is_conversation(text)), asked[0]), options)
        options = replace(options, seed=run.settings.seed)
        aligner = Aligner(tokenizer, Vocabulary(words).bytes_of if words else None)
        # Where the weights differ, the student that began those answers has been trained on.
        with Journal(path, force=force or there != header) as journal:
            if not journal.lines:
                journal.append(header)
            consultation = Consultation(journal, crew, asked, options, tokenizer, aligner)
            thread = threading.Thread(target=consultation.work, daemon=True)
            thread.start()
            try:
                yield consultation
            finally:
                consultation.stop()
                thread.join(10 * TICK)


def _ask(teacher: Teacher, job: _Job) -> Response:
    return teacher.go_on(job.prompt, job.begun, job.options)


def _service(response: Response) -> float:
    return response.timings.get("service", 0.0)


def check(teacher: Teacher, prompt: str, options: GenerateOptions) -> None:
    """Raises TeacherError where it tells no logprobs, or doesn't go on with an answer of its own that is handed back to
    it as it did at once: then it doesn't read it as its own."""
    spec, asked = teacher.describe().spec, replace(options, temperature=0.0, max_tokens=TRIAL)
    answer, words = teacher.generate(prompt, asked), teacher.tokenizer()
    whole = answer.tokens
    if whole is None or words is None or not whole.soft.any():
        raise TeacherError(f"{spec}: tells no logprobs, so nobody knows what else it would have said; {OTHERWISE}")
    bytes_of = Vocabulary(words).bytes_of
    pieces = [bytes_of[i] for i in whole.ids.tolist()]
    place = next((n for n in range(1, len(pieces)) if whole.soft[n] and pieces[n][:1].isspace()), 0)
    begun = b"".join(pieces[:place]).decode("utf-8", "ignore")
    begun = begun if answer.text.startswith(begun) else begun.lstrip()
    rest = teacher.go_on(prompt, begun, replace(asked, max_tokens=2)).tokens
    if rest is None or not len(rest) or _apart(whole.part(place), rest) > ALIKE:
        raise TeacherError(f"{spec}: goes on with an answer of its own otherwise than it did at once; {OTHERWISE}")


def _apart(one: TokenTargets, two: TokenTargets) -> float:
    """Total variation between the alternatives of the first tokens."""
    a, b = (dict(zip(t.top_ids[0].tolist(), np.exp(t.top_logprobs[0]).tolist(), strict=True)) for t in (one, two))
    return sum(abs(a.get(i, 0.0) - b.get(i, 0.0)) for i in a.keys() | b.keys()) / 2


class Consultation:
    """What the student began and what its teacher said, by round.

    asked: the prompts of training documents, and further ones. waited: seconds that the student waited for its teacher.
    """

    def __init__(
        self,
        journal: Journal,
        crew: Crew[_Job, Response],
        asked: Sequence[str],
        options: GenerateOptions,
        tokenizer: StudentTokenizer,
        aligner: Aligner,
    ) -> None:
        self.journal, self.crew, self.asked, self.options = journal, crew, asked, options
        self.tokenizer, self.aligner = tokenizer, aligner
        self.waited = 0.0
        self._begun: dict[int, list[Begun]] = {}
        self._said: defaultdict[int, dict[int, dict[str, Any]]] = defaultdict(dict)
        for line in journal.lines[1:]:
            self._take_in(line)
        self._sent: set[int] = set()
        self._rounds: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._news = threading.Condition()
        self._problem: BaseException | None = None
        self._stopped = False

    def _take_in(self, line: dict[str, Any]) -> None:
        if "begun" in line:
            self._begun[line["round"]] = [Begun(*each) for each in line["begun"]]
        else:
            self._said[line["round"]][line["place"]] = line

    def _keep(self, line: dict[str, Any]) -> None:
        with self._news:
            self.journal.append(line)
            self._take_in(line)
            self._news.notify_all()

    # The teacher's thread.
    def work(self) -> None:
        """Have one round after the other answered, until `stop`."""
        try:
            while (number := self._rounds.get()) is not None:
                gone: DistillError | None = None
                for outcome in self.crew.run(self._jobs(number), some=any(self._said.values())):
                    if self._stopped:
                        return
                    if outcome is not None and isinstance(outcome.problem, NEVER | None):
                        self._keep(_line(outcome))
                    elif outcome is not None:
                        gone = outcome.problem
                if gone is not None:
                    raise TeacherError(f"{gone} (what was answered is kept, the same command goes on from there)")
        except BaseException as error:  # carried to the thread that waits, bugs too
            with self._news:
                self._problem = error
                self._news.notify_all()

    def stop(self) -> None:
        """Ask nothing more."""
        self._stopped = True
        self.crew.stop()
        self._rounds.put(None)

    def _jobs(self, number: int) -> list[_Job]:
        """Those of a round that nobody went on with yet."""
        begun, seed = self._begun[number], self.options.seed
        spelled = [b"".join(map(self.tokenizer.token_bytes, each.words)).decode() for each in begun]
        return [
            _Job(number, i, self.asked[each.prompt], text, replace(self.options, seed=seed + number * len(begun) + i))
            for i, (each, text) in enumerate(zip(begun, spelled, strict=True))
            if i not in self._said[number]
        ]

    # The student's.
    def answers(
        self,
        number: int,
        rounds: int,
        begin: Callable[[int], list[Begun]],
        prompt: Callable[[int], list[int]],
        tell: Callable[..., None],
    ) -> tuple[Documents, dict[int, list[int]]]:
        """Documents of a round's answers, and the dreams that some were given after; the next one is begun before.

        rounds: how many there will be, 0 where nobody knows. prompt: its ids, by number. tell: what is waited for.
        Raises what became of the teacher; what it had said is kept.
        """
        for n in range(number, min(number + AHEAD, rounds or number + AHEAD)):
            if n not in self._begun:
                self._keep({"round": n, "begun": [astuple(each) for each in begin(n)]})
            if n not in self._sent:
                self._sent.add(n)
                self._rounds.put(n)
        begun, said, started = self._begun[number], self._said[number], time.monotonic()
        with self._news:
            while len(said) < len(begun):
                if self._problem is not None:
                    raise self._problem
                tell(answered=f"{len(said)} of {len(begun)}")
                self._news.wait(TICK)
        self.waited += time.monotonic() - started
        return self._documents(begun, [said[place] for place in range(len(begun))], prompt)

    def _documents(
        self, begun: Sequence[Begun], said: Sequence[Mapping[str, Any]], prompt: Callable[[int], list[int]]
    ) -> tuple[Documents, dict[int, list[int]]]:
        on = [self._aligned(line) for line in said]
        those = [i for i, each in enumerate(on) if len(each.ids)]
        if not those:
            raise TeacherError(f"the teacher goes on with no answer: {said[0].get('why', 'it says nothing')}")
        documents = documents_of(
            self.tokenizer,
            [prompt(begun[i].prompt) for i in those],
            [[] for _ in those],
            [_after(begun[i].words, on[i]) for i in those],
            np.array([len(begun[i].words) for i in those]),
        )
        return documents, {place: begun[i].dream for place, i in enumerate(those) if begun[i].dream}

    def _aligned(self, line: Mapping[str, Any]) -> Aligned:
        """What the teacher said, in the student's tokens, up to one that those lack; nothing where it refused to."""
        packed, known = line.get("targets"), self.tokenizer.teacher_map
        targets = unpack_targets(base64.b64decode(packed)) if packed else None
        if targets is not None and known is not None and (lacks := known[targets.ids] < 0).any():
            targets = targets.part(0, int(lacks.argmax()))
            if not len(targets):  # without targets its text would be read as hard labels
                return self.aligner.align("", None, "")
        return self.aligner.align(line.get("text", ""), targets, line.get("done", ""))


def _line(outcome: Outcome[_Job, Response]) -> dict[str, Any]:
    job, response = outcome.what, outcome.answer
    where = {"round": job.number, "place": job.place}
    if response is None:
        return {**where, "why": str(outcome.problem)}
    packed = None if response.tokens is None else base64.b64encode(pack_targets(response.tokens)).decode()
    return {**where, "text": response.text, "done": response.done_reason, "targets": packed}


def _after(words: Sequence[int], said: Aligned) -> Aligned:
    """An answer of both: nothing is known of the student's words."""
    count = len(words)
    width = said.slot_ids.shape[1]
    return Aligned(
        ids=np.concatenate([words, said.ids]).astype(np.int64),
        slot_ids=np.concatenate([np.repeat(np.array(words, np.int64)[:, None], width, 1), said.slot_ids]),
        slot_logprobs=np.pad(said.slot_logprobs, ((count, 0), (0, 0)), constant_values=np.nan),
        chunk_ids=np.pad(said.chunk_ids, (count, 0), constant_values=-1),
        chunk_logprobs=said.chunk_logprobs,
    )
