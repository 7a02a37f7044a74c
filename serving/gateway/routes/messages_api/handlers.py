"""/v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from .....engine.errors import EngineFault, PhalanxError
from .....engine.protocol.messages import Tokenize, Tokenized
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
    submit = turn.submit
    question = Tokenize(
        id=submit.id,
        messages=submit.messages,
        tools=submit.tools,
        chat_template_kwargs=submit.chat_template_kwargs,
        add_generation_prompt=submit.add_generation_prompt,
        continue_final_message=submit.continue_final_message,
    )
    try:
        answer = await gateway.ask(question)
    except PhalanxError as error:
        raise faces.explained(gateway, error, turn) from error
    if not isinstance(answer, Tokenized):
        raise EngineFault(f"the engine answered a Tokenize with {type(answer).__name__}")
    await exchange.respond_json(TokenCount(input_tokens=len(answer.token_ids)))
