"""All-reduce, residual sum and RMSNorm in one pass, over memory that the ranks of one host share.

Each rank copies its rows to memory of its own (`send_rows`), all ranks wait for each other once, and each reads every
rank's rows (`receive_add_norm`). The wait is the caller's, between the two: whoever is past it has been joined by all.

One wait a call is enough, since calls take two halves of the memory in turn. A rank writes call k + 2's rows over call
k's only after the wait of call k + 1, and the others joined that one after they had read call k's rows, as each
device does its work in order. That holds for one stream of calls a rank, the same on every rank.

Whose turn it is stands in device memory, so that replayed CUDA graphs and calls outside of them, however mixed, take
turns as they are executed. send_rows reads turns[0] and notes it in turns[1]; receive_add_norm reads turns[1] and sets
turns[0] to the other half. Neither kernel writes what its own programs read, and kernels of a stream run one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_SEND_BLOCK = 2048
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Peers:
    """Every rank's memory as this rank's device addresses it; all calls of a rank use the same object."""

    addresses: torch.Tensor  # (N,) int64 on the device: of each rank's memory, divisible by 16
    turns: torch.Tensor  # (2,) int32 on the device, zeros at first
    rank: int
    half_bytes: int  # of each of the two halves of a rank's memory, divisible by 16


def send_rows(x: torch.Tensor, peers: Peers) -> None:
    """Copy `x`, contiguous bfloat16, float16 or float32, to this rank's memory. Raises ValueError if it is too much."""
    if x.dtype not in _TYPES or not x.is_contiguous() or x.nbytes > peers.half_bytes:
        raise ValueError(
            f"a tensor of {x.nbytes} bytes, {x.dtype}, {'' if x.is_contiguous() else 'not '}contiguous; what is sent "
            f"must be contiguous and of {', '.join(map(str, _TYPES))}, {peers.half_bytes} bytes at most"
        )
    _send[(triton.cdiv(x.numel(), _SEND_BLOCK),)](
        x, peers.addresses, peers.turns, peers.half_bytes, x.numel(), RANK=peers.rank, BLOCK=_SEND_BLOCK
    )


def receive_add_norm(
    sent: torch.dtype,
    bias: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    peers: Peers,
) -> torch.Tensor:
    """Add the rows that all ranks have sent, and `bias`, to `total`, in place; returns RMSNorm(total) in `dtype`.

    `total` is (T, H) float32, contiguous, and T * H numbers of dtype `sent` are what every rank has sent; `bias` (H,)
    of any dtype, or None; `weight` (H,). Sums are of float32, in rank order: the same bits on every rank.
    Raises ValueError for a `total` of another dtype or layout.
    """
    if total.dtype != torch.float32 or total.ndim != 2 or not total.is_contiguous():
        raise ValueError(f"total is {tuple(total.shape)} {total.dtype}; it must be (T, H), float32 and contiguous")

    # A program holds a row in registers, a warp for each 1,024 numbers, from 4 to 16.
    rows, columns = total.shape
    out = torch.empty(total.shape, dtype=dtype, device=total.device)
    block = triton.next_power_of_2(columns)
    _receive_add_norm[(rows,)](
        peers.addresses,
        peers.turns,
        peers.half_bytes,
        total,
        weight if bias is None else bias,
        weight,
        out,
        columns,
        eps,
        SENT=_TYPES[sent],
        RANKS=peers.addresses.shape[0],
        HAS_BIAS=bias is not None,
        BLOCK=block,
        num_warps=min(16, max(4, block // 1024)),
    )
    return out


@triton.jit
def _send(x, addresses, turns, half_bytes, numel, RANK: tl.constexpr, BLOCK: tl.constexpr):
    turn = tl.load(turns)
    if tl.program_id(0) == 0:
        tl.store(turns + 1, turn)
    address = tl.load(addresses + RANK) + turn.to(tl.int64) * half_bytes
    # The compiler knows the alignment of arguments only, and would copy number by number here.
    address = tl.multiple_of(address.to(x.dtype), 16)
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    tl.store(address + offsets, tl.load(x + offsets, mask=inside), mask=inside)


@triton.jit
def _receive_add_norm(
    addresses,
    turns,
    half_bytes,
    total,
    bias,
    weight,
    out,
    columns,
    eps,
    SENT: tl.constexpr,
    RANKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    turn = tl.load(turns + 1)
    if row == 0:
        tl.store(turns, 1 - turn)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    first = row.to(tl.int64) * columns

    # Every rank reads the ranks' rows in the same order, so that all have the same bits.
    added = tl.zeros((BLOCK,), tl.float32)
    for rank in tl.static_range(RANKS):
        address = tl.load(addresses + rank) + turn.to(tl.int64) * half_bytes
        address = tl.multiple_of(address.to(tl.pointer_type(SENT)), 16)
        added += tl.load(address + first + offsets, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        added += tl.load(bias + offsets, mask=inside, other=0.0).to(tl.float32)

    summed = tl.load(total + first + offsets, mask=inside, other=0.0) + added
    tl.store(total + first + offsets, summed, mask=inside)

    scale = tl.rsqrt(tl.sum(summed * summed) / columns + eps)
    normed = summed * scale * tl.load(weight + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + first + offsets, normed.to(out.dtype.element_ty), mask=inside)
