"""Special tokens that a tokenizer looks for in a text only after it has normalized it."""

from __future__ import annotations

from typing import Any


class NormalizedTokens:
    """Finds what becomes a special token by normalization: an "e" and an accent where the token is "é", say.

    Thread-safe. Most tokenizers have none of them: their special tokens are found in the text as it is written.
    """

    def __init__(self, backend: Any) -> None:
        """`backend` is a tokenizers.Tokenizer."""
        self._backend = backend
        special = {number: token for number, token in backend.get_added_tokens_decoder().items() if token.special}
        self._special_ids = frozenset(special)
        has_normalizer = backend.normalizer is not None
        found = {self.normalize(token.content) for token in special.values() if token.normalized and has_normalizer}
        self.texts = frozenset(found - {""})
        """The tokens' texts, normalized."""

    def normalize(self, text: str) -> str:
        """The text as the tokenizer sees it where it looks for these tokens."""
        return str(self._backend.normalizer.normalize_str(text))

    def find(self, text: str) -> list[tuple[int, int]]:
        """Where special tokens of any kind are in a text: the characters' first index and the one past their last."""
        [encoded] = self._backend.encode_batch([text], add_special_tokens=False)
        found = zip(encoded.ids, encoded.offsets, strict=True)
        return [(first, end) for token, (first, end) in found if token in self._special_ids and end > first]
