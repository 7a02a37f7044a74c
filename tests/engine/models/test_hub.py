"""Where a model is found: a folder, the local hub cache, or nowhere, said within seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from phalanx import ConfigError
from phalanx.engine.models.hub import resolve_model

REFUSING = "http://127.0.0.1:9"  # the discard port: nobody listens
UNROUTED = "http://10.255.255.1"  # packets to it vanish, or are refused at once


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert resolve_model("~/mine") == tmp_path / "mine"


def test_a_file_is_refused_with_what_to_do_about_it(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ConfigError, match=r"is a file; give a model folder.*get_model gguf="):
        resolve_model(str(tmp_path / "model.gguf"))


NO_NAMES = ("/no/such/folder", "no-such-name", "a/b/c", "../nowhere/at/all", "or gani/sation")
LIKE_NAMES = ("./nowhere", "../nowhere", "models/qwen--2", "nobody/model.git", "-a/b", "\u00e9/b", "a/" + "b" * 300)
NO_PATHS = ("~nobody-has-this-name/model", "x" * 5000, "x/" * 5000, "a\0b")


@pytest.mark.parametrize("name", [*NO_NAMES, *LIKE_NAMES, *NO_PATHS], ids=lambda name: ascii(name[:20]))
def test_what_is_neither_folder_nor_hub_name_is_refused_without_asking_the_hub(name: str) -> None:
    with pytest.raises(ConfigError, match="no folder here, and no hub name") as raised:
        resolve_model(name)
    assert len(str(raised.value)) < 500


def _resolve(
    name: str, cache: Path, endpoint: str, weights: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """resolve_model in a process of its own: huggingface_hub reads its settings when it is imported."""
    program = (
        "from phalanx.engine.models.hub import resolve_model\nfrom phalanx.engine.errors import ConfigError\n"
        f"try: print('found', resolve_model({name!r}, weights={weights}))\n"
        "except ConfigError as error: print('refused', error)"
    )
    kept = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    settings = {"HF_HOME": str(cache), "HF_HUB_CACHE": str(cache / "hub"), "HF_ENDPOINT": endpoint, **environment}
    return subprocess.run(
        [sys.executable, "-c", program], env=kept | settings, capture_output=True, text=True, timeout=60, check=True
    )


@pytest.mark.parametrize("endpoint", [REFUSING, UNROUTED])
def test_a_hub_name_without_a_network_is_refused_within_seconds(tmp_path: Path, endpoint: str) -> None:
    result = _resolve("nobody/has-this-model", tmp_path, endpoint)
    assert result.stdout.startswith("refused model='nobody/has-this-model' is not in the local hub cache")
    assert "set model= to a local folder" in result.stdout


def test_an_offline_hub_is_refused_too(tmp_path: Path) -> None:
    result = _resolve("nobody/has-this-model", tmp_path, REFUSING, HF_HUB_OFFLINE="1")
    assert result.stdout.startswith("refused model='nobody/has-this-model' is not in the local hub cache")


def _cached(cache: Path, *names: str) -> Path:
    """The snapshot of somebody/small in a hub cache, with these files."""
    repository = cache / "hub" / "models--somebody--small"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for name in names:
        (snapshot / name).write_text("{}")
    return snapshot


def test_a_cached_hub_name_needs_no_network(tmp_path: Path) -> None:
    snapshot = _cached(tmp_path, "config.json", "model.safetensors")
    assert _resolve("somebody/small", tmp_path, REFUSING).stdout.strip() == f"found {snapshot}"


def test_a_snapshot_without_its_weights_is_not_the_model(tmp_path: Path) -> None:
    snapshot = _cached(tmp_path, "config.json", "tokenizer.json")
    said = _resolve("somebody/small", tmp_path, REFUSING).stdout
    assert said.startswith("refused model='somebody/small' is in the local hub cache without model.safetensors and")
    assert _resolve("somebody/small", tmp_path, REFUSING, weights=False).stdout.strip() == f"found {snapshot}"


def test_a_snapshot_with_some_of_its_shards_is_not_the_model(tmp_path: Path) -> None:
    snapshot = _cached(tmp_path, "config.json", "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    said = _resolve("somebody/small", tmp_path, REFUSING).stdout
    assert said.startswith("refused model='somebody/small' is in the local hub cache without model-2.safetensors and")
    (snapshot / "model-2.safetensors").touch()
    assert _resolve("somebody/small", tmp_path, REFUSING).stdout.strip() == f"found {snapshot}"


def test_a_cache_that_this_user_may_not_read_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/cache/models--org--model/refs/main")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refused)
    with pytest.raises(ConfigError, match=r"cannot be looked up in the local hub cache .*Permission denied.*refs/main"):
        resolve_model("org/model")
