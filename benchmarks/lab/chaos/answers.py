"""Asks a question over HTTP, and makes of whole answers and of streams what two of them can be compared by."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
from phalanx.engine.errors import EngineStopped

from .questions import MESSAGES, RESPONSES, Question

TOLERANCE = 1e-4
"""Most difference of two log-probabilities."""
PATIENCE_S = 180.0
QUESTIONS_S = 1.0
"""Seconds by which the last question may be sent later than the first: some are in their prefill when others are
decoded."""
UNCOMPARED = frozenset(
    {
        *("id", "created", "created_at", "completed_at", "call_id", "timings", "system_fingerprint", "signature"),
        *("encrypted_content", "obfuscation", "sequence_number", "cached_tokens", "cache_read_input_tokens"),
        *("input_tokens", "input_tokens_details", "prompt_tokens_details"),
    }
)
"""Fields that may differ. Of Messages input_tokens leaves out what was cached."""
REPLACED = ("role", "type", "finish_reason", "id", "object")
"""Texts of a stream's events that a later one replaces; others grow."""
SHOWN_CHARACTERS = 120


class HungUp(Exception):
    """The client left on purpose."""


@dataclass
class Asked:
    """One request, and what came back."""

    question: Question
    arrivals: list[float] = field(default_factory=list)
    """When pieces of a stream came, in seconds of the monotonic clock."""
    answer: Any = None
    error: str = ""
    refused: bool = False
    """Whether it was not accepted at all."""


OnLine = Callable[[int], None]
"""Called with the number of lines of a stream so far; it may wait, or raise HungUp."""


def ask(
    url: str, question: Question, on_line: OnLine = lambda lines: None, timeout_s: float = PATIENCE_S, name: str = ""
) -> Asked:
    """Ask, and return what came. Raises HungUp if `on_line` does; any other failure is in the result.

    `name` is the request's own for the server, if there is one.
    """
    asked = Asked(question)
    body = {"model": "m", **question.body}
    try:
        headers = {"X-Request-Id": name} if name else {}
        with httpx.Client(base_url=url, timeout=timeout_s, trust_env=False, headers=headers) as client:
            if question.stream:
                events = list(_stream(client, question.path, body, asked, on_line))
                asked.answer = comparable(_folded(question.path, events))
            else:
                answer = client.post(question.path, json=body)
                _check(asked, answer)
                asked.answer = comparable(answer.json())
    except (httpx.HTTPError, EngineStopped) as error:
        asked.error = repr(error)
    return asked


def ask_all(url: str, questions: list[Question]) -> list[Asked]:
    """Ask all at about the same time, as QUESTIONS_S has it."""

    def later(index: int) -> Asked:
        time.sleep(QUESTIONS_S * index / len(questions))
        return ask(url, questions[index])

    with ThreadPoolExecutor(len(questions)) as threads:
        return list(threads.map(later, range(len(questions))))


def _check(asked: Asked, answer: httpx.Response) -> None:
    if answer.status_code != 200:
        asked.refused = answer.status_code in (429, 503)
        raise EngineStopped(f"status {answer.status_code}: {answer.text[:300]}")


def _stream(
    client: httpx.Client, path: str, body: dict[str, Any], asked: Asked, on_line: OnLine
) -> Iterator[dict[str, Any]]:
    """The events of a stream. Raises EngineStopped for one that fails, or ends without its end."""
    done = False
    lines = 0
    with client.stream("POST", path, json=body) as answer:
        if answer.status_code != 200:
            answer.read()
        _check(asked, answer)
        for line in answer.iter_lines():
            if not line.startswith("data: "):
                continue
            asked.arrivals.append(time.monotonic())
            lines += 1
            on_line(lines)
            if line == "data: [DONE]":
                done = True
                continue
            event = json.loads(line[6:])
            if ("error" in event and event["error"] is not None) or event.get("type") in ("error", "response.failed"):
                raise EngineStopped(f"an event says: {line[:300]}")
            done = done or event.get("type") in ("message_stop", "response.completed", "response.incomplete")
            yield event
    if not done:
        raise EngineStopped("the stream ended before its end")


# ---- streams as whole answers


