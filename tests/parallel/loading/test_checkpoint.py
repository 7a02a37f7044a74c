from __future__ import annotations

import json
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from phalanx.parallel.loading import checkpoint
from phalanx.parallel.loading.checkpoint import LoadError, WeightSlice, load_weights
from phalanx.parallel.loading.dummy_weights import fill_dummy
from safetensors.torch import save_file

A, B = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


def whole(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> WeightSlice:
    return WeightSlice(name, shape, tuple(slice(0, size) for size in shape), torch.full(shape, -7.0, dtype=dtype))


def part(name: str, shape: tuple[int, ...], *index: slice, dtype: torch.dtype = torch.float32) -> WeightSlice:
    destination = torch.full([i.stop - i.start for i in index], -7.0, dtype=dtype)
    return WeightSlice(name, shape, index, destination)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {A: torch.randn(48, 16, generator=generator), B: torch.randn(16, 48, generator=generator)}


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    for i, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, tmp_path / f"{i}.safetensors")
    write_index(tmp_path, {A: "0.safetensors", B: "1.safetensors"})
    return tmp_path


def write_index(folder: Path, weight_map: dict[str, Any]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_raw(folder: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header) if length is None else length) + header + data
    )


def both() -> list[WeightSlice]:
    return [whole(A, (48, 16)), whole(B, (16, 48))]


