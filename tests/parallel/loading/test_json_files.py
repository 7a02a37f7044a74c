"""JSON files of a model folder that are no files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from phalanx import CheckpointError
from phalanx.engine.coordinator.tokenizer_files import check_tokenizer_files
from phalanx.parallel.loading.json_files import LoadError, is_lfs_pointer, read_json_object


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_and_a_device_are_not_waited_for(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "generation_config.json"
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    with pytest.raises(LoadError, match=r"generation_config.json is a pipe, a socket or a device"):
        read_json_object(file)
    assert not is_lfs_pointer(file)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja"])
def test_a_tokenizer_with_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        check_tokenizer_files(tmp_path)
