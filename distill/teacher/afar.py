"""A teacher that is asked from other machines: a helper on one of them asks its host, and hands on what it says."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from distill.address import Address, default_host
from distill.cluster import Helper, open_cluster
from distill.config import RuntimeSettings, TeacherSettings
from distill.errors import TeacherUnavailable
from distill.events import Event, Listener
from distill.teacher.protocol import GenerateOptions, Response, Teacher, TeacherInfo, TeacherTokenizer

Open = Callable[..., list[Teacher]]
"""`open_teacher`."""


class Asker:
    """On its machine: one of the teachers that the settings open, and what it tells."""

    def __init__(self, opened: Open, number: int, settings: TeacherSettings, *how: Any) -> None:
        self._said: list[Event] = []
        self._teacher = opened(settings, self._said.append, *how)[number]

    def ask(self, method: str, *arguments: Any) -> tuple[Any, list[Event]]:
        found = getattr(self._teacher, method, None)  # not each can `forget`
        answer = found(*arguments) if callable(found) else found
        said, self._said[:] = list(self._said), []
        return answer, said


class Afar:
    """A `Teacher`. host: where, for people. What it said of itself is known after its machine has gone, too."""

    def __init__(self, helper: Helper, host: str, listen: Listener) -> None:
        self.host, self._helper, self._listen = host, helper, listen
        self._known: dict[str, Any] = {}

    def _ask(self, method: str, *arguments: Any) -> Any:
        answer, said = self._helper.call("ask", method, *arguments)
        for event in said:
            self._listen(event)
        return answer

    def _of_itself(self, method: str) -> Any:
        try:
            self._known[method] = self._ask(method)
        except TeacherUnavailable:
            if method not in self._known:
                raise
        return self._known[method]

    @property
    def slots(self) -> int | None:
        """As it said with `describe`."""
        return self._known.get("slots")

    def describe(self) -> TeacherInfo:
        info = self._of_itself("describe")
        self._of_itself("slots")
        return info

    def forget(self) -> None:
        """As `OllamaTeacher.forget`, where it is one."""
        self._known.pop("describe", None)
        with contextlib.suppress(TeacherUnavailable):
            self._ask("forget")

    def tokenizer(self) -> TeacherTokenizer | None:
        return self._of_itself("tokenizer")

    def generate(self, prompt: str, options: GenerateOptions) -> Response:
        return self._ask("generate", prompt, options)

    def go_on(self, prompt: str, begun: str, options: GenerateOptions) -> Response:
        return self._ask("go_on", prompt, begun, options)

    def generate_json(self, prompt: str, schema: dict[str, Any], options: GenerateOptions) -> str:
        return self._ask("generate_json", prompt, schema, options)

    def close(self) -> None:
        self._helper.close()


def teachers_afar(
    opened: Open, settings: TeacherSettings, listen: Listener, context: int, runtime: RuntimeSettings
) -> list[Teacher]:
    """What `opened` would open here, opened and asked on the cluster's machines: what a machine has itself (a server at
    127.0.0.1, an embedded model) by each of them, any other server by one. Raises what opening the cluster does."""
    cluster = open_cluster(runtime.cluster, listen)
    kind, machines = settings.model.partition(":")[0], cluster.machines()
    hosts = settings.hosts or ([str(default_host())] if kind == "ollama" else [])
    if kind == "embedded":
        places = [("", machine) for machine in machines]
    else:
        places = [(h, m) for h in hosts for m in (machines if Address(h).is_loopback else [""])] or [("", "")]
    all_of_them = replace(settings, hosts=[host for host, _ in places if host])
    found: list[Teacher] = []
    for number, (host, machine) in enumerate(places):
        how = number if host else 0, all_of_them, context, replace(runtime, cluster="")
        told = " at ".join(filter(None, [host and Address(host), machine])) or settings.model
        found.append(Afar(Helper(cluster, functools.partial(Asker, opened, *how), machine), told, listen))
    return found
