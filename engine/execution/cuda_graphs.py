"""Decode steps as CUDA graphs: their thousand kernels are launched as one, by sizes of the batch.

A graph computes on tensors that stay where they are. A step's batch is padded to the next size that was captured, with
rows of a slot and a block of the cache that belong to nobody, and copied there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch

from ...kernels.attention import AttentionMetadata
from ..models.forward_batch import ForwardBatch

Compute = Callable[[ForwardBatch], torch.Tensor]


def choose_graphs(setting: str, *, device: str, attention: str, fits: bool, collectives_fit: bool) -> tuple[str, str]:
    """What becomes of the setting `graphs`, not auto any more, and why. Raises ValueError if it cannot be.

    `fits` says whether attention takes padded batches without asking for their lengths, `collectives_fit` whether the
    ranks' sums can be captured.
    """
    lacking = [
        f"{name} cannot be captured"
        for name, can in ((f"attention={attention}", fits), ("these ranks' collectives", collectives_fit))
        if not can
    ]
    if device != "cuda":
        lacking.insert(0, f"device={device} has none")

    if setting == "auto":
        return ("none", f"no CUDA graphs: {lacking[0]}") if lacking else ("all", "CUDA graphs of decode steps")
    if setting in ("all", "lazy") and lacking:
        raise ValueError(
            f"graphs={setting} cannot be: {', '.join(lacking)}. It needs device=cuda, attention=triton, flash_attn_2 "
            f"or flash_attn_3, and one rank or a GPU for each; or set graphs=none"
        )
    if setting == "eager" and not fits:
        raise ValueError(
            f"graphs=eager cannot be: attention={attention} asks for the lengths of a batch; set graphs=none"
        )
    return setting, f"graphs={setting}"


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Sizes of batches that have a graph, ascending: each number of rows up to max_num_seqs has one at least as large.

    One, two and four; above that three rows at most are padding, and from 32 on one of five: 22 sizes reach 256.
    """
    if max_num_seqs < 1:
        raise ValueError(f"max_num_seqs={max_num_seqs} must be at least 1")
    sizes = [1, 2, 4]
    while sizes[-1] < max_num_seqs:
        sizes.append(sizes[-1] + max(4, 1 << (sizes[-1].bit_length() - 3)))
    return tuple(sorted({min(size, max_num_seqs) for size in sizes}))


class Recorder(ABC):
    """How a function of static tensors becomes something to replay."""

    @abstractmethod
    def record(self, function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """A function that computes again what `function` did, and the tensor in which its result then stands."""

    @abstractmethod
    def close(self) -> None:
        """Give up what was recorded."""


class CudaRecorder(Recorder):
    """Captures CUDA graphs. They share one pool of memory: each replay may overwrite the results of any before."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def record(self, function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        # Once without: kernels are compiled and libraries set up, which a capture does not allow.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()
        torch.cuda.current_stream().wait_stream(self._stream)

        graph = torch.cuda.CUDAGraph()
        # Other threads, NCCL's watchdog among them, may talk to the driver meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = function()
        self._graphs.append(graph)
        return graph.replay, result

    def close(self) -> None:
        # A graph that holds NCCL's kernels must be gone before the communicator is.
        torch.cuda.synchronize()
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()


class EagerRecorder(Recorder):
    """Runs the operations one by one on the same static, padded tensors: to find faults, and to test without a GPU."""

    def record(self, function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        result = function().clone()

        def replay() -> None:
            result.copy_(function())

        return replay, result

    def close(self) -> None:
        """Nothing was kept."""


class DecodeGraphs:
    """The graphs of one rank. The ranks capture the same sizes in the same order: each capture runs collectives."""

    def __init__(
        self,
        compute: Compute,
        recorder: Recorder,
        sizes: Sequence[int],
        *,
        max_blocks: int,
        block_size: int,
        dummy_block: int,
        device: torch.device,
    ) -> None:
        """`compute` makes the logits of a batch of decode rows; it must not wait for the device.

        `max_blocks` are the entries of a block table, `dummy_block` is one that no sequence is given.
        """
        self._compute = compute
        self._recorder = recorder
        self._block_size = block_size
        self._sizes = sorted(sizes)
        self._recorded: dict[int, tuple[Callable[[], None], torch.Tensor]] = {}

        # What the graphs compute on.
        rows = self._sizes[-1]
        self._token_ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self._positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self._lengths = torch.ones(rows, dtype=torch.int64, device=device)
        self._dummy_index = dummy_block * block_size
        self._slot_mapping = torch.full((rows,), self._dummy_index, dtype=torch.int64, device=device)
        self._block_table = torch.full((rows, max_blocks), dummy_block, dtype=torch.int64, device=device)
        self._cu_q = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._seqused_k = torch.ones(rows, dtype=torch.int32, device=device)
        self._none = torch.zeros(0, dtype=torch.int64, device=device)

    @property
    def missing(self) -> list[int]:
        """Sizes not captured yet, in the order in which to do it: the largest first, the others fit into its memory."""
        return [size for size in reversed(self._sizes) if size not in self._recorded]

    def capture(self, size: int) -> None:
        """Make the graph of one size. Overwrites the dummy block and waits for the device."""
        batch = self._batch(size)
        # What stands there of earlier steps may name blocks that are somebody's by now.
        self._slot_mapping[:size].fill_(self._dummy_index)
        self._seqused_k[:size].fill_(1)
        self._positions[:size].zero_()
        self._recorded[size] = self._recorder.record(lambda: self._compute(batch))

    def size_for(self, rows: int) -> int | None:
        """The size to which a batch of that many decode rows is to be padded; None if no graph takes it."""
        for size in self._sizes[bisect_left(self._sizes, rows) :]:
            if size in self._recorded:
                return size
        return None

    def run(self, batch: ForwardBatch) -> torch.Tensor:
        """Logits, float32 (size, vocabulary rows of this rank), of a batch padded to a size that size_for() named.

        They are good until the next run.
        """
        size, attention = len(batch.token_ids), batch.attention
        replay, logits = self._recorded[size]
        torch._foreach_copy_(
            [self._token_ids[:size], self._positions[:size], self._lengths[:size], self._slot_mapping[:size]],
            [batch.token_ids, batch.positions, batch.lengths, attention.slot_mapping],
        )
        self._seqused_k[:size].copy_(attention.seqused_k)
        self._block_table[:size, : attention.block_table.shape[1]].copy_(attention.block_table)
        replay()
        return logits

    def close(self) -> None:
        """Give the graphs up: before the collectives that they hold are closed."""
        self._recorded.clear()
        self._recorder.close()

    def _batch(self, size: int) -> ForwardBatch:
        attention = AttentionMetadata(
            num_decodes=size,
            slot_mapping=self._slot_mapping[:size],
            block_table=self._block_table[:size],
            cu_q=self._cu_q[: size + 1],
            seqused_k=self._seqused_k[:size],
            query_lengths=(1,) * size,
            # Whoever replays it has others, none of them longer: nothing may be read off these.
            key_lengths=(self._block_table.shape[1] * self._block_size,) * size,
            block_size=self._block_size,
        )

        return ForwardBatch(
            token_ids=self._token_ids[:size],
            positions=self._positions[:size],
            lengths=self._lengths[:size],
            attention=attention,
            sample_tokens=self._none,
            sample_slots=self._none,
            sample_rows=[],
            prompt_rows=[],
        )
