"""A forked process's command line and environment, as other programs see them.

Linux shows the memory in which a process found both when it began (/proc/PID/cmdline and environ): what a fork writes
there is seen of it. Texts are replaced by texts that are no longer, so nothing moves.
"""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

_log = logging.getLogger("phalanx")
_ARGUMENTS, _ENVIRONMENT = 48, 50
"""The numbers of arg_start and env_start among the fields of /proc/PID/stat (proc(5)); their ends follow them."""


def replace_in_arguments(old: str, new: str) -> None:
    """Show the argument `new`, of as many bytes, in place of `old`."""
    if len(new.encode()) != len(old.encode()):
        raise ValueError(f"{new!r} must have as many bytes as {old!r}")
    _replace(_ARGUMENTS, old.encode(), new.encode())


def replace_in_environment(old: dict[str, str], new: dict[str, str]) -> None:
    """Show the variables `new`, no longer than `old`, in place of these, which are the last ones in this order.

    Only what other processes see changes, and what C code reads that this process has not set again.
    """
    before, after = (
        b"\0".join(f"{name}={value}".encode() for name, value in variables.items()) for variables in (old, new)
    )
    if len(after) > len(before):
        raise ValueError(f"{new!r} must have no more bytes than {old!r}")
    _replace(_ENVIRONMENT, before, after.ljust(len(before), b"\0"))


def _replace(field: int, old: bytes, new: bytes) -> None:
    """Overwrite the last `old` of the process's own text by `new`, of the same length; it may be missing."""
    try:
        # The second field, a name in parentheses, may hold anything.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[field - 3]), int(fields[field - 2])
    except (OSError, IndexError, ValueError) as error:
        _log.debug("the process shows its old name: %s", error)
        return
    place = ctypes.string_at(start, end - start).rfind(b"\0" + old + b"\0") + 1 if start else 0
    if place > 0:
        ctypes.memmove(start + place, new, len(new))
