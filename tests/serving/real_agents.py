"""Coding agents as people install them, each before a scripted model that edits a file with the agent's own tools.

    unshare -n sh -c 'ip link set lo up; exec python -m phalanx.tests.serving.real_agents codex=/path/to/codex ...'

Arguments are NAME=PROGRAM for any of AGENTS. Each gets a home and a folder of its own and none of this environment. It
prints a line for each, and fails where a request was refused or the file was not edited. Without a network namespace
around it, an agent may call whomever it likes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from phalanx.engine.protocol.messages import Submit
from phalanx.serving.gateway.engine_pool import OnEvent
from phalanx.tests.serving.gateway.agent_pool import AgentPool, tool_call
from phalanx.tests.serving.gateway.conftest import Server
from phalanx.tests.serving.gateway.scripted_pool import ScriptedTicket
from starlette.middleware import Middleware

TASK = "Correct the greeting in greet.py"
BEFORE = 'def greet():\n    return "helo"\n'
AFTER = 'def greet():\n    return "hello"\n'
SAID = "I corrected the greeting."
TIMEOUT_S = 180
_BLOCK = 'greet.py\n```python\n<<<<<<< SEARCH\n    return "helo"\n=======\n    return "hello"\n>>>>>>> REPLACE\n```\n'

_CODEX = """model = "demo"
model_provider = "phalanx"
web_search = "disabled"
[model_providers.phalanx]
name = "phalanx"
base_url = "{url}/v1"
wire_api = "responses"
"""
_OPENCODE = """{{
  "provider": {{
    "phalanx": {{
      "npm": "@ai-sdk/openai-compatible",
      "options": {{"baseURL": "{url}/v1"}},
      "models": {{"demo": {{"limit": {{"context": 32768, "output": 4096}}}}}}
    }}
  }},
  "model": "phalanx/demo"
}}
"""
_PI = """{{
  "providers": {{
    "phalanx": {{"baseUrl": "{url}%s", "api": "%s", "apiKey": "none", "models": [{{"id": "demo", "reasoning": true}}]}}
  }}
}}
"""


def _pi(path: str, api: str) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """pi, which speaks each of the three APIs."""
    arguments = ["--provider", "phalanx", "--model", "demo", "-p", TASK]
    return arguments, {"PI_OFFLINE": "1"}, {"home/.pi/agent/models.json": _PI % (path, api)}


AGENTS: dict[str, tuple[list[str], dict[str, str], dict[str, str]]] = {
    "codex": (
        ["exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", TASK],
        {},
        {"home/.codex/config.toml": _CODEX},
    ),
    "claude": (
        ["--model", "demo", "-p", TASK, "--permission-mode", "acceptEdits", "--allowedTools", "Bash Read Edit"],
        {
            "ANTHROPIC_BASE_URL": "{url}", "ANTHROPIC_AUTH_TOKEN": "none", "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "4096",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        },
        {},
    ),
    "opencode": (["run", TASK], {}, {"work/opencode.json": _OPENCODE}),
    "qwen": (
        ["--auth-type", "openai", "--yolo", "-p", TASK],
        {"OPENAI_BASE_URL": "{url}/v1", "OPENAI_API_KEY": "none", "OPENAI_MODEL": "demo"},
        {},
    ),
    "aider": (
        [
            *["--model", "openai/demo", "--edit-format", "diff", "--yes-always", "--no-git", "--no-check-update"],
            *["--analytics-disable", "--no-show-model-warnings", "--message", TASK, "greet.py"],
        ],
        {"OPENAI_API_BASE": "{url}/v1", "OPENAI_API_KEY": "none"},
        {},
    ),
    "pi-chat": _pi("/v1", "openai-completions"),
    "pi-responses": _pi("/v1", "openai-responses"),
    "pi-messages": _pi("", "anthropic-messages"),
}  # fmt: skip
"""The arguments, the environment and the files of each agent."""


class CodingModel(AgentPool):
    """Reads greet.py, edits it, looks at it and tells, with whatever tools of an agent do that."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = msgspec.structs.replace(self.model, max_model_len=200_000)
        self._file = folder / "greet.py"

    def _run(self, submit: Submit, on_event: OnEvent, ticket: ScriptedTicket) -> None:
        thinking = "<think>I think.</think>" if submit.split_reasoning and submit.tools else ""
        self.answers = [thinking + self._say(submit)]
        super()._run(submit, on_event, ticket)

    def _say(self, submit: Submit) -> str:
        tools = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in submit.tools or []}
        messages = submit.messages or []
        if not tools:
            return _BLOCK if "SEARCH/REPLACE" in str(messages) else SAID
        results = sum(message["role"] == "tool" for message in messages)
        steps: list[Callable[[dict[str, Any]], str]] = [self._read, self._edit, self._look]
        return steps[results](tools) if results < len(steps) else SAID

    def _read(self, tools: dict[str, Any]) -> str:
        values = {r"file_?path|absolute_path|path": str(self._file)}
        return _call(tools, ("Read", "read", "read_file"), values) or _shell(tools, "cat greet.py")

    def _edit(self, tools: dict[str, Any]) -> str:
        values: dict[str, Any] = {r"file_?path|path": str(self._file), r"old_?string": "helo", r"new_?string": "hello"}
        values |= {"edits": [{"oldText": "helo", "newText": "hello"}]}
        return _call(tools, ("Edit", "edit"), values) or _shell(tools, "sed -i s/helo/hello/ greet.py")

    def _look(self, tools: dict[str, Any]) -> str:
        return _shell(tools, 'cat greet.py; echo "{it\'s} done"')


