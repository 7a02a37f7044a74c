"""/v1/chat/completions."""

from __future__ import annotations

import msgspec

from ....engine.protocol.messages import ModelInfo, Submit
from ....engine.protocol.structured import StructuredOutput
from ..gateway import Gateway, affinity_of, tokens_in
from ..generation.answer_reader import AnswerReader, Dialect, ToolSyntax, dialect_of
from ..generation.tool_grammar import call_or_answer, strict_grammar, tool_grammar
from ..http.errors import invalid
from ..http.exchange import Exchange
from ..http.json_body import check_sendable
from ..schemas.chat import ChatRequest, check_chat, template_messages, template_variables, with_allowed_tools
from ..schemas.fields import check_store, check_stream, kept_tokens, timeout_of, to_sampling
from ..schemas.refused import REFUSED_CHAT
from ..schemas.structured import structured_errors, structured_of
from ..schemas.tools import ToolChoice, tool_choice_of
from .answering import collect, stream
from .chat_writer import ChatStyle, ChatWriter

REQUIRED_FORM: ToolSyntax = "hermes"
"""The form of calls that a grammar makes the model write, whatever its own is."""


async def chat_completions(gateway: Gateway, exchange: Exchange) -> None:
    """Continue a conversation."""
    request = await exchange.read(ChatRequest, REFUSED_CHAT)
    exchange.take_request_id(request.request_id)
    given_tools = request.tools
    request = with_allowed_tools(request)
    name, info = gateway.model(request.model)
    submit, messages = to_submit(gateway, exchange, request, info)
    style = ChatStyle(request, f"chatcmpl-{exchange.request_id}", name, messages, submit.split_reasoning)
    each = readers(request, info, gateway, submit.sampling.n)

    tokens = sum(tokens_in(str(message.get("content", ""))) + 4 for message in messages)
    tokens += sum(tokens_in(str(tool)) for tool in request.tools or ())
    first = "\0".join(str(message.get("content", "")) for message in messages[:2])
    affinity = affinity_of(submit.cache_salt, request.prompt_cache_key or first)
    timeout_s = timeout_of(request.timeout, gateway.config)
    async with (
        structured_errors(request, submit.structured, given_tools),
        gateway.generation(exchange, bool(request.stream), timeout_s) as generation,
    ):
        generation.admit(1, tokens)
        await generation.start([submit], affinity)
        if request.stream:
            await stream(gateway, exchange, generation, ChatWriter(style, each))
        else:
            answer = style.whole(await collect(generation), each)
            await exchange.respond_json(answer)


def to_submit(
    gateway: Gateway, exchange: Exchange, request: ChatRequest, info: ModelInfo
) -> tuple[Submit, list[dict[str, object]]]:
    """The protocol's request, and its messages. Raises ApiError for what the server does not do."""
    check_chat(request, gateway.config)
    check_store(request)
    check_stream(request.stream, request.stream_options, request.prompt_logprobs)
    check_sendable(request.tools, "tools")
    check_sendable(request.chat_template_kwargs, "chat_template_kwargs")
    choice = tool_choice_of(request.tools, request.tool_choice)
    dialect = dialect_of(info, gateway.config)
    if choice.mode == "auto" and dialect.tools is None:
        why = (
            "this model's chat template shows no form of calls that the server reads; set the server's tool_syntax, or "
            'tool_choice="none" to have the template know the tools'
        )
        raise invalid(f"tools is not supported: {why}", "tools", "unsupported_parameter")
    structured = structured_with_tools(request, choice, dialect)

    messages = template_messages(request.messages)
    newer = request.max_completion_tokens is not None
    sampling = to_sampling(
        request,
        gateway.config,
        info,
        max_tokens=request.max_completion_tokens if newer else request.max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_logprobs=request.prompt_logprobs,
        max_tokens_field="max_completion_tokens" if newer else "max_tokens",
        logprobs_field="top_logprobs",
    )
    if choice.mode != "none" and request.skip_special_tokens is None:
        # The tags of calls may be special tokens, without which no call would be seen.
        sampling = msgspec.structs.replace(sampling, skip_special_tokens=False)

    continues = bool(request.continue_final_message)
    generation_prompt = request.add_generation_prompt
    submit = Submit(
        id=gateway.new_id(),
        messages=messages,
        tools=request.tools,
        chat_template_kwargs=template_variables(request),
        truncate_prompt_tokens=kept_tokens(request.truncate_prompt_tokens, info, sampling.max_tokens or 1),
        add_generation_prompt=not continues if generation_prompt is None else generation_prompt,
        continue_final_message=continues,
        sampling=sampling,
        structured=structured,
        priority=request.priority or 0,
        cache_salt=exchange.salted(request.cache_salt),
        return_prompt_token_ids=bool(request.return_token_ids),
        split_reasoning=dialect.reasoning,
        stop_in_reasoning=bool(request.stop_in_reasoning),
    )
    return submit, messages


def structured_with_tools(request: ChatRequest, choice: ToolChoice, dialect: Dialect) -> StructuredOutput | None:
    """What the answer must match: calls that are required, a form of its text, or the schemas of strict tools.

    Raises ApiError for a form that leaves no room for the calls that tool_choice allows.
    """
    tools = request.tools or []
    wanted = structured_of(request)
    if choice.mode == "required":
        if request.structured_outputs is not None:
            field, why = "structured_outputs", "the answer is calls, and nothing else"
            raise invalid(f"{field} does not go with a tool_choice that asks for a call: {why}", field)
        # There is no text that response_format could form.
        return tool_grammar(tools, choice.names, parallel=request.parallel_tool_calls is not False)
    if choice.mode == "none":
        return wanted
    if wanted is not None:
        return call_or_answer(tools, wanted)
    return strict_grammar(tools) if dialect.tools == REQUIRED_FORM else None


def readers(request: ChatRequest, info: ModelInfo, gateway: Gateway, n: int) -> list[AnswerReader]:
    """What reads each of the n completions of a request that to_submit() has accepted."""
    choice = tool_choice_of(request.tools, request.tool_choice)
    by_grammar = choice.mode == "required" or structured_of(request) is not None
    syntax = REQUIRED_FORM if by_grammar else dialect_of(info, gateway.config).tools
    if choice.mode == "none":
        syntax = None
    return [
        AnswerReader(
            syntax,
            request.tools,
            shows_reasoning=request.include_reasoning is not False,
            most_calls=1 if request.parallel_tool_calls is False else None,
        )
        for _ in range(n)
    ]