def _folded(path: str, events: list[dict[str, Any]]) -> dict[str, Any]:
    if path == RESPONSES:
        return _folded_response(events)
    if path == MESSAGES:
        return _folded_message(events)
    return _folded_choices(events)


def _folded_choices(events: list[dict[str, Any]]) -> dict[str, Any]:
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for event in events:
        usage = event.get("usage") or usage
        for part in event["choices"]:
            choice = choices.setdefault(part["index"], {})
            for call in (part.get("delta") or {}).pop("tool_calls", None) or []:
                _grow(choice.setdefault("tool_calls", {}).setdefault(call.pop("index"), {}), call)
            _grow(choice, part)
    for choice in choices.values():
        choice.pop("index")
    return {"choices": [choices[index] for index in sorted(choices)], "usage": usage}


def _folded_response(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The response of the last event, and beside it what the events before it add up to."""
    texts: dict[str, str] = {}
    for event in events:
        if isinstance(event.get("delta"), str):
            name = f"{event['type']} {event.get('output_index')} {event.get('content_index')}"
            texts[name] = texts.get(name, "") + event["delta"]
    return {"last": events[-1]["response"], "texts": texts}


def _folded_message(events: list[dict[str, Any]]) -> dict[str, Any]:
    blocks: dict[int, dict[str, Any]] = {}
    ending: dict[str, Any] = {}
    for event in events:
        if event["type"] == "content_block_start":
            blocks[event["index"]] = dict(event["content_block"])
        elif event["type"] == "content_block_delta":
            _grow(blocks[event["index"]], {key: value for key, value in event["delta"].items() if key != "type"})
        elif event["type"] == "message_delta":
            _grow(ending, event)
    return {"content": [blocks[index] for index in sorted(blocks)], "ending": ending}


def _grow(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Join a part to what came before: texts and lists grow, mappings do so by their names, the rest is replaced."""
    for name, value in part.items():
        before = whole.get(name)
        if value is None:
            whole.setdefault(name, None)
        elif isinstance(before, list) or (isinstance(before, str) and name not in REPLACED):
            whole[name] = before + value
        elif isinstance(before, dict):
            _grow(before, value)
        else:
            whole[name] = dict(value) if isinstance(value, dict) else value


# ---- comparing


def comparable(value: Any) -> Any:
    """An answer without what may differ between two of the same tokens."""
    if isinstance(value, dict):
        return {name: comparable(each) for name, each in value.items() if name not in UNCOMPARED}
    if isinstance(value, list):
        return [comparable(each) for each in value]
    return value


def differences(found: Any, expected: Any, path: str = "") -> Iterator[str]:
    """What differs, in words; numbers with a fraction may differ by TOLERANCE."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in sorted({*found, *expected}):
            if name in found and name in expected:
                yield from differences(found[name], expected[name], f"{path}.{name}")
            else:
                yield f"{path}.{name} is there only {'now' if name in found else 'undisturbed'}"
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            yield from differences(one, other, f"{path}[{index}]")
    elif isinstance(found, float) and isinstance(expected, float):
        if not math.isclose(found, expected, rel_tol=0.0, abs_tol=TOLERANCE):
            yield f"{path}: {found} instead of {expected}"
    elif found != expected:
        yield f"{path}: {_shown(found, expected)}"


def _shown(found: Any, expected: Any) -> str:
    """Both values, texts from where they part."""
    if not isinstance(found, str) or not isinstance(expected, str):
        return f"{str(found)[:SHOWN_CHARACTERS]} instead of {str(expected)[:SHOWN_CHARACTERS]}"
    same = next((index for index, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
    start = max(0, (min(len(found), len(expected)) if same is None else same) - 10)
    end = start + SHOWN_CHARACTERS
    return f"from {start} on {found[start:end]!r} instead of {expected[start:end]!r}"


def judge(asked: Asked, expected: Any) -> tuple[str, str]:
    """A verdict, and words: same, different, refused or lost."""
    if asked.error:
        return "refused" if asked.refused else "lost", f"{asked.question.name}: {asked.error}"
    found = first(differences(asked.answer, expected))
    return ("different", f"{asked.question.name}: {found}") if found else ("same", "")


def first(words: Iterable[str]) -> str:
    """The first few of them, in one text."""
    return "; ".join(word for word, _ in zip(words, range(3), strict=False))
