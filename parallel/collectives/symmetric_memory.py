"""Collectives that sum small messages in memory which the GPUs of one host share, and leave the rest to others."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence

import torch

from .autotune_table import Table, choose_algorithms, describe, look_up, make_table, row_ladder, slowest
from .base import Collectives
from .peer_memory import FUSED, ONE_SHOT, SUMS, PeerMemory, SymmetricMemoryUnavailable
from .rendezvous import attempt, first_problem

_log = logging.getLogger("phalanx")

INNER = "process group"
"""An algorithm in a table: by the collectives underneath, not in shared memory."""
UNFUSED = "unfused"
"""An algorithm in the table of sums that a norm follows: the sum by its own table, then the norm."""
_CALLS = 20  # of a sum, in one repeat of a measurement
_REPEATS = 5

Measure = Callable[[Callable[[], object]], float]
"""Seconds that a call takes; every rank measures the same calls in the same order."""


class SymmetricMemoryCollectives(Collectives):
    """Sums by `memory` what it does faster than `inner`, as tune() has measured it; before that, nothing.

    Whatever way is taken, all ranks take it and have the same bits; which bits may depend on the way.
    """

    def __init__(self, inner: Collectives, host: Collectives, memory: PeerMemory) -> None:
        """`host` are CPU collectives of the same ranks, on which they agree what to do."""
        self._inner = inner
        self._host = host
        self._memory = memory
        self.rank = inner.rank
        self.size = inner.size
        self.supports_graph = inner.supports_graph
        self._sums: Table = ()
        self._norms: Table = ()

    @property
    def device(self) -> torch.device:
        """The GPU of this rank."""
        return self._inner.device

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks by the algorithm that the table has for the size of `x`."""
        algorithm = self._algorithm(x)
        if algorithm == INNER:
            return self._inner.all_reduce(x)
        result = self._memory.sum(algorithm, x)
        return result if algorithm == ONE_SHOT else x.copy_(result)

    def add_reduced_norm(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        total: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """As Collectives.add_reduced_norm: fused if the table has that for the size of `x`."""
        fused = look_up(self._norms, x.nbytes, UNFUSED) == FUSED and self._memory.fits(FUSED, x.shape, x.dtype)
        if fused and x.nbytes > 0:
            return self._memory.add_norm(x, bias, total, weight, eps, dtype)
        return super().add_reduced_norm(x, bias, total, weight, eps, dtype)

    def gather(self, x: torch.Tensor, dst: int = 0) -> list[torch.Tensor] | None:
        """By the collectives underneath."""
        return self._inner.gather(x, dst)

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        """By the collectives underneath."""
        return self._inner.broadcast(x, src)

    def barrier(self) -> None:
        """By the collectives underneath."""
        self._inner.barrier()

    def use(self, sums: Table, norms: Table) -> None:
        """Go by these tables of bytes, the same on all ranks: `sums` of INNER and the memory's SUMS, `norms` of UNFUSED
        and FUSED. What the memory cannot do goes by INNER and UNFUSED all the same.
        """
        self._sums = sums
        self._norms = norms

    def tune(self, columns: int, dtype: torch.dtype, max_rows: int, measure: Measure | None = None) -> None:
        """Measure, and use the tables that rank 0 makes of what every rank measured.

        Where measuring fails, all goes by the collectives underneath, and rank 0 logs why.
        """
        measure = measure or self._measure
        row_bytes = columns * dtype.itemsize
        ladder = row_ladder(min(max_rows, self._memory.capacity // row_bytes))
        self.use((), ())
        if not ladder:
            return

        def sum_by(algorithm: str, rows: int) -> Callable[[], object]:
            x = torch.zeros(rows, columns, dtype=dtype, device=self.device)
            return lambda: self._sum_by(algorithm, x)

        def norm_by(algorithm: str, rows: int) -> Callable[[], object]:
            x = torch.zeros(rows, columns, dtype=dtype, device=self.device)
            total = torch.zeros(rows, columns, device=self.device)
            weight = torch.zeros(columns, device=self.device)
            add_norm = self._memory.add_norm if algorithm == FUSED else self.add_reduced_norm
            return lambda: add_norm(x, None, total, weight, 1e-6, dtype)

        def table(ways: Sequence[str], prepare: Callable[[str, int], Callable[[], object]]) -> Table:
            able = {rows: self._able(ways, torch.Size([rows, columns]), dtype) for rows in ladder}
            seconds, problem = attempt(lambda: [measure(prepare(way, rows)) for rows in ladder for way in able[rows]])
            reason = first_problem(self._host, problem)
            if seconds is None or reason is not None:
                raise SymmetricMemoryUnavailable(reason)
            return self._agree({rows * row_bytes: able[rows] for rows in ladder}, seconds)

        try:
            with torch.inference_mode():
                self.use(table((INNER, *SUMS), sum_by), ())
                self.use(self._sums, table((UNFUSED, FUSED), norm_by))
        except SymmetricMemoryUnavailable as reason:
            self.use((), ())
            if self.rank == 0:
                _log.warning("small sums go by the process group, symmetric memory could not be measured: %s", reason)
            return
        if self.rank == 0:
            _log.info("all-reduce: %s", describe(self._sums, INNER))
            _log.info("all-reduce and norm: %s", describe(self._norms, UNFUSED))

    def close(self) -> None:
        """Close the collectives underneath."""
        self._inner.close()

    def _algorithm(self, x: torch.Tensor) -> str:
        """The algorithm for such a message: from its shape and dtype alone, which are the same on every rank."""
        algorithm = look_up(self._sums, x.nbytes, INNER)
        return algorithm if x.nbytes > 0 and self._memory.fits(algorithm, x.shape, x.dtype) else INNER

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        return self._sum_by(self._algorithm(x), x)

    def _sum_by(self, algorithm: str, x: torch.Tensor) -> torch.Tensor:
        return self._inner.all_reduce(x) if algorithm == INNER else self._memory.sum(algorithm, x)

    def _able(self, ways: Sequence[str], shape: torch.Size, dtype: torch.dtype) -> list[str]:
        return [way for way in ways if way in (INNER, UNFUSED) or self._memory.fits(way, shape, dtype)]

    def _agree(self, able: dict[int, list[str]], seconds: list[float]) -> Table:
        """The table for sizes whose ways, in order, took this rank so long: rank 0's judgement of all ranks' times."""
        everyone = self._host.gather(torch.tensor(seconds, dtype=torch.float64))
        chosen = torch.zeros(len(able), dtype=torch.int64)
        if everyone is not None:
            worst = iter(slowest([part.tolist() for part in everyone]))
            times = {size: {way: next(worst) for way in ways} for size, ways in able.items()}
            table = choose_algorithms(times)
            chosen = torch.tensor([ways.index(look_up(table, size, "")) for size, ways in able.items()])
        choices = self._host.broadcast(chosen).tolist()
        return make_table({size: ways[i] for (size, ways), i in zip(able.items(), choices, strict=True)})

    def _measure(self, call: Callable[[], object]) -> float:
        """Median of several runs of many calls, in a CUDA graph if that can be: decoding runs in one."""
        for _ in range(3):
            call()

        run: Callable[[], object] = lambda: [call() for _ in range(_CALLS)]  # noqa: E731
        if self.supports_graph:
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize(self.device)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                run()
            run = graph.replay
        return statistics.median(self._time(run) for _ in range(_REPEATS)) / _CALLS

    def _time(self, run: Callable[[], object]) -> float:
        self._host.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000
