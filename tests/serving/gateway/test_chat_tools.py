"""Tools and thinking on /v1/chat/completions, with the official client and a pool that says what it is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import openai
import pytest
from phalanx.serving.gateway.config import GatewayConfig
from phalanx.tests.serving.gateway.conftest import Server
from phalanx.tests.serving.gateway.scripted_pool import MODEL, ScriptedPool

HELLO = [{"role": "user", "content": "Hi"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "It does.",
            "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
            "strict": True,
        },
    }
    for name in ("read", "write")
]
READ = '<tool_call>\n{"name": "read", "arguments": {"path": "a </tool_call> \\"é\\n"}}\n</tool_call>'
WRITE = '<tool_call>\n{"name": "write", "arguments": {"path": "b"}}\n</tool_call>'
QWEN3 = msgspec.structs.replace(MODEL, chat_template="{{ '<tool_call>' }}{{ '</think>' }}")


@pytest.fixture(scope="module")
def shared_thinker() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def thinker(shared_thinker: Server) -> Server:
    """A server of a model whose template knows tools and thinking."""
    shared_thinker.pool.join()
    shared_thinker.pool.__init__()  # type: ignore[misc]
    shared_thinker.pool.model = QWEN3
    return shared_thinker


def ask(server: Server, **fields: Any) -> Any:
    return server.openai.chat.completions.create(**{"model": "demo", "messages": HELLO, **fields})


class Streamed:
    """A message that was put together from chunks, as clients do it."""

    def __init__(self, chunks: Any) -> None:
        self.content = self.reasoning = self.reasoning_content = ""
        self.calls: list[dict[str, Any]] = []
        self.finish_reason: str | None = None
        self.chunks = list(chunks)
        for chunk in self.chunks:
            for choice in chunk.choices:
                self._add(choice)

    def _add(self, choice: Any) -> None:
        delta = choice.delta
        self.content += delta.content or ""
        self.reasoning += getattr(delta, "reasoning", None) or ""
        self.reasoning_content += getattr(delta, "reasoning_content", None) or ""
        self.finish_reason = choice.finish_reason or self.finish_reason
        for call in delta.tool_calls or []:
            if call.id is not None:
                assert (call.index, call.type, call.function.arguments) == (len(self.calls), "function", "")
                self.calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
            else:
                assert call.function.name is None
                self.calls[call.index]["arguments"] += call.function.arguments


def test_calls_are_the_same_whole_and_streamed(thinker: Server) -> None:
    thinker.pool.answer = f"Let me see.\n\n{READ}\n{WRITE}\n"
    (choice,) = ask(thinker, tools=TOOLS).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    calls = choice.message.tool_calls
    assert [(call.type, call.function.name) for call in calls] == [("function", "read"), ("function", "write")]
    assert json.loads(calls[0].function.arguments) == {"path": 'a </tool_call> "é\n'}
    assert calls[0].id != calls[1].id

    streamed = Streamed(ask(thinker, tools=TOOLS, stream=True))
    assert (streamed.content, streamed.finish_reason) == ("Let me see.", "tool_calls")
    assert [(call["name"], call["arguments"]) for call in streamed.calls] == [
        (call.function.name, call.function.arguments) for call in calls
    ]
    sent = [call for chunk in streamed.chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert [call.function.name for call in sent if call.function.name] == ["read", "write"]


def test_a_call_alone_has_no_content(thinker: Server) -> None:
    thinker.pool.answer = f"\n\n{WRITE}"
    message = ask(thinker, tools=TOOLS).choices[0].message
    assert (message.content, len(message.tool_calls)) == (None, 1)


def test_a_conversation_with_a_tool_goes_on_with_what_came_back(thinker: Server) -> None:
    thinker.pool.answer, thinker.pool.reasoning = WRITE, "Hm."
    message = ask(thinker, tools=TOOLS).choices[0].message
    (call,) = message.tool_calls
    thinker.pool.answer = "Done."
    result = {"role": "tool", "tool_call_id": call.id, "content": "written"}
    answer = ask(thinker, tools=TOOLS, messages=[*HELLO, message.model_dump(exclude_none=True), result])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Done.", "stop")
    submit = thinker.pool.submits[-1]
    assert submit.messages[1:] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "write", "arguments": {"path": "b"}}, "id": call.id}
            ],
            "reasoning": "Hm.",
            "reasoning_content": "Hm.",
        },
        result,
    ]
    assert submit.tools == TOOLS


def test_a_call_that_was_cut_off_is_as_far_as_it_came_and_may_be_sent_back(thinker: Server) -> None:
    thinker.pool.answer = WRITE
    choice = ask(thinker, tools=TOOLS, max_tokens=len(WRITE) - 20).choices[0]
    assert choice.finish_reason == "length"
    (call,) = choice.message.tool_calls
    assert call.function.arguments == '{"path": "b'[: len(call.function.arguments)]
    back = {"role": "assistant", "tool_calls": [call.model_dump()]}
    ask(thinker, tools=TOOLS, messages=[*HELLO, back])
    sent = thinker.pool.submits[-1].messages[1]["tool_calls"][0]
    assert sent["function"]["arguments"] == call.function.arguments


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_call_is_text(thinker: Server, stream: bool) -> None:
    thinker.pool.answer = 'Write <tool_call>{"name": 1}</tool_call> for it. \n'
    answer = ask(thinker, tools=TOOLS, stream=stream)
    made = Streamed(answer) if stream else None
    content = made.content if made else answer.choices[0].message.content
    assert content == thinker.pool.answer
    assert (made.finish_reason if made else answer.choices[0].finish_reason) == "stop"


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}])
def test_calls_are_text_where_no_tool_may_be_called(thinker: Server, fields: Any) -> None:
    thinker.pool.answer = WRITE
    message = ask(thinker, **fields).choices[0].message
    assert (message.content, message.tool_calls) == (WRITE, None)
    assert thinker.pool.submits[-1].sampling.skip_special_tokens


def test_tags_that_are_special_tokens_are_seen(thinker: Server) -> None:
    ask(thinker, tools=TOOLS)
    assert not thinker.pool.submits[-1].sampling.skip_special_tokens
    ask(thinker, tools=TOOLS, extra_body={"skip_special_tokens": True})
    assert thinker.pool.submits[-1].sampling.skip_special_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_of_calls_that_may_not_be_parallel_the_first_is_kept(thinker: Server, stream: bool) -> None:
    thinker.pool.answer = f"{READ}\n{WRITE}"
    answer = ask(thinker, tools=TOOLS, parallel_tool_calls=False, stream=stream)
    names = (
        [call["name"] for call in Streamed(answer).calls]
        if stream
        else [call.function.name for call in answer.choices[0].message.tool_calls]
    )
    assert names == ["read"]


def test_each_completion_has_calls_of_its_own(thinker: Server) -> None:
    thinker.pool.answer = WRITE
    answer = ask(thinker, tools=TOOLS, n=3)
    ids = {choice.message.tool_calls[0].id for choice in answer.choices}
    assert len(ids) == 3
    chunks = list(ask(thinker, tools=TOOLS, n=2, stream=True))
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        calls = [call for choice in choices for call in choice.delta.tool_calls or []]
        assert "".join(call.function.arguments for call in calls) == '{"path": "b"}'
        assert choices[-1].finish_reason == "tool_calls"


def grammar_of(server: Server) -> Any:
    """The structural tag of the request that the engine got last; None without one."""
    structured = server.pool.submits[-1].structured
    return None if structured is None else json.loads(structured.structural_tag or "")


NAMED = {"type": "function", "function": {"name": "read"}}


@pytest.mark.parametrize(("choice", "names"), [("required", ["read", "write"]), (NAMED, ["read"])])
@pytest.mark.parametrize("parallel", [True, False])
def test_calls_that_are_required_go_by_a_grammar(
    thinker: Server, choice: Any, names: list[str], parallel: bool
) -> None:
    thinker.pool.answer = READ
    form = {"type": "json_object"}
    answer = ask(thinker, tools=TOOLS, tool_choice=choice, parallel_tool_calls=parallel, response_format=form)
    assert answer.choices[0].finish_reason == "tool_calls"
    grammar = grammar_of(thinker)
    assert grammar["alone"] == ("many" if parallel else "one")
    begins = [f'<tool_call>\n{{"name": "{name}", "arguments": ' for name in names]
    assert [structure["begin"] for structure in grammar["structures"]] == begins
    assert {structure["end"] for structure in grammar["structures"]} == {"}\n</tool_call>"}


def test_calls_of_strict_tools_go_by_their_schema_wherever_they_are(thinker: Server) -> None:
    loose = {"type": "function", "function": {"name": "loose", "parameters": {"type": "object", "required": ["a"]}}}
    ask(thinker, tools=[TOOLS[0], loose])
    grammar = grammar_of(thinker)
    assert grammar["triggers"] == ["<tool_call>"]
    schemas = [structure["schema"] for structure in grammar["structures"]]
    assert schemas == [TOOLS[0]["function"]["parameters"], {"type": "object"}]
    ask(thinker, tools=[loose])
    assert grammar_of(thinker) is None


def test_an_answer_of_a_form_leaves_room_for_a_call(thinker: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    ask(thinker, tools=TOOLS, response_format=form)
    grammar = grammar_of(thinker)
    assert grammar["alone"] == "one"
    assert grammar["structures"][-1] == {"begin": "", "schema": schema, "end": ""}
    assert len(grammar["structures"]) == 3
    with pytest.raises(openai.BadRequestError, match="leaves no room for calls") as caught:
        ask(thinker, tools=TOOLS, extra_body={"structured_outputs": {"regex": "a"}})
    assert caught.value.param == "structured_outputs"


def test_a_server_may_be_told_how_its_model_calls_tools(make_gateway: Callable[[GatewayConfig], Server]) -> None:
    server = make_gateway(GatewayConfig(tool_syntax="qwen3_coder"))
    server.pool.answer = "<function=read>\n<parameter=path>\na\n</parameter>\n</function>"
    (call,) = ask(server, tools=TOOLS).choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("read", '{"path": "a"}')


# ---- thinking


def test_thinking_comes_apart_whole_and_streamed(thinker: Server) -> None:
    thinker.pool.reasoning, thinker.pool.answer = "Hm, é.\n", "\n\nYes"
    answer = ask(thinker)
    message = answer.choices[0].message
    assert (message.reasoning, message.reasoning_content, message.content) == ("Hm, é.\n", "Hm, é.\n", "\n\nYes")
    assert answer.usage.completion_tokens_details.reasoning_tokens == 8
    assert answer.usage.completion_tokens == 13
    assert "ended_in_reasoning" not in answer.choices[0].model_dump()

    options = {"include_usage": True}
    streamed = Streamed(ask(thinker, stream=True, stream_options=options))
    assert (streamed.reasoning, streamed.reasoning_content, streamed.content) == ("Hm, é.\n", "Hm, é.\n", "\n\nYes")
    assert streamed.chunks[-1].usage.completion_tokens_details.reasoning_tokens == 8


def test_thinking_then_a_call(thinker: Server) -> None:
    thinker.pool.reasoning, thinker.pool.answer = f"I need {WRITE}", f"\n\n{READ}"
    for stream in (False, True):
        answer = ask(thinker, tools=TOOLS, stream=stream)
        made: Any = Streamed(answer) if stream else answer.choices[0].message
        assert made.reasoning == thinker.pool.reasoning
        assert not made.content
        assert len(made.calls if stream else made.tool_calls) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_may_be_left_out(thinker: Server, stream: bool) -> None:
    thinker.pool.reasoning, thinker.pool.answer = "Hm.", "Yes"
    answer = ask(thinker, stream=stream, extra_body={"include_reasoning": False})
    made: Any = Streamed(answer) if stream else answer.choices[0].message.model_dump()
    if stream:
        assert (made.reasoning, made.content) == ("", "Yes")
        return
    assert made["content"] == "Yes"
    assert not {"reasoning", "reasoning_content"} & set(made)
    assert answer.usage.completion_tokens_details.reasoning_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_ends_within_thinking_says_so(thinker: Server, stream: bool) -> None:
    thinker.pool.reasoning = "Hm, let me see."
    answer = ask(thinker, stream=stream, max_tokens=5)
    choice = (list(answer)[-1] if stream else answer).choices[0]
    assert (choice.finish_reason, choice.ended_in_reasoning) == ("length", True)
    if not stream:
        assert (choice.message.content, choice.message.reasoning) == (None, "Hm, l")


def test_log_probabilities_and_token_ids_are_those_of_all_tokens(thinker: Server) -> None:
    thinker.pool.reasoning, thinker.pool.answer = "Hm.", f"Yes.{WRITE}"
    everything = list((thinker.pool.reasoning + thinker.pool.answer).encode())
    more: Any = {"tools": TOOLS, "logprobs": True, "extra_body": {"return_token_ids": True}}
    (choice,) = ask(thinker, **more).choices
    assert choice.token_ids == everything
    assert [item.bytes[0] for item in choice.logprobs.content] == everything
    streamed = Streamed(ask(thinker, stream=True, **more))
    choices = [choice for chunk in streamed.chunks for choice in chunk.choices]
    assert [item.bytes[0] for each in choices if each.logprobs for item in each.logprobs.content] == everything
    assert [token for each in choices for token in getattr(each, "token_ids", None) or []] == everything
    assert (streamed.reasoning, streamed.content, streamed.calls[0]["name"]) == ("Hm.", "Yes.", "write")


def test_usage_in_every_chunk_grows_through_thinking_and_calls(thinker: Server) -> None:
    thinker.pool.reasoning, thinker.pool.answer, thinker.pool.token_s = "Hm.", f"Yes.{WRITE}", 0.001
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(ask(thinker, tools=TOOLS, stream=True, extra_body={"stream_options": options}))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == len("Hm.Yes.") + len(WRITE)


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            {"reasoning_effort": "none", "enable_thinking": True},
        ),
        ({"stop_in_reasoning": True}, None),
    ],
)
def test_what_is_said_of_thinking_reaches_the_engine(thinker: Server, fields: Any, variables: Any) -> None:
    ask(thinker, extra_body=fields)
    submit = thinker.pool.submits[-1]
    assert submit.chat_template_kwargs == variables
    assert submit.split_reasoning
    assert submit.stop_in_reasoning == ("stop_in_reasoning" in fields)


def test_a_model_without_thinking_is_not_asked_to_split_it(server: Server) -> None:
    answer = ask(server)
    assert not server.pool.submits[-1].split_reasoning
    assert answer.usage.completion_tokens_details is None


def test_a_slow_readers_deltas_are_joined_with_their_thinking(thinker: Server) -> None:
    pool: ScriptedPool = thinker.pool
    pool.reasoning, pool.answer = "Hm. " * 200, f"Yes. {WRITE}"
    streamed = Streamed(ask(thinker, tools=TOOLS, stream=True))
    assert (streamed.reasoning, streamed.content) == (pool.reasoning, "Yes.")
    assert streamed.calls[0]["arguments"] == '{"path": "b"}'
