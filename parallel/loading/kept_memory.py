"""Memory that outlives the rank that fills it: a supervisor owns it, and the rank's successor maps what is in it.

It is a file without a name (memfd_create(2)). Whoever fills it seals it at the end, so from then on nobody writes to it
again, and one that is not sealed is known to be unfinished. Imports no torch.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import sys
import weakref
from pathlib import Path
from typing import Any

PAGE = mmap.PAGESIZE
HUGE_PAGE = 2 * 2**20
LINE = 64
"""Each piece of memory begins at a multiple of so many bytes."""
MAX_INDEX_BYTES = 64 * 2**20

_HEADER = struct.Struct("<8sQQ")
_MAGIC = b"phalanx1"
_MADV_COLLAPSE = 25
# fcntl(2): Python has no names for all of them.
_ADD_SEALS, _GET_SEALS = 1033, 1034
_SEALS = 0x1 | 0x2 | 0x4 | 0x10
"""No more seals, no shrinking, no growing, and no writing but through mappings that exist (F_SEAL_FUTURE_WRITE)."""


class KeptMemoryError(Exception):
    """What is in the memory is not what it should be, or the system cannot keep any."""


def make_kept_memory() -> int:
    """Return the descriptor of new, empty memory. Raises OSError where the system has none that can be sealed."""
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "memory that can be sealed is Linux's")
    return os.memfd_create("phalanx-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def is_complete(memory: int) -> bool:
    """Whether the memory was filled to its end, and sealed."""
    import fcntl

    try:
        return fcntl.fcntl(memory, _GET_SEALS) & _SEALS == _SEALS
    except OSError:
        return False


def identity_of_files(folder: Path) -> list[tuple[str, int, int, int, int]]:
    """What tells a model folder's files from others: name, bytes, time of change, device and inode of each.

    Of those that decide what its weights are: safetensors and JSON. A folder that cannot be read has none.
    """
    found = []
    try:
        for path in sorted(folder.iterdir()):
            if path.suffix in (".safetensors", ".json"):
                stat = path.stat()
                found.append((path.name, stat.st_size, stat.st_mtime_ns, stat.st_dev, stat.st_ino))
    except OSError:
        return []
    return found


class KeptWriter:
    """Hands out pieces of the memory, one behind the other, until finish()."""

    def __init__(self, memory: int, capacity: int, *, huge_first: bool) -> None:
        """`capacity` is the most bytes that may be asked for: only those that are written to take memory.

        With `huge_first` huge pages are made before they are written to, which costs least. Without, small pages are
        collapsed in the end: each then stays on the NUMA node of the thread that wrote to it first.
        Raises OSError if the memory cannot be mapped.
        """
        self._memory = memory
        self._capacity = _up(capacity + PAGE, HUGE_PAGE)
        os.ftruncate(memory, self._capacity)
        self.buffer = _map(memory, self._capacity, mmap.PROT_READ | mmap.PROT_WRITE)
        self._huge_first = huge_first
        self._huge_to = 0
        self._end = PAGE  # the first page is the header's

    def take(self, nbytes: int) -> int:
        """Return the offset of a new piece of zeros. Raises KeptMemoryError beyond the capacity."""
        first = _up(self._end, LINE)
        if first + nbytes > self._capacity:
            raise KeptMemoryError(f"{first + nbytes} bytes of weights, where at most {self._capacity} were expected")
        self._end = first + nbytes
        if self._huge_first and self._end > self._huge_to:
            self._collapse(self._huge_to, _up(self._end, HUGE_PAGE))
        return first

    def makes_huge_pages(self) -> bool:
        """Whether the system makes huge pages of this memory."""
        return self._collapse(0, HUGE_PAGE)

    def offset_of(self, address: int) -> int:
        """Return where in the memory this address is. Raises KeptMemoryError if it is elsewhere."""
        offset = address - ctypes.addressof(self.buffer)
        if not PAGE <= offset < self._end:
            raise KeptMemoryError("a weight was packed elsewhere")
        return offset

    def finish(self, index: bytes) -> int:
        """Add what tells where everything is, and seal the memory: it is read-only from now on. Returns its bytes.

        Raises OSError if it cannot be sealed; it then is as good as before for this process, and of no use to another.
        """
        import fcntl

        if not self._huge_first:
            self._collapse(0, _up(self._end, HUGE_PAGE))
        at = self.take(len(index))
        used = _up(self._end, PAGE)
        address = ctypes.addressof(self.buffer)
        ctypes.memmove(address + at, index, len(index))
        ctypes.memmove(address, _HEADER.pack(_MAGIC, at, len(index)), _HEADER.size)

        os.ftruncate(self._memory, used)
        fcntl.fcntl(self._memory, _ADD_SEALS, _SEALS)
        # A stray write ends this process, and does not become part of what the next one computes with.
        if _libc().mprotect(address, self._capacity, mmap.PROT_READ):
            raise OSError(ctypes.get_errno(), "mprotect")
        return used

    def _collapse(self, first: int, last: int) -> bool:
        """Have huge pages in a range of whole ones, if the system makes any: small pages hold the same."""
        address = ctypes.addressof(self.buffer)
        for at in range(max(first, self._huge_to), last, HUGE_PAGE):
            self.buffer[at] = self.buffer[at]  # a huge page is made only around one that is there
        self._huge_to = last
        # Unlike MADV_HUGEPAGE it asks nobody's leave: shared memory has huge pages where this works.
        return bool(_libc().madvise(address + first, last - first, _MADV_COLLAPSE) == 0)


class KeptReader:
    """Maps memory that is complete, for reading."""

    def __init__(self, memory: int) -> None:
        """Raises KeptMemoryError if it is not complete or damaged, OSError if it cannot be mapped."""
        if not is_complete(memory):
            raise KeptMemoryError("it was not filled to its end")
        self.nbytes = os.fstat(memory).st_size
        if self.nbytes < PAGE:
            raise KeptMemoryError(f"it has {self.nbytes} bytes, which is less than its header takes")
        self.buffer = _map(memory, self.nbytes, mmap.PROT_READ)

        magic, at, length = _HEADER.unpack_from(self.buffer)
        if magic != _MAGIC or not length <= MAX_INDEX_BYTES or not PAGE <= at <= self.nbytes - length:
            raise KeptMemoryError("its header is damaged")
        self.index = ctypes.string_at(ctypes.addressof(self.buffer) + at, length)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
    ]  # fmt: skip
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _map(memory: int, nbytes: int, access: int) -> Any:
    """Map the memory where its huge pages can be huge to the processor: at a multiple of their size.

    Returns an array of bytes (ctypes): the mapping ends with the last object that refers to it.
    """
    libc = _libc()
    room = nbytes + HUGE_PAGE
    nothing = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    reserved = libc.mmap(None, room, 0, nothing, -1, 0)
    if reserved in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), f"mmap of {room} bytes")
    start = _up(reserved, HUGE_PAGE)
    fixed = 0x10
    if libc.mmap(start, nbytes, access, mmap.MAP_SHARED | fixed, memory, 0) != start:
        number = ctypes.get_errno()
        libc.munmap(reserved, room)
        raise OSError(number, f"mmap of {nbytes} bytes")
    buffer = (ctypes.c_char * nbytes).from_address(start)
    # Not at the interpreter's end, when threads may still read: the process's end ends the mapping.
    weakref.finalize(buffer, libc.munmap, reserved, room).atexit = False
    return buffer
