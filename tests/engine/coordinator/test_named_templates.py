"""Which of a model's chat templates renders a conversation, and how templates ask for what a message lacks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from phalanx import InvalidRequest
from phalanx.engine.coordinator.tokenizer import Tokenizer
from phalanx.engine.protocol.messages import Prompt

CHAT: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": "{}"}}

PLAIN = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
WITH_TOOLS = "{{ tools | length }} tools: " + PLAIN
DEEPSEEK = """{% for message in messages %}{% if message['role'] == 'user' %}{{ '<U>' + message['content'] }}{% endif %}
{%- if message['role'] == 'assistant' and message['content'] is none %}{% for tool in message['tool_calls'] %}
{{- '<A><call>' + tool['function']['name'] + tool['function']['arguments'] + '</call>' }}{% endfor %}{% endif %}
{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<A>' + content }}{% endif %}{% endfor %}"""
"""The parts of DeepSeek-R1's template that an answer goes through."""


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))


def _with_templates(folder: Path, template: Any) -> Tokenizer:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    return Tokenizer(folder)


def _theirs(tokenizer: Tokenizer, chat: list[dict[str, Any]], tools: Any = None) -> str:
    return str(tokenizer._tokenizer.apply_chat_template(chat, tools=tools, tokenize=False, add_generation_prompt=True))


def _ours(tokenizer: Tokenizer, chat: list[dict[str, Any]], tools: Any = None) -> str:
    return tokenizer.encode_conversation(Prompt(messages=chat, tools=tools))[0]


@pytest.mark.parametrize("stored", [False, True])
def test_a_conversation_with_tools_goes_through_the_template_that_is_for_tools(folder: Path, stored: bool) -> None:
    named = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": WITH_TOOLS}]
    made = _with_templates(folder, named)
    expected = [_theirs(made, CHAT, tools) for tools in (None, [TOOL])]
    tokenizer = [Tokenizer(folder, folder.parent / "store") for _ in range(1 + stored)][-1]
    assert [_ours(tokenizer, CHAT, tools) for tools in (None, [TOOL])] == expected == ["[Hi]", "1 tools: [Hi]"]
    assert tokenizer.chat_template == PLAIN


def test_without_a_template_named_default_only_a_conversation_with_tools_is_rendered(folder: Path) -> None:
    tokenizer = _with_templates(folder, {"tool_use": WITH_TOOLS, "rag": PLAIN})
    assert _ours(tokenizer, CHAT, [TOOL]) == _theirs(tokenizer, CHAT, [TOOL])
    with pytest.raises(InvalidRequest, match=r"chat templates of the model's tokenizer \(tool_use, rag\)"):
        _ours(tokenizer, CHAT)


def test_a_file_of_a_template_may_begin_with_a_byte_order_mark(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf" + PLAIN.encode())
    assert _ours(Tokenizer(folder), CHAT) == "[Hi]"


@pytest.mark.parametrize("content", [None, ...])
def test_a_template_that_asks_whether_a_content_is_none_shows_the_calls_of_an_answer(
    folder: Path, content: Any
) -> None:
    tokenizer = _with_templates(folder, DEEPSEEK)
    answer = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    given = {name: value for name, value in answer.items() if value is not ...}
    assert _ours(tokenizer, [*CHAT, given]) == "<U>Hi<A><call>look{}</call>"
