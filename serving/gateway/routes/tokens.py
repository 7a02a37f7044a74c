"""/tokenize, /detokenize and /tokenizer_info: the engine's tokenizer answers."""

from __future__ import annotations

from ....engine.errors import EngineFault
from ....engine.protocol.messages import Detokenize, Detokenized, ModelInfo, Tokenize, Tokenized
from ..gateway import Gateway
from ..http.errors import invalid
from ..http.exchange import Exchange
from ..http.json_body import check_sendable
from ..schemas.chat import template_messages
from ..schemas.fields import kept_tokens
from ..schemas.refused import REFUSED_TOKENIZE
from ..schemas.responses import DetokenizeResponse, TokenizeResponse, TokenizerInfo
from ..schemas.tokens import DetokenizeRequest, TokenizeRequest


async def tokenize(gateway: Gateway, exchange: Exchange) -> None:
    """Tell the token ids of a text or a conversation."""
    request = await exchange.read(TokenizeRequest, REFUSED_TOKENIZE)
    _, model = gateway.model(request.model)
    answer = await gateway.ask(_question(gateway, request, model))
    if not isinstance(answer, Tokenized):
        raise EngineFault(f"the engine answered a Tokenize with {type(answer).__name__}")
    await exchange.respond_json(
        TokenizeResponse(
            count=len(answer.token_ids),
            max_model_len=model.max_model_len,
            tokens=answer.token_ids,
            token_strs=[text.decode(errors="replace") for text in answer.token_bytes]
            if request.return_token_strs
            else None,
        )
    )


def _question(gateway: Gateway, request: TokenizeRequest, model: ModelInfo) -> Tokenize:
    kept = kept_tokens(request.truncate_prompt_tokens, model, 0)
    if (request.prompt is None) == (request.messages is None):
        raise invalid("exactly one of prompt and messages is required", "prompt")
    if request.prompt is not None:
        for name in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools"):
            if getattr(request, name) is not None:
                raise invalid(f"{name} is only for messages", name)
        return Tokenize(
            id=gateway.new_id(),
            prompt=request.prompt,
            truncate_prompt_tokens=kept,
            add_special_tokens=request.add_special_tokens is not False,
        )

    if request.add_special_tokens:
        raise invalid("add_special_tokens=true is not supported with messages", "add_special_tokens")
    check_sendable(request.tools, "tools")
    check_sendable(request.chat_template_kwargs, "chat_template_kwargs")
    continues = bool(request.continue_final_message)
    if continues and request.add_generation_prompt:
        raise invalid("continue_final_message=true needs add_generation_prompt=false", "continue_final_message")
    generation_prompt = request.add_generation_prompt
    return Tokenize(
        id=gateway.new_id(),
        messages=template_messages(request.messages or []),
        truncate_prompt_tokens=kept,
        tools=request.tools,
        chat_template_kwargs=request.chat_template_kwargs,
        add_generation_prompt=not continues if generation_prompt is None else generation_prompt,
        continue_final_message=continues,
    )


async def detokenize(gateway: Gateway, exchange: Exchange) -> None:
    """Tell the text of token ids."""
    request = await exchange.read(DetokenizeRequest)
    gateway.model(request.model)
    answer = await gateway.ask(Detokenize(id=gateway.new_id(), token_ids=request.tokens))
    if not isinstance(answer, Detokenized):
        raise EngineFault(f"the engine answered a Detokenize with {type(answer).__name__}")
    await exchange.respond_json(DetokenizeResponse(prompt=answer.text))


async def tokenizer_info(gateway: Gateway, exchange: Exchange) -> None:
    """Tell what the tokenizer is."""
    model = next(iter(gateway.known_models().values()))
    await exchange.respond_json(
        TokenizerInfo(
            tokenizer_class=model.tokenizer_class,
            chat_template=model.chat_template,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            model_max_length=model.max_model_len,
        )
    )
