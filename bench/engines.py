"""How many tokens a second the embedded teacher's engines write, on the same prompts, in turn."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

from bench.result import BenchResult, Series, alternate, machine, ratio
from distill.corpus.prompts import load_prompts
from distill.events import Listener, silent
from distill.teacher.embedded import EmbeddedTeacher
from distill.teacher.protocol import GenerateOptions

ENGINES = ("llama.cpp", "torch")


def bench_engines(
    model: str,
    requests: int,
    tokens: int,
    threads: int = 0,
    repeat: int = 1,
    warmup: int = 0,
    listen: Listener = silent,
) -> BenchResult:
    """Ask `requests` of the everyday prompts for `tokens` tokens at most, sampled as capture does, with as many in
    flight as the engine has slots, and one.

    Series: each engine's tokens a second, reading prompts included, loading not; and their ratio, round by round.
    Raises BadInput where our engine can't run the model, and what the teacher raises.
    """
    prompts = [prompt.text for prompt in load_prompts(["everyday"], 0.0, requests)]
    written: dict[str, list[int]] = {engine: [] for engine in ENGINES}
    with ExitStack() as stack:
        jobs: dict[str, Callable[[], object]] = {}
        teachers: dict[str, EmbeddedTeacher] = {}
        for engine in ENGINES:
            teacher = EmbeddedTeacher(model, engine=engine, threads=threads, listen=listen)
            stack.callback(teacher.close)
            teacher.generate(prompts[0], GenerateOptions(max_tokens=1))  # loads what is loaded when it is needed
            teachers[engine] = teacher
            jobs[engine] = partial(_ask_all, teacher, prompts, tokens, written[engine])
        seconds = alternate(jobs, repeat, warmup, "bench capture", listen)
        about = {
            "slots": {engine: teacher.slots for engine, teacher in teachers.items()},
            "versions": {engine: teacher.describe().version for engine, teacher in teachers.items()},
        }
    speeds = {
        engine: [count / took for count, took in zip(written[engine][warmup:], seconds[engine], strict=True)]
        for engine in ENGINES
    }
    return BenchResult(
        "capture",
        [
            *(Series(engine, "tokens/s", 1, tuple(speeds[engine])) for engine in ENGINES),
            ratio("torch / llama.cpp", speeds["torch"], speeds["llama.cpp"]),
        ],
        settings={"engines": model, "requests": len(prompts), "tokens": tokens, "threads": threads},
        about=about,
        warmup=warmup,
        machine=machine(),
    )


def _ask_all(teacher: EmbeddedTeacher, prompts: list[str], tokens: int, written: list[int]) -> None:
    """Notes down how many tokens came."""

    def ask(numbered: tuple[int, str]) -> int:
        seed, prompt = numbered
        answer = teacher.generate(prompt, GenerateOptions(max_tokens=tokens, seed=seed))
        assert answer.tokens is not None
        return len(answer.tokens)

    with ThreadPoolExecutor(teacher.slots + 1) as pool:
        written.append(sum(pool.map(ask, enumerate(prompts))))
