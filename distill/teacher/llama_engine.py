"""llama.cpp as an engine of the embedded teacher."""

import importlib.metadata
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

from distill.teacher.gguf_tokenizer import Vocabulary
from distill.teacher.llama_cpp import Completion, Entry, LlamaCpp
from distill.teacher.protocol import GenerateOptions, Response, TokenTargets
from distill.teacher.targets import Position, assemble, hard, is_cut, opens, respond

TRIAL_TOKENS = 12


class LlamaEngine:
    """A loaded model. Requests above its slots wait here: in the server, each would hold a thread of its own."""

    def __init__(self, model: LlamaCpp, vocabulary: Vocabulary) -> None:
        self.model = model
        self._vocabulary = vocabulary
        self._pool = ThreadPoolExecutor(model.slots + 1, thread_name_prefix="llama-engine")

    @property
    def slots(self) -> int:
        return self.model.slots

    @property
    def version(self) -> str:
        return f"xllamacpp {importlib.metadata.version('xllamacpp')}"

    def answer(self, prompt: str, options: GenerateOptions, begun: str = "") -> Response:
        """begun: how its answer begins, which isn't said again."""
        rendered, answer = self._complete(prompt, options, begun=begun, n_probs=options.top_logprobs)
        tokens = self._targets(answer, options.top_logprobs)
        prompt_s, answer_s = answer.timings["prompt_ms"] / 1000, answer.timings["predicted_ms"] / 1000
        return respond(
            answer.text,
            tokens,
            self._vocabulary,
            "stop" if answer.stop_type == "eos" else "length",
            {"service": prompt_s + answer_s, "prompt": prompt_s, "answer": answer_s},
            limit=options.max_tokens,
            opened=opens(rendered),
        )

    def answer_json(self, prompt: str, schema: dict[str, Any], options: GenerateOptions) -> str:
        """An answer constrained to a JSON schema, as text."""
        return self._complete(prompt, options, json_schema=schema)[1].text

    def speed(self, prompt: str, options: GenerateOptions, rival: float) -> float:
        """Tokens a second that it writes with all slots busy, from a few; 0 where, prompts included, it isn't half as
        fast as `rival`: nobody waits for more."""
        brief = replace(options, max_tokens=TRIAL_TOKENS, thinking_tokens=0)
        tasks = [
            self._pool.submit(self._ask, prompt, brief, n_probs=options.top_logprobs) for _ in range(self.model.slots)
        ]
        done, late = wait(tasks, timeout=2 * TRIAL_TOKENS * self.model.slots / rival)
        if late:
            return 0.0
        timings = [task.result()[1].timings for task in done]
        return sum(1000 * t["predicted_n"] / t["predicted_ms"] for t in timings if t["predicted_ms"] > 0)

    def close(self) -> None:
        self.model.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _complete(self, prompt: str, options: GenerateOptions, **more: Any) -> tuple[str, Completion]:
        return self._pool.submit(self._ask, prompt, options, **more).result()

    def _ask(self, prompt: str, options: GenerateOptions, begun: str = "", **more: Any) -> tuple[str, Completion]:
        """What the model continued, and how."""
        rendered = self.model.render(prompt, options.system, bool(options.think)) + begun
        return rendered, self.model.complete(
            rendered,
            max_tokens=options.room,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            **more,
        )

    def _targets(self, answer: Completion, width: int) -> TokenTargets:
        """Entries and ids one to one. A merged character is soft in its last token, which its entry describes."""
        vocabulary, positions, at = self._vocabulary, list[Position](), 0
        for entry in answer.entries:
            size = 1
            while entry["id"] != answer.ids[at + size - 1] or vocabulary.decode(answer.ids[at : at + size]) != bytes(
                entry["bytes"]
            ):
                size += 1
                if at + size > len(answer.ids):  # the engine spells a token in its own way: trust the order
                    size = 1
                    break
            positions += [hard(i) for i in answer.ids[at : at + size - 1]]
            positions.append(_position(answer.ids[at + size - 1], entry))
            at += size
        positions += [hard(i) for i in answer.ids[at:]]
        while positions and is_cut(vocabulary.decode([position.id for position in positions])):
            positions.pop()
        return assemble(positions, width)


def _position(i: int, entry: Entry) -> Position:
    top = entry["top_logprobs"]
    return Position(i, entry["logprob"], [a["id"] for a in top], [a["logprob"] for a in top])
