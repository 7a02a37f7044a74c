"""Weight formats: what they answer before and after packing, and that nobody else knows their names."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from phalanx.engine.config import EngineConfig
from phalanx.engine.errors import ConfigError
from phalanx.kernels import cpu
from phalanx.kernels.weight_formats import NAMES, PLAIN_PANELS, get_weight_format
from phalanx.kernels.weight_formats.base import PANEL_ROWS, WeightFormat
from phalanx.kernels.weight_formats.bf16_in_12_bits import BF16_IN_12_BITS
from phalanx.kernels.weight_formats.packed import PackedWeight

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("kernels", "parallel", "engine", "serving", "launch")
OWN = ROOT / "kernels" / "weight_formats"
FORMATS = [*map(get_weight_format, NAMES), BF16_IN_12_BITS]
SPECIFIC = {each.name for each in FORMATS if each is not PLAIN_PANELS}
each_format = pytest.mark.parametrize("weight_format", FORMATS, ids=lambda each: each.name)
needs_kernels = pytest.mark.skipif(cpu.native is None, reason="not built; see test_extensions.py")
CPU = torch.device("cpu")


def _weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5).bfloat16()


def _exact(packed: PackedWeight) -> torch.Tensor:
    """The numbers of a weight as they are multiplied, by multiplying with unit vectors."""
    return packed.linear_float(torch.eye(packed.columns, dtype=torch.bfloat16)).T


def test_a_configuration_takes_the_registered_names() -> None:
    for name in NAMES:
        assert get_weight_format(EngineConfig(model="m", quantization=name).quantization).name == name
    with pytest.raises(ConfigError, match=f"quantization='bf16_12'.*{', '.join(NAMES)}"):
        EngineConfig(model="m", quantization="bf16_12")
    with pytest.raises(ValueError, match=f"quantization='int2'.*{', '.join(NAMES)}"):
        get_weight_format("int2")


def test_names_and_codes_are_each_formats_own() -> None:
    assert len({each.name for each in FORMATS}) == len({each.code for each in FORMATS}) == len(FORMATS)
    assert PANEL_ROWS == cpu.PANEL


@pytest.mark.parametrize(("name", "head"), [("none", "none"), ("int8", "int8"), ("w8a8", "int8"), ("int4", "int8")])
def test_the_head_keeps_8_bits_of_weight_and_16_of_x(name: str, head: str) -> None:
    kept = get_weight_format(name).for_head()
    assert kept is get_weight_format(head)
    assert not kept.rounds_x


@needs_kernels
@each_format
@pytest.mark.parametrize("columns", [8, 32, 72, 136, 1280])
def test_the_bytes_told_beforehand_are_those_of_the_packed_weight(weight_format: WeightFormat, columns: int) -> None:
    packed = weight_format.pack(_weight(48, columns), 45)
    if packed.format is weight_format:
        assert packed.nbytes == weight_format.nbytes(48, columns, 2)
    else:  # told without the numbers: a plain weight may come to less
        assert packed.nbytes < weight_format.nbytes(48, columns, 2)
    assert BF16_IN_12_BITS.nbytes(48, columns, 2) == cpu.native.compressed_bytes(48, columns)


@needs_kernels
@each_format
def test_rows_may_be_cut_anywhere_and_columns_at_multiples_of_what_stays_together(weight_format: WeightFormat) -> None:
    weight = _weight(64, 192)
    whole = _exact(weight_format.pack(weight.clone(), 64))
    for first, last in ((0, 5), (5, 38), (38, 64)):
        part = torch.zeros(48, 192, dtype=torch.bfloat16)
        part[: last - first] = weight[first:last]
        assert torch.equal(_exact(weight_format.pack(part, last - first)), whole[first:last])
    for first, last in ((0, weight_format.column_cut * 3), (192 - weight_format.column_cut * 5, 192)):
        if last - first > 1 and (last - first) % 2 == 0:  # the kernels' bfloat16 comes in pairs
            weight_format.pack(weight[:, first:last].contiguous(), 64)
    # Cut between groups that share a scale, the parts have the whole matrix's bits.
    if getattr(weight_format, "group", 64) is not None:
        parts = [_exact(weight_format.pack(weight[:, i : i + 64].contiguous(), 64)) for i in (0, 64, 128)]
        assert torch.equal(torch.cat(parts, dim=1), whole)


@needs_kernels
@each_format
def test_columns_that_stay_together_are_not_parted(weight_format: WeightFormat) -> None:
    if weight_format.column_cut > 1:
        with pytest.raises(ValueError, match=rf"multiple of {weight_format.column_cut}\b"):
            weight_format.pack(_weight(16, weight_format.column_cut + 2), 16)


@needs_kernels
@each_format
def test_rows_are_looked_up_as_they_are_multiplied(weight_format: WeightFormat) -> None:
    packed = weight_format.for_head().pack(_weight(48, 128), 45)
    expected = torch.cat([_exact(packed)[[44, 3]], torch.zeros(2, 128)]).float()
    # A number times its scale may lie halfway between two of bfloat16: it is rounded away from zero.
    rounded = (expected.contiguous().view(torch.int32) + 0x8000) & -0x10000
    assert torch.equal(packed.look_up(torch.tensor([44, 3, -1, 45])), rounded.view(torch.float32).bfloat16())


@needs_kernels
def test_a_plain_bfloat16_weight_becomes_one_of_12_bits_where_it_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    wild = torch.exp2(torch.randint(-60, 1, (16, 256), generator=torch.Generator().manual_seed(0)).float())
    for fast in (True, False):
        monkeypatch.setattr(cpu, "compresses", lambda fast=fast: fast)
        expected = BF16_IN_12_BITS if fast else PLAIN_PANELS
        assert PLAIN_PANELS.preferred(torch.bfloat16) is expected
        assert PLAIN_PANELS.pack(_weight(16, 256), 16).format is expected
        assert PLAIN_PANELS.preferred(torch.float32) is PLAIN_PANELS
        assert PLAIN_PANELS.pack(_weight(16, 256).float(), 16).format is PLAIN_PANELS
        assert PLAIN_PANELS.pack(_weight(16, 12), 16).format is PLAIN_PANELS
        assert PLAIN_PANELS.pack((_weight(16, 256) * wild).bfloat16(), 16).format is PLAIN_PANELS


@each_format
def test_a_format_refuses_what_it_cannot_be_on(weight_format: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    if weight_format is PLAIN_PANELS:
        weight_format.check(torch.device("cuda"), torch.float16)
        return
    if cpu.native is not None:
        weight_format.check(CPU, torch.bfloat16)
    for device, dtype in ((torch.device("cuda"), torch.bfloat16), (CPU, torch.float32), (CPU, torch.float16)):
        with pytest.raises(ValueError, match=rf"{device.type}.* {dtype}.*set (quantization=none|dtype=bfloat16)"):
            weight_format.check(device, dtype)
    monkeypatch.setattr(cpu, "native", None)
    with pytest.raises(ValueError, match=r"C\+\+ kernels"):
        weight_format.check(CPU, torch.bfloat16)


def test_names_cuts_and_bytes_need_no_torch() -> None:
    program = (
        "import sys\n"
        "from phalanx.engine.config import EngineConfig\n"
        "from phalanx.kernels.weight_formats import NAMES, get_weight_format\n"
        "from phalanx.launch.plan import main\n"
        "for name in NAMES:\n"
        "    assert get_weight_format(name).for_head().nbytes(16, 64, 2) and get_weight_format(name).column_cut\n"
        "    assert main(['model=qwen2_5_0_5b', f'quantization={name}']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_nobody_else_compares_a_formats_name() -> None:
    paths = [path for room in ROOMS for path in (ROOT / room).rglob("*.py") if OWN not in path.parents]
    found = [f"{path.relative_to(ROOT)}:{line}" for path in paths for line in _comparisons(path.read_text())]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "if kind == 'int8': pass",
        "if 'w8a8' != kind: pass",
        "if kind in ('none', 'int4'): pass",
        "x = {'int8': 1}",
        "x = dict(int4=1)",
        "match kind:\n    case 'w8a8': pass",
        "if kind.startswith('int'): pass\nif config.quantization != 'none': pass",
        "x = quantization in ('none',)",
        "x = KINDS.index('int8')",
    ],
)
def test_a_comparison_with_a_formats_name_is_found(source: str) -> None:
    assert list(_comparisons(source))


@pytest.mark.parametrize(
    "source",
    [
        "if config.kv_cache_dtype == 'int8': pass",
        "if graphs == 'none': pass",
        "make(quantization='int8')",
        "KV_CACHE_DTYPES = ('auto', 'int8')",
        "x = 'int4 keeps 4 bits'",
    ],
)
def test_what_is_no_comparison_with_a_formats_name_is_let_be(source: str) -> None:
    assert not list(_comparisons(source))


def _comparisons(source: str) -> Iterator[int]:
    """Lines that compare something with a format's name, or look something up by one.

    `none` counts where a quantization is compared, for other settings have a none too; int8 does not where it is the KV
    cache's.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            texts = {text for side in sides for text in _texts(side)}
            about = {_last_name(side) for side in sides}
            if about & {"kv_cache_dtype"}:
                continue
            if texts & SPECIFIC or (texts and "quantization" in about):
                yield node.lineno
        elif isinstance(node, ast.Dict):
            if {text for key in node.keys if key for text in _texts(key)} & SPECIFIC:
                yield node.lineno
        elif isinstance(node, ast.MatchValue):
            if set(_texts(node.value)) & SPECIFIC:
                yield node.lineno
        elif isinstance(node, ast.Call):
            keywords = {keyword.arg for keyword in node.keywords} & SPECIFIC
            looked_up = isinstance(node.func, ast.Attribute) and node.func.attr in ("index", "get", "startswith")
            if keywords or (looked_up and {text for given in node.args for text in _texts(given)} & SPECIFIC):
                yield node.lineno
        elif isinstance(node, ast.Subscript) and set(_texts(node.slice)) & SPECIFIC:
            yield node.lineno


def _texts(node: ast.expr) -> Iterator[str]:
    """String constants that an expression is, or a tuple, list or set of them holds."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Tuple | ast.List | ast.Set):
        for element in node.elts:
            yield from _texts(element)


def _last_name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None
