"""The check of coding agents, with small agents of our own: it sees the file edited, and a request that is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from phalanx.tests.serving.real_agents import run

AGENT = """#!{python}
import json, os, subprocess, urllib.request

function = {{"name": "bash", "parameters": {{"type": "object", "properties": {{"command": {{"type": "string"}}}}}}}}
messages = [{{"role": "user", "content": "Correct the greeting in greet.py"}}]
while True:
    body = {{"messages": messages, "tools": [{{"type": "function", "function": function}}], {more}}}
    url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
    asked = urllib.request.Request(url, json.dumps(body).encode(), {{"content-type": "application/json"}})
    try:
        message = json.load(urllib.request.urlopen(asked))["choices"][0]["message"]
    except OSError:
        break
    messages.append({{name: value for name, value in message.items() if value}})
    if not message.get("tool_calls"):
        break
    for call in message["tool_calls"]:
        command = json.loads(call["function"]["arguments"])["command"]
        output = subprocess.run(command, shell=True, capture_output=True, text=True).stdout
        messages.append({{"role": "tool", "tool_call_id": call["id"], "content": output}})
"""


def agent(folder: Path, more: str = "") -> str:
    program = folder / "agent"
    program.write_text(AGENT.format(python=sys.executable, more=more))
    program.chmod(0o755)
    return str(program)


def test_an_agent_that_edits_the_file_passes(tmp_path: Path) -> None:
    noted = run("qwen", agent(tmp_path), tmp_path / "place")
    assert noted == ["POST /v1/chat/completions 200"] * 4


def test_an_agent_whose_request_is_refused_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="qwen had requests refused"):
        run("qwen", agent(tmp_path, '"no_such_field": 1'), tmp_path / "place")
