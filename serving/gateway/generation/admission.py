"""How much the gateway holds at once; what is too much is refused at once, with when to come again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from ..config import GatewayConfig
from ..http.errors import ApiError, invalid

_MAX_RETRY_S = 60
_HALF_LIFE_S = 10.0


class Admission:
    """Counts open requests and their prompt tokens. Used on the event loop alone."""

    def __init__(self, config: GatewayConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self.requests = 0
        self.tokens = 0
        self.refused = 0
        # Requests that ended lately, each counting half as much every _HALF_LIFE_S.
        self._ended = 0.0
        self._ended_at = self._began_at = clock()

    def enter(self, requests: int, tokens: int) -> None:
        """Let requests in, of so many prompt tokens together.

        Raises ApiError: 400 for more than would ever be let in, 429 with Retry-After for more than there is room for.
        """
        most_requests = self._config.max_open_requests
        most_tokens = self._config.max_open_tokens
        if requests > most_requests:
            bound = f"{most_requests} (max_open_requests)"
            raise invalid(f"{requests} prompts are more than the server holds at once, {bound}", "prompt")
        if tokens > most_tokens:
            bound = f"{most_tokens} (max_open_tokens)"
            raise invalid(f"about {tokens} prompt tokens are more than the server holds at once, {bound}")

        over = self.requests + requests - most_requests
        if over > 0 or self.tokens + tokens > most_tokens:
            self.refused += requests
            held = f"{self.requests} requests with about {self.tokens} prompt tokens"
            raise ApiError(
                429,
                f"the server is full: it holds {held}, of {most_requests} and {most_tokens}; try again later",
                type="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(self.retry_after(max(over, 1)))},
            )
        self.requests += requests
        self.tokens += tokens

    def leave(self, requests: int, tokens: int) -> None:
        """The same requests have ended."""
        self.requests -= requests
        self.tokens -= tokens
        now = self._clock()
        self._ended = self._ended * self._decay(now) + requests
        self._ended_at = now

    def retry_after(self, requests: int = 1) -> int:
        """Whole seconds until so many requests will have ended at the measured rate, 1 to 60."""
        now = self._clock()
        recent = self._ended * self._decay(now)
        # The sum of a steady rate r, decaying, is r * half-life / ln 2; less of it in the first seconds.
        age = max(now - self._began_at, 0.1)
        window = _HALF_LIFE_S / math.log(2) * (1 - _halved(age))
        rate = recent / window
        if not recent:
            return 1  # nothing was measured yet
        return max(1, min(_MAX_RETRY_S, math.ceil(requests / max(rate, 1e-9))))

    def _decay(self, now: float) -> float:
        return _halved(now - self._ended_at)


def _halved(age_s: float) -> float:
    return math.exp(-math.log(2) * age_s / _HALF_LIFE_S)
