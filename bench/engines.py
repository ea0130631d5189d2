"""How many tokens a second the embedded teacher's engines write, on the same prompts, in turn."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

from bench.result import BenchResult
from bench.stopwatch import Stopwatch, ratio, seconds_of, speeds
from distill.corpus.prompts import load_prompts
from distill.teacher.embedded import EmbeddedTeacher
from distill.teacher.protocol import GenerateOptions

ENGINES = ("llama.cpp", "torch")


def bench_engines(watch: Stopwatch, model: str, requests: int, tokens: int, threads: int = 0) -> BenchResult:
    """Ask `requests` of the everyday prompts for `tokens` tokens at most, sampled as capture does, with as many in
    flight as the engine has slots, and one.

    Series: each engine's tokens a second, reading prompts included, loading not; and their ratio, round by round.
    Raises BadInput where our engine can't run the model, and what the teacher raises.
    """
    prompts = [prompt.text for prompt in load_prompts(["everyday"], 0.0, requests)]
    with ExitStack() as stack:
        teachers: dict[str, EmbeddedTeacher] = {}
        for engine in ENGINES:
            teacher = EmbeddedTeacher(model, engine=engine, threads=threads, listen=watch.listen)
            stack.callback(teacher.close)
            teacher.generate(prompts[0], GenerateOptions(max_tokens=1))  # loads what is loaded when it is needed
            teachers[engine] = teacher
        jobs = {engine: partial(_speed, teacher, prompts, tokens) for engine, teacher in teachers.items()}
        found = watch.alternate(jobs, "bench capture")
        about = {
            "slots": {engine: teacher.slots for engine, teacher in teachers.items()},
            "versions": {engine: teacher.describe().version for engine, teacher in teachers.items()},
        }
    series = [*speeds(found), ratio("torch / llama.cpp", found["torch"], found["llama.cpp"])]
    settings = {"engines": model, "requests": len(prompts), "tokens": tokens, "threads": threads}
    return watch.result("capture", series, settings, about)


def _speed(teacher: EmbeddedTeacher, prompts: list[str], tokens: int) -> float:
    """Tokens a second of answering them all."""

    def ask(seed: int) -> int:
        return len(teacher.generate(prompts[seed], GenerateOptions(max_tokens=tokens, seed=seed)).tokens or ())

    written: list[int] = []
    with ThreadPoolExecutor(teacher.slots + 1) as pool:
        seconds = seconds_of(lambda: written.extend(pool.map(ask, range(len(prompts)))))
    return sum(written) / seconds
