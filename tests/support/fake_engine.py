"""Ollama's API over a real llama.cpp engine, in the wire format of tests/fixtures/ollama.

Not imitated: `suffix`, `images`, tools, `context` given back, `keep_alive`, /v1. Quantizing renames the type only:
the values stay, as no test needs the rounding.
"""

import hashlib
import shutil
import tempfile
import threading
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from support.fake_answer import Answer
from support.fake_models import FLOAT_TYPES, Model, model_from_gguf, show, tags_entry, type_name
from support.fake_ollama import NDJSON, FakeOllama, Reply, Request, error, reply

from distill.errors import DistillError
from distill.teacher.gguf_file import read_metadata
from distill.teacher.llama_cpp import Completion, LlamaCpp

NO_EMBEDDINGS = "This server does not support embeddings. Start it with `--embeddings`"


class Engine:
    state: FakeOllama | None = None

    def __init__(self, models: MutableMapping[str, Path], *, slots: int, threads: int) -> None:
        self.slots, self.threads = slots, threads
        self.models = {full_name(name): model_from_gguf(path) for name, path in models.items()}
        self.engines: dict[Path, LlamaCpp] = {}
        self.lock = threading.Lock()
        self.blobs = Path(tempfile.mkdtemp(prefix="fake-ollama-"))

    def close(self) -> None:
        for loaded in self.engines.values():
            loaded.close()
        shutil.rmtree(self.blobs, ignore_errors=True)

    def knows_blob(self, path: str) -> bool:
        return path.startswith("/api/blobs/") and self.blob(path.rsplit("/", 1)[1]).exists()

    def blob(self, digest: str) -> Path:
        return self.blobs / digest.replace(":", "-")

    def answer(self, request: Request) -> Reply:
        if request.path.startswith("/api/blobs/"):
            return self.blobs_route(request)
        match request.method, request.path:
            case "GET", "/api/version":
                old = self.state is not None and self.state.old
                return reply({"version": "0.12.10" if old else "0.33.0-rc2"})
            case "GET", "/api/tags":
                return reply({"models": [tags_entry(name, model) for name, model in self.models.items()]})
            case "GET", "/api/ps":
                return reply({"models": []})
            case _:
                pass
        routes = {
            ("POST", "/api/generate"): self.generate,
            ("POST", "/api/chat"): self.chat,
            ("POST", "/api/show"): self.show,
            ("POST", "/api/create"): self.create,
            ("POST", "/api/push"): self.push,
            ("POST", "/api/embed"): self.embed,
            ("DELETE", "/api/delete"): self.delete,
        }
        route = routes.get((request.method, request.path))
        if route is None:
            return Reply(404, "text/plain", b"404 page not found")
        if not isinstance(request.json, dict):
            return error(
                400,
                "invalid character looking for beginning of object key string"
                if request.body
                else "missing request body",
            )
        return route(request.json)

    # Models.
    def blobs_route(self, request: Request) -> Reply:
        digest = request.path.rsplit("/", 1)[1]
        there = self.blob(digest).exists()
        if request.method == "HEAD":
            return Reply(200) if there else Reply(404, "application/json; charset=utf-8")
        if there:
            return Reply(200)
        got = f"sha256:{hashlib.sha256(request.body).hexdigest()}"
        if got != digest:
            return error(400, f'digest mismatch, expected "{digest}", got "{got}"')
        self.blob(digest).write_bytes(request.body)
        return Reply(201)

    def show(self, asked: dict[str, Any]) -> Reply:
        name = full_name(asked.get("model", ""))
        if name not in self.models:
            return error(404, f"model '{name}' not found")
        model = self.models[name]
        blob = self.blob(f"sha256:{model.digest}")
        afar = self.state is not None and self.state.afar
        with self.lock:
            if not blob.exists() and not afar:
                blob.symlink_to(model.path.resolve())
        return reply(show(name, model, blob, verbose=bool(asked.get("verbose"))))

    def create(self, asked: dict[str, Any]) -> Reply:
        kind = "application/json"  # without a charset, as recorded
        files: dict[str, str] = asked.get("files") or {}
        for digest in files.values():
            if not self.blob(digest).exists():
                path = f"/usr/share/ollama/.ollama/models/blobs/{digest.replace(':', '-')}"
                return error(500, f"open {path}: no such file or directory", kind)
        seeing = [name for name, digest in files.items() if is_projector(self.blob(digest))]
        files = {name: digest for name, digest in files.items() if name not in seeing}
        if len(files) != 1 or not next(iter(files)).endswith(".gguf"):
            return error(400, "the fake imports one GGUF, no safetensors", kind)
        digest = next(iter(files.values()))
        if self.blob(digest).open("rb").read(4) != b"GGUF":
            return error(400, "supplied file was not in GGUF format", kind)
        model = model_from_gguf(self.blob(digest))
        model.template = asked.get("template") or model.template
        model.system = asked.get("system") or ""
        model.parameters = asked.get("parameters") or {}
        model.license = asked.get("license") or ""
        if quantize := asked.get("quantize"):
            if type_name(model) not in FLOAT_TYPES:
                return error(400, "quantization is only supported for F16, BF16 and F32 models", kind)
            model.quantized = str(quantize).upper()
        self.models[full_name(asked["model"])] = model
        steps = ["parsing GGUF", *([f"quantizing F16 model to {model.quantized}"] if quantize else [])]
        steps += [f"using existing layer {digest}", "writing manifest", "success"]
        if asked.get("stream", True):
            return Reply(200, NDJSON, stream=[{"status": status} for status in steps])
        return reply({"status": "success"})

    def push(self, asked: dict[str, Any]) -> Reply:
        model = self.models.get(full_name(asked.get("model", "")))
        if model is None:
            return error(404, f"model '{asked.get('model')}' not found")
        size, layer = model.path.stat().st_size, f"sha256:{model.digest}"
        sent = [{"status": "pushing", "digest": layer, "total": size, "completed": done} for done in (0, size)]
        return Reply(200, NDJSON, stream=[{"status": "retrieving manifest"}, *sent, {"status": "success"}])

    def delete(self, asked: dict[str, Any]) -> Reply:
        if self.models.pop(full_name(asked.get("model", "")), None) is None:
            return error(404, f"model '{asked.get('model')}' not found")
        return Reply(200)

    def embed(self, asked: dict[str, Any]) -> Reply:
        if full_name(asked.get("model", "")) not in self.models:
            return error(404, f"model '{asked.get('model')}' not found")
        return error(501, NO_EMBEDDINGS)

    # Answers.
    def generate(self, asked: dict[str, Any]) -> Reply:
        messages = [{"Role": "user", "Content": asked.get("prompt", "")}]
        return self.respond(asked, messages, chat=False)

    def chat(self, asked: dict[str, Any]) -> Reply:
        names = {"role": "Role", "content": "Content", "thinking": "Thinking"}
        messages = [{names[k]: v for k, v in message.items() if k in names} for message in asked.get("messages") or []]
        return self.respond(asked, messages, chat=True)

    def respond(self, asked: dict[str, Any], messages: list[dict[str, Any]], *, chat: bool) -> Reply:
        arrived = time.perf_counter_ns()
        model = self.models.get(full_name(asked.get("model", "")))
        if model is None:
            return error(404, f"model '{asked.get('model')}' not found")
        if not 0 <= asked.get("top_logprobs", 0) <= 20:
            return error(400, "top_logprobs must be between 0 and 20")
        think = asked.get("think")
        if think and not model.thinks:
            return error(400, f'"{asked["model"]}" does not support thinking')
        if model.thinks and think is None:
            think = True  # a thinking model thinks unless it is told not to
        prompt = messages[0]["Content"] if asked.get("raw") else self.render(asked, model, messages, think)
        engine = self.engine(model)
        loaded = time.perf_counter_ns()
        context = int((asked.get("options") or {}).get("num_ctx") or engine.context)
        ids = engine.tokenize(prompt, begin=True)
        if len(ids) >= context and asked.get("truncate") is False:
            return error(400, "the input length exceeds the context length")
        try:
            done = self.complete(engine, asked, model, ids[1 - context :] if len(ids) >= context else prompt)
        except DistillError as problem:
            return error(500, str(problem))
        answer = Answer(asked, model, engine, prompt, done, think=bool(think), chat=chat)
        answer.old = self.state is not None and self.state.old
        answer.load_ns, answer.arrived = loaded - arrived, arrived
        return Reply(200, NDJSON, stream=answer.chunks()) if asked.get("stream", True) else reply(answer.whole())

    def render(self, asked: dict[str, Any], model: Model, messages: list[dict[str, Any]], think: Any) -> str:
        from support.go_template import render

        system = asked.get("system") or model.system
        if system and all(message["Role"] != "system" for message in messages):
            messages = [{"Role": "system", "Content": system}, *messages]
        data = {"Messages": messages, "Think": bool(think), "IsThinkSet": think is not None, "System": system}
        return render(asked.get("template") or model.template, data)

    def engine(self, model: Model) -> LlamaCpp:
        with self.lock:
            if model.path not in self.engines:
                self.engines[model.path] = LlamaCpp(model.path, slots=self.slots, threads=self.threads)
            return self.engines[model.path]

    def complete(self, engine: LlamaCpp, asked: dict[str, Any], model: Model, prompt: str | list[int]) -> Completion:
        options = {**model.parameters, **(asked.get("options") or {})}
        schema = asked.get("format")
        limit = int(options.get("num_predict", -1))
        return engine.complete(
            prompt,
            max_tokens=limit if limit >= 0 else 512,
            temperature=float(options.get("temperature", 0.8)),
            top_k=int(options.get("top_k", 40)),
            top_p=float(options.get("top_p", 0.9)),
            seed=int(options.get("seed", 0)),
            # Without alternatives the engine doesn't say which text came with which token.
            n_probs=max(1, int(asked.get("top_logprobs", 0))),
            json_schema={"type": "object"} if schema == "json" else schema or None,
            stop=[options["stop"]] if isinstance(options.get("stop"), str) else options.get("stop") or None,
        )


def is_projector(path: Path) -> bool:
    """As Ollama tells: it has `vision.block_count` of its architecture's, and no `block_count`."""
    if path.open("rb").read(4) != b"GGUF":
        return False
    told = read_metadata(path)
    blocks = (f"{told.get('general.architecture')}.{kind}block_count" for kind in ("", "vision."))
    return [bool(told.get(key)) for key in blocks] == [False, True]


def full_name(name: str) -> str:
    return name if ":" in name else f"{name}:latest"
