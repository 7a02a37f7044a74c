"""What coding agents send, by their public documentation: each edits a file in several turns of a scripted model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from phalanx.tests.serving.gateway.agent_pool import tool_call
from phalanx.tests.serving.gateway.conftest import Server

BEFORE = 'def greet():\n    return "helo"  # {not} a tag: </tool_call >\n'
AFTER = BEFORE.replace("helo", "hello")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "greet.py"
    made.write_text(BEFORE)
    return made


def script(file: Path, read: str, edit: str) -> list[str]:
    """What the model says: it reads the file, tries an edit that fails, edits it, and tells."""
    path = str(file)
    wrong = json.dumps({"path": path, "old": "heloo", "new": "hello"})
    right = json.dumps({"path": path, "old": '"helo"  # {not}', "new": '"hello"  # {not}'})
    return [
        "<think>I must see it.</think>I read the file." + tool_call(read, json.dumps({"path": path})),
        "<think>A typo.</think>" + tool_call(edit, wrong),
        "<think>Again.</think>\n\n" + tool_call(edit, right) + "\n" + tool_call(read, json.dumps({"path": path})),
        "I corrected the greeting.",
    ]


def tools() -> dict[str, Callable[..., str]]:
    def read(path: str) -> str:
        return Path(path).read_text()

    def edit(path: str, old: str, new: str) -> str:
        text = Path(path).read_text()
        if old not in text:
            raise ValueError(f"{old!r} is not in the file")
        Path(path).write_text(text.replace(old, new))
        return "done"

    return {"read_file": read, "edit_file": edit, "Read": read, "Edit": edit}


def schema(*names: str) -> dict[str, Any]:
    properties = {name: {"type": "string", "description": f"The {name}."} for name in names}
    return {"type": "object", "properties": properties, "required": list(names), "additionalProperties": False}


def test_an_agent_of_responses_edits_a_file(agent: Server, file: Path) -> None:
    """As Codex does: nothing is stored, each turn sends everything again, thinking as it was encrypted."""
    agent.pool.answers = script(file, "read_file", "edit_file")
    function = {"type": "function", "description": "Does what it says.", "strict": False}
    request: dict[str, Any] = {
        "model": "demo",
        "instructions": "You are a coding agent.",
        "tools": [
            {**function, "name": "read_file", "parameters": schema("path")},
            {**function, "name": "edit_file", "parameters": schema("path", "old", "new")},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "a-thread",
        "extra_body": {"client_metadata": {"x-installation-id": "1"}},
    }  # fmt: skip
    environment = {"type": "input_text", "text": "<environment_context>\n  <cwd>/work</cwd>\n</environment_context>"}
    items: list[Any] = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<permissions/>"}]},
        {"type": "message", "role": "user", "content": [environment]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Correct the greeting."}]},
    ]
    said = ""
    for _ in range(6):
        done, said, ended = [], "", False
        for event in agent.openai.responses.create(**request, input=items):
            if event.type == "response.output_item.done":
                done.append(event.item)
            elif event.type == "response.output_text.delta":
                said += event.delta
            ended = event.type == "response.completed"
        assert ended
        calls = [item for item in done if item.type == "function_call"]
        items += [as_sent_back(item) for item in done]
        if not calls:
            break
        for call in calls:
            output = run(call.name, call.arguments)
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": output})

    assert said == "I corrected the greeting."
    assert file.read_text() == AFTER
    messages = agent.pool.submits[-1].messages or []
    roles = [message["role"] for message in messages]
    assert roles == [
        *["system", "system", "user", "user", "assistant", "tool", "assistant", "tool", "assistant", "tool", "tool"]
    ]
    thoughts = [message.get("reasoning") for message in messages if message["role"] == "assistant"]
    assert thoughts == ["I must see it.", "A typo.", "Again."]
    assert messages[-1]["content"] == AFTER
    assert len(set(agent.pool.affinities)) == 1


def as_sent_back(item: Any) -> dict[str, Any]:
    """An item as Codex keeps it: without ids and states, and thinking without its content."""
    left_out = {"status", "content"} if item.type == "reasoning" else {"status", "id"}
    kept: dict[str, Any] = item.model_dump(exclude_none=True, exclude=left_out)
    return kept


def run(name: str, arguments: str) -> str:
    try:
        return tools()[name](**json.loads(arguments))
    except ValueError as error:
        return f"failed: {error}"


def test_an_agent_of_messages_edits_a_file(agent: Server, file: Path) -> None:
    """As Claude Code does: blocks of system text that are cached, tools, results, thinking that is kept."""
    agent.pool.answers = script(file, "Read", "Edit")
    cached = {"cache_control": {"type": "ephemeral"}}
    request: Any = {
        "model": "demo",
        "max_tokens": 3200,
        "system": [
            {"type": "text", "text": "You are a coding agent.", **cached},
            {"type": "text", "text": "The folder is /work.", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        ],
        "tools": [
            {"name": "Read", "description": "Reads.", "input_schema": schema("path")},
            {"name": "Edit", "description": "Replaces text.", "input_schema": schema("path", "old", "new"), **cached},
        ],
        "thinking": {"type": "enabled", "budget_tokens": 3199},
        "metadata": {"user_id": "user_1"},
        "extra_headers": {"anthropic-beta": "interleaved-thinking-2025-05-14,context-management-2025-06-27"},
        "extra_query": {"beta": "true"},
        "extra_body": {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
    }  # fmt: skip
    reminder = {"type": "text", "text": "<system-reminder>Be careful.</system-reminder>"}
    messages: list[Any] = [
        {"role": "user", "content": [reminder, {"type": "text", "text": "Correct the greeting.", **cached}]}
    ]
    counted = agent.anthropic.messages.count_tokens(
        model="demo", messages=messages, system=request["system"], tools=request["tools"]
    )
    message = None
    for _ in range(6):
        with agent.anthropic.messages.stream(**request, messages=messages) as stream:
            message = stream.get_final_message()
        if len(messages) == 1:
            assert message.usage.input_tokens == counted.input_tokens
        content = [block.model_dump(exclude_none=True, exclude={"parsed_output"}) for block in message.content]
        messages.append({"role": "assistant", "content": content})
        if message.stop_reason != "tool_use":
            break
        results = []
        for block in message.content:
            if block.type == "tool_use":
                text = run(block.name, json.dumps(block.input))
                results.append({
                    "type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": text}],
                    "is_error": text.startswith("failed"),
                })  # fmt: skip
        messages.append({"role": "user", "content": results})

    assert message is not None
    assert (message.stop_reason, message.content[-1].text) == ("end_turn", "I corrected the greeting.")  # type: ignore[union-attr]
    assert file.read_text() == AFTER
    sent = agent.pool.submits[-1].messages or []
    roles = [message["role"] for message in sent]
    assert roles == ["system", "user", "assistant", "tool", "assistant", "tool", "assistant", "tool", "tool"]
    thoughts = [message.get("reasoning") for message in sent if message["role"] == "assistant"]
    assert thoughts == ["I must see it.", "A typo.", "Again."]
    assert str(sent[5]["content"]).startswith("Error:\nfailed")
    assert sent[-1]["content"] == AFTER
    assert agent.pool.submits[-1].chat_template_kwargs == {"enable_thinking": True}