@pytest.mark.parametrize("error", [MemoryError("os error 12"), RuntimeError("unable to mmap 769 bytes")])
def test_a_file_that_this_process_has_no_addresses_for_is_not_called_damaged(
    folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(checkpoint, "safe_open", refused)
    with pytest.raises(LoadError, match=r"model\.safetensors cannot be mapped into memory \(.*ulimit -v") as raised:
        load_weights(folder, both())
    assert "copy it again" not in str(raised.value)


@pytest.mark.parametrize("chunk_bytes", [1, 200, 2**25])
@pytest.mark.parametrize("layout", ["folder", "sharded"])
def test_row_and_column_parts_arrive_whatever_the_chunk_size(
    layout: str, chunk_bytes: int, request: pytest.FixtureRequest, tensors: dict[str, torch.Tensor], monkeypatch: Any
) -> None:
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(checkpoint, "MAPPED_BYTES", 1000)
    rows = part(A, (48, 16), slice(11, 37), slice(0, 16))
    columns = part(B, (16, 48), slice(0, 16), slice(5, 29))
    report = load_weights(request.getfixturevalue(layout), [rows, columns])
    assert torch.equal(rows.destination, tensors[A][11:37])
    assert torch.equal(columns.destination, tensors[B][:, 5:29])
    assert report.bytes_read == report.shard_bytes == (26 * 16 + 16 * 24) * 4
    assert report.files == (1 if layout == "folder" else 2)


def test_a_part_lands_inside_a_fused_parameter_and_leaves_the_rest_alone(
    folder: Path, tensors: dict[str, torch.Tensor]
) -> None:
    fused = torch.zeros(40, 16, dtype=torch.bfloat16)
    load_weights(
        folder,
        [WeightSlice(A, (48, 16), (slice(8, 18), slice(0, 16)), fused[20:30]), whole(B, (16, 48))],
    )
    assert torch.equal(fused[20:30], tensors[A][8:18].bfloat16())
    assert not fused[:20].any()
    assert not fused[30:].any()


@pytest.mark.parametrize("stored", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_converted_to_the_dtype_of_their_destination(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    value = torch.randn(5, 3).to(stored)
    save_file({A: value}, tmp_path / "model.safetensors")
    one = whole(A, (5, 3), wanted)
    report = load_weights(tmp_path, [one])
    assert torch.equal(one.destination, value.to(wanted))
    assert report.bytes_read == 15 * stored.itemsize


def test_one_dimensional_and_empty_parts_are_read(tmp_path: Path) -> None:
    bias, weight = torch.randn(10), torch.randn(4, 10)
    save_file({"bias": bias, "weight": weight}, tmp_path / "model.safetensors")
    some = part("bias", (10,), slice(3, 8))
    nothing = [part("weight", (4, 10), slice(0, 4), slice(10, 10)), part("weight", (4, 10), slice(2, 2), slice(0, 10))]
    report = load_weights(tmp_path, [some, *nothing])
    assert torch.equal(some.destination, bias[3:8])
    assert report.bytes_read == 20


def test_a_tensor_may_be_read_into_two_places(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    first, second = whole(A, (48, 16)), part(A, (48, 16), slice(0, 4), slice(0, 16))
    load_weights(folder, [first, second, whole(B, (16, 48))])
    assert torch.equal(first.destination[:4], second.destination)


def test_progress_ends_at_the_total(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 256)
    heard: list[tuple[int, int]] = []
    report = load_weights(folder, both(), progress=lambda done, total: heard.append((done, total)))
    assert len(heard) > 4
    assert heard == sorted(heard)
    assert heard[-1] == (report.shard_bytes, report.shard_bytes)


def test_small_parts_are_read_on_one_of_torchs_threads_and_the_others_are_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SMALL_BYTES", 48 * 16 * 4)
    threads: list[tuple[str, int]] = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        few_rows = slice(0, 8), slice(0, 16)
        slices = [part(A, (48, 16), *few_rows), whole(B, (16, 48)), part(A, (48, 16), *few_rows)]
        load_weights(folder, slices, filled=lambda each: threads.append((each.name, torch.get_num_threads())))
        assert threads == [(A, 1), (B, 2), (A, 1)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_tensors_that_the_model_has_no_place_for_are_left_out_and_reported(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "v_head.weight": torch.ones(4, 4),
        "model.position_ids": torch.arange(3),
        "model.mask": torch.ones(2, dtype=torch.bool),
        "model.scales": torch.ones(5).to(torch.float8_e4m3fn),
        "model.empty": torch.ones(0, 3),
    }
    save_file(tensors | extra, tmp_path / "model.safetensors")
    slices = both()
    filled = list(slices)
    report = load_weights(tmp_path, slices, ignore=lambda name: name.endswith("inv_freq"))
    assert sorted(report.left_out) == sorted(list(extra)[1:])
    assert all(torch.equal(one.destination, tensors[one.name]) for one in filled)


def test_a_part_that_does_not_fit_its_destination_is_refused_where_it_is_made() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        WeightSlice(A, (48, 16), (slice(0, 5), slice(0, 16)), torch.empty(1, 16))
    with pytest.raises(ValueError, match="does not fit"):
        WeightSlice(A, (48, 16), (slice(40, 49), slice(0, 16)), torch.empty(9, 16))


# Faults of the checkpoint. Each must be found before any destination is touched.


def drop_a(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({B: tensors[B]}, folder / "model.safetensors")


def transpose_a(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({A: tensors[A].T.contiguous(), B: tensors[B]}, folder / "model.safetensors")


def integers(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({A: tensors[A].to(torch.int8), B: tensors[B]}, folder / "model.safetensors")


def float8(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({A: tensors[A].to(torch.float8_e4m3fn), B: tensors[B]}, folder / "model.safetensors")


def cut_off(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def cut_off_in_header(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:40])


def absurd_header_length(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_raw(folder, b"{}", length=2**62)


def header_is_not_json(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_raw(folder, b"{not json")


def header_is_a_list(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_raw(folder, b"[1, 2]")


def header_lacks_offsets(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_raw(folder, json.dumps({A: {"dtype": "F32", "shape": [48, 16]}}).encode())


def offsets_contradict_shape(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_raw(folder, json.dumps({A: {"dtype": "F32", "shape": [48, 16], "data_offsets": [0, 8]}}).encode(), b"0" * 8)


def empty_file(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def no_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").unlink()


def only_gguf(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").rename(folder / "model.gguf")


def only_pickle(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


Fault = Callable[[Path, dict[str, torch.Tensor]], None]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (drop_a, ["lack tensor", A]),
        (transpose_a, ["model.safetensors", A, "[16, 48]", "[48, 16]"]),
        (integers, ["model.safetensors", A, "I8", "Quantized checkpoints are not"]),
        (float8, ["model.safetensors", A, "F8_E4M3", "Quantized checkpoints are not"]),
        (cut_off, ["model.safetensors is cut off", "up_proj.weight", "copy it again"]),
        (cut_off_in_header, ["model.safetensors", "cut off", "40 bytes in all"]),
        (absurd_header_length, ["model.safetensors", str(2**62)]),
        (header_is_not_json, ["model.safetensors", "header is damaged"]),
        (header_is_a_list, ["model.safetensors", "header is damaged"]),
        (header_lacks_offsets, ["model.safetensors", "header is damaged"]),
        (offsets_contradict_shape, ["model.safetensors", A, "cannot have 8 bytes"]),
        (empty_file, ["model.safetensors is no safetensors file"]),
        (no_weights, ["holds no weights", "load_format=dummy"]),
        (only_gguf, ["holds no weights", "phalanx.launch.get_model gguf=", "model.gguf out=DIR"]),
        (only_pickle, ["holds no weights", "safe_serialization=True"]),
    ],
)
def test_a_faulty_checkpoint_is_refused_by_name_before_anything_is_read(
    fault: Fault, says: list[str], folder: Path, tensors: dict[str, torch.Tensor]
) -> None:
    fault(folder, tensors)
    slices = both()
    with pytest.raises(LoadError) as caught:
        load_weights(folder, slices)
    for words in says:
        assert words in str(caught.value)
    assert all(bool((one.destination == -7).all()) for one in slices)


def test_an_index_that_names_an_absent_file_is_refused(sharded: Path) -> None:
    (sharded / "1.safetensors").unlink()
    with pytest.raises(LoadError, match=rf"1\.safetensors is missing, but .*index\.json says that it holds {B}"):
        load_weights(sharded, both())


def test_an_index_that_lists_a_tensor_its_file_lacks_is_refused(sharded: Path) -> None:
    write_index(sharded, {A: "0.safetensors", B: "0.safetensors"})
    with pytest.raises(LoadError, match=rf"0\.safetensors lacks tensor {B}, which .*index\.json says is there"):
        load_weights(sharded, both())


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}"])
def test_an_index_that_is_none_is_refused(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(LoadError, match=r"index\.json"):
        load_weights(sharded, both())


def test_a_tensor_in_two_files_is_refused_unless_both_hold_the_same(
    sharded: Path, tensors: dict[str, torch.Tensor]
) -> None:
    save_file(tensors, sharded / "1.safetensors")
    load_weights(sharded, both())
    save_file({**tensors, A: tensors[A].roll(1, 0)}, sharded / "1.safetensors")
    with pytest.raises(LoadError, match=r"is in both .*0\.safetensors and .*1\.safetensors, and not the same"):
        load_weights(sharded, both())


def test_an_index_may_name_a_tensor_that_nobody_needs_and_no_file_has(sharded: Path) -> None:
    write_index(sharded, {A: "0.safetensors", B: "1.safetensors", "v_head.weight": "1.safetensors"})
    assert load_weights(sharded, both()).left_out == ()


def test_files_without_their_index_and_adapters_are_named(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(LoadError, match=r"holds no weights.*0\.safetensors, 1\.safetensors is one of 2 files that no"):
        load_weights(sharded, both())
    (sharded / "adapter_config.json").write_text("{}")
    with pytest.raises(LoadError, match=r"an adapter \(adapter_config\.json\); adapters are not supported: merge it"):
        load_weights(sharded, both())


def test_a_quantized_checkpoint_without_a_word_in_its_config_is_named(
    folder: Path, tensors: dict[str, torch.Tensor]
) -> None:
    packed = {A.replace("weight", "qweight"): torch.ones(4, 4, dtype=torch.int32), B: tensors[B]}
    save_file(packed, folder / "model.safetensors")
    with pytest.raises(LoadError, match=rf"lack tensor {A}.*others are 'I32': quantized checkpoints are not supported"):
        load_weights(folder, both())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(
    folder: Path, tensors: dict[str, torch.Tensor], value: float
) -> None:
    tensors[B][3, 20] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(LoadError, match=rf"model\.safetensors: tensor {B} holds values that are not finite"):
        load_weights(folder, both())
    load_weights(folder, [whole(A, (48, 16)), part(B, (16, 48), slice(0, 16), slice(21, 48))])


def test_a_weight_too_large_for_float16_is_refused_and_the_dtype_to_set_is_named(tmp_path: Path) -> None:
    save_file({A: torch.tensor([[1.0, -1e5]])}, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match=rf"{A} holds -100000, .*65504.*set dtype=bfloat16"):
        load_weights(tmp_path, [whole(A, (1, 2), torch.float16)])


# Dummy weights.


def test_dummy_weights_are_one_model_however_they_are_cut() -> None:
    name, shape = "model.layers.3.mlp.down_proj.weight", (70, 300)
    all_of_it = whole(name, shape)
    fill_dummy([all_of_it], seed=5)
    for index in [(slice(13, 40), slice(0, 300)), (slice(0, 70), slice(100, 257)), (slice(7, 8), slice(2, 3))]:
        one = part(name, shape, *index)
        fill_dummy([one], seed=5)
        assert torch.equal(one.destination, all_of_it.destination[index])


def test_dummy_weights_differ_between_tensors_and_seeds() -> None:
    first, other_name, other_seed = whole("a", (8, 8)), whole("b", (8, 8)), whole("a", (8, 8))
    fill_dummy([first, other_name], seed=1)
    fill_dummy([other_seed], seed=2)
    assert not torch.equal(first.destination, other_name.destination)
    assert not torch.equal(first.destination, other_seed.destination)


def test_dummy_matrices_look_like_independent_uniform_numbers() -> None:
    shape = (600, 400)
    one = whole("model.layers.0.mlp.up_proj.weight", shape)
    fill_dummy([one], seed=0)
    values = one.destination
    assert abs(float(values.mean())) < 2e-4
    assert float(values.std()) == pytest.approx(0.02, rel=0.01)
    assert float(values.abs().max()) <= 0.02 * 3**0.5 * 1.001
    # The largest singular value of independent entries (Marchenko and Pastur); of low rank, it would be far larger.
    singular = torch.linalg.svdvals(values)
    assert float(singular[0]) == pytest.approx(0.02 * (600**0.5 + 400**0.5), rel=0.05)
    assert float(singular[-1]) == pytest.approx(0.02 * (600**0.5 - 400**0.5), rel=0.15)


def test_dummy_norms_are_near_one_and_biases_are_small() -> None:
    norm, bias = whole("model.norm.weight", (500,)), whole("model.layers.0.self_attn.q_proj.bias", (500,))
    fill_dummy([norm, bias], seed=0)
    assert float((norm.destination - 1).abs().max()) < 0.04
    assert 0.005 < float(bias.destination.abs().mean()) < 0.04


# Memory.

MEASURE = textwrap.dedent(
    """
    import sys
    from pathlib import Path

    import safetensors, torch
    from phalanx.parallel.loading.checkpoint import WeightSlice, load_weights

    def status(field):
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    rows, columns, count, kind = 8192, 4096, 9, sys.argv[2]
    part = (slice(0, rows), slice(512, 1024)) if kind == "columns" else (slice(1024, 2048), slice(0, columns))
    # Warmed up, so that what libraries allocate once is the interpreter's.
    torch.ones(4, 4, dtype=torch.bfloat16).aminmax()
    before = status("VmHWM")
    slices = [
        WeightSlice(
            f"layer.{i}.weight",
            (rows, columns),
            part,
            torch.empty([p.stop - p.start for p in part], dtype=torch.bfloat16),
        )
        for i in range(count)
    ]
    report = load_weights(Path(sys.argv[1]), slices)
    held = sum(one.destination.nbytes for one in slices)
    print(report.bytes_read / report.shard_bytes, status("VmHWM") - before - held)
    """
)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    block = torch.randn(8192, 4096, dtype=torch.float32).bfloat16()
    save_file({f"layer.{i}.weight": block.clone() for i in range(9)}, folder / "model.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_loading_an_eighth_of_a_600_mb_file_needs_at_most_300_mb_besides_the_shard(large: Path, kind: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large), kind], capture_output=True, text=True, check=True, timeout=300
    )
    ratio, excess = run.stdout.split()
    assert float(ratio) <= 1.05
    assert float(excess) <= 300e6
