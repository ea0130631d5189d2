"""Held-out prompts, answers and mined dreams in a student's ids, made apart from the examinees."""

from collections.abc import Mapping
from dataclasses import dataclass

from distill.corpus.traces import Trace, TraceStore
from distill.exam.truth import Truth, read_truths, spread
from distill.mining.triplets import by_trace, read_triplets
from distill.run import Run
from distill.tokens.aligner import Aligner
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import dream_ids, prompt_ids
from distill.tokens.image_tokens import dream_of
from distill.tokens.packing import split_traces, training_recall


@dataclass(frozen=True)
class Example:
    """One held-out prompt.

    header: ids of the prompt and, with `train.retrieve`, of what was retrieved for it, up to where the student goes
    on. answer: the student's ids of the teacher's answer, without EOS. bytes: of its UTF-8. mined: ids of the dream
    mined from it, empty where nothing was found.
    truth: its split, true answer and depth, where the run's dataset knows them.
    """

    key: str
    prompt: str
    text: str
    header: list[int]
    answer: list[int]
    bytes: int
    mined: list[int]
    truth: Truth | None = None


def load_examples(
    run: Run, tokenizer: StudentTokenizer, codes: Mapping[str, int], context: int, dream_tokens: int
) -> tuple[list[Example], int]:
    """The first `evaluate.prompts` held-out prompts in the order of their keys, and how many were left out.

    Where the dataset has splits, as many of each as there are. codes: phrase → image token. Left out are empty
    answers, and prompts that with the longest dream and the whole answer don't fit `context`: every arm is
    measured on whole answers.
    """
    limit = run.settings.evaluate.prompts
    truths = read_truths(run)
    mined = by_trace(read_triplets(run.triplets))
    examples: list[Example] = []
    left_out = 0
    with TraceStore(run.traces, readonly=True) as store:
        train = split_traces(store)[0] if run.settings.train.retrieve else []
        recall = training_recall(run, train, mined, codes, tokenizer)
        # Without splits they are read one by one, as far as they are wanted.
        for trace in spread(list(store.traces(held_out=True)), truths) if truths else store.traces(held_out=True):
            if limit and len(examples) == limit:
                break
            found = mined.get(trace.key)
            dream = dream_ids(tokenizer, dream_of(found, codes)) if found else []
            prompt = recall.prompt(trace.prompt)
            header = prompt_ids(tokenizer, prompt, system=run.settings.capture.system)
            example = _example(trace, tokenizer, header, dream, truths.get(trace.key))
            # A mined dream can be longer than `dream_tokens`, where `mine.steps` was lowered since.
            fits = len(example.header) + max(dream_tokens, len(dream) + 5) + len(example.answer) <= context
            if example.answer and fits:
                examples.append(example)
            else:
                left_out += 1
    return sorted(examples, key=lambda example: example.key), left_out


def _example(
    trace: Trace, tokenizer: StudentTokenizer, header: list[int], dream: list[int], truth: Truth | None
) -> Example:
    text, tokens = trace.response.text, trace.response.tokens
    # The alignment of training: the teacher's own tokens where the student has them all.
    aligned = Aligner(tokenizer, None).align(text, tokens, trace.response.done_reason)
    answer = aligned.ids.tolist()
    answer = answer[:-1] if answer and answer[-1] == tokenizer.eos_id else answer
    size = len(text.encode())
    return Example(trace.key, trace.prompt, text, header, answer, size, dream, truth)
