"""launch.plan: what N ranks need, without weights, a GPU or torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from phalanx import ConfigError
from phalanx.launch.plan import main, make_plan, read_options, read_spec, smallest_fit


def test_it_imports_no_torch() -> None:
    code = (
        "import sys, phalanx.launch.plan as plan\n"
        "code = plan.main(['model=qwq_32b_preview', 'ranks=3', 'device_memory=48GiB'])\n"
        "sys.exit(code if 'torch' not in sys.modules else 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "15" in done.stdout
    assert "Fewest ranks that fit: 2" in done.stdout


def test_numbers_of_qwq_on_one_rank_are_the_models_own() -> None:
    options = read_options(["model=qwq_32b_preview", "device_memory=141GB"])
    plan = make_plan(read_spec(options.model), options)
    assert plan.needs[0].kv_token == 262_144
    assert plan.needs[0].weights == pytest.approx(65.5e9, rel=0.01)
    assert plan.fits


def test_what_does_not_fit_says_which_setting_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model=qwq_32b_preview", "ranks=1", "device_memory=48GiB"]) == 1
    out = capsys.readouterr().out
    assert "Set ranks=2" in out


def test_a_request_that_is_too_long_is_told_the_length_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model=qwq_32b_preview", "ranks=1", "device_memory=72GiB"]) == 1
    assert "max_model_len=" in capsys.readouterr().out


def test_the_fewest_ranks_that_fit_do_fit_and_one_less_does_not() -> None:
    options = read_options(["model=qwen2_5_72b", "device_memory=80GB"])
    spec = read_spec("qwen2_5_72b")
    fewest = smallest_fit(spec, options)
    assert fewest is not None
    assert make_plan(spec, read_options(["device_memory=80GB", f"ranks={fewest}"])).fits
    assert not make_plan(spec, read_options(["device_memory=80GB", f"ranks={fewest - 1}"])).fits


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model=qwq_32b_preview", "rank=3"], "did you mean 'ranks'"),
        (["model=nothing_here"], "nothing_here.*qwq_32b_preview"),
        (["model=qwq_32b_preview", "ranks=41"], "ranks=41"),
        (["model=qwq_32b_preview", "ranks=many"], "many"),
        (["model=qwq_32b_preview", "device_memory=lots"], "lots"),
        (["model=qwq_32b_preview", "ranks=2", "device_memory=[48GiB]"], "device_memory"),
        (["model=qwq_32b_preview", "dtype=int3"], "int3"),
        (["model"], "key=value"),
    ],
)
def test_bad_input_exits_2_and_names_what_is_allowed(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    import re

    assert re.search(words, capsys.readouterr().err)


def test_a_folder_is_as_good_as_a_preset(tmp_path: Path) -> None:
    import json

    from phalanx.launch.presets import load_preset

    (tmp_path / "config.json").write_text(json.dumps(load_preset("smollm2_135m")["shape"]))
    assert read_spec(str(tmp_path)) == read_spec("smollm2_135m")
    with pytest.raises(ConfigError):
        read_spec(str(tmp_path / "absent"))
