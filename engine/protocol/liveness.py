"""Whether the engine at the other end of a wire is still the one that has this client's requests.

The transport answers a Ping itself, beside intake and the step loop, so that an engine which computes a long step is
not taken for a dead one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from .messages import PROTOCOL_VERSION, Pong

PING_S = 1.0
"""Seconds from an answer to the next Ping."""
SILENCE_S = 15.0
"""An engine that has answered before and does not for so long is taken for gone, if the system has not told before that
its connection was closed; so often it is asked from then on."""
LOOK_S = 1.0
"""Most seconds between two looks that count as silence: in what is above, this process was held up itself."""


class EngineWatch:
    """Says when requests are lost, from what an engine answers. Used by one thread.

    They are lost when another engine answers at the address (its epoch differs), when the same engine knows this client
    by another name (the connection was cut and made again, and what was sent to the old one is gone), when the
    connection is closed, as that of a process that ends, and when an engine that answered before falls silent.
    """

    def __init__(self, address: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._address = address
        self._clock = clock
        self._known: Pong | None = None
        self._silent = False
        self._asked_at: float | None = None  # when the Ping was sent that was not answered yet
        self._asked_before = 0  # how often until there was an answer
        self._may_have_missed = False
        self._heard_at = self._looked_at = clock()
        self._silent_s = 0.0  # without an answer, as far as this process could have heard one
        self._connections = 0

    @property
    def epoch(self) -> str:
        """The epoch of the engine that answered last; empty before one has."""
        return self._known.epoch if self._known is not None else ""

    @property
    def is_silent(self) -> bool:
        """Whether silence() or closed() has told of a silence that no answer has ended."""
        return self._silent

    @property
    def should_ask(self) -> bool:
        """Whether it is time for a Ping; whoever sends it calls asked()."""
        now = self._clock()
        if self._asked_at is not None:
            # A Ping may be lost with its engine. One that is sent while there is none reaches the next at once.
            silent = self._known is None or now - self._heard_at >= SILENCE_S
            return now - self._asked_at >= (SILENCE_S if silent else PING_S)
        return self._known is None or now - self._heard_at >= PING_S

    def asked(self) -> None:
        """Note that a Ping was sent."""
        self._asked_at = self._clock()
        if self._known is None:
            self._asked_before += 1

    def heard(self, pong: Pong) -> str | None:
        """Take in an answer. Returns why requests are lost, if they are."""
        before, self._known = self._known, pong
        self._heard_at = self._clock()
        self._asked_at = None
        self._silent = False
        self._silent_s = 0.0
        if before is None:
            self._may_have_missed = self._asked_before > 1
        if before is None or before == pong:
            return None
        if before.epoch != pong.epoch:
            return f"the engine at {self._address} was replaced by another; what it had not finished is lost"
        return f"the connection to {self._address} was lost and made again; what was under way is lost"

    def missed(self) -> str | None:
        """Return why the first engine that answers may lack what was sent before; once.

        An engine that ends before it answers, as one that is still loading, takes with it what it was sent.
        """
        missed, self._may_have_missed = self._may_have_missed, False
        if not missed:
            return None
        return f"the engine at {self._address} was long in answering; one before it may have had what was sent"

    def connected(self) -> None:
        """Take in that there is a connection. A Ping that waits for an answer may have gone with the one before."""
        self._connections += 1
        if self._connections > 1:
            self._asked_at = None
            self._heard_at = min(self._heard_at, self._clock() - PING_S)

    def closed(self) -> str | None:
        """Take in that the connection was closed. Returns why requests are lost; once for each silence.

        The other end has ended, or was cut off: what it had of this client's it aborts, if it still lives.
        """
        if self._known is None or self._silent:
            return None
        self._silent = True
        return f"the connection to the engine at {self._address} was closed: its process has ended, or was cut off"

    def silence(self) -> str | None:
        """Return why requests are lost if the engine has fallen silent; once for each silence. To be called often."""
        now = self._clock()
        self._silent_s += min(LOOK_S, now - self._looked_at)
        self._looked_at = now
        if self._known is None or self._silent or self._asked_at is None or self._silent_s < SILENCE_S:
            return None
        self._silent = True
        return f"the engine at {self._address} has not answered for {SILENCE_S:g} s"


def version_mismatch(address: str, pong: Pong) -> str | None:
    """Return why this client and the engine that answered cannot work together; None if they can."""
    if pong.version == PROTOCOL_VERSION:
        return None
    return (
        f"the engine at {address} speaks version {pong.version} of the protocol, this client version "
        f"{PROTOCOL_VERSION}: use the same version of phalanx on both sides"
    )
