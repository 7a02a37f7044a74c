"""The fused all-reduce, residual sum and RMSNorm, of ranks that all live in this process, in Triton's interpreter."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from phalanx.kernels import cuda
from phalanx.kernels.cuda.all_reduce import Peers, receive_add_norm, send_rows
from phalanx.tests.compile_triton import ARCHITECTURES, compile_calls

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    cuda.interpret(True)
    yield
    cuda.interpret(False)


class Ranks:
    """N ranks, each with memory of its own that all address."""

    def __init__(self, count: int, half_bytes: int) -> None:
        self.memories = [torch.zeros(2 * half_bytes, dtype=torch.uint8) for _ in range(count)]
        addresses = torch.tensor([memory.data_ptr() for memory in self.memories])
        self.peers = [Peers(addresses, torch.zeros(2, dtype=torch.int32), rank, half_bytes) for rank in range(count)]


class Call:
    """One call's messages and totals, and what must come of them."""

    def __init__(self, count: int, rows: int, columns: int, dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.dtype, self.eps = dtype, 1e-5
        self.messages = [torch.randn(rows, columns, generator=generator).to(dtype) for _ in range(count)]
        self.before = torch.randn(rows, columns, generator=generator)
        self.bias = torch.randn(columns, generator=generator).to(dtype) if seed % 2 else None
        self.weight = torch.rand(columns, generator=generator) + 0.5

    def receive(self, peers: Peers) -> tuple[torch.Tensor, torch.Tensor]:
        total = self.before.clone()
        normed = receive_add_norm(self.dtype, self.bias, total, self.weight, self.eps, self.dtype, peers)
        return total, normed

    def check(self, total: torch.Tensor, normed: torch.Tensor) -> None:
        added = torch.zeros_like(self.before)
        for message in self.messages:
            added += message.float()
        if self.bias is not None:
            added += self.bias.float()
        expected = self.before + added
        assert torch.equal(total, expected)
        wide = expected.double()
        norm = wide / (wide.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight
        tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[self.dtype]
        assert normed.dtype == self.dtype
        torch.testing.assert_close(normed.double(), norm, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 64), (2, 3, 5120), (3, 2, 100), (5, 1, 17), (8, 4, 896)])
def test_every_rank_has_the_sum_in_rank_order_and_its_norm(
    count: int, rows: int, columns: int, dtype: torch.dtype
) -> None:
    ranks = Ranks(count, 65536)
    for step in range(3):
        call = Call(count, rows, columns, dtype, seed=step)
        for message, peers in zip(call.messages, ranks.peers, strict=True):
            send_rows(message, peers)
        results = [call.receive(peers) for peers in ranks.peers]
        for total, normed in results:
            call.check(total, normed)
            assert torch.equal(normed, results[0][1])


def test_a_rank_may_send_the_next_rows_before_the_others_have_read_the_last() -> None:
    """All that the one barrier between sending and receiving forbids is to be two calls ahead."""
    ranks = Ranks(2, 4096)
    first, second = ranks.peers
    calls = [Call(2, 2, 256, torch.bfloat16, seed) for seed in range(6)]
    send_rows(calls[0].messages[0], first)
    for call, following in zip(calls, [*calls[1:], None], strict=True):
        send_rows(call.messages[1], second)
        call.check(*call.receive(first))
        if following is not None:
            send_rows(following.messages[0], first)
        call.check(*call.receive(second))


def test_calls_take_the_halves_in_turn_whatever_their_shapes() -> None:
    ranks = Ranks(1, 4096)
    memory, peers = ranks.memories[0], ranks.peers[0]
    for step, (rows, columns) in enumerate([(1, 8), (4, 512), (1, 8), (2, 100)]):
        call = Call(1, rows, columns, torch.bfloat16, seed=step)
        send_rows(call.messages[0], peers)
        half = memory[4096 * (step % 2) :][: call.messages[0].nbytes]
        assert torch.equal(half.view(torch.bfloat16), call.messages[0].flatten())
        assert peers.turns.tolist() == [step % 2, step % 2]
        call.check(*call.receive(peers))
        assert peers.turns.tolist() == [1 - step % 2, step % 2]


def test_the_norm_may_have_another_dtype_than_what_is_sent() -> None:
    ranks = Ranks(1, 4096)
    x, total = torch.ones(2, 32, dtype=torch.float32), torch.zeros(2, 32)
    send_rows(x, ranks.peers[0])
    normed = receive_add_norm(torch.float32, None, total, torch.ones(32), 0.0, torch.bfloat16, ranks.peers[0])
    assert torch.equal(normed, torch.ones(2, 32, dtype=torch.bfloat16))
    assert torch.equal(total, x)


@pytest.mark.parametrize(
    ("x", "problem"),
    [
        (torch.zeros(1, 2049, dtype=torch.bfloat16), "4098 bytes.*4096 bytes at most"),
        (torch.zeros(4, 4, dtype=torch.int32), "torch.int32"),
        (torch.zeros(4, 8).T, "not contiguous"),
    ],
)
def test_what_cannot_be_sent_is_refused(x: torch.Tensor, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        send_rows(x, Ranks(1, 4096).peers[0])


@pytest.mark.parametrize("total", [torch.zeros(2, 8).bfloat16(), torch.zeros(8, 2).T, torch.zeros(16)])
def test_a_total_of_another_kind_is_refused(total: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be \(T, H\), float32 and contiguous"):
        receive_add_norm(torch.float32, None, total, torch.ones(8), 0.0, torch.float32, Ranks(1, 4096).peers[0])


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_the_kernels_compile_for_every_gpu_within_its_registers() -> None:
    cases = {}
    for ranks, columns, sent in [(2, 896, torch.bfloat16), (8, 5120, torch.float16), (8, 8192, torch.float32)]:
        peers = Peers(_meta(ranks, dtype=torch.int64), _meta(2, dtype=torch.int32), 1, 8 * 2**20)
        x, total = _meta(3, columns, dtype=sent), _meta(3, columns, dtype=torch.float32)
        weight = _meta(columns, dtype=torch.float32)
        bias = _meta(columns, dtype=sent) if ranks == 8 else None
        cases[f"send {sent}"] = functools.partial(send_rows, x, peers)
        cases[f"receive {columns} from {ranks}"] = functools.partial(
            receive_add_norm, sent, bias, total, weight, 1e-6, torch.bfloat16, peers
        )
    compiled = compile_calls(cases)
    assert {kernel.arch for kernel in compiled} == set(ARCHITECTURES)
    assert len(compiled) == len(cases) * len(ARCHITECTURES)
    assert [problem for kernel in compiled for problem in kernel.problems()] == []
