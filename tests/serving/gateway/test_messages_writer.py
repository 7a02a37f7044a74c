"""The events of a streamed message of /v1/messages, from scripted parts; the official client puts them together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from phalanx.engine.protocol.messages import Accepted, Completion, Finished, Timings, Usage
from phalanx.serving.gateway.generation.parts import CallArguments, CallBegin, CallEnd, Part, Reasoning, Text
from phalanx.serving.gateway.routes.messages_api.writer import MessageWriter
from phalanx.serving.gateway.schemas.messages_api.answer import MessageAnswer, MessageUsage
from phalanx.serving.gateway.schemas.sealed import unseal

CALL = [CallBegin(0, "call_1", "edit"), CallArguments(0, '{"a":'), CallArguments(0, " 1}"), CallEnd(0)]


def run(parts: Sequence[Part], ending: Completion | None = None, *, omit: bool = False) -> list[Any]:
    message = MessageAnswer(id="msg_1", model="demo", usage=MessageUsage(input_tokens=0, output_tokens=0))
    writer = MessageWriter(message, stream=True, omit_thinking=omit)
    writer.begin(Accepted(id="r", prompt_tokens=7, seed=1, max_tokens=10))
    for part in parts:
        writer.take([part], [])
    usage = Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=4, reasoning_tokens=2)
    writer.end(Finished("r", [], usage, Timings(0, 0, 0, 0)), ending or Completion(0, "stop"))
    events = []
    for block in writer.drain().decode().split("\n\n")[:-1]:
        name, body = block.split("\n")
        events.append(json.loads(body.removeprefix("data: ")))
        assert events[-1]["type"] == name.removeprefix("event: ")
    return events


def blocks(events: list[Any]) -> list[Any]:
    """The blocks that a client puts together."""
    made: list[Any] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(made)
            made.append({**event["content_block"], "json": ""})
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            name = {"input_json_delta": "json"}.get(delta["type"], delta["type"].removesuffix("_delta"))
            made[event["index"]][name] += delta.get("partial_json", delta.get(name))
    return made


def test_a_message_is_its_start_its_blocks_and_its_end() -> None:
    events = run([Reasoning("h"), Reasoning("m"), Text("\n\n"), Text("I edit."), *CALL])
    names = [event["type"] for event in events]
    assert names == [
        *["message_start", "content_block_start", "ping", *["content_block_delta"] * 3, "content_block_stop"],
        *["content_block_start", "content_block_delta", "content_block_stop"],
        *["content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"],
        *["message_delta", "message_stop"],
    ]
    thinking, text, call = blocks(events)
    assert (thinking["thinking"], bool(thinking["signature"])) == ("hm", True)
    assert text["text"] == "\n\nI edit."
    assert (call["id"], call["name"], call["input"], call["json"]) == ("call_1", "edit", {}, '{"a": 1}')


def test_usage_counts_the_cached_part_of_the_prompt_apart() -> None:
    events = run([Text("x")])
    assert events[0]["message"]["usage"]["input_tokens"] == 7
    usage = events[-2]["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]) == (3, 4, 5)
    assert usage["output_tokens_details"] == {"thinking_tokens": 2}


@pytest.mark.parametrize(
    ("parts", "ending", "reason", "sequence"),
    [
        ([Text("x")], Completion(0, "stop"), "end_turn", None),
        ([Text("x")], Completion(0, "length"), "max_tokens", None),
        ([Text("x")], Completion(0, "stop", "END"), "stop_sequence", "END"),
        ([Text("x")], Completion(0, "stop", 7), "end_turn", None),
        ([Text("x"), *CALL], Completion(0, "stop"), "tool_use", None),
        ([Text("x"), *CALL[:2]], Completion(0, "length"), "max_tokens", None),
        ([Reasoning("x")], Completion(0, "length", thinking=True), "max_tokens", None),
    ],
)
def test_the_end_says_why(parts: list[Part], ending: Completion, reason: str, sequence: str | None) -> None:
    delta = run(parts, ending)[-2]["delta"]
    assert (delta["stop_reason"], delta["stop_sequence"]) == (reason, sequence)


def test_omitted_thinking_is_in_the_signature() -> None:
    (block,) = blocks(run([Reasoning("h"), Reasoning("m")], omit=True))
    assert block["thinking"] == ""
    assert unseal(block["signature"], "signature") == "hm"


def test_white_space_between_calls_is_no_block() -> None:
    made = blocks(run([Text("\n"), *CALL, Text("\n"), *CALL, Text("\n")]))
    assert [block["type"] for block in made] == ["tool_use", "tool_use"]
    assert blocks(run([Text(" "), Text("\n")]))[0]["text"] == " \n"
    assert blocks(run([])) == []


def test_arguments_that_were_cut_off_are_kept_as_text() -> None:
    message = MessageAnswer(id="msg_1", model="demo", usage=MessageUsage(input_tokens=0, output_tokens=0))
    writer = MessageWriter(message, stream=False, omit_thinking=False)
    writer.take([*CALL[:2]], [])
    writer.end(Finished("r", [], Usage(1, 1), Timings(0, 0, 0, 0)), Completion(0, "length"))
    assert message.content[0].input == {"INVALID_JSON": '{"a":'}  # type: ignore[union-attr]


def test_a_call_that_breaks_off_before_its_arguments_is_not_one_without_any() -> None:
    (streamed,) = blocks(run([CALL[0], CallEnd(0, whole=False)], Completion(0, "length")))
    assert json.loads(streamed["json"]) == {"INVALID_JSON": ""}
    (whole,) = blocks(run([CALL[0], CallArguments(0, "{}"), CallEnd(0)]))
    assert json.loads(whole["json"]) == {}