def _call(tools: dict[str, Any], names: tuple[str, ...], values: dict[str, Any]) -> str:
    """A call of the first of `names` that there is; `values` has its arguments by patterns of their names."""
    for name in names:
        if name in tools:
            fields = tools[name].get("properties", {})
            found = {f: v for f in fields for form, v in values.items() if re.fullmatch(form, f, re.IGNORECASE)}
            return tool_call(name, json.dumps(found))
    return ""


def _shell(tools: dict[str, Any], command: str) -> str:
    values = {"cmd|command": command, "description": "Looks.", "is_background": False}
    return _call(tools, ("exec_command", "Bash", "bash", "run_shell_command"), values)


class Statuses:
    """Notes how each request was answered."""

    def __init__(self, app: Any, noted: list[str]) -> None:
        self._app, self._noted = app, noted

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on."""

        async def noting(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._noted.append(f"{scope['method']} {scope['path']} {message['status']}")
            await send(message)

        await self._app(scope, receive, noting if scope["type"] == "http" else send)


def run(name: str, program: str, folder: Path) -> list[str]:
    """Have an agent do its task; how its requests were answered. Raises AssertionError if it did not."""
    arguments, environment, files = AGENTS[name]
    noted: list[str] = []
    work = folder / "work"
    server = Server(pool=CodingModel(work), middleware=[Middleware(Statuses, noted=noted)])
    try:
        for path, text in {**files, "work/greet.py": BEFORE, "home/.keep": ""}.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text.format(url=server.url) if path in files else text)
        own = {key: value.format(url=server.url) for key, value in environment.items()}
        basics = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(folder / "home"), "TERM": "dumb"}
        done = subprocess.run(
            [program, *arguments],
            check=False,
            cwd=work,
            env={**basics, "NO_PROXY": "127.0.0.1", **own},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
    finally:
        server.close()
    refused = [line for line in noted if int(line.split()[-1]) >= 400]
    assert done.returncode == 0, f"{name} ended with {done.returncode}: {done.stdout[-2000:]}"
    assert not refused, f"{name} had requests refused: {refused}"
    assert (work / "greet.py").read_text() == AFTER, f"{name} did not edit the file: {done.stdout[-2000:]}"
    return noted


def main() -> None:
    """Run the agents that the command line names."""
    for argument in sys.argv[1:]:
        name, _, program = argument.partition("=")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            noted = run(name, program, Path(folder))
        print(f"{name}: the file is edited; {len(noted)} requests, none refused", flush=True)


if __name__ == "__main__":
    main()
