"""AMX's part of the kernels: its own bits, on the processor and emulated, and how it is asked for and given up."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
import torch
from phalanx.kernels import cpu
from phalanx.kernels.attention import AttentionMetadata
from phalanx.kernels.cpu.attention import CpuAttention
from phalanx.kernels.weight_formats import NAMES, get_weight_format
from phalanx.kernels.weight_formats.packed import PackedWeight
from phalanx.tests.kernels.packing import pack

AMX, EMULATED, VECTORS = "avx512_amx", "emulated_amx", "avx512_bf16"
pytestmark = pytest.mark.skipif(cpu.native is None, reason="not built; see test_extensions.py")
HAS_AMX = cpu.native is not None and cpu.native.can_run(AMX)
needs_amx = pytest.mark.skipif(not HAS_AMX, reason="this processor has no AMX")
TILED = [AMX, EMULATED] if HAS_AMX else [EMULATED]
MOST_INTEGER_ROWS = cpu.native.MOST_INTEGER_ROWS if cpu.native is not None else 0
SHAPES = [(1, 64, 896), (5, 80, 128), (17, 33, 72), (33, 90, 1504), (40, 32, 320), (70, 48, 96), (3, 1, 8)]


@pytest.fixture(autouse=True)
def chosen() -> Iterator[None]:
    before = cpu.native.kernels()
    yield
    cpu.native.use_kernels(before)


def _product(kernels: str, kind: str, rows: int, n: int, k: int, *, deterministic: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * n * k)
    weight = (torch.randn(n + -n % cpu.PANEL, k, generator=generator) / k**0.5).bfloat16()
    x = torch.randn(rows, k, generator=generator).bfloat16()
    cpu.native.use_kernels(kernels)
    return pack(weight, n, kind, deterministic=deterministic).linear_float(x)


@needs_amx
@pytest.mark.parametrize("shape", SHAPES)
def test_emulated_tiles_have_the_processors_bits(shape: tuple[int, int, int]) -> None:
    assert torch.equal(_product(AMX, "none", *shape), _product(EMULATED, "none", *shape))


@needs_amx
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] > MOST_INTEGER_ROWS])
def test_emulated_tiles_have_the_processors_bits_of_many_rows_of_int8_weights(shape: tuple[int, int, int]) -> None:
    rows, n, k = shape
    generator = torch.Generator().manual_seed(rows * n * k)
    weight = (torch.randn(n + -n % cpu.PANEL, k, generator=generator) / k**0.5).bfloat16()
    x = torch.randn(rows, k, generator=generator).bfloat16()
    cpu.native.use_kernels(AMX)
    # Packed once: the sums of squared errors, by which scales are chosen, differ in their last bits.
    packed = pack(weight, n, "int8")
    expected = packed.linear_float(x)
    cpu.native.use_kernels(EMULATED)
    assert torch.equal(packed.linear_float(x), expected)


@needs_amx
@pytest.mark.parametrize("kind", ["int8", "w8a8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_of_8_bit_numbers_have_the_bits_of_vectors(kind: str, shape: tuple[int, int, int]) -> None:
    products = [_product(kernels, kind, *shape, deterministic=True) for kernels in (AMX, VECTORS)]
    assert torch.equal(*products)


# One row block more than integers have, two blocks, an odd number of them, more than one task; 36 and 200 are no
# multiples of a group's 32 columns, 40 and 90 none of a panel pair's 32.
@pytest.mark.parametrize("kernels", TILED)
@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [
        (MOST_INTEGER_ROWS + 1, 48, 200), (32, 90, 36), (33, 40, 200), (40, 96, 1056), (100, 33, 36), (70, 16, 4),
    ],
)  # fmt: skip
def test_many_rows_are_multiplied_with_int8_weights_as_the_bfloat16_numbers_they_stand_for(
    kernels: str, rows: int, n: int, k: int
) -> None:
    cpu.native.use_kernels(kernels)
    generator = torch.Generator().manual_seed(k)
    weight = (torch.randn(n + -n % cpu.PANEL, k, generator=generator) / k**0.5).bfloat16()
    weight[3] = 0  # numbers of zero have a scale of 1
    x = torch.randn(rows, k, generator=generator).bfloat16()
    packed = pack(weight.clone(), n, "int8")
    became = packed.look_up(torch.arange(len(weight)))
    found = packed.linear_float(x)
    assert torch.equal(found, pack(became.clone(), n).linear_float(x))
    assert not found[:, 3].any()

    # Sums of float32, of at most k products; and rounding weights leans to neither side.
    exact = x.double() @ became[:n].double().T
    bound = 2.0**-23 * (k / 16 + 4) * (x.double().abs() @ became[:n].double().abs().T)
    assert ((found.double() - exact).abs() <= bound).all()
    error = ((became.double() - weight.double()) * weight.double().sign())[:n]
    assert abs(error.sum()) <= 4 * error.norm()

    # So they differ from the integers' results by no more than the rounding of weights to 8 bits of a number.
    integers = pack(weight.clone(), n, "int8", deterministic=True).linear_float(x).double()
    most = (2.0**-8 + 2.0**-14) * (x.double().abs() @ became[:n].double().abs().T) + 2.0**-14 * x.double().abs().amax(
        dim=1, keepdim=True
    ) * became[:n].double().abs().sum(dim=1)
    assert ((found.double() - integers).abs() <= most).all()


@pytest.mark.parametrize("kernels", TILED)
@pytest.mark.parametrize("output", ["silu_mul", "add_to"])
def test_many_rows_of_int8_weights_end_as_bfloat16_ones_do(kernels: str, output: str) -> None:
    cpu.native.use_kernels(kernels)
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(96, 100, generator=generator) / 10).bfloat16()
    x = torch.randn(40, 100, generator=generator).bfloat16()
    bias = torch.randn(96, generator=generator).bfloat16()
    packed = pack(weight.clone(), 96, "int8")
    plain = pack(packed.look_up(torch.arange(96)), 96)
    if output == "silu_mul":
        assert torch.equal(packed.silu_mul(x, bias), plain.silu_mul(x, bias))
    else:
        totals = torch.ones(2, 40, 96)
        packed.add_to(totals[0], x, bias)
        plain.add_to(totals[1], x, bias)
        assert torch.equal(totals[0], totals[1])


def _rows_with_the_same_bits(weight: PackedWeight, x: torch.Tensor, counts: Sequence[int]) -> bool:
    """Whether the first rows of x have the same results in each number of rows."""
    least = min(8, counts[0])
    first, *others = (weight.linear_float(x[:count])[:least] for count in counts)
    return all(torch.equal(each, first) for each in others)


@pytest.mark.parametrize("kernels", TILED)
@pytest.mark.parametrize("kind", ["int8", "w8a8", "int4"])
def test_int8_weights_are_multiplied_in_two_ways_unless_they_are_deterministic(kernels: str, kind: str) -> None:
    cpu.native.use_kernels(kernels)
    generator = torch.Generator().manual_seed(2)
    matrix = (torch.randn(48, 200, generator=generator) / 14).bfloat16()
    x = torch.randn(100, 200, generator=generator).bfloat16()
    few, many = (1, 4, 5, MOST_INTEGER_ROWS - 1, MOST_INTEGER_ROWS), (MOST_INTEGER_ROWS + 1, 32, 33, 40, 100)
    weight = pack(matrix.clone(), 48, kind)
    assert _rows_with_the_same_bits(weight, x, few)
    assert _rows_with_the_same_bits(weight, x, many)
    assert _rows_with_the_same_bits(weight, x, [few[-1], many[0]]) == (kind != "int8")

    head = get_weight_format(kind, deterministic=True).for_head()
    for deterministic in (pack(matrix.clone(), 48, kind, deterministic=True), head.pack(matrix.clone(), 48)):
        assert _rows_with_the_same_bits(deterministic, x, [*few, *many])


@pytest.mark.parametrize(("kernels", "n"), [(EMULATED, 48), *([(AMX, 48), (AMX, 4096)] if HAS_AMX else [])])
@pytest.mark.parametrize("kind", NAMES)
def test_a_rows_bits_are_the_same_beside_any_number_of_others(kernels: str, kind: str, n: int) -> None:
    cpu.native.use_kernels(kernels)
    generator = torch.Generator().manual_seed(n)
    weight = pack((torch.randn(n, 1056, generator=generator) / 32).bfloat16(), n, kind, deterministic=True)
    x = torch.randn(600 if kernels == AMX else 70, 1056, generator=generator).bfloat16()
    alone = [weight.linear_float(x[row : row + 1]) for row in range(8)]
    for rows in (2, 16, 17, 32, 33, 64, 65, len(x)):
        together = weight.linear_float(x[:rows])
        assert all(torch.equal(together[row : row + 1], alone[row]) for row in range(min(8, rows))), rows


@pytest.mark.parametrize("kernels", TILED)
@pytest.mark.parametrize(("keys", "head_dim"), [(300, 64), (2100, 80)])
def test_a_tokens_attention_has_the_same_bits_in_a_decode_and_in_a_chunk(
    kernels: str, keys: int, head_dim: int
) -> None:
    cpu.native.use_kernels(kernels)
    heads, kv_heads, block_size, queries = 6, 2, 16, 40
    generator = torch.Generator().manual_seed(keys)
    blocks = -(-keys // block_size)
    caches = [torch.zeros(blocks, block_size, kv_heads, head_dim, dtype=torch.bfloat16) for _ in range(2)]
    k, v = (torch.randn(keys, kv_heads, head_dim, generator=generator).bfloat16() for _ in range(2))
    q = torch.randn(queries, heads, head_dim, generator=generator).bfloat16()
    backend = CpuAttention()
    backend.store_kv(k, v, caches[0], caches[1], torch.arange(keys))

    def attend(first: int, last: int) -> torch.Tensor:
        """Queries first to last - 1 of the last ones, as one chunk."""
        metadata = AttentionMetadata(
            num_decodes=int(last - first == 1),
            slot_mapping=torch.arange(keys - queries + first, keys - queries + last),
            block_table=torch.arange(blocks)[None],
            cu_q=torch.tensor([0, last - first], dtype=torch.int32),
            seqused_k=torch.tensor([keys - queries + last], dtype=torch.int32),
            query_lengths=(last - first,),
            key_lengths=(keys - queries + last,),
            block_size=block_size,
        )
        return backend.attend(q[first:last], caches[0], caches[1], backend.plan(metadata))

    whole = attend(0, queries)
    assert torch.equal(torch.cat([attend(0, 13), attend(13, queries)]), whole)
    assert torch.equal(torch.cat([attend(i, i + 1) for i in range(queries)]), whole)


@needs_amx
def test_tiles_of_another_library_are_no_harm() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(256, 256, generator=generator) / 16).bfloat16()
    x = torch.randn(64, 256, generator=generator).bfloat16()
    packed = pack(weight.clone(), 256)
    first = packed.linear_float(x)
    for _ in range(3):
        x @ weight.T  # oneDNN configures the same thread's tiles for itself
        assert torch.equal(packed.linear_float(x), first)


@needs_amx
def test_an_int8_weight_of_other_kernels_is_refused() -> None:
    cpu.native.use_kernels(VECTORS)
    packed = pack(torch.randn(16, 32).bfloat16(), 16, "int8")
    cpu.native.use_kernels(AMX)
    with pytest.raises(ValueError, match="packed for"):
        packed.linear_float(torch.randn(1, 32).bfloat16())


REFUSED = """
import ctypes, struct
# A filter of system calls (seccomp(2)): arch_prctl, number 158, answers EPERM, as on a system that masks AMX off.
def code(op, jt, jf, k): return struct.pack("HBBI", op, jt, jf, k)
program = code(0x20, 0, 0, 0) + code(0x15, 0, 1, 158) + code(0x06, 0, 0, 0x00050001) + code(0x06, 0, 0, 0x7FFF0000)
buffer = ctypes.create_string_buffer(program)
filter_of = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, ctypes.c_char_p(filter_of), 0, 0) == 0, ctypes.get_errno()  # PR_SET_SECCOMP
import torch
from phalanx.kernels import cpu
from phalanx.kernels.weight_formats import PLAIN_PANELS
assert not cpu.native.can_run("avx512_amx")
weight = torch.randn(32, 64).bfloat16()
x = torch.randn(3, 64).bfloat16()
product = PLAIN_PANELS.pack(weight.clone(), 32).linear_float(x)
torch.testing.assert_close(product, x.float() @ weight.float().T, atol=1e-3, rtol=1e-3)
print(cpu.native.kernels())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "prctl"), reason="filters of system calls are Linux's")
def test_where_the_system_refuses_tiles_other_kernels_serve() -> None:
    process = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() in {"avx512_bf16", "avx512_vnni", "avx512", "avx2", "portable"}
