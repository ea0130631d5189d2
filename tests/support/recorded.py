"""Backends made of the recorded exchanges: replayed as they are, or shaped into answers that take a fixed time."""

import functools
import gzip
import hashlib
import json
import random
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from support.fake_ollama import JSON, NDJSON, FakeOllama, Reply, Request, dumps, error, reply

FIXTURES = Path(__file__).parent.parent / "fixtures" / "ollama"


@functools.lru_cache(maxsize=1)
def recorded() -> list[dict[str, Any]]:
    """All exchanges: name, note, request (method, path, json or body), response (status, content_type, …)."""
    exchanges = [json.loads(path.read_bytes()) for path in sorted(FIXTURES.glob("*.json"))]
    exchanges += [json.loads(gzip.decompress(path.read_bytes())) for path in sorted(FIXTURES.glob("*.json.gz"))]
    return exchanges


def exchange(name: str) -> dict[str, Any]:
    return next(entry for entry in recorded() if entry["name"] == name)


class Replay:
    def __init__(self, exchanges: list[dict[str, Any]]) -> None:
        self.exchanges = exchanges

    def answer(self, request: Request) -> Reply:
        for entry in self.exchanges:
            if _matches(entry["request"], request):
                return _recorded_reply(entry["response"])
        return Reply(404, "text/plain", b"404 page not found")

    def knows_blob(self, path: str) -> bool:
        return False

    def close(self) -> None:
        pass


class Told(Replay):
    """What a test says to a path, a JSON value or what makes one of the request's; the rest as recorded."""

    def __init__(self, replies: dict[str, Any], names: Iterable[str] = ("tags", "version", "show", "show_verbose")):
        super().__init__([exchange(name) for name in names])
        self.replies = replies

    def answer(self, request: Request) -> Reply:
        if request.path not in self.replies:
            return super().answer(request)
        said = self.replies[request.path]
        found = said(request.json) if callable(said) else said
        return found if isinstance(found, Reply) else reply(found)


def _matches(known: dict[str, Any], request: Request) -> bool:
    if (known["method"], known["path"]) != (request.method, request.path):
        return False
    if known["json"] is not None:
        # Clients may spell out a default that the recording left out, and what would change no recorded answer.
        spelled = {"stream": True, "verbose": False, "truncate": False, "shift": False}
        return {**spelled, **known["json"]} == {**spelled, **(request.json if isinstance(request.json, dict) else {})}
    return (known["body"] or "").encode() == request.body


def _recorded_reply(known: dict[str, Any]) -> Reply:
    kind = known["content_type"]
    if "ndjson" in known:
        return Reply(known["status"], kind, stream=known["ndjson"])
    if "json" in known:
        return Reply(known["status"], kind, dumps(known["json"]))
    return Reply(known["status"], kind, known.get("text", "").encode())


class Timed:
    """Answers are the recorded one with its tokens shuffled, by prompt and seed: ids, entries and text agree."""

    state: FakeOllama | None = None

    def __init__(self, slots: int, seconds: float) -> None:
        self.slots = threading.Semaphore(slots)
        self.seconds = seconds
        model = exchange("generate_logprobs")["response"]["json"]
        self.head = model["context"][: model["prompt_eval_count"]]
        self.ids = model["context"][model["prompt_eval_count"] :]
        self.tokens = [entry["token"] for entry in model["logprobs"]]
        self.entries = [dumps(entry) for entry in model["logprobs"]]  # once: an answer should cost its time, no more
        bare = [{**entry, "top_logprobs": []} for entry in model["logprobs"]]
        self.bare = [dumps({k: v for k, v in entry.items() if k != "top_logprobs"}) for entry in bare]
        self.known = Replay([exchange(n) for n in ("tags", "version", "show", "show_verbose", "ps")])
        self.verbose: bytes | None = None
        self.loaded = True

    def answer(self, request: Request) -> Reply:
        if request.path == "/api/version" and self.state is not None and self.state.old:
            return reply({"version": "0.12.10"})
        if request.path != "/api/generate":
            return self.known.answer(request)
        if not isinstance(request.json, dict):
            return error(400, "missing request body")
        if request.json.get("model") != "smollm2:135m":
            return error(404, f"model '{request.json.get('model')}' not found")
        if request.json.get("keep_alive") == 0 and not request.json.get("prompt"):
            self.loaded = False
            return reply({**self.stamp(request.json), "response": "", "done": True, "done_reason": "unload"})
        if request.json.get("stream", True):
            return Reply(200, NDJSON, stream=self.chunks(request.json))
        arrived = time.perf_counter()
        with self.slots:
            started = time.perf_counter()
            body = self.body(request.json)
            time.sleep(max(0.0, self.seconds - (time.perf_counter() - started)))
            total = time.perf_counter() - arrived
        return Reply(200, JSON, body.replace(b'"total_duration":0', b'"total_duration":%d' % int(total * 1e9), 1))

    def chunks(self, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """As generate_logprobs_stream was recorded: a chunk a token, then one with the numbers and no text. The prompt
        takes a tenth of the time; of a model that was unloaded, loading takes half as long again."""
        arrived = time.perf_counter()
        with self.slots:
            loading, self.loaded = 0.0 if self.loaded else 0.5 * self.seconds, True
            time.sleep(loading + 0.1 * self.seconds)
            whole = json.loads(self.body(asked))
            entries = whole.pop("logprobs", None)
            texts = [self.tokens[self.ids.index(i)] for i in whole["context"][len(self.head) :]]
            for place, text in enumerate(texts):
                time.sleep(0.9 * self.seconds / len(texts))
                said = {"logprobs": [entries[place]]} if entries else {}
                yield {**self.stamp(asked), "response": text, "done": False, **said}
            total = int((time.perf_counter() - arrived) * 1e9)
            yield {**whole, "response": "", "total_duration": total, "load_duration": int(loading * 1e9)}

    def stamp(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"model": asked["model"], "created_at": "2026-11-21T23:50:38.56931228Z"}

    def body(self, asked: dict[str, Any]) -> bytes:
        options = asked.get("options") or {}
        digest = hashlib.sha256(json.dumps([asked.get("prompt"), options.get("seed", 0)]).encode()).digest()
        rest = list(range(1, len(self.ids)))
        random.Random(digest).shuffle(rest)
        order = [0, *rest][: max(1, int(options.get("num_predict", len(self.ids))))]
        value = {
            **self.stamp(asked),
            "response": "".join(self.tokens[i] for i in order),
            "done": True,
            "done_reason": "length",
            "context": [*self.head, *(self.ids[i] for i in order)],
            "total_duration": 0,
            "load_duration": 0,
            "prompt_eval_count": len(self.head),
            "prompt_eval_duration": int(0.1 * self.seconds * 1e9),
            "eval_count": len(order),
            "eval_duration": int(0.9 * self.seconds * 1e9),
        }
        text = dumps(value)
        if asked.get("logprobs") and not (self.state is not None and self.state.old):
            entries = self.entries if asked.get("top_logprobs") else self.bare
            text = text[:-1] + b',"logprobs":[' + b",".join(entries[i] for i in order) + b"]}"
        return text

    def knows_blob(self, path: str) -> bool:
        return False

    def close(self) -> None:
        pass
