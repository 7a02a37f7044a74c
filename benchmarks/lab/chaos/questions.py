"""Requests of every kind over HTTP, for the demo model with a template of tools and thinking (lab/agent_model.py)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
LONG_WORDS = 1100
"""Words of a prompt whose prefill takes several steps."""

SUMS = {
    "1+1": ("One and one make two, for one more than one is two, and nothing is left over.", "2"),
    "2+2": ("Two and two make four, for two more than two is four, and nothing is left over.", "4"),
    "3+3": ("Three and three make six, for three more than three is six, and nothing is left over.", "6"),
}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 4, "maxItems": 6},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
PAINT = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "title": {"type": "string", "maxLength": 40}},
    "required": ["colour", "title"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Question:
    """One request."""

    name: str
    path: str
    body: dict[str, Any]

    @property
    def stream(self) -> bool:
        """Whether its answer is a stream."""
        return bool(self.body.get("stream"))


def _function(name: str, parameters: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


def _weather(last: str) -> list[dict[str, Any]]:
    """A question for the weather of a city, after calls for that of two others."""
    made: list[dict[str, Any]] = []
    for city in ("Rome", "Berlin"):
        call = {"name": "get_weather", "arguments": json.dumps({"city": city})}
        made += [
            {"role": "user", "content": f"What is the weather in {city}?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": city, "type": "function", "function": call}],
            },
        ]
    return [*made, {"role": "user", "content": f"What is the weather in {last}?"}]


def _sums() -> list[dict[str, Any]]:
    """A sum to be thought about, after three that were."""
    made: list[dict[str, Any]] = []
    for asked, (thinking, answer) in SUMS.items():
        made += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer, "reasoning": thinking}]
    return [*made, {"role": "user", "content": "4+4"}]


def _sum_items() -> list[dict[str, Any]]:
    """The same as items of Responses."""
    made: list[dict[str, Any]] = []
    for asked, (thinking, answer) in SUMS.items():
        thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": thinking}]}
        made += [{"role": "user", "content": asked}, thought, {"role": "assistant", "content": answer}]
    return [*made, {"role": "user", "content": "4+4"}]


def questions(tokens: int = 64) -> list[Question]:
    """Sixteen requests, whose answers have about `tokens` tokens each, or as many as their form takes."""
    story = "Once upon a time, in a village by the sea,"
    user = [{"role": "user", "content": "Tell me a story of a fox and a crow."}]
    seeded = {"temperature": 1.0, "seed": 5}
    thinks = {"chat_template_kwargs": {"enable_thinking": True}}
    length: dict[str, Any] = {"max_tokens": tokens, "ignore_eos": True}
    weather = [_function("get_weather", CITY)]
    paint = [_function("paint", PAINT, strict=True)]
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    letters = {"regex": "([a-f]{2,4} ){9,20}[g-i]{3}"}
    penalties = {"presence_penalty": 0.6, "frequency_penalty": 0.6}
    long = "The quick brown fox jumps over the lazy dog. " * (LONG_WORDS // 9)
    greedy = {"temperature": 0}

    def chat(name: str, messages: Any, **body: Any) -> Question:
        return Question(name, CHAT, {"messages": messages, **body})

    def text(name: str, prompt: Any, **body: Any) -> Question:
        return Question(name, TEXT, {"prompt": prompt, **body})

    two = {"n": 2, "logprobs": True, "top_logprobs": 2}
    stops = {"stop": [" the", "\n\n"], "min_tokens": tokens // 2, "max_tokens": tokens}
    shown_stops = {"stop": ["fox", " and"], "include_stop_str_in_output": True, "min_tokens": tokens // 3}
    ends = {"max_tokens": 4 * tokens}
    use = {"tools": weather, "max_tokens": tokens}
    must = {"tools": paint, "tool_choice": "required", **ends}
    return [
        chat("greedy stream", user, **greedy, **length, **STREAM),
        chat("seeded with penalties", user, **seeded, **penalties, **length),
        chat("two completions with log-probabilities, stream", user, **seeded, **two, **length, **STREAM),
        text("stop strings", story, **greedy, **stops),
        text("stop strings that are shown, stream", story, **seeded, **shown_stops, max_tokens=tokens, **STREAM),
        text("echo with log-probabilities", story, **greedy, **length, echo=True, logprobs=2),
        text("two with the prompt's log-probabilities", story, **seeded, **length, n=2, prompt_logprobs=1, logprobs=1),
        chat("schema, stream", user, **seeded, **ends, response_format=form, **STREAM),
        text("regular expression", story, **seeded, **ends, structured_outputs=letters),
        chat("a tool that must be called, stream", user, **seeded, **must, **STREAM),
        chat("a tool that may be called, stream", _weather("Paris"), **greedy, **use, **STREAM),
        chat("thinking, stream", _sums(), **greedy, max_tokens=tokens, **thinks, **STREAM),
        Question(
            "Responses stream",
            RESPONSES,
            {"input": _sum_items(), **greedy, "max_output_tokens": tokens, **thinks, "stream": True, "store": False},
        ),
        Question(
            "Messages stream",
            MESSAGES,
            {"messages": user, **greedy, "max_tokens": tokens, "stream": True},
        ),
        text(
            "characters of several tokens, stream",
            "😀🎉😀🎉漢字🙂",
            **seeded,
            **length,
            return_token_ids=True,
            **STREAM,
        ),
        text("long prompt, stream", long, **greedy, **length, **STREAM),
    ]
