"""The requests that are accepted and not finished, and whose they are."""

from __future__ import annotations

import threading
from typing import NamedTuple

from ..errors import EngineStopped, InvalidRequest


class Owner(NamedTuple):
    """Whose a request is, and by what id that client knows it."""

    client: bytes
    external_id: str

    @property
    def request_id(self) -> str:
        """The engine's own id of the request: two clients may choose the same external id."""
        return f"{self.client.hex()}:{self.external_id}"


def id_in_use(owner: Owner) -> InvalidRequest:
    """The error of a request whose client has another of the same id."""
    return InvalidRequest(f"id={owner.external_id!r} is in use by a request that is not finished; choose another")


class RequestRegistry:
    """Knows each request from its acceptance to its last event, and why the engine accepts no more once it stops.

    Intake threads add, the output thread removes, and whoever stops the engine closes it.
    The lock makes add() and close() exclude each other. So every request is either refused, or in unfinished() by the
    time close() returns, where the output thread finds it and fails it: none is left without a last event.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owners: dict[str, Owner] = {}  # by request id
        self._refusal: str | None = None

    def check_unused(self, owner: Owner) -> None:
        """Raise InvalidRequest if the client has an unfinished request of this id. An intake thread calls it."""
        with self._lock:
            if owner.request_id in self._owners:
                raise id_in_use(owner)

    def add(self, owner: Owner) -> None:
        """Accept a request. Raises EngineStopped after close(), InvalidRequest as check_unused()."""
        with self._lock:
            self._check_open()
            if owner.request_id in self._owners:
                raise id_in_use(owner)
            self._owners[owner.request_id] = owner

    def remove(self, request_id: str) -> Owner | None:
        """Forget a request whose last event is due; None if it has gone before. The output thread calls it."""
        with self._lock:
            return self._owners.pop(request_id, None)

    def unfinished(self) -> list[str]:
        """The ids of the accepted requests, the oldest first. The output thread calls it."""
        with self._lock:
            return list(self._owners)

    def of_client(self, client: bytes) -> list[str]:
        """The ids of a client's accepted requests. Any thread may call it."""
        with self._lock:
            return [request_id for request_id, owner in self._owners.items() if owner.client == client]

    def check_open(self) -> None:
        """Raise EngineStopped if close() was called. Any thread may call it."""
        with self._lock:
            self._check_open()

    def close(self, why: str) -> EngineStopped:
        """Accept nothing more. Returns the error of what is left; a second call keeps the first reason.

        The thread that ran the step loop calls it, or the one that closes the engine.
        """
        with self._lock:
            self._refusal = self._refusal or why
            return EngineStopped(self._refusal)

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise EngineStopped(self._refusal)
