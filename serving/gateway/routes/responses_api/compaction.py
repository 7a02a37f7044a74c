"""The summary of a conversation, which the model writes and later inputs may have in the conversation's place."""

from __future__ import annotations

import time
import uuid
from typing import Any

from .....engine.protocol.messages import Accepted, Completion, Finished
from ...generation.parts import Part, Text
from ...http.errors import ApiError
from ...schemas.responses import LogprobContent
from ...schemas.responses_api.answer import CompactedResponse, ResponseUsage
from ...schemas.responses_api.request import CompactRequest, ReasoningConfig, ResponsesRequest
from ...schemas.sealed import seal
from .conversation import Item
from .keeping import with_id
from .writer import usage_of

ASK: Item = {
    "type": "message",
    "role": "user",
    "content": "Do not go on with the conversation. Write a summary of it that will take its place, for somebody who "
    "goes on with it and has nothing else: what was asked for and every instruction that still holds, what was done "
    "and found out, names, numbers, files and results of tools that are still needed, and what is left to do.",
}
"""The last message that the model gets."""
SHARE = 4
"""A summary takes at most this part of the model's context: a quarter, so that there is room to go on."""
CUT = "[The summary breaks off here.]"


def as_response(request: CompactRequest, max_model_len: int) -> ResponsesRequest:
    """The request of the response that is the summary, for a model with a context of `max_model_len` tokens.

    It is written without thinking, where the template can.
    """
    same = {name: getattr(request, name) for name in request.__struct_fields__}
    most = max(1, max_model_len // SHARE)
    return ResponsesRequest(**same, max_output_tokens=most, reasoning=ReasoningConfig(effort="none"))


class SummaryWriter:
    """Collects the summary's text."""

    keep_alive = b""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._usage: ResponseUsage | None = None

    def begin(self, accepted: Accepted) -> None:
        """The engine computes the summary."""

    def take(self, parts: list[Part], logprobs: list[LogprobContent]) -> None:
        """More of the summary; thinking is none of it."""
        self._pieces += [part.text for part in parts if isinstance(part, Text)]

    def end(self, finished: Finished, ending: Completion) -> None:
        """The summary has ended, or its room has."""
        self._usage = usage_of(finished.usage)
        if ending.finish_reason == "length":
            self._pieces.append(f"\n{CUT}")

    def fail(self, error: ApiError) -> None:
        """Only streams fail so."""

    def drain(self) -> bytes:
        """A summary has no events."""
        return b""

    def response(self, items: list[Item]) -> CompactedResponse:
        """The user's messages among the conversation's `items`, and the summary. Raises ApiError (422) without one."""
        text = "".join(self._pieces).strip()
        if not text or text == CUT or self._usage is None:
            why = "the model wrote no summary of this input; send the conversation itself"
            raise ApiError(422, why, code="no_summary")
        summary = {"type": "compaction", "id": f"cmp_{uuid.uuid4().hex}", "encrypted_content": seal(text)}
        return CompactedResponse(
            id=f"resp_{uuid.uuid4().hex}",
            created_at=int(time.time()),
            output=[*map(_user_message, filter(_is_users, items)), summary],
            usage=self._usage,
        )


def _is_users(item: Item) -> bool:
    return bool(item["type"] == "message" and item["role"] == "user")


def _user_message(item: Item) -> dict[str, Any]:
    content = item["content"]
    parts = [{"type": "input_text", "text": content}] if isinstance(content, str) else content
    return {**with_id(item), "status": "completed", "content": parts}
