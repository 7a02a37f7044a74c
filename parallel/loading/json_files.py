"""JSON files of a model folder: read whole within a bound, and refused by name. A folder may come from anybody."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 2**28
"""A tokenizer.json of 250,000 tokens has some 30 MB."""
SHOWN_CHARACTERS = 200

_LFS = b"version https://git-lfs.github.com/spec/"


class LoadError(Exception):
    """A checkpoint is missing, damaged, or not this model's; the message names the file and the tensor or field."""


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds; it may begin with a byte-order mark, as some editors leave it.

    Raises LoadError if it cannot be read, is above MAX_JSON_BYTES, no JSON, nested too deep, or no object.
    """
    try:
        found = file.stat()
        if found.st_size > MAX_JSON_BYTES:
            raise LoadError(f"{file} has {found.st_size} bytes; it may have at most {MAX_JSON_BYTES}")
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise LoadError(f"{file} is a pipe, a socket or a device, which may never end: it must be a file")
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        if is_lfs_pointer(file):
            raise LoadError(lfs_advice(file)) from error
        raise LoadError(
            f"{file} cannot be read: {error}" if isinstance(error, OSError) else f"{file} is not JSON: {error}"
        ) from error
    except RecursionError as error:
        raise LoadError(f"{file} is nested too deep to be read") from error
    if not isinstance(value, dict):
        raise LoadError(f"{file} must hold a JSON object, not {type(value).__name__}")
    return value


def shown(value: object) -> str:
    """Return a value from a file as a message shows it: as Python writes it, shortened."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} nested too deep to be shown"
    except ValueError:  # Python writes no integer of thousands of digits
        return f"a {type(value).__name__} too long to be shown"
    return shortened(text)


def shortened(text: str) -> str:
    """Return a text as a message may hold it: of bounded length, and without halves of surrogate pairs."""
    text = text.encode(errors="backslashreplace").decode()
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return f"{text[:SHOWN_CHARACTERS]}... ({len(text)} characters)"


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is the pointer that Git leaves for a large one that was not fetched (git-lfs.com/spec/v1)."""
    if not file.is_file():  # a pipe, say, which is opened only once somebody writes to it
        return False
    try:
        with file.open("rb") as stream:
            return stream.read(len(_LFS)) == _LFS
    except OSError:
        return False


def lfs_advice(file: Path) -> str:
    """Return the advice for a user whose file is a Git LFS pointer."""
    return f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` where it came from, or download it"
