"""What all ranks of a group learn together: a rank that failed alone must let the others know before it raises."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from .base import Collectives

T = TypeVar("T")


def attempt(action: Callable[[], T]) -> tuple[T | None, str]:
    """The result, or what went wrong: the other ranks have to know of it before this one may raise."""
    try:
        return action(), ""
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        return None, str(error) or type(error).__name__


def first_problem(host: Collectives, problem: str) -> str | None:
    """The first rank's `problem` that is not "", and its rank: the same on every rank of `host`, CPU collectives."""
    text = problem.encode(errors="backslashreplace")
    for rank, (length,) in enumerate(all_gather_ints(host, [len(text)])):
        if length:
            message = torch.tensor(list(text), dtype=torch.uint8) if rank == host.rank else torch.empty(length).byte()
            message = host.broadcast(message, src=rank)
            return f"rank {rank} of {host.size}: {bytes(message.tolist()).decode()}"
    return None


def all_gather_ints(host: Collectives, values: Sequence[int]) -> list[list[int]]:
    """Every rank's values, equally many and each of 63 bits at most, on every rank of `host`, CPU collectives."""
    table = torch.zeros(host.size, len(values), dtype=torch.int64)
    table[host.rank] = torch.tensor(values)
    rows: list[list[int]] = host.all_reduce(table).tolist()
    return rows


def all_gather_texts(host: Collectives, text: str) -> list[str]:
    """Every rank's text, on every rank of `host`, CPU collectives."""
    data = text.encode(errors="backslashreplace")  # a message may quote what is no valid Unicode
    longest = max(length for [length] in all_gather_ints(host, [len(data)]))
    rows = all_gather_ints(host, [len(data), *data, *bytes(longest - len(data))])
    return [bytes(row[1 : 1 + row[0]]).decode() for row in rows]


def cores_of_all(host: Collectives) -> int:
    """The CPUs that the ranks of `host`, on one machine, may use together: each may be bound to some of its own."""
    # A mask of CPUs as words of 62 bits, which all_gather_ints() can carry.
    mine = os.sched_getaffinity(0)
    words = max(most for [most] in all_gather_ints(host, [max(mine)])) // 62 + 1
    masks = [sum(1 << cpu % 62 for cpu in mine if cpu // 62 == word) for word in range(words)]
    united = [0] * words
    for row in all_gather_ints(host, masks):
        united = [word | other for word, other in zip(united, row, strict=True)]
    return sum(word.bit_count() for word in united)


def boot() -> int:
    """60 bits of what names this boot of this machine: equal for processes of one host."""
    return int(Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "")[:15], 16)


def other_host(boots: Sequence[int]) -> str | None:
    """The rank that is on another host than rank 0, in words, from every rank's boot(); None if all are on one."""
    for rank, name in enumerate(boots):
        if name != boots[0]:
            return f"rank {rank} of {len(boots)} is on another host than rank 0"
    return None
