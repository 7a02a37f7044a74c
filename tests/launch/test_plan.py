"""launch.plan: what N ranks need, without weights, a GPU or torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from phalanx import CheckpointError, ConfigError
from phalanx.engine.memory.planner import RankMemory
from phalanx.engine.memory.sizes import RUNTIME_BYTES, activation_bytes
from phalanx.launch.cli.plan_table import GIB, Plan, make_plan, remedies
from phalanx.launch.cli.presets import load_preset, presets
from phalanx.launch.plan import main, read_setup, read_spec


def _plan(*arguments: str) -> Plan:
    setup = read_setup(arguments)
    return make_plan(read_spec(setup.config.model), setup)


def test_the_program_plans_without_torch_or_transformers() -> None:
    code = (
        "import sys, phalanx.launch.plan as plan\n"
        "code = plan.main(['model=qwq_32b_preview', 'ranks=3', 'device_memory=48GiB'])\n"
        "sys.exit(9 if {'torch', 'transformers'} & set(sys.modules) else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:5] for line in done.stdout.splitlines() if re.match(r" *[012] +1", line)] == [
        ["0", "15", "3", "9088", "50688"],
        ["1", "15", "3", "9024", "50688"],
        ["2", "10", "2", "9536", "50688"],
    ]
    assert "Smallest number of ranks that fits: 2." in done.stdout


@pytest.mark.parametrize(("memory", "code"), [("48GiB", 0), ("24GiB", 1), ("plenty", 2)])
def test_the_exit_code_says_fits_does_not_fit_or_bad_input(memory: str, code: int) -> None:
    arguments = ["model=qwq_32b_preview", "ranks=2", f"device_memory={memory}"]
    done = subprocess.run([sys.executable, "-m", "phalanx.launch.plan", *arguments], capture_output=True, check=False)
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("model", presets())
def test_every_preset_can_be_planned_with_what_it_is_told_alone(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"model={model}", "ranks=2"]) == 0
    out = capsys.readouterr().out
    assert model in out
    assert "fit" not in out  # without a device nothing is said of fitting
    assert main([f"model={model}", "ranks=2", "device_memory=400GB"]) == 0


def test_numbers_of_qwq_on_one_rank_are_the_models_own() -> None:
    plan = _plan("model=qwq_32b_preview", "device_memory=141GB")
    (need,) = plan.needs
    assert need.kv_token == 262_144
    assert need.weights == pytest.approx(65.5e9, rel=0.001)
    assert plan.kv_tokens == (int(141e9 * 0.9) - need.weights - need.activations) // 262_144
    assert plan.fits


def test_float32_weights_and_cache_take_twice_the_bytes_of_bfloat16() -> None:
    half, full = (_plan("model=qwen2_5_0_5b", f"dtype={dtype}").needs[0] for dtype in ("bfloat16", "float32"))
    assert (full.weights, full.kv_token) == (2 * half.weights, 2 * half.kv_token)
    assert half.activations < full.activations < 2 * half.activations


@pytest.mark.parametrize(("quantization", "head", "layers"), [("int8", 1.0625, 1.0625), ("int4", 1.0625, 0.53125)])
def test_quantized_weights_and_cache_take_their_bytes(quantization: str, head: float, layers: float) -> None:
    for model, tables in (("qwen2_5_0_5b", 0), ("qwq_32b_preview", 1)):
        plain, small = (_plan(f"model={model}", f"quantization={kind}").needs[0] for kind in ("none", quantization))
        spec = read_spec(model)
        table = spec.vocab_size * spec.hidden_size
        expected = (plain.weights / 2 - (1 + tables) * table) * layers + table * (head + 2 * tables)
        assert small.weights == pytest.approx(expected, rel=1e-6)
    need = _plan("model=qwq_32b_preview", "kv_cache_dtype=int8").needs[0]
    assert need.kv_token == 2 * 64 * 8 * (128 + 4)


def test_the_reserve_grows_with_a_steps_tokens_and_rows() -> None:
    plan = _plan("model=qwen2_5_0_5b")
    more = _plan("model=qwen2_5_0_5b", "max_num_batched_tokens=4096", "max_num_seqs=128")
    # The reserve is the runtime's plus a sum over tokens and rows: twice of both is twice the sum.
    reserve, twice = plan.needs[0].activations, more.needs[0].activations
    assert twice - reserve == reserve - 2**29
    assert reserve == activation_bytes(plan.parts, 0, plan.setup.config, 2)


def test_the_groups_kv_tokens_are_those_of_the_rank_with_the_least_room() -> None:
    plan = _plan("model=qwq_32b_preview", "ranks=3", "device_memory=48GiB")
    assert plan.kv_tokens == min(need.kv_tokens or 0 for need in plan.needs)
    assert plan.needs[2].kv_tokens != plan.kv_tokens  # two KV heads, where the others have three


@pytest.mark.parametrize(
    ("kv_memory", "available", "lacking"),
    [(0.5, -GIB, GIB), (0.7, GIB, 0), (3 * GIB, 3 * GIB, 0), (5 * GIB, 4 * GIB, GIB)],
)
def test_a_fraction_is_of_the_device_and_bytes_are_of_the_cache(kv_memory: float, available: int, lacking: int) -> None:
    memory = RankMemory(0, 2**15, total=10 * GIB, in_use=5 * GIB, activations=GIB)
    requirements = _plan("model=qwq_32b_preview", f"kv_memory={kv_memory}").requirements
    assert requirements.available_bytes(memory) == available
    assert requirements.lacking_bytes(memory) == lacking


def test_without_a_device_only_the_bytes_that_are_named_are_known() -> None:
    assert _plan("model=qwq_32b_preview", "kv_memory=5GiB").kv_tokens == 5 * GIB // 262_144
    assert _plan("model=qwq_32b_preview").kv_tokens is None


def test_it_fits_only_if_one_sequence_of_max_model_len_does() -> None:
    # QwQ-32B states 131,072 positions: an engine with that limit needs a cache for them.
    assert _plan("model=qwq_32b", "ranks=2", "device_memory=48GiB").fits is False
    assert _plan("model=qwq_32b", "ranks=2", "device_memory=48GiB", "max_model_len=32768").fits is True


def test_the_fewest_ranks_that_fit_do_fit_and_one_less_does_not() -> None:
    fewest = _plan("model=qwen2_5_72b", "device_memory=80GB").fewest_ranks
    assert fewest is not None
    assert _plan("model=qwen2_5_72b", "device_memory=80GB", f"ranks={fewest}").fits
    assert not _plan("model=qwen2_5_72b", "device_memory=80GB", f"ranks={fewest - 1}").fits


@given(
    st.sampled_from(["qwq_32b", "qwen2_5_7b", "qwen3_32b"]),
    st.lists(st.integers(2, 90), min_size=1, max_size=4),
    st.sampled_from([None, 2048, 32768]),
    st.sampled_from(["0.9", "0.6", "1GiB", "30GiB"]),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_each_change_that_is_advised_alone_makes_it_fit(
    model: str, devices: list[int], max_model_len: int | None, kv_memory: str, name_devices: bool
) -> None:
    arguments = [f"model={model}", f"ranks={len(devices)}", f"kv_memory={kv_memory}"]
    arguments += [f"max_model_len={max_model_len}"] if max_model_len else []
    memory = [f"device_memory=[{','.join(f'{size}GiB' for size in devices)}]"] if name_devices else []
    plan = _plan(*arguments, *memory)
    assume(plan.fits is False)
    for change in remedies(plan):
        if name_devices and change.startswith("ranks="):
            assert len(set(devices)) == 1
            assert _plan(*arguments, f"device_memory={devices[0]}GiB", *change.split()).fits, change
        else:
            assert _plan(*arguments, *memory, *change.split()).fits, change


@pytest.mark.parametrize(
    ("arguments", "advised"),
    [
        (["ranks=1", "device_memory=48GiB"], ["ranks=2", "device_memory="]),
        (["ranks=1", "device_memory=72GiB"], ["ranks=2", "max_model_len=11008"]),
        (["ranks=2", "device_memory=38GiB"], ["ranks=3", "kv_memory=0.94"]),
        (["ranks=2", "device_memory=[80GiB,24GiB]"], ["rank_weights=[3.33,1]"]),
        (["ranks=2", "device_memory=48GiB", "kv_memory=60GiB"], ["kv_memory=17026MiB", "device_memory="]),
        (["ranks=2", "kv_memory=1GiB"], ["ranks=8", "max_model_len=8192", "kv_memory=4096MiB"]),
        (["ranks=2", "rank_weights=[1,3]", "device_memory=48GiB"], ["ranks=2 rank_weights=null"]),
    ],
)
def test_what_does_not_fit_says_which_setting_to_change_to_what(
    arguments: list[str], advised: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["model=qwq_32b_preview", *arguments]) == 1
    out = capsys.readouterr().out
    assert "It does not fit: " in out
    for change in advised:
        assert re.search(rf"^(Set| or) {re.escape(change)}", out, re.MULTILINE), out


@pytest.mark.parametrize(
    ("arguments", "advised"),
    [
        (["device_memory=24GiB", "max_num_seqs=8"], ["device_memory="]),
        (["device_memory=70.2GiB"], ["max_model_len=", "kv_memory=8192MiB", "device_memory="]),
        (["device_memory=80GiB", "kv_memory=2GiB"], ["ranks=4", "max_model_len=8192", "kv_memory="]),
        (["device_memory=80GiB", "kv_memory=60GiB", "ranks=2"], ["kv_memory=", "device_memory="]),
        (["device_memory=[60GiB,10GiB]", "ranks=2"], ["device_memory=["]),
    ],
)
def test_what_does_not_fit_a_cpu_host_says_what_would(arguments: list[str], advised: list[str]) -> None:
    arguments = ["model=qwq_32b_preview", "device=cpu", *arguments]
    plan = _plan(*arguments)
    assert plan.fits is False
    changes = remedies(plan)
    for change in changes:
        assert _plan(*arguments, *change.split()).fits, change
    for change in advised:
        assert any(line.startswith(change) for line in changes), (change, changes)


def test_ranks_on_cpus_share_a_hosts_memory_or_have_one_each() -> None:
    arguments = ["model=qwen2_5_0_5b", "device=cpu", "ranks=2"]
    together = _plan(*arguments, "device_memory=8GiB")
    assert together.setup.one_host
    assert together.kv_tokens == 2 * GIB // 6144 // 16 * 16  # half of what a host's cache takes, for each
    apart = _plan(*arguments, "device_memory=[8GiB,8GiB]")
    assert apart.kv_tokens == 4 * GIB // 6144 // 16 * 16
    # On a small host it is a fraction of what weights and processes leave.
    small = _plan(*arguments, "device_memory=4GiB")
    weights = sum(need.weights for need in small.needs)
    assert small.kv_tokens == int((4 * GIB - weights - 2 * RUNTIME_BYTES) * 0.9) // 2 // (16 * 6144) * 16


def test_on_a_cpu_the_memory_that_is_available_here_is_planned_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("phalanx.launch.plan.available_memory", lambda: 6 * GIB)
    assert read_setup(["model=qwen2_5_0_5b", "device=cpu"]).device_memory == (6 * GIB,)
    assert read_setup(["model=qwen2_5_0_5b"]).device_memory is None
    assert main(["model=qwen2_5_0_5b", "device=cpu"]) == 0
    out = capsys.readouterr().out
    assert "on 1 CPU rank" in out
    assert "Memory of the host: 6.00 GiB." in out
    assert "Weights are counted with 16 bits. CPUs with AVX-512 keep most of them in 12" in out
    assert main(["model=qwq_32b_preview", "device=cpu"]) == 1
    assert "the host lacks" in capsys.readouterr().out
    for other in ("dtype=float32", "quantization=int8"):
        main(["model=qwen2_5_0_5b", "device=cpu", other])
        assert "Weights are counted with 16 bits" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (["quantization=int8"], "quantization=int8"),
        (["kv_cache_dtype=int8"], "kv_cache_dtype=int8"),
        (["device=cpu", "quantization=int4", "dtype=float32"], "quantization=int4"),
        (["device=cpu", "quantization=int4", "kv_cache_dtype=int8"], None),
    ],
)
def test_settings_that_an_engine_refuses_on_the_device_are_named(
    arguments: list[str], refused: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["model=qwen2_5_0_5b", *arguments])
    out = capsys.readouterr().out
    assert ("refuses it here" in out) == (refused is not None)
    assert refused is None or f"An engine takes {refused} with device=cpu" in out


def test_the_cost_of_an_uneven_number_is_said_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    main(["model=qwq_32b_preview", "ranks=16"])
    out = capsys.readouterr().out
    assert "The busiest rank holds 1.031 times an even share of the weights" in out
    assert "up to 2 ranks hold the same one, and the cache takes 2.00 times the memory" in out
    main(["model=qwq_32b_preview", "ranks=3"])
    assert "the fullest rank keeps 1.12 times its share of the cache" in capsys.readouterr().out
    main(["model=qwq_32b_preview", "ranks=4"])
    assert "The weights are even" in capsys.readouterr().out


def test_no_number_is_cut_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    main(["model=qwen2_5_72b", "ranks=2", "device_memory=4000GB"])
    assert "…" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model=qwq_32b_preview", "rank=3"], "'rank'.*did you mean 'ranks'"),
        (["ranks=2"], "model is missing.*qwq_32b_preview"),
        (["model=nothing_here"], "nothing_here.*qwq_32b_preview"),
        (["model=Qwen/QwQ-32B-Preview"], "write model=qwq_32b_preview"),
        (["model=qwq_32b_preview", "ranks=41"], "ranks=41.*1 to 40"),
        (["model=qwq_32b_preview", "ranks=0"], "ranks=0"),
        (["model=qwq_32b_preview", "ranks=many"], "ranks=many.*an integer"),
        (["model=qwq_32b_preview", "ranks=2", "rank_weights=0.5"], r"rank_weights=0\.5.*a list"),
        (["model=qwq_32b_preview", "ranks=2", "rank_weights=[a,b]"], r"rank_weights=\[a,b\].*a list"),
        (["model=qwq_32b_preview", "ranks=2", "rank_weights=[1]"], "rank_weights=.*2 positive numbers"),
        (["model=qwq_32b_preview", "device_memory=lots"], "device_memory: 'lots'.*GiB"),
        (["model=qwq_32b_preview", "device_memory=0"], "device_memory=0"),
        (["model=qwq_32b_preview", "ranks=2", "device_memory=[48GiB]"], "device_memory=.*ranks=2"),
        (["model=qwq_32b_preview", "kv_memory=lots"], "kv_memory: 'lots'"),
        (["model=qwq_32b_preview", "kv_memory=0"], "kv_memory=0"),
        (["model=qwq_32b_preview", "kv_memory=.inf"], "kv_memory=inf"),
        (["model=qwq_32b_preview", "dtype=int3"], "int3.*bfloat16"),
        (["model=qwq_32b_preview", "max_model_len=40000"], "max_model_len=40000.*32768"),
        (["model=qwq_32b_preview", "device=tpu"], "device='tpu'.*auto, cpu, cuda"),
        (["model=qwq_32b_preview", "device=cpu", "ranks=2", "device_memory=[48GiB]"], "device_memory=.*ranks=2"),
        (["model=qwq_32b_preview", "max_num_seqs=4096"], "max_num_batched_tokens=2048 is below max_num_seqs=4096"),
        (["model"], "key=value"),
    ],
)
def test_bad_input_exits_2_and_names_what_is_allowed(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert re.search(words, captured.err)
    assert captured.out == ""


def test_help_names_every_key_and_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in ("model", "rank_weights", "device", "device_memory", "kv_memory", *presets()):
        assert name in out
    assert not re.search(r"^ *Of ", out, re.MULTILINE)


def test_a_folder_is_as_good_as_a_preset(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(load_preset("smollm2_135m")["shape"]))
    assert read_spec(str(tmp_path)) == read_spec("smollm2_135m")
    with pytest.raises(ConfigError, match="absent"):
        read_spec(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_spec(str(tmp_path / "empty"))
