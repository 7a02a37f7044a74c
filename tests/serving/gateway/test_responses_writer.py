"""The events of a streamed response: their order and what they hold, from scripted parts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from phalanx.engine.protocol.messages import Accepted, Completion, Finished, Timings, Usage
from phalanx.serving.gateway.generation.parts import CallArguments, CallBegin, CallEnd, Part, Reasoning, Text
from phalanx.serving.gateway.http.errors import ApiError
from phalanx.serving.gateway.routes.responses_api.writer import ResponseWriter, Style
from phalanx.serving.gateway.schemas.responses_api.answer import ResponseObject

ACCEPTED = Accepted(id="r", prompt_tokens=3, seed=1, max_tokens=10)
MESSAGE = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
DONE = "output_item.done"
CALL = [CallBegin(0, "call_1", "edit"), CallArguments(0, '{"a":'), CallArguments(0, " 1}"), CallEnd(0)]


def run(parts: Sequence[Part], reason: str = "stop", *, summary: bool = False, sealed: bool = False) -> list[Any]:
    """The events of an answer of these parts, one at a time; the numbers of all are in order."""
    writer = make(summary=summary, sealed=sealed)
    writer.begin(ACCEPTED)
    for part in parts:
        writer.take([part], [])
    writer.end(Finished("r", [], Usage(3, 5, 2, 1), Timings(0, 0, 0, 0)), Completion(0, reason))
    return events_of(writer.drain())


def make(**style: bool) -> ResponseWriter:
    response = ResponseObject(
        id="resp_1", created_at=1, status="in_progress", model="demo", temperature=1.0, top_p=1.0, store=False
    )
    return ResponseWriter(response, Style(**{"stream": True, "summary": False, "sealed": False, **style}))


def events_of(data: bytes) -> list[Any]:
    blocks = data.decode().split("\n\n")[:-1]
    events = []
    for block in blocks:
        name, body = block.split("\n")
        events.append(json.loads(body.removeprefix("data: ")))
        assert events[-1]["type"] == name.removeprefix("event: ")
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def names(events: list[Any]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_text_is_a_message_with_one_part() -> None:
    events = run([Text("Hel"), Text("lo")])
    expected = ["created", "in_progress", *MESSAGE[:3], *MESSAGE[2:], DONE, "completed"]
    assert names(events) == expected
    assert [event["delta"] for event in events if "delta" in event] == ["Hel", "lo"]
    (item,) = events[-1]["response"]["output"]
    assert item["content"] == [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}]
    assert (item["status"], events[-1]["response"]["status"]) == ("completed", "completed")
    assert events[0]["response"]["output"] == []
    assert {event["item_id"] for event in events if "item_id" in event} == {item["id"]}


def test_thinking_text_and_calls_are_items_in_their_order() -> None:
    events = run([Reasoning("h"), Reasoning("m"), Text("\n\n"), Text("I edit."), *CALL, Text("\n"), *CALL])
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "function_call"]
    assert output[0]["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert output[1]["content"][0]["text"] == "\n\nI edit."
    assert (output[2]["call_id"], output[2]["name"], output[2]["arguments"]) == ("call_1", "edit", '{"a": 1}')
    calls = ["output_item.added", *["function_call_arguments.delta"] * 2, "function_call_arguments.done", DONE]
    thinking = ["reasoning_text.delta", "reasoning_text.delta", "reasoning_text.done", "content_part.done", DONE]
    assert names(events) == [
        *["created", "in_progress", "output_item.added", "content_part.added", *thinking],
        *[*MESSAGE, DONE, *calls, *calls, "completed"],
    ]
    places = [event["output_index"] for event in events if "output_index" in event]
    assert places == sorted(places)
    assert set(places) == {0, 1, 2, 3}


def test_a_summary_takes_the_place_of_the_content_of_thinking() -> None:
    events = run([Reasoning("h"), Reasoning("m"), Text("x")], summary=True, sealed=True)
    item = events[-1]["response"]["output"][0]
    assert item["summary"] == [{"type": "summary_text", "text": "hm"}]
    assert "content" not in item
    assert item["encrypted_content"].startswith("phalanx1.")
    summary = [name for name in names(events) if "summary" in name]
    assert summary == [
        "reasoning_summary_part.added",
        *["reasoning_summary_text.delta"] * 2,
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
    ]


@pytest.mark.parametrize("last", [Text("x"), Reasoning("x"), CALL[0]])
def test_what_is_cut_off_is_incomplete(last: Part) -> None:
    events = run([last], "length")
    response = events[-1]["response"]
    assert (events[-1]["type"], response["status"]) == ("response.incomplete", "incomplete")
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][-1]["status"] == "incomplete"
    assert response["completed_at"] is None


def test_usage_has_its_details() -> None:
    usage = run([Text("x")])[-1]["response"]["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (3, 5, 8)
    assert usage["input_tokens_details"]["cached_tokens"] == 2
    assert usage["output_tokens_details"] == {"reasoning_tokens": 1}


@pytest.mark.parametrize("parts", [[], [Text(" "), Text("\n")]])
def test_an_answer_of_nothing_to_see_is_a_message(parts: list[Part]) -> None:
    (item,) = run(parts)[-1]["response"]["output"]
    assert item["content"][0]["text"] == "".join(part.text for part in parts if isinstance(part, Text))


def test_a_failure_ends_the_open_item_and_the_response() -> None:
    writer = make()
    writer.begin(ACCEPTED)
    writer.take([Text("x")], [])
    writer.fail(ApiError(500, "a row of NaN", type="server_error", code="engine_fault"))
    events = events_of(writer.drain())
    assert names(events)[-3:] == [DONE, "error", "failed"]
    assert events[-2] == {
        "type": "error",
        "sequence_number": len(events) - 2,
        "code": "engine_fault",
        "message": "a row of NaN",
        "param": None,
    }
    assert events[-1]["response"]["error"] == {"code": "server_error", "message": "a row of NaN"}
    assert events[-1]["response"]["output"][0]["status"] == "incomplete"


def test_a_whole_answer_is_what_the_stream_came_to() -> None:
    parts = [Reasoning("hm"), Text("I edit."), *CALL]
    streamed = run(parts)[-1]["response"]
    writer = make(stream=False)
    writer.begin(ACCEPTED)
    writer.take(parts, [])
    writer.end(Finished("r", [], Usage(3, 5, 2, 1), Timings(0, 0, 0, 0)), Completion(0, "stop"))
    assert writer.drain() == b""
    whole = [item.__struct_config__.tag for item in writer.response.output]
    assert whole == [item["type"] for item in streamed["output"]]
    assert [getattr(item, "status", None) for item in writer.response.output] == ["completed"] * 3
