"""/v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from ...gateway import Gateway
from ...http.exchange import Exchange
from ...schemas.messages_api.answer import MessageAnswer, MessageUsage, TokenCount
from ...schemas.messages_api.request import (
    REFUSED_COUNT_TOKENS,
    REFUSED_MESSAGES,
    CountTokensRequest,
    MessagesRequest,
)
from .. import faces
from .conversation import display_of, to_chat
from .writer import MessageWriter


async def messages(gateway: Gateway, exchange: Exchange) -> None:
    """Continue a conversation, in Anthropic's form."""
    request = await exchange.read(MessagesRequest, REFUSED_MESSAGES)
    chat, paths = to_chat(request, gateway.config)
    turn = faces.prepare(gateway, exchange, chat, paths)
    message = MessageAnswer(
        id=f"msg_{exchange.request_id}", model=turn.name, usage=MessageUsage(input_tokens=0, output_tokens=0)
    )
    omits = display_of(request) == "omitted"
    writer = MessageWriter(message, stream=bool(request.stream), omit_thinking=omits, request_id=exchange.request_id)
    await faces.answer(gateway, exchange, turn, writer)
    if not request.stream:
        await exchange.respond_json(message)


async def count_tokens(gateway: Gateway, exchange: Exchange) -> None:
    """Count the tokens of a conversation, as /v1/messages would send it to the model."""
    request = await exchange.read(CountTokensRequest, REFUSED_COUNT_TOKENS)
    chat, paths = to_chat(request, gateway.config)
    turn = faces.prepare(gateway, exchange, chat, paths)
    await exchange.respond_json(TokenCount(input_tokens=await faces.count_tokens(gateway, turn)))
