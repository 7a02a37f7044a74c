"""What tokens stand for: each one's bytes, and the characters of an answer as its tokens come."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"
INCOMPLETE_BYTES = 3
"""Bytes of an incomplete character at most, and so tokens. Some decoders show each as U+FFFD, others all as one."""
WINDOW_TOKENS = 16
"""Tokens without whole text that are decoded together at most."""
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class IncrementalDetokenizer:
    """Decodes one completion token by token; text appears once it is whole UTF-8.

    The tokens of the last piece of text are decoded again together with those after it, since what a token's text is
    may depend on the token before it. A window of tokens begins where text was whole.

    The first window begins with the prompt's last tokens: where a tokenizer marks the beginning of a word with a space
    (SentencePiece), decoding an answer by itself would swallow the space before its first word.
    """

    def __init__(self, backend: Any, skipped: frozenset[int], prompt: Sequence[int] = ()) -> None:
        """`backend` is a tokenizers.Tokenizer; the token ids in `skipped` have no text. `prompt` is its last tokens."""
        self._backend = backend
        self._skipped = skipped
        self._window = [token for token in prompt if token not in skipped and backend.id_to_token(token) is not None]
        self._text = self._decode() if self._window else ""
        # An answer to a prompt that ends within a character is decoded by itself.
        if self._text.endswith(INCOMPLETE):
            self._window = []
            self._text = ""
        self._context = len(self._window)  # tokens of the window whose text is shown in full
        self._shown = len(self._text)  # characters of the window's text that were returned, or are the prompt's

    @property
    def is_whole(self) -> bool:
        """Whether the text of every token so far was returned."""
        return self._shown == len(self._text)

    def step(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is incomplete."""
        if token_id in self._skipped or self._backend.id_to_token(token_id) is None:
            return ""
        self._window.append(token_id)
        self._text = self._decode()

        pending = len(self._window) - self._context
        if not self._text.endswith(INCOMPLETE):
            text = self._show(len(self._text))
            if text:
                self._begin_window(self._context)
                self._context = len(self._window)
            return text

        if pending <= INCOMPLETE_BYTES:
            return ""

        # Bytes that are no UTF-8 and never will be. The last of them may still begin a character.
        text = self._show(max(len(self._text.rstrip(INCOMPLETE)), len(self._text) - INCOMPLETE_BYTES))
        if pending == WINDOW_TOKENS:
            self._begin_window(len(self._window) - WINDOW_TOKENS // 2)
            self._context = 0
        return text

    def flush(self) -> str:
        """What an incomplete character at the very end decodes to (U+FFFD), as decoding all at once would show it."""
        return self._show(len(self._text))

    def _show(self, end: int) -> str:
        start, self._shown = self._shown, max(self._shown, end)
        return self._text[start:end]

    def _begin_window(self, first: int) -> None:
        held = len(self._text) - self._shown
        self._window = self._window[first:]
        self._text = self._decode()
        self._shown = len(self._text) - held

    def _decode(self) -> str:
        return str(self._backend.decode(self._window, skip_special_tokens=False))


class TokenBytes:
    """The bytes of every token, each looked up once. Thread-safe: two threads at worst look one up twice.

    A token of a byte-level BPE gives the bytes that its letters stand for, and one of SentencePiece's byte fallback its
    byte: so the bytes of an answer's tokens join to its text, also where one token is a part of a character.
    """

    def __init__(self, backend: Any, size: int) -> None:
        """`backend` is a tokenizers.Tokenizer whose token ids are below `size`."""
        self._backend = backend
        self._known: list[bytes | None] = [None] * size
        kinds = _decoder_kinds(backend.decoder)
        self._letters = _bytes_of_letters() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        self._marks_spaces = bool(kinds & {"Metaspace", "▁"})

    def __getitem__(self, token_id: int) -> bytes:
        """The bytes of a token; none of an id that is no token."""
        if not 0 <= token_id < len(self._known):
            return b""
        known = self._known[token_id]
        if known is None:
            known = self._known[token_id] = self._look_up(token_id)
        return known

    def _look_up(self, token_id: int) -> bytes:
        token: str | None = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._letters is not None:
            # As the decoder does: a token with another character in it is text as it is.
            found = [self._letters.get(letter) for letter in token]
            return bytes(byte for byte in found if byte is not None) if None not in found else token.encode()
        byte = _BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        if byte is not None:
            return bytes([int(byte[1], 16)])
        return token.replace("▁", " ").encode() if self._marks_spaces else token.encode()


def _decoder_kinds(decoder: Any) -> set[str]:
    """The kinds of a decoder and of those it consists of; "▁" for one that replaces this by a space."""
    if decoder is None:
        return set()
    kinds: set[str] = set()
    pending = [json.loads(decoder.__getstate__())]
    while pending:
        values = pending.pop()
        kinds.add(values["type"])
        pending += values.get("decoders", [])
        if values["type"] == "Replace" and values.get("pattern") == {"String": "▁"}:
            kinds.add("▁")
    return kinds


def _bytes_of_letters() -> dict[str, int]:
    """The byte that each letter of GPT-2's byte-level alphabet stands for: printable Latin-1 for itself, the others for
    the bytes that are left, in order."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + index): byte for index, byte in enumerate(others)}
