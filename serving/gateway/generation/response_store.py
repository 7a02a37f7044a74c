"""Responses that are kept for later requests: bounded in count and bytes, for a while, each for its own caller."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from ..config import GatewayConfig

_RECORD_BYTES = 512  # about what a record takes beside its JSON


@dataclass
class StoredResponse:
    """One response; JSON is smaller than objects, and the garbage collector does not look into it."""

    response: bytes
    """The response, JSON."""
    input: bytes
    """All items of its input, those of the responses before it included: a JSON list."""
    task: asyncio.Task[None] | None = None
    """What computes it, if it is computed in the background and has not ended."""
    item_ids: list[str] = field(default_factory=list)
    """The items of its output, as far as it has ended."""
    used_at: float = 0.0

    @property
    def size(self) -> int:
        """Bytes that it takes, about."""
        return _RECORD_BYTES + len(self.response) + len(self.input) + 64 * len(self.item_ids)


class Mirror(Protocol):
    """Hears of what is kept, and no more."""

    def put(self, owner: str, response_id: str, record: StoredResponse) -> None:
        """A response is kept, as it is now."""

    def delete(self, owner: str, response_id: str) -> None:
        """A response is kept no more."""


class ResponseStore:
    """Belongs to the event loop. What was used longest ago makes room for what is new.

    A caller finds its own responses alone: to every other one they are not there.
    """

    def __init__(
        self, config: GatewayConfig, clock: Callable[[], float] = time.monotonic, mirror: Mirror | None = None
    ) -> None:
        self._config = config
        self._clock = clock
        self._mirror = mirror
        self._records: collections.OrderedDict[tuple[str, str], StoredResponse] = collections.OrderedDict()
        self._items: dict[tuple[str, str], str] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._records)

    @property
    def keeps(self) -> bool:
        """Whether anything is kept."""
        return self._config.stored_responses > 0

    def put(self, owner: str, response_id: str, record: StoredResponse) -> bool:
        """Keep a response, in place of the one of the same id. Returns False for one that has no room at all."""
        kept = self.load(owner, response_id, record)
        if kept and self._mirror is not None:
            self._mirror.put(owner, response_id, record)
        return kept

    def load(self, owner: str, response_id: str, record: StoredResponse) -> bool:
        """The same for one that the mirror has."""
        self._drop((owner, response_id), cancel=False)
        if not self.keeps or record.size > self._config.stored_response_bytes:
            return False
        record.used_at = self._clock()
        self._records[owner, response_id] = record
        self.bytes += record.size
        for item_id in record.item_ids:
            self._items[owner, item_id] = response_id
        self._make_room()
        return True

    def get(self, owner: str, response_id: str) -> StoredResponse | None:
        """A caller's response, which counts as used; None if there is none of this id, any more."""
        self._make_room()
        record = self._records.get((owner, response_id))
        if record is not None:
            record.used_at = self._clock()
            self._records.move_to_end((owner, response_id))
        return record

    def holds(self, owner: str, response_id: str) -> bool:
        """Whether there is a response of this id; it does not count as used."""
        return (owner, response_id) in self._records

    def delete(self, owner: str, response_id: str) -> bool:
        """Forget a response, and stop computing it. Returns whether there was one."""
        return self._drop((owner, response_id), cancel=True)

    def find_item(self, owner: str, item_id: str) -> dict[str, Any] | None:
        """An item of the output of one of a caller's responses."""
        response_id = self._items.get((owner, item_id))
        record = self.get(owner, response_id) if response_id is not None else None
        if record is None:
            return None
        output: list[dict[str, Any]] = msgspec.json.decode(record.response)["output"]
        return next((item for item in output if item["id"] == item_id), None)

    def _make_room(self) -> None:
        config, oldest = self._config, self._clock() - self._config.stored_response_s
        while self._records:
            key, record = next(iter(self._records.items()))
            full = len(self._records) > config.stored_responses or self.bytes > config.stored_response_bytes
            if not full and record.used_at > oldest:
                return
            self._drop(key, cancel=True)

    def _drop(self, key: tuple[str, str], *, cancel: bool) -> bool:
        record = self._records.pop(key, None)
        if record is None:
            return False
        self.bytes -= record.size
        for item_id in record.item_ids:
            self._items.pop((key[0], item_id), None)
        if cancel and record.task is not None:
            record.task.cancel()
        if self._mirror is not None:
            self._mirror.delete(*key)
        return True
