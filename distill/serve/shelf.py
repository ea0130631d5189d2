"""Students by their names: in memory when they are asked for, and as long as somebody wants them to be."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress

from distill.errors import BadInput
from distill.serve.about import About
from distill.serve.fields import FOREVER, ApiError
from distill.serve.scheduler import Scheduler
from distill.serve.student import Loaded, Offer, Student
from distill.teacher.names import fitting_name, name_key


def tagged(name: str) -> str:
    """As Ollama tells it: with its tag."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


class Served:
    """One name. Its weights are in memory while it is used, and for `keep` seconds after; as in Ollama, what a
    request says of that holds until another says otherwise or they have left."""

    def __init__(
        self, offer: Offer, student: Student, scheduler: Scheduler, place: tuple[int, int], keep: float
    ) -> None:
        """place: how many answers are written at once at most, and how many students there are."""
        self.scheduler, self.keep = scheduler, keep
        self._kept = keep
        self.name = tagged(fitting_name(student.name))
        self.expires = FOREVER
        self._loaded: Loaded | None = None
        self._users = 0
        self._loading = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._place = place
        self._hold(offer, Loaded(student, *place), About.of(student, offer))

    @property
    def sees(self) -> bool:
        return "vision" in self.about.capabilities

    @property
    def is_loaded(self) -> bool:
        return self._loaded is not None

    async def acquire(self) -> Loaded:
        """In memory until it is released. Raises DistillError where it can't be read any more."""
        self._users += 1
        try:
            async with self._loading:
                if self._loaded is None:
                    self._hold(*await asyncio.to_thread(self._read))
                assert self._loaded is not None
                return self._loaded
        except BaseException:
            self._users -= 1
            raise

    def release(self, keep: float | None) -> None:
        """Who acquired it is done. keep: seconds that it shall stay in memory, if that was said."""
        self._users -= 1
        keep = self._kept = self._kept if keep is None else keep
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.expires = time.time() + keep
        if keep == 0:
            self._rest()
        elif keep != FOREVER:
            self._timer = asyncio.get_running_loop().call_later(keep, self._rest)

    def begin(self) -> None:
        """Nobody has asked yet: it stays as long as after a request."""
        self._users += 1
        self.release(None)

    def unload(self) -> None:
        """Out of memory at once, or when the last who uses it is done."""
        self._users += 1
        self.release(0)

    def _read(self) -> tuple[Offer, Loaded, About]:
        offer = self.offer if self.offer.renew is None else self.offer.renew()
        known = self.about.digest if offer.stamp and offer.stamp == self.offer.stamp else ""
        student = offer.load()
        return offer, Loaded(student, *self._place), About.of(student, offer, known)

    def _hold(self, offer: Offer, loaded: Loaded, about: About) -> None:
        """It is told of and asked as what is there: since it left, another may have been made. Its name stays."""
        self.offer, student = offer, loaded.student
        self._loaded, self.about, self.context = loaded, about, student.model.config.context
        self.system, self.words = student.system, student.tokenizer
        self.scheduler.lanes = [*self.scheduler.lanes, loaded.lane]

    def _rest(self) -> None:
        """Give its memory free, unless somebody uses it; who does comes by here again."""
        if self._users:
            return
        self._kept = self.keep
        if self._loaded is not None:
            lane, self._loaded = self._loaded.lane, None
            self.scheduler.lanes = [each for each in self.scheduler.lanes if each is not lane]


class Shelf:
    """All students that are served. slots: answers of each that are written at once at most. queue: requests that wait
    for a place. keep: seconds that a student stays in memory where no request says otherwise.

    Raises BadInput for two of one name, and whatever opening them does.
    """

    def __init__(self, offers: Sequence[Offer], slots: int = 64, queue: int = 512, keep: float = FOREVER) -> None:
        self.scheduler = Scheduler(queue)
        self.students: dict[tuple[str, str, str, str], Served] = {}
        try:
            for offer in offers:
                served = Served(offer, offer.load(), self.scheduler, (slots, len(offers)), keep)
                if (key := name_key(served.name)) in self.students:
                    other = self.students[key].offer
                    two, rename = f"{other.source} and {offer.source}", other.rename or offer.rename
                    remedy = f"serve one at another --port{rename and f', or {rename}'}"
                    raise BadInput(f"{served.name}: two students of this name, {two}; {remedy}")
                self.students[key] = served
        except BaseException:
            self.close()
            raise

    def find(self, name: str) -> Served:
        """By its name as Ollama reads names. Raises ApiError 404."""
        with suppress(KeyError):
            return self.students[name_key(name)]
        raise ApiError(404, f"model '{name}' not found")

    def close(self) -> None:
        self.scheduler.close()
