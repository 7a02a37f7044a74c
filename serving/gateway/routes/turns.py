"""The turns of a conversation as chat has them, gathered from the pieces that other APIs have, and where each was."""

from __future__ import annotations

from typing import Any

Content = str | list[dict[str, str]]


class Turns:
    """Collects messages. Thinking, text and calls that follow one another are one message of the assistant."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.paths: dict[str, str] = {}
        """Where the request has what is at a path of chat's, such as messages[3] -> input[5]."""
        self._open: dict[str, Any] | None = None
        self._user: dict[str, Any] | None = None

    def add(self, role: str, content: Content, path: str, *, content_path: str, **more: Any) -> None:
        """A message that is not the assistant's."""
        self._open = self._user = None
        chat_path = self._append({"role": role, "content": content, **more}, path)
        self.paths[f"{chat_path}.content"] = content_path

    def extend_user(self, parts: list[dict[str, str]], content_path: str) -> None:
        """Text of the user, which goes on with the message before it until `end` is called."""
        last = self.messages[-1] if self.messages else None
        if self._user is None or last is not self._user:
            chat_path = self._append({"role": "user", "content": []}, content_path.rpartition(".")[0])
            self.paths[f"{chat_path}.content"] = content_path
            self._user = last = self.messages[-1]
        last["content"] += parts

    def extend_said(self, parts: list[dict[str, str]], content_path: str) -> None:
        """Text of the assistant, which goes on with text right before it."""
        message = self._open
        if message is None or "tool_calls" in message:
            message = self._begin(content_path.rpartition(".")[0])
        if "content" not in message:
            self.paths[f"messages[{len(self.messages) - 1}].content"] = content_path
        message["content"] = [*message.get("content", []), *parts]

    def think(self, text: str, path: str) -> None:
        """Thinking of the assistant, which begins a message unless it follows other thinking."""
        message = self._open
        if message is None or "content" in message or "tool_calls" in message:
            message = self._begin(path)
        message["reasoning"] = message.get("reasoning", "") + text

    def say(self, content: Content, path: str, *, content_path: str) -> None:
        """Text of the assistant."""
        message = self._open
        if message is None or "content" in message or "tool_calls" in message:
            message = self._begin(path)
        message["content"] = content
        self.paths[f"messages[{len(self.messages) - 1}].content"] = content_path

    def call(self, call_id: str, name: str, arguments: str, path: str, *, arguments_path: str) -> None:
        """A call by the assistant."""
        message = self._open if self._open is not None else self._begin(path)
        calls = message.setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})
        chat_path = f"messages[{len(self.messages) - 1}].tool_calls[{len(calls) - 1}]"
        self.paths[chat_path] = path
        self.paths[f"{chat_path}.function"] = path
        self.paths[f"{chat_path}.function.arguments"] = arguments_path

    def end(self) -> None:
        """What comes next begins a message."""
        self._open = self._user = None

    def _begin(self, path: str) -> dict[str, Any]:
        self._append({"role": "assistant"}, path)
        self._open = self.messages[-1]
        return self._open

    def _append(self, message: dict[str, Any], path: str) -> str:
        self.messages.append(message)
        chat_path = f"messages[{len(self.messages) - 1}]"
        self.paths[chat_path] = path
        return chat_path
