"""What the bytes of a streamed answer say, read after the run."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import msgspec

from .client import Exchange


@dataclass(frozen=True)
class Answer:
    """One request's figures; all but `error` and `late_s` are zero if it failed."""

    late_s: float
    """How much later than due it was sent."""
    error: str | None = None
    ttft_s: float = 0.0
    """From when it was due to its first text."""
    e2e_s: float = 0.0
    gaps_s: tuple[float, ...] = ()
    """Between arrivals of text."""
    prompt_tokens: int = 0
    output_tokens: int = 0

    @property
    def tpot_ms(self) -> float:
        """Mean milliseconds between output tokens after the first; 0 with fewer than two."""
        return 1000 * sum(self.gaps_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


def read_answer(exchange: Exchange) -> Answer:
    """Read what came back for one request: events of OpenAI's API, chat or completions."""
    late_s = exchange.sent - exchange.due
    if exchange.error is not None:
        return Answer(late_s, exchange.error)
    if exchange.status != 200:
        body = b"".join(piece for _, piece in exchange.pieces)
        return Answer(late_s, f"status {exchange.status}: {body[:200].decode('utf-8', 'replace')}")

    arrivals: list[float] = []
    usage: dict[str, int] = {}
    ended = False
    for moment, data in _events(exchange):
        if data == b"[DONE]":
            ended = True
            continue
        event = msgspec.json.decode(data)
        if "error" in event:
            return Answer(late_s, f"in mid-stream: {event['error']}")
        usage = event.get("usage") or usage
        if any(_text_of(choice) for choice in event.get("choices", ())):
            arrivals.append(moment)

    if not ended or not arrivals:
        return Answer(late_s, "the stream ended without text" if ended else "the stream ended without [DONE]")
    gaps = tuple(after - before for before, after in itertools.pairwise(arrivals))
    return Answer(
        late_s=late_s,
        ttft_s=arrivals[0] - exchange.due,
        e2e_s=exchange.ended - exchange.due,
        gaps_s=gaps,
        prompt_tokens=usage.get("prompt_tokens", 0),
        output_tokens=usage.get("completion_tokens", len(arrivals)),
    )


def _events(exchange: Exchange) -> list[tuple[float, bytes]]:
    """Return the data of each server-sent event, with the moment at which it was whole."""
    events = []
    buffer = b""
    for moment, piece in exchange.pieces:
        *whole, buffer = (buffer + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in whole:
            lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                events.append((moment, b"\n".join(lines)))
    return events


def _text_of(choice: dict[str, Any]) -> str:
    """Return what a choice adds, in chat or completions; reasoning is text too."""
    delta = choice.get("delta") or {}
    return choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
