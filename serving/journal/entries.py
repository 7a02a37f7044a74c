"""What the journal keeps."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

ROW_BYTES = 512
"""About what a row takes beside its texts and bytes."""
EXPIRED = 600
"""Stands for the HTTP status of a batch's request that was not answered within the batch's window."""
_PAGE_BYTES = 4096
_LONG_BYTES = 1024


@dataclass(frozen=True)
class Request:
    """What is to be computed, whoever dies meanwhile."""

    id: str
    """No other request has it."""
    kind: str
    """What computes it: a route's path, or "generate"."""
    owner: str = ""
    """Whose it is: a digest of the API key's hash; "" where the server has no keys."""
    name: str = ""
    """The request id that its caller knows."""
    key: str | None = None
    """Its Idempotency-Key: one request of an owner has it."""
    salt: str = ""
    """The salt of its owner's cached prefixes."""
    body: bytes = b""
    """The body of its HTTP request."""
    digest: bytes = b""
    """A digest of what was asked: see digest_of()."""
    batch: str | None = None
    """The batch that it belongs to."""
    custom_id: str | None = None
    """How its batch names it."""

    @property
    def size(self) -> int:
        """Bytes of the file that it takes, about."""
        return ROW_BYTES + taken(len(self.body)) + len(self.name) + len(self.key or "") + len(self.custom_id or "")


@dataclass(frozen=True)
class Entry:
    """A request as the journal has it."""

    request: Request
    """Without its body once it has ended."""
    number: int
    """Requests are numbered as they were accepted."""
    accepted_at: float
    """Unix time in seconds."""
    attempts: int = 0
    """How many processes have computed it without getting on."""
    finished_at: float | None = None
    status: int | None = None
    """The HTTP status of its answer, or EXPIRED."""
    answer: bytes | None = None
    """The whole answer."""


def taken(size: int) -> int:
    """Bytes of the file that so many bytes take: what is long has pages of its own."""
    return size if size < _LONG_BYTES else size + _PAGE_BYTES


def digest_of(*parts: bytes) -> bytes:
    """What two requests for the same have in common."""
    digest = hashlib.blake2b(digest_size=20, person=b"phalanx-journal")
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()
