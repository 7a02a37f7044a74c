"""GGUF files: whatever their bytes are, they become a model folder or are refused by name."""

from __future__ import annotations

from contextlib import suppress
from functools import cache

from phalanx.engine.errors import PhalanxError
from phalanx.launch.model_files.gguf_model import convert_gguf
from phalanx.tests.fuzz.bounds import check_message, in_time
from phalanx.tests.fuzz.choices import Choices
from phalanx.tests.fuzz.folders import scratch
from phalanx.tests.launch.test_hostile_gguf import METADATA, OPTIONAL, _write

VALUES = (
    0,
    1,
    -1,
    3,
    2**31,
    10**12,
    float("nan"),
    1.5,
    "x",
    "linear",
    "yarn",
    "qwen2",
    "llama",
    "llama-bpe",
    ["x"],
    [1],
    ["a", "b", "c", "d"],
    "",
)


@cache
def _good() -> bytes:
    _write(scratch() / "good.gguf")
    return (scratch() / "good.gguf").read_bytes()


@cache
def _imported() -> None:
    """Import what the conversion of a SentencePiece vocabulary imports, which is no input's time."""
    _write(scratch() / "first.gguf", **{"tokenizer.ggml.model": "llama"})
    with suppress(PhalanxError):
        convert_gguf(scratch() / "first.gguf", scratch() / "out", force=True)


def fuzz_one(data: bytes) -> None:
    """Convert a damaged file, or one of odd metadata."""
    choices = Choices(data)
    _imported()
    file = scratch() / "m.gguf"
    kind = choices.number(4)
    if kind == 0:
        file.write_bytes(choices.rest())
    elif kind == 1:
        keys = (*METADATA, *OPTIONAL)
        _write(file, **{choices.pick(keys): choices.pick(VALUES) for _ in range(1 + choices.number(3))})
    else:
        head = choices.mutated(_good()[: choices.pick((1500, 64, 300))])
        file.write_bytes(head + _good()[len(head) :] if kind == 2 else head)
    try:
        with in_time():
            convert_gguf(file, scratch() / "out", force=True)
    except PhalanxError as error:
        check_message(error)
