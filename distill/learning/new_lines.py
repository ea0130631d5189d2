"""What `dream learn RUN --from` reads: new prompts with their answers.

A file of JSON lines, `{"prompt": …, "answer": …}` each, or `text` in the place of `answer`, as `dream traces` exports
them; perhaps with `dream` (`{"causal": [["ball", "fall", "ground"], …], …}`) and `held_out` (true: not learned from).
Or another run's folder: its answers, with soft targets where both runs had the same teacher, and what was mined there.
What this run holds out, or the other, is not learned from.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distill.corpus.prompts import is_held_out
from distill.corpus.traces import Trace, TraceStore
from distill.errors import BadInput
from distill.mining.triplets import LENSES, Triplet, by_trace, clean_phrase, read_triplets
from distill.run import Run, fingerprint, sha256_file
from distill.student.made_with import made_with
from distill.teacher.gguf_tokenizer import Vocabulary
from distill.teacher.protocol import GenerateOptions, Response
from distill.tokens.aligner import Aligner
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.image_tokens import Codebook, load_codes
from distill.tokens.packing import Documents, build_documents
from distill.tokens.recall import Recall
from distill.turns import opening
from distill.written import whole


@dataclass(frozen=True)
class NewLines:
    """Answers to learn, those that are held out among them. digest: of all. triplets: trace key → its dream."""

    traces: list[Trace]
    digest: str = ""
    triplets: dict[str, list[Triplet]] = field(default_factory=dict[str, list[Triplet]])

    def documents(self, run: Run, held_out: bool) -> Documents:
        """Those that are held out, or those that are not. Phrases that no image token was made for take the nearest."""
        tokenizer = StudentTokenizer.load(run.tokenizer)
        codebook = Codebook.load(run.tokenizer, run.settings.teacher)
        codes = load_codes(run.tokenizer, codebook)
        traces = [trace for trace in self.traces if trace.held_out == held_out]
        phrases = {phrase for trace in traces for t in self.triplets.get(trace.key, ()) for phrase in t.phrases}
        if strange := sorted(phrases - codes.keys()):
            codes = codes | dict(zip(strange, codebook.encode(strange).tolist(), strict=True))
        with TraceStore(run.traces, readonly=True) as store:
            teacher = store.tokenizer()
        aligner = Aligner(tokenizer, Vocabulary(teacher).bytes_of if teacher is not None else None)
        recall = Recall(replace(run.settings.train, retrieve=""), 0, {}, codes, tokenizer.labels)
        system = made_with(run).capture.system
        return build_documents(traces, self.triplets, codes, tokenizer, aligner, system, recall, {})


def read_new(run: Run, path: Path) -> NewLines:
    """Raises BadInput, naming file and line, for what can't be read, and where there is nothing to learn."""
    found = _of_run(run, Run.open(path)) if path.is_dir() else _of_lines(run, path)
    if all(trace.held_out for trace in found.traces):
        raise BadInput(f"{path}: holds no answer to learn{' (all are held out)' if found.traces else ''}")
    return found


def _of_run(run: Run, other: Run) -> NewLines:
    other.require("capture")
    with TraceStore(run.traces, readonly=True) as store:
        ours = store.teacher()
    with TraceStore(other.traces, readonly=True) as store:
        same, digest = store.teacher().digest == ours.digest, store.content_digest()
        traces = _set_apart(run, store.traces())
    if not same:
        traces = [replace(trace, response=replace(trace.response, tokens=None)) for trace in traces]
    triplets = by_trace(read_triplets(other.triplets)) if other.triplets.exists() else {}
    mined = [sha256_file(other.triplets)] if other.triplets.exists() else []
    return NewLines(traces, "".join([digest, *mined]), triplets)


def _set_apart(run: Run, traces: Iterable[Trace]) -> list[Trace]:
    """Held out, too, is what begins as a prompt that the run holds out, whatever holds it out there."""
    with TraceStore(run.traces, readonly=True) as store:
        asked = {opening(prompt) for _, prompt, _ in store.answers(held_out=True)}
    return [replace(each, held_out=each.held_out or opening(each.prompt) in asked) for each in traces]


def _of_lines(run: Run, path: Path) -> NewLines:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: can't be read: {error}") from error
    return new_lines(run, [(f"{path}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()])


def new_lines(run: Run, lines: Sequence[tuple[str, str | Mapping[str, Any]]]) -> NewLines:
    """Lines as they are written, or as JSON has them, each with its place. Those without a dream are mined where the
    run's own answers were by syntax: of each lens what comes first. Raises BadInput, naming the place."""
    traces: dict[str, Trace] = {}
    triplets: dict[str, list[Triplet]] = {}
    details = ["mine.details"] if run.settings.mine.details else []
    for place, line in lines:
        try:
            content = json.loads(line) if isinstance(line, str) else line
            trace, dream = read_line(content, run.settings.capture.held_out)
        except (ValueError, TypeError, AttributeError) as error:
            example = '{"prompt": "…", "answer": "…"}'
            raise BadInput(f"{place}: {error}; a line is such as {example}") from error
        traces[trace.key], triplets[trace.key] = trace, dream
    if run.settings.mine.miner == "syntax" and not run.settings.capture.dataset:
        from distill.mining.syntax_miner import mine_texts

        bare = [trace for trace in traces.values() if not triplets[trace.key]]
        texts = ((each.key, each.prompt, each.response.text, each.response.done_reason) for each in bare)
        mine = run.settings.mine
        for trace, mined in zip(bare, mine_texts(texts, mine.steps, mine.details), strict=True):
            triplets[trace.key] = mined.triplets
    return NewLines(_set_apart(run, traces.values()), fingerprint([*(line for _, line in lines), *details]), triplets)


def read_line(line: Mapping[str, Any], share: float) -> tuple[Trace, list[Triplet]]:
    """A line's answer and its dream. share: held out, by the prompt, where the line doesn't say. Raises ValueError,
    TypeError or AttributeError for what is none."""
    prompt, answer = line.get("prompt"), line.get("answer", line.get("text"))
    if not (isinstance(prompt, str) and isinstance(answer, str) and prompt.strip() and answer.strip()):
        raise ValueError("prompt and answer should be texts")
    if (held_out := line.get("held_out")) not in (None, True, False):
        raise ValueError("held_out should be true or false")
    if not isinstance(reason := line.get("done_reason") or "stop", str):
        raise TypeError("done_reason should be text, such as stop or length")
    key = hashlib.sha256(json.dumps([prompt, answer]).encode()).hexdigest()
    dream = [
        Triplet(clean_phrase(what), clean_phrase(action), clean_phrase(result), lens, step, key, -1, "dream")
        for lens, steps in (line.get("dream") or {}).items()
        for step, (what, action, result) in enumerate(steps)
    ]
    if strange := {triplet.lens for triplet in dream} - {*LENSES}:
        raise ValueError(f"dream: {strange.pop()!r} is none of {', '.join(LENSES)}")
    out = is_held_out(prompt, share) if held_out is None else held_out
    return Trace(key, whole(prompt), out, Response(whole(answer), None, reason), GenerateOptions(), ""), dream
