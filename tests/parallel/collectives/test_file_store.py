"""Collectives through a file: what they give, and whom they name when somebody does not come."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from phalanx.parallel.collectives.base import CollectiveError
from phalanx.parallel.collectives.file_store import FileStoreCollectives
from phalanx.parallel.collectives.rendezvous import all_gather_ints, all_gather_texts, first_problem

T = TypeVar("T")


def together(tmp_path: Path, size: int, action: Callable[[FileStoreCollectives], T], wait_s: float = 20.0) -> list[T]:
    """What `action` returns on each of `size` ranks, here threads with a store of their own."""

    def rank(number: int) -> T:
        return action(FileStoreCollectives(tmp_path / "store", number, size, wait_s))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_operation_gives_every_rank_what_it_should(tmp_path: Path, size: int) -> None:
    def operations(host: FileStoreCollectives) -> tuple[list[int], list[int] | None, list[float], list[list[int]]]:
        host.barrier()
        total = host.all_reduce(torch.tensor([host.rank, 2**40])).tolist()
        gathered = host.gather(torch.tensor([[host.rank]], dtype=torch.int32), dst=size - 1)
        said = host.broadcast(torch.tensor([host.rank + 0.5]), src=size - 1).tolist()
        rows = None if gathered is None else [int(part) for part in gathered]
        return total, rows, said, all_gather_ints(host, [host.rank, -host.rank])

    for rank, (total, rows, said, table) in enumerate(together(tmp_path, size, operations)):
        assert total == [sum(range(size)), size * 2**40]
        assert rows == (list(range(size)) if rank == size - 1 else None)
        assert said == [size - 0.5]
        assert table == [[each, -each] for each in range(size)]


def test_texts_and_problems_reach_every_rank(tmp_path: Path) -> None:
    def texts(host: FileStoreCollectives) -> tuple[list[str], str | None]:
        return all_gather_texts(host, "α" * host.rank), first_problem(host, "no luck" if host.rank == 1 else "")

    assert together(tmp_path, 3, texts) == [(["", "α", "αα"], "rank 1 of 3: no luck")] * 3


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    alone = FileStoreCollectives(tmp_path / "store", 0, 2, timeout_s=0.2)
    with pytest.raises(CollectiveError, match="rank 0 of 2 waited for rank 1 in barrier"):
        alone.barrier()


def test_ranks_that_send_different_shapes_are_told(tmp_path: Path) -> None:
    def uneven(host: FileStoreCollectives) -> str:
        with pytest.raises(CollectiveError) as caught:
            host.all_reduce(torch.zeros(1 + host.rank, dtype=torch.int64))
        return str(caught.value)

    said = together(tmp_path, 2, uneven)
    assert said[0] == "rank 0 of 2 got 16 bytes of rank 1 in all_reduce, not 8"
