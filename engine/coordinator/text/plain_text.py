"""Encodes what users wrote as plain text, also where it is the text of a special token."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Collection
from typing import Any

from ...errors import InvalidRequest
from .chat_template import Rendered

_ANCHOR = f"\U0010fffd{uuid.uuid4().hex}"
"""A token of the copy; nobody can write it."""


class PlainText:
    """Encodes rendered conversations. Thread-safe.

    A tokenizer first cuts a text at its added tokens and encodes each piece by itself. So the whole is encoded with its
    marks, and only the pieces that hold one are encoded again, with what their marks stand for, by a copy of the
    tokenizer that knows no special token. The tokens of all else are exactly the tokenizer's.
    """

    def __init__(self, backend: Any, special_ids: Collection[int]) -> None:
        """`backend` is a tokenizers.Tokenizer."""
        self._backend = backend
        self._special_ids = special_ids
        self._added_ids = frozenset(backend.get_added_tokens_decoder())
        self._lock = threading.Lock()
        self._copy: Any = None  # made when it is first needed: it takes as much memory as the tokenizer

    def encode(self, rendered: Rendered) -> list[int]:
        """Token ids. Raises InvalidRequest if a special token cannot be written as plain text."""
        # A batch, unlike a single text, is encoded without the GIL.
        [encoded] = self._backend.encode_batch([rendered.text], add_special_tokens=False)
        token_ids: list[int] = []
        piece: list[int] = []
        start = marks = 0
        found = list(zip(encoded.ids, encoded.offsets, strict=True))
        for token, (first, end) in [*found, (None, (len(rendered.text), len(rendered.text)))]:
            if token is not None and token not in self._added_ids:
                piece.append(token)
                continue

            # A piece ends at an added token or with the text.
            text = rendered.text[start:first]
            if rendered.mark in text:
                piece = self._encode_plain(rendered.expand(text, marks), at_start=start == 0)
                marks += text.count(rendered.mark)
            token_ids += piece
            if token is not None:
                token_ids.append(token)
            piece = []
            start = end
        return token_ids

    def _encode_plain(self, text: str, at_start: bool) -> list[int]:
        with self._lock:
            if self._copy is None:
                self._copy = self._make_copy()
        if at_start:
            found = self._copy.encode(text, add_special_tokens=False).ids
        else:
            # Some tokenizers put a space before a text's first word; behind another token there is none.
            found = self._copy.encode(_ANCHOR + text, add_special_tokens=False).ids[1:]

        special = next((token for token in found if token in self._special_ids), None)
        if special is not None:
            raise InvalidRequest(
                f"the messages hold {self._backend.id_to_token(special)!r}, which this model's tokenizer "
                f"cannot write as plain text"
            )
        return list(found)

    def _make_copy(self) -> Any:
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend

        copy = Backend.from_str(self._backend.to_str())
        copy.no_truncation()
        copy.no_padding()
        copy.encode_special_tokens = True
        copy.add_tokens([AddedToken(_ANCHOR, normalized=False, special=False)])
        return copy
