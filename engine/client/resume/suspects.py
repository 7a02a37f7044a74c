"""Which request an engine's deaths are to be blamed on. Pure bookkeeping: it sends nothing.

An engine that dies while requests are under way may have died of one of them. They are all sent again. One that gets
on, by a token or its end, is cleared: what it did before cannot be what kills. Those that were under way at two deaths
and have not got on in between are suspects. From then on one suspect at a time is at the engine, and nothing else that
was not cleared, until it gets on or the engine dies of it. So a neighbour costs its request some time, never its
answer.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

SUSPECT_DEATHS = 2
"""Deaths without getting on in between after which a request is tried apart from the others."""
BLAMED_DEATHS = 3
"""The same after which the only suspect is blamed. Of a request that was alone each time, SUSPECT_DEATHS are enough."""


class Suspects:
    """Keeps the counts by request id, and the order in which requests are tried."""

    def __init__(self) -> None:
        self._deaths: Counter[str] = Counter()
        self._alone: Counter[str] = Counter()
        self._tried: str | None = None
        self._untried: deque[str] = deque()

    @property
    def isolating(self) -> bool:
        """Whether a request that nobody suspects has to wait."""
        return self._tried is not None

    def died(self, under_way: Sequence[str]) -> str | None:
        """Count a death while these requests were at the engine. Returns the one to blame, if it is known.

        It is forgotten then. Afterwards first() says with what to begin at the next engine.
        """
        self._deaths.update(under_way)
        if len(under_way) == 1:
            self._alone[under_way[0]] += 1

        suspects = [each for each in under_way if self._deaths[each] >= SUSPECT_DEATHS]
        blamed = None
        if len(suspects) == 1:
            [only] = suspects
            if self._deaths[only] >= BLAMED_DEATHS or self._alone[only] >= SUSPECT_DEATHS:
                blamed = only

        if self._tried is not None:
            suspects = list(dict.fromkeys([*suspects, *self._untried]))
        self._untried = deque(each for each in suspects if each != blamed)
        self._tried = None
        if blamed is not None:
            self.forget(blamed)
        return blamed

    def first(self) -> str | None:
        """Return the suspect to try next, alone; None if all requests may go to the engine."""
        if self._tried is None and self._untried:
            self._tried = self._untried.popleft()
        return self._tried

    def got_on(self, request_id: str) -> bool:
        """A request got a token. Returns whether it was the one being tried: then first() says what comes next."""
        self._deaths.pop(request_id, None)
        self._alone.pop(request_id, None)
        if request_id != self._tried:
            return False
        self._tried = None
        return True

    def forget(self, request_id: str) -> bool:
        """A request has ended. Returns the same as got_on()."""
        if request_id in self._untried:
            self._untried.remove(request_id)
        return self.got_on(request_id)
