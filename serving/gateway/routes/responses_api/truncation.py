"""truncation="auto": items leave the beginning of a conversation until it fits into the model's context."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...gateway import Gateway
from ...http.errors import ApiError
from .. import faces
from .conversation import Item

SHARE = 4
"""What is cut leaves this part of the context to an answer whose length is not given: a quarter."""

Made = Callable[[Sequence[Item | None]], faces.Turn]
"""Makes the turn of a conversation; None stands for an item that has left it."""


async def turn_that_fits(gateway: Gateway, items: Sequence[Item], most_new: int | None, made: Made) -> faces.Turn:
    """The turn of as many of the last items as fit beside `most_new` tokens of an answer.

    Where all fit beside it, or beside one token if it is None, all stay. The last item stays in any case, and with what
    a tool returned its call: what does not fit then the engine refuses. Raises ApiError as `made` and the engine do.
    """
    whole = made(items)
    _, info = gateway.model(whole.chat.model)
    if await _fits(gateway, whole, info.max_model_len - (most_new or 1)):
        return whole

    # The engine tells how long a conversation is: it takes a few questions to find the first item that may stay.
    places = [place for place, item in enumerate(items) if place and item["type"] != "function_call_output"]
    if not places:
        return whole
    longest = info.max_model_len - (most_new or info.max_model_len // SHARE)
    low, high = 0, len(places) - 1
    while low < high:
        middle = (low + high) // 2
        if await _fits(gateway, made(_from(items, places[middle])), longest):
            high = middle
        else:
            low = middle + 1
    return made(_from(items, places[low]))


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
        None if place < first or (item["type"] == "function_call_output" and item["call_id"] in gone) else item
        for place, item in enumerate(items)
    ]
