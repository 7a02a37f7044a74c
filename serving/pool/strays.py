"""Requests that have no engine, because theirs ended: they wait for another, and those that may be to blame for a turn.

Pure bookkeeping on the event loop; the tickets send.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from ...engine.client.resume.suspects import BLAMED_DEATHS, SUSPECT_DEATHS

LOOK_S = 1.0
"""Seconds between two looks at what waits; also the least before a request goes back to an engine that it came from."""


class Stray(Protocol):
    """A request whose engine has ended."""

    deaths: int
    """Engines that have ended with it since it last got on."""
    aborted: bool
    """Whether nobody wants it any more."""
    stranded_at: float | None
    """When it was first without an engine since it last got on; the event loop's time."""

    def go(self) -> bool:
        """Send it to an engine; False if there is none for it yet."""

    def give_up(self) -> None:
        """End it with what its last engine said."""

    def blame(self) -> None:
        """End it as one of which engines die."""


class Strays:
    """Who waits. Of those with which SUSPECT_DEATHS engines have ended in a row one at a time is at an engine.

    The one with which BLAMED_DEATHS have is to blame if it was such a one: all others go on.
    """

    def __init__(self, wait_s: float, loop: asyncio.AbstractEventLoop) -> None:
        """After `wait_s` seconds without an engine a request is given up; those in which it waits its turn aside."""
        self._wait_s = wait_s
        self._loop = loop
        self._waiting: dict[Stray, None] = {}
        """In the order in which they came."""
        self._tried: Stray | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, stray: Stray) -> None:
        """Take in a request whose engine has ended."""
        tried = stray is self._tried
        if tried:
            self._tried = None
        if tried and stray.deaths >= BLAMED_DEATHS:
            stray.blame()
        else:
            stray.stranded_at = stray.stranded_at or self._loop.time()
            self._waiting[stray] = None
        self.send_on()

    def got_on(self, stray: Stray) -> None:
        """Take in that a request got a token, or ended: it is not what engines die of."""
        if stray is self._tried:
            self._tried = None
            self.send_on()

    def send_on(self) -> None:
        """Send what can be sent by now, in the order in which it came."""
        now = self._loop.time()
        for stray in list(self._waiting):
            suspected = stray.deaths >= SUSPECT_DEATHS
            if stray.aborted:
                self._end(stray)
            elif suspected and self._tried is not None:
                stray.stranded_at = now
            elif stray.go():
                del self._waiting[stray]
                self._tried = stray if suspected else self._tried
            elif stray.stranded_at is not None and now - stray.stranded_at >= self._wait_s:
                self._end(stray)
        if self._waiting and self._timer is None:
            self._timer = self._loop.call_later(LOOK_S, self._look)

    def give_up(self) -> None:
        """End all that wait: no engine will come."""
        for stray in list(self._waiting):
            self._end(stray)
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        self.send_on()

    def _end(self, stray: Stray) -> None:
        del self._waiting[stray]
        stray.give_up()
