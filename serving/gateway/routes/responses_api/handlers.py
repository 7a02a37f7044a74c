"""The routes under /v1/responses."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec

from ...gateway import Gateway
from ...generation.response_store import StoredResponse
from ...http.errors import ApiError, invalid
from ...http.exchange import Exchange
from ...schemas.responses_api.answer import DeletedResponse, InputItems, InputTokens, ReasoningInfo, ResponseObject
from ...schemas.responses_api.request import (
    ENCRYPTED,
    REFUSED_COMPACT,
    REFUSED_RESPONSES,
    CompactRequest,
    InputItemsQuery,
    ResponseQuery,
    ResponsesRequest,
)
from .. import faces
from .compaction import ASK, SummaryWriter, as_response
from .conversation import Item, check_together, echoed_format, input_items, to_chat
from .keeping import Keeper, start_in_background, with_encrypted_content
from .tools import echoed_tools, namespaces
from .truncation import turn_that_fits
from .writer import ResponseWriter, Style

LOOK_S = 0.01
"""Seconds between two looks at whether a response that is being taken up again has its task."""

_NOT_KEPT = "it was never kept, or no longer is, or belongs to another key"


async def create(gateway: Gateway, exchange: Exchange) -> None:
    """Answer an input, in OpenAI's newer form."""
    request = await exchange.read(ResponsesRequest, REFUSED_RESPONSES)
    check_together(request)
    store = gateway.responses
    owner = exchange.owner
    if (request.store or request.background) and not store.keeps:
        field = "background" if request.background else "store"
        raise invalid(f"{field}=true is not supported: this server keeps nothing (stored_responses=0)", field)

    turn, items = await _read_turn(gateway, exchange, request)
    durable = exchange.durable
    # The same id when it is computed again: its caller may know it.
    identity = uuid.uuid4().hex if durable is None else durable.request.id
    writer = _writer(request, turn, f"resp_{identity}", keeps=store.keeps)

    keeper = Keeper(gateway, owner, items, writer) if writer.response.store else None
    if request.background:
        assert keeper is not None
        await start_in_background(gateway, exchange, turn, keeper)
        await exchange.respond(msgspec.json.encode(writer.response))
        return
    await faces.answer(gateway, exchange, turn, keeper or writer)
    if not request.stream:
        await exchange.respond_json(writer.response)


async def count_input_tokens(gateway: Gateway, exchange: Exchange) -> None:
    """Count the tokens of an input, as /v1/responses would send it to the model."""
    request = await exchange.read(ResponsesRequest, REFUSED_RESPONSES)
    turn, _ = await _read_turn(gateway, exchange, request)
    await exchange.respond_json(InputTokens(input_tokens=await faces.count_tokens(gateway, turn)))


async def compact(gateway: Gateway, exchange: Exchange) -> None:
    """Have the model write a summary of an input, which later inputs may have in its place."""
    request = await exchange.read(CompactRequest, REFUSED_COMPACT)
    _, info = gateway.model(request.model)
    turn, items = await _read_turn(gateway, exchange, as_response(request, info.max_model_len), [ASK])
    writer = SummaryWriter()
    await faces.answer(gateway, exchange, turn, writer)
    await exchange.respond_json(writer.response(items))


async def retrieve(gateway: Gateway, exchange: Exchange) -> None:
    """Return a kept response."""
    query = exchange.read_query(ResponseQuery)
    if query.stream:
        raise invalid("stream=true is not supported: stored responses are not streamed", "stream", "unsupported_value")
    if query.include_obfuscation:
        why = "there is no stream to be padded"
        raise invalid(f"include_obfuscation=true is not supported: {why}", "include_obfuscation", "unsupported_value")
    _, record = _stored(gateway, exchange)
    if ENCRYPTED not in (query.include or ()):
        await exchange.respond(record.response)
        return
    response = msgspec.json.decode(record.response)
    await exchange.respond_json({**response, "output": [with_encrypted_content(item) for item in response["output"]]})


async def delete(gateway: Gateway, exchange: Exchange) -> None:
    """Forget a kept response, and stop computing it."""
    response_id = await _stop(gateway, exchange)
    gateway.responses.delete(exchange.owner, response_id)
    await exchange.respond_json(DeletedResponse(id=response_id))


async def cancel(gateway: Gateway, exchange: Exchange) -> None:
    """Stop computing a response in the background."""
    _, record = _stored(gateway, exchange)
    if not msgspec.json.decode(record.response)["background"]:
        raise invalid(
            "only a response with background=true can be cancelled; close the connection of any other", "response_id"
        )
    await _stop(gateway, exchange)
    _, record = _stored(gateway, exchange)
    await exchange.respond(record.response)


async def list_input_items(gateway: Gateway, exchange: Exchange) -> None:
    """List the items of a kept response's input, those of the responses before it included."""
    query = exchange.read_query(InputItemsQuery)
    _, record = _stored(gateway, exchange)
    items: list[Item] = msgspec.json.decode(record.input)
    if query.order != "asc":
        items.reverse()
    if query.after is not None:
        matches = [index for index, item in enumerate(items) if item["id"] == query.after]
        if not matches:
            raise invalid(f"after={query.after[:100]!r} is not the id of an item of the input", "after")
        items = items[matches[0] + 1 :]
    limit = query.limit or 20
    shown = items[:limit]
    if ENCRYPTED in (query.include or ()):
        shown = [with_encrypted_content(item) for item in shown]
    await exchange.respond_json(
        InputItems(
            data=shown,
            first_id=shown[0]["id"] if shown else None,
            last_id=shown[-1]["id"] if shown else None,
            has_more=len(items) > limit,
        )
    )


