"""The files of a tokenizer, checked before transformers reads them, so that a fault has a file and a field."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from ...parallel.loading.json_files import (
    MAX_JSON_BYTES,
    LoadError,
    is_lfs_pointer,
    lfs_advice,
    read_json_object,
    shortened,
    shown,
)
from ..errors import CheckpointError

VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")
"""The files that make a folder one with a tokenizer."""
_JSON = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json", "vocab.json")
_TEXT = ("chat_template.jinja", "merges.txt", "config.json")

MAX_SPECIAL_CHARACTERS = 1024
"""The longest text of a special token. Its beginnings are looked for in every message, and take memory by its square.
"""

_TokenId = Annotated[str, msgspec.Meta(pattern="^[0-9]{1,9}$")]
_StoredId = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
_TokenText = Annotated[str, msgspec.Meta(max_length=MAX_SPECIAL_CHARACTERS)]
_Side = Literal["left", "right"]


class _AddedToken(msgspec.Struct):
    content: _TokenText
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False
    special: bool = False


class _Template(msgspec.Struct):
    name: str
    template: str


_Token = _TokenText | _AddedToken


class _TokenizerConfig(msgspec.Struct):
    """The fields of tokenizer_config.json that transformers acts on, for any model served here. Others may be there."""

    tokenizer_class: str | None = None
    bos_token: _Token | None = None
    eos_token: _Token | None = None
    unk_token: _Token | None = None
    pad_token: _Token | None = None
    sep_token: _Token | None = None
    cls_token: _Token | None = None
    mask_token: _Token | None = None
    added_tokens_decoder: dict[_TokenId, _AddedToken] = {}
    additional_special_tokens: list[_Token] | dict[str, _Token] | None = None
    extra_special_tokens: list[_Token] | dict[str, _Token] | None = None
    model_specific_special_tokens: dict[str, _Token] | None = None
    chat_template: str | list[_Template] | dict[str, str] | None = None
    model_max_length: int | float | None = None
    model_input_names: list[str] = []
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    split_special_tokens: bool = False
    padding_side: _Side = "left"
    truncation_side: _Side = "left"
    auto_map: dict[str, Any] = {}
    errors: str | None = None
    tokenizer_object: None = None


class _SpecialTokensMap(_TokenizerConfig):
    additional_special_tokens: list[_Token] | None = None


class _StoredToken(_AddedToken, kw_only=True):
    id: _StoredId


class _TokenizerFile(msgspec.Struct):
    """The fields of tokenizer.json that transformers reads by itself."""

    added_tokens: list[_StoredToken] = []
    model: dict[str, Any] = {}


_KINDS: dict[str, Any] = {
    "tokenizer_config.json": _TokenizerConfig,
    "special_tokens_map.json": _SpecialTokensMap,
    "added_tokens.json": dict[str, _StoredId],
}
"""What transformers reads by itself, and would fail at without naming file and field."""


def check_tokenizer_files(folder: Path) -> None:
    """Raise CheckpointError naming file and field for what no tokenizer can be made of.

    What only the tokenizer's own reader can tell is left to it: tokenizer.json is not read here.
    """
    for file in map(folder.joinpath, (*_JSON, *_TEXT)):
        if is_lfs_pointer(file):
            raise CheckpointError(lfs_advice(file))
        if file.is_file() and file.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes; it may have at most {MAX_JSON_BYTES}")
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise CheckpointError(
            f"{folder} holds no tokenizer (tokenizer.json); copy it there, or set tokenizer= to a folder with one"
        )

    for name, kind in _KINDS.items():
        file = folder / name
        if file.is_file():
            values = _read(file)
            _check_fields(file, values, kind)
            _check_input_names(file, values)


def check_tokens(folder: Path, probe: list[int], special: Iterable[str]) -> None:
    """Raise CheckpointError if `probe`, the token ids of some text, are none, or for a special token too long."""
    if not probe:
        raise CheckpointError(
            f"the tokenizer in {folder} makes no token of text: tokenizer.json holds no usable model.vocab; copy that "
            f"file again"
        )
    for text in special:
        if len(text) > MAX_SPECIAL_CHARACTERS:
            raise CheckpointError(
                f"{folder / 'tokenizer.json'}: added_tokens: the special token {shown(text)} may have at most "
                f"{MAX_SPECIAL_CHARACTERS} characters"
            )


def explain_unreadable(folder: Path, error: BaseException) -> CheckpointError:
    """Return the error for a tokenizer that its reader refused, naming the file where that can be told."""
    for file in map(folder.joinpath, _JSON):
        try:
            if file.is_file():
                _check_fields(file, _read(file), _TokenizerFile if file.name == "tokenizer.json" else dict)
        except CheckpointError as found:
            return found

    reason = shortened(f"{type(error).__name__}: {error}")
    return CheckpointError(
        f"the tokenizer in {folder} (tokenizer.json, tokenizer_config.json) cannot be read ({reason}): copy its files "
        f"again, or install a newer transformers"
    )


def _check_fields(file: Path, values: dict[str, Any], kind: Any) -> None:
    """Raise CheckpointError naming the first field that is not of the type which `kind` gives it, or no Unicode."""
    for name, value in values.items():
        try:
            _check_unicode({name: value})
            msgspec.convert({name: value}, kind)
        except (UnicodeEncodeError, msgspec.ValidationError, RecursionError) as error:
            raise CheckpointError(f"{file}: {shortened(name)}={shown(value)}: {shortened(str(error))}") from error


def _check_unicode(value: Any) -> None:
    # transformers makes no use of a number of more than 64 bits, or compares with it.
    with contextlib.suppress(OverflowError):
        msgspec.json.encode(value)


def _check_input_names(file: Path, values: dict[str, Any]) -> None:
    names = values.get("model_input_names", ["input_ids"])
    if file.name == "tokenizer_config.json" and "input_ids" not in names:
        raise CheckpointError(f"{file}: model_input_names={shown(names)} must hold input_ids")


def _read(file: Path) -> dict[str, Any]:
    """Read a file that transformers or its tokenizers will read, too: they take no byte-order mark."""
    try:
        with file.open("rb") as stream:
            marked = stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
        values = read_json_object(file)
    except (LoadError, OSError) as error:
        raise CheckpointError(str(error)) from error
    if marked:
        raise CheckpointError(
            f"{file} begins with a byte-order mark, which tokenizers do not read: save it as UTF-8 without one"
        )
    return values
