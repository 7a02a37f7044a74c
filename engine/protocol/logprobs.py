"""Log-probabilities as they travel from the sampler to a client."""

from __future__ import annotations

import msgspec


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities (natural logarithm) at one position: of its token and of the likeliest ones."""

    token_id: int
    logprob: float
    rank: int  # 1 is the likeliest; how many tokens are at least as likely
    top_token_ids: list[int]
    top_logprobs: list[float]
    token_bytes: bytes = b""
    """The bytes of the token's text; empty without a tokenizer."""
    top_bytes: list[bytes] = []
    """The same for `top_token_ids`."""