async def _stop(gateway: Gateway, exchange: Exchange) -> str:
    """End the computing of a response in the background, if it has not ended, and return its id."""
    while True:
        response_id, record = _stored(gateway, exchange)
        if record.task is not None:
            record.task.cancel()
            await asyncio.wait([record.task])
            return response_id
        if gateway.journaling is None:
            return response_id

        # One that an earlier process had begun waits for its turn, or is just being taken up: then its task comes.
        durable, request_id = gateway.journaling.requests, response_id.removeprefix("resp_")
        if await durable.give_up(request_id):
            response = {**msgspec.json.decode(record.response), "status": "cancelled"}
            gateway.responses.put(
                exchange.owner, response_id, StoredResponse(msgspec.json.encode(response), record.input)
            )
            return response_id
        opened = durable.open.get(request_id)
        if opened is None or opened.left.is_set():
            return response_id
        await asyncio.sleep(LOOK_S)


def _stored(gateway: Gateway, exchange: Exchange) -> tuple[str, StoredResponse]:
    response_id = str(exchange.scope["path_params"]["response_id"])
    record = gateway.responses.get(exchange.owner, response_id)
    if record is None:
        raise ApiError(
            404,
            f"response_id={response_id[:100]!r} is not known: {_NOT_KEPT}",
            type="not_found_error",
            param="response_id",
            code="response_not_found",
        )
    return response_id, record


async def _read_turn(
    gateway: Gateway, exchange: Exchange, request: ResponsesRequest, added: Sequence[Item] = ()
) -> tuple[faces.Turn, list[Item]]:
    """(the request on its way to the engine, the items of its input with those of the responses before it)

    Items that are `added` come after them, to the engine alone, and with truncation="auto" those that do not fit are
    left out for it. Raises ApiError with the path of the field that is wrong.
    """
    owner = exchange.owner
    before = _previous_items(gateway, owner, request.previous_response_id)
    items = input_items(request, lambda item_id: gateway.responses.find_item(owner, item_id))
    given = [*before, *items, *added]

    def made(kept: Sequence[Item | None]) -> faces.Turn:
        chat, paths = to_chat(request, kept[: len(before)], kept[len(before) :], gateway.config)
        return faces.prepare(gateway, exchange, chat, paths)

    if request.truncation == "auto":
        return await turn_that_fits(gateway, given, request.max_output_tokens, made), before + items
    return made(given), before + items


def _previous_items(gateway: Gateway, owner: str, response_id: str | None) -> list[Item]:
    if response_id is None:
        return []
    record = gateway.responses.get(owner, response_id)
    if record is None:
        # Clients know by these words, this code and the status 400 that they have to send the whole conversation.
        raise invalid(
            f"Previous response with id {response_id[:100]!r} not found (previous_response_id): {_NOT_KEPT}",
            "previous_response_id",
            "previous_response_not_found",
        )
    response: dict[str, Any] = msgspec.json.decode(record.response)
    if record.task is not None:
        raise invalid(
            f"previous_response_id={response_id[:100]!r} has not ended: it is {response['status']}; wait for its end",
            "previous_response_id",
        )
    items: list[Item] = msgspec.json.decode(record.input)
    output: list[Item] = response["output"]
    return items + output


def _writer(request: ResponsesRequest, turn: faces.Turn, response_id: str, *, keeps: bool) -> ResponseWriter:
    sampling = turn.submit.sampling
    reasoning = request.reasoning
    summary = (reasoning.summary or reasoning.generate_summary) if reasoning else None
    response = ResponseObject(
        id=response_id,
        created_at=int(time.time()),
        status="queued" if request.background else "in_progress",
        model=turn.name,
        instructions=request.instructions,
        previous_response_id=request.previous_response_id,
        tools=echoed_tools(request),
        tool_choice="auto" if request.tool_choice is None else request.tool_choice,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        text=echoed_format(request),
        reasoning=ReasoningInfo(effort=reasoning.effort if reasoning else None, summary=summary),
        max_output_tokens=request.max_output_tokens,
        max_tool_calls=request.max_tool_calls,
        temperature=1.0 if sampling.temperature is None else sampling.temperature,
        top_p=1.0 if sampling.top_p is None else sampling.top_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        top_logprobs=request.top_logprobs or 0,
        truncation=request.truncation or "disabled",
        store=keeps if request.store is None else request.store,
        background=bool(request.background),
        metadata=request.metadata or {},
        user=request.user,
        safety_identifier=request.safety_identifier,
        prompt_cache_key=request.prompt_cache_key,
    )

    sealed = ENCRYPTED in (request.include or ())
    style = Style(stream=bool(request.stream), summary=summary is not None, sealed=sealed)
    return ResponseWriter(response, style, namespaces(request))
