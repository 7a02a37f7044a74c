"""How much of the journal files and batches may take, so that other requests still find room in it."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass


class QuotaExceeded(Exception):
    """A bound of a Quota is reached. The message says which, and how it is raised."""


@dataclass(frozen=True)
class Quota:
    """Bounds of the documents of some kinds, and of the requests of batches; checked before more is kept."""

    kinds: tuple[str, ...]
    """The kinds whose bytes count."""
    most: int
    """Most documents of the new one's kind that one owner has."""
    setting: str
    """What bounds `most`, for errors."""
    most_bytes: int
    """Most bytes of all owners' together."""
    bytes_setting: str
    """What bounds `most_bytes`, for errors."""

    def check(self, connection: sqlite3.Connection, kind: str, owner: str, size: int) -> None:
        """Raise QuotaExceeded where an owner may not have one more of a kind, or `size` bytes are too many more."""
        query = "SELECT count(*) FROM document WHERE kind = ? AND owner = ?"
        (count,) = connection.execute(query, (kind, owner)).fetchone()
        if count >= self.most:
            raise QuotaExceeded(
                f"the server keeps {count} of this kind ({kind}) for one caller, and may keep {self.most} "
                f"({self.setting})"
            )

        taken = self._bytes(connection)
        if taken + size > self.most_bytes:
            raise QuotaExceeded(
                f"files and batches take {taken} bytes of the journal, and may take {self.most_bytes} "
                f"({self.bytes_setting}): {size} more do not fit"
            )

    def _bytes(self, connection: sqlite3.Connection) -> int:
        taken = 0
        for kind in self.kinds:
            query = "SELECT coalesce(sum(size), 0) FROM document WHERE kind = ?"
            taken += int(connection.execute(query, (kind,)).fetchone()[0])
        query = "SELECT coalesce(sum(size), 0) FROM request WHERE batch IS NOT NULL"
        return taken + int(connection.execute(query).fetchone()[0])
