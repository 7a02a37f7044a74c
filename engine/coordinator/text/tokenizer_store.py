"""Tokenizers as transformers made them of a folder's files, kept from one start to the next.

Which tokenizer belongs to a folder is transformers' to say, and to import it takes longer than to read the weights of a
small model. What it made is stored under a hash of all that it could have read and of the versions that read it. So a
stored tokenizer is the one that transformers would make again, and tokenizers alone loads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer as Backend

_log = logging.getLogger(__name__)

_FORM = 2
"""Another form of what is stored has another number."""
_READERS = ("transformers", "tokenizers", "sentencepiece", "tiktoken", "mistral_common", "protobuf")
"""Packages that have a say in what is made of a folder's files."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""Files that no tokenizer is made of."""
_MAX_BYTES = 2**28
_MAX_FILES = 256
_KEPT = 16
"""Tokenizers that are kept, those last used."""
_SUFFIX = ".tokenizer"


class _Stored(msgspec.Struct, frozen=True, array_like=True):
    """What is made of a folder, as it is written."""

    backend: str
    """JSON of tokenizers.Tokenizer."""
    splits_special_tokens: bool
    kind: str
    special_tokens_map: dict[str, str]
    chat_templates: dict[str, str]
    eos_token_id: int | None
    longest_token_bytes: int | None


class StoredTokenizer:
    """Has what Tokenizer uses of transformers' tokenizer, the same."""

    def __init__(self, stored: _Stored) -> None:
        self.backend_tokenizer = Backend.from_str(stored.backend)
        self.backend_tokenizer.encode_special_tokens = stored.splits_special_tokens
        self.kind = stored.kind
        self.special_tokens_map = stored.special_tokens_map
        self.chat_template = stored.chat_templates
        self.eos_token_id = stored.eos_token_id
        self.longest_token_bytes = stored.longest_token_bytes

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))


class TokenizerStore:
    """Stores the tokenizer of one model folder, in a folder of this user's own."""

    def __init__(self, home: Path, folder: Path) -> None:
        """`home` holds the tokenizers of all models, and is made when one is stored."""
        self._home = home
        self._folder = folder
        self._name: str | None = None  # of the file; not known before load()

    def load(self) -> StoredTokenizer | None:
        """The tokenizer of the folder's files as they are now; None if it is not stored."""
        try:
            self._name = _fingerprint(self._folder)
            if self._name is None or not self._home.is_dir():
                return None
            self._check_owner()
            file = self._home / self._name
            if not file.is_file() or file.stat().st_size > _MAX_BYTES:
                return None
            tokenizer = StoredTokenizer(msgspec.msgpack.decode(file.read_bytes(), type=_Stored))
            os.utime(file)
        # tokenizers raises Exception itself, of a file that somebody has changed.
        except Exception as error:
            _log.warning("a stored tokenizer is not used, and read from %s instead: %s", self._folder, error)
            return None
        return tokenizer

    def save(
        self, tokenizer: Any, *, kind: str, chat_templates: dict[str, str], longest_token_bytes: int | None
    ) -> None:
        """Store `tokenizer`, which transformers made of the folder, and which has encoded a text."""
        if self._name is None:
            return

        backend = tokenizer.backend_tokenizer
        eos_token_id = tokenizer.eos_token_id
        stored = _Stored(
            backend=backend.to_str(),
            splits_special_tokens=bool(backend.encode_special_tokens),
            kind=kind,
            special_tokens_map=dict(tokenizer.special_tokens_map),
            chat_templates=chat_templates,
            eos_token_id=eos_token_id if isinstance(eos_token_id, int) else None,
            longest_token_bytes=longest_token_bytes,
        )
        if StoredTokenizer(stored).backend_tokenizer.to_str() != stored.backend:
            _log.debug("the tokenizer of %s is not stored: read back it is another one", self._folder)
            return

        try:
            self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check_owner()
            self._write(self._home / self._name, msgspec.msgpack.encode(stored))
            self._forget_oldest()
        except OSError as error:
            _log.debug("the tokenizer of %s is not stored: %s", self._folder, error)

    def _check_owner(self) -> None:
        """Raise PermissionError unless this user alone can have written what the store holds."""
        found = self._home.stat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise PermissionError(f"{self._home} must belong to this user, and be writable for nobody else")

    def _write(self, file: Path, data: bytes) -> None:
        """Write a file whole or not at all, for other processes may read and write it at the same time."""
        descriptor, unfinished = tempfile.mkstemp(dir=self._home)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
            os.replace(unfinished, file)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(unfinished)
            raise

    def _forget_oldest(self) -> None:
        files = sorted(self._home.glob(f"*{_SUFFIX}"), key=lambda file: file.stat().st_mtime)
        for file in files[:-_KEPT]:
            file.unlink(missing_ok=True)


def _fingerprint(folder: Path) -> str | None:
    """The name for all that decides what transformers makes of a folder; None if there is too much of it."""
    found = hashlib.sha256(repr((_FORM, str(folder), [_version(name) for name in _READERS])).encode())
    files = sorted(_files(folder))
    if len(files) > _MAX_FILES or sum(file.stat().st_size for file in files) > _MAX_BYTES:
        return None
    for file in files:
        data = file.read_bytes()
        found.update(repr((str(file.relative_to(folder)), len(data))).encode())
        found.update(data)
    return found.hexdigest() + _SUFFIX


def _files(folder: Path) -> Iterator[Path]:
    """The files in a folder, and in its folders (chat templates), that a tokenizer may be made of."""
    for file in (*folder.iterdir(), *folder.glob("*/*")):
        if file.is_file() and file.suffix not in _WEIGHTS:
            yield file


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
