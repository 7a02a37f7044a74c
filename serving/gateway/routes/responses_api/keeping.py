"""Responses that are kept, and those that are computed while nobody waits."""

from __future__ import annotations

import asyncio
import logging
import uuid

import msgspec

from .....engine.errors import PhalanxError
from .....engine.protocol.messages import Accepted, Completion, Finished
from ...gateway import Gateway
from ...generation.parts import Part
from ...generation.response_store import StoredResponse
from ...http.errors import ApiError, internal
from ...http.exchange import Exchange
from ...schemas.responses import LogprobContent
from ...schemas.sealed import seal
from .. import faces
from .conversation import Item
from .writer import ResponseWriter

_log = logging.getLogger(__name__)

_ID_PREFIXES = {"function_call": "fc", "function_call_output": "fco", "reasoning": "rs", "compaction": "cmp"}


class Keeper:
    """Writes a response, and keeps it when it has ended: before its last event is sent."""

    def __init__(self, gateway: Gateway, owner: str, items: list[Item], writer: ResponseWriter) -> None:
        """`items` are all of the input, those of the responses before it included."""
        self._store = gateway.responses
        self._owner = owner
        self._writer = writer
        self.keep_alive = writer.keep_alive
        self._input = msgspec.json.encode([with_id(item) for item in items])
        self._task: asyncio.Task[None] | None = None

    def begin(self, accepted: Accepted) -> None:
        """The engine computes the answer."""
        self._writer.begin(accepted)
        if self._task is not None:
            self.keep(self._task)

    def take(self, parts: list[Part], logprobs: list[LogprobContent]) -> None:
        """More of the answer."""
        self._writer.take(parts, logprobs)

    def end(self, finished: Finished, ending: Completion) -> None:
        """The answer has ended."""
        self._writer.end(finished, ending)
        self._keep_end()

    def fail(self, error: ApiError) -> None:
        """The answer cannot go on."""
        self._writer.fail(error)
        self._keep_end()

    def cancel(self) -> None:
        """Nobody wants the answer any more."""
        self._writer.cancel()
        self._keep_end()

    def drain(self) -> bytes:
        """The events since the last call."""
        return self._writer.drain()

    def keep(self, task: asyncio.Task[None] | None) -> None:
        """Keep the response as it is now; `task` is what computes it in the background."""
        self._task = task
        response = self._writer.response
        ids = [item.id for item in response.output]
        record = StoredResponse(msgspec.json.encode(response), self._input, task, ids)
        if not self._store.put(self._owner, response.id, record):
            _log.warning("response %s is not kept: it takes %d bytes (stored_response_bytes)", response.id, record.size)

    @property
    def response(self) -> bytes:
        """The response as it is now, JSON."""
        return msgspec.json.encode(self._writer.response)

    def forget(self) -> None:
        """Keep nothing of the response."""
        self._store.delete(self._owner, self._writer.response.id)

    def _keep_end(self) -> None:
        # A response in the background that was deleted meanwhile stays so.
        if self._task is None or self._store.holds(self._owner, self._writer.response.id):
            self.keep(None)


async def start_in_background(gateway: Gateway, exchange: Exchange, turn: faces.Turn, keeper: Keeper) -> None:
    """Have the answer computed, and return once the engine has the request. Raises ApiError for a refusal."""
    started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    keeper.keep(asyncio.create_task(_compute(gateway, exchange, turn, keeper, started)))
    durable = exchange.durable
    try:
        await started
    except ApiError:
        if durable is None or not durable.recovered:  # else it is tried again later
            keeper.forget()
        raise
    if durable is not None:
        durable.background = True


async def _compute(
    gateway: Gateway, exchange: Exchange, turn: faces.Turn, keeper: Keeper, started: asyncio.Future[None]
) -> None:
    await _compute_answer(gateway, exchange, turn, keeper, started)
    if not started.done() or started.cancelled() or started.exception() is not None:
        return
    if exchange.durable is not None and gateway.journaling is not None:
        await gateway.journaling.requests.end_background(exchange.durable, keeper.response)


async def _compute_answer(
    gateway: Gateway, exchange: Exchange, turn: faces.Turn, keeper: Keeper, started: asyncio.Future[None]
) -> None:
    try:
        async with faces.running(gateway, exchange, turn, detached=True) as generation:
            started.set_result(None)
            await faces.collect(generation, turn, keeper)
    except asyncio.CancelledError:
        # By the route that cancels, by one that deletes, or by the store, which needs its room.
        started.cancel()
        keeper.cancel()
    except (ApiError, PhalanxError) as error:
        made = faces.explained(gateway, error, turn)
        if started.done():
            keeper.fail(made)
        else:
            started.set_exception(made)
    except Exception:
        _log.exception("request %s failed", exchange.request_id)
        if started.done():
            keeper.fail(internal())
        else:
            started.set_exception(internal())


def with_id(item: Item) -> Item:
    """The item, with an id if it had none."""
    if item.get("id"):
        return item
    return {**item, "id": f"{_ID_PREFIXES.get(str(item['type']), 'msg')}_{uuid.uuid4().hex}"}


def with_encrypted_content(item: Item) -> Item:
    """The item; thinking that a client may read has the form, too, in which it sends it back unread."""
    parts = item.get("content") or item.get("summary")
    if item["type"] != "reasoning" or item.get("encrypted_content") or not parts:
        return item
    return {**item, "encrypted_content": seal("".join(part["text"] for part in parts))}
