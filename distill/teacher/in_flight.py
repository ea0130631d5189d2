"""How many requests to keep in flight at a server that doesn't say how many it serves at once.

Too few leave slots idle; too many only queue, but queue towards a time-out. So: begin generously, add one for
every answer that came without queueing, and once answers queue, measure the busy slots by Little's law
(busy = seconds of service delivered per second) and keep a little more than those in flight.
"""

import math
from collections import deque

START = 16
MOST = 256
QUEUED = 1.5
"""An answer whose latency is above so many times its service time has queued."""


class InFlight:
    """The bound for one server. `limit` is to be kept in flight; `slots` is what was found (0: not yet).

    A known number of slots, or a number that the user fixed, is taken as it is.
    """

    def __init__(self, slots: int | None = None, fixed: int = 0) -> None:
        self.limit = fixed or (slots + 1 if slots else START)
        self.slots = slots or 0
        self._adaptive = not fixed and not slots
        self._starting = True
        self._climbing = True
        self._climbed_from = 0.0
        self._served: deque[tuple[float, float]] = deque()
        self._since = 0.0
        self._best = 0.0
        self._floor = 2
        self._starved_at = 0.0

    def completed(self, end: float, latency: float, service: float) -> None:
        """An answer came: at `end` on any clock, after `latency` s, of which a slot was busy `service` s."""
        if not self._adaptive or service <= 0:
            return
        self._served.append((end - service, end))
        if self._starting and latency <= QUEUED * service:
            self.limit = min(MOST, self.limit + 1)
            return
        if self._starting:
            self._starting = False
            self._since = min(start for start, _ in self._served)
        longest = max(stop - start for start, stop in self._served)
        upto = end - longest  # whatever was in service before then has ended by now: nothing is missing
        if upto - self._since < longest or len(self._served) < self.limit:
            return
        within = sum(max(0.0, min(stop, upto) - max(start, self._since)) for start, stop in self._served)
        self._settle(within / (upto - self._since))
        self._since = end
        self._served = deque(entry for entry in self._served if entry[1] > upto)

    def _settle(self, busy: float) -> None:
        self.slots = round(busy)
        if self._climbing and busy >= 0.6 * self.limit and busy > 1.1 * self._climbed_from:
            # Most of them are in service; the rest may be on the way (a slow network), not in a queue. Try more.
            self._climbed_from = busy
            self.limit = min(MOST, math.ceil(1.5 * self.limit))
            return
        self._climbing = False
        self._best = max(busy, 0.98 * self._best)
        starved = busy < 0.95 * self._best
        if starved and self._starved_at and busy < 1.03 * self._starved_at:
            # More in flight was no help: the server itself has fewer slots for us than it had.
            self._best, self._floor, self._starved_at, starved = busy, 2, 0.0, False
        if starved:
            self._starved_at = busy
            self._floor = math.ceil(1.25 * self.limit) + 1
            self.limit = min(MOST, self._floor)
        elif busy > self.limit - 1:
            self.limit = min(MOST, math.ceil(1.5 * self.limit))
        else:
            self._starved_at = 0.0
            self.limit = min(MOST, max(round(busy) + 2, self._floor))
