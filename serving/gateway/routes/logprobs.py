"""Log-probabilities in OpenAI's two forms and vLLM's third, from the bytes of each token."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from ....engine.protocol.logprobs import TokenLogprobs
from ..schemas.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    LogprobContent,
    LogprobItem,
    PromptLogprob,
    PromptLogprobs,
)

# JSON has no minus infinity: the log-probability of what cannot be sampled, as in vLLM's answers.
_LOWEST = -9999.0


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, _LOWEST)


def token_text(token_id: int, text: bytes, as_id: bool) -> str:
    """How a token is named; bytes that are no whole characters show as the replacement character."""
    return f"token_id:{token_id}" if as_id else text.decode(errors="replace")


def chat_logprobs(entries: Iterable[TokenLogprobs], as_ids: bool) -> ChatLogprobs:
    """The form of chat: for each token its likeliest rivals, the likeliest first."""
    return ChatLogprobs(content=[_content(entry, as_ids) for entry in entries])


def _content(entry: TokenLogprobs, as_ids: bool) -> LogprobContent:
    return LogprobContent(
        token=token_text(entry.token_id, entry.token_bytes, as_ids),
        logprob=finite(entry.logprob),
        bytes=list(entry.token_bytes),
        top_logprobs=[
            LogprobItem(token=token_text(token, text, as_ids), logprob=finite(logprob), bytes=list(text))
            for token, logprob, text in _top(entry)
        ],
    )


def _top(entry: TokenLogprobs) -> list[tuple[int, float, bytes]]:
    texts = entry.top_bytes or [b""] * len(entry.top_token_ids)
    return list(zip(entry.top_token_ids, entry.top_logprobs, texts, strict=True))


class CompletionLogprobsWriter:
    """Makes the form of completions of one completion, piece by piece: offsets go on where the last piece ended."""

    def __init__(self, as_ids: bool, top: bool) -> None:
        self._as_ids = as_ids
        self._top = top
        self._offset = 0
        # Characters may be spread over several tokens: each token begins where those before it have come to.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._made = self._empty()

    def _empty(self) -> CompletionLogprobs:
        return CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])

    def first(self, token_id: int, text: bytes) -> None:
        """Add the prompt's first token, which has no log-probability."""
        self._add(token_id, text, None, None)

    def add(self, entries: Iterable[TokenLogprobs]) -> None:
        """Add tokens."""
        for entry in entries:
            top: dict[str, float] = {}
            # Different tokens may have the same text: the likeliest of them counts.
            if self._top:
                for token, logprob, text in _top(entry):
                    name = token_text(token, text, self._as_ids)
                    top[name] = max(finite(logprob), top.get(name, _LOWEST))
            name = token_text(entry.token_id, entry.token_bytes, self._as_ids)
            top[name] = max(finite(entry.logprob), top.get(name, _LOWEST))
            self._add(entry.token_id, entry.token_bytes, finite(entry.logprob), top)

    def skip(self, text: str) -> None:
        """Begin after a text that comes before the first token."""
        self._offset += len(text)

    def take(self) -> CompletionLogprobs:
        """What was added since the last call."""
        made, self._made = self._made, self._empty()
        return made

    def _add(self, token_id: int, text: bytes, logprob: float | None, top: dict[str, float] | None) -> None:
        self._made.tokens.append(token_text(token_id, text, self._as_ids))
        self._made.token_logprobs.append(logprob)
        self._made.top_logprobs.append(top)
        self._made.text_offset.append(self._offset)
        self._offset += len(self._decoder.decode(text))


def prompt_logprobs(entries: list[TokenLogprobs]) -> PromptLogprobs:
    """vLLM's form for a prompt: for each token by id; none for the first."""
    made: PromptLogprobs = [None]
    for entry in entries:
        candidates = {
            str(token): PromptLogprob(
                logprob=finite(logprob), rank=rank, decoded_token=token_text(token, text, as_id=False)
            )
            for rank, (token, logprob, text) in enumerate(_top(entry), 1)
        }
        candidates[str(entry.token_id)] = PromptLogprob(
            logprob=finite(entry.logprob),
            rank=entry.rank,
            decoded_token=token_text(entry.token_id, entry.token_bytes, as_id=False),
        )
        made.append(candidates)
    return made
