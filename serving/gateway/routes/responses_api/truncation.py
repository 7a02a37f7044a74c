"""truncation="auto": items leave the beginning of a conversation until it fits into the model's context."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...gateway import Gateway
from ...http.errors import ApiError
from .. import faces
from .conversation import Item

SHARE = 4
"""What is cut leaves this part of the context to an answer whose length is not given: a quarter."""
FAR_TOO_LONG = 16
"""Times that the context holds a conversation, by its bytes, from which it is not counted as a whole."""

Made = Callable[[Sequence[Item | None]], faces.Turn]
"""Makes the turn of a conversation; None stands for an item that has left it."""


async def turn_that_fits(gateway: Gateway, items: Sequence[Item], most_new: int | None, made: Made) -> faces.Turn:
    """The turn of as many of the last items as fit beside `most_new` tokens of an answer.

    Where all fit beside it, or beside one token if it is None, all stay. The last item stays in any case, and with what
    a tool returned its call: what does not fit then the engine refuses. Raises ApiError as `made` and the engine do.
    """
    whole = made(items)
    _, info = gateway.model(whole.chat.model)
    starts = [index for index, item in enumerate(items) if index and item["type"] != "function_call_output"]
    # What looks many times too long is not counted as a whole, which takes seconds, unless the rest turns out short.
    far_too_long = whole.prompt_tokens > FAR_TOO_LONG * info.max_model_len
    if not starts or (not far_too_long and await _fits(gateway, whole, info.max_model_len - (most_new or 1))):
        return whole

    # The engine tells how long a conversation is. Its last items are asked about, each time twice as many, and then
    # those in between: no question is about much more than fits.
    longest = info.max_model_len - (most_new or info.max_model_len // SHARE)
    low, high, kept = 0, len(starts) - 1, 1
    while low < high:
        middle = max(len(starts) - 2 * kept, (low + high) // 2)
        if await _fits(gateway, made(_from(items, starts[middle])), longest):
            high, kept = middle, len(starts) - middle
        else:
            low = middle + 1
    if far_too_long and not low and await _fits(gateway, whole, info.max_model_len - (most_new or 1)):
        return whole
    return made(_from(items, starts[low]))


async def _fits(gateway: Gateway, turn: faces.Turn, longest: int) -> bool:
    try:
        return await faces.count_tokens(gateway, turn) <= longest
    except ApiError as error:
        if error.status != 400:
            raise
        return False  # too long to be counted, or nothing that the chat template renders


def _from(items: Sequence[Item], first: int) -> list[Item | None]:
    """The items from `first` on, without what was returned by calls before it."""
    gone = {item["call_id"] for item in items[:first] if item["type"] == "function_call"}
    return [
        None if index < first or (item["type"] == "function_call_output" and item["call_id"] in gone) else item
        for index, item in enumerate(items)
    ]
