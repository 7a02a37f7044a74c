"""Conversations as a model's chat template renders them; what users wrote stays apart from what the template wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ....parallel.loading.json_files import shown
from ...errors import InvalidRequest
from .normalized_tokens import NormalizedTokens
from .template_processes import RenderError, TemplateProcesses

Message = dict[str, Any]

RESERVED = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template")
"""Variables of a template that chat_template_kwargs may not set."""
_CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "  # as transformers marks the end of the message that goes on
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which clients send it
_ROLES = ("assistant", "developer", "function", "ipython", "system", "tool", "user")
_TYPES = ("array", "boolean", "function", "integer", "null", "number", "object", "string", "text")
_KNOWN_WORDS = frozenset((*_ROLES, *_TYPES))  # templates compare these, and make control tokens of roles
_USERS_KEYS = ("arguments", "parameters", "properties")  # whose keys users choose
_FIRST_MARK, _MARKS = 0x10F000, 0xFF0
_ESCAPED = re.compile(r"\\U0010f[0-9a-f]{3}|\\udbf[c-f]\\ud[c-f][0-9a-f]{2}")


@dataclass(frozen=True)
class Marks:
    """Characters that occur nowhere in what a request holds."""

    begin: str
    end: str
    cut: str
    stands_for: str

    @classmethod
    def unused_in(cls, texts: Iterable[str]) -> Marks:
        """Choose them from the private use area. Raises InvalidRequest if nearly all of it is in use."""
        used: set[str] = set()
        for text in texts:
            if not text.isascii():
                used |= {letter for letter in text if ord(letter) >= _FIRST_MARK}
            if "\\" in text:
                used |= set(_ESCAPED.findall(text))
        letters = map(chr, range(_FIRST_MARK, _FIRST_MARK + _MARKS))
        unused = (letter for letter in letters if used.isdisjoint((letter, *_escapes(letter))))
        try:
            return cls(*(next(unused) for _ in range(4)))
        except StopIteration:
            raise InvalidRequest("the messages use every character of the private use area") from None

    def unescape(self, text: str) -> str:
        """Put back marks that a template has escaped: it writes an object as Python does, or as JSON in ASCII."""
        if "\\" in text:
            for mark in (self.begin, self.end, self.cut):
                for escaped in _escapes(mark):
                    text = text.replace(escaped, mark)
        return text


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation.

    In `text` a mark stands for each text of a special token that a user wrote, or for nothing, where a user's text and
    what is next to it would make one; `plain` says for what.
    """

    text: str
    mark: str
    plain: list[str]

    def expand(self, text: str, first: int = 0) -> str:
        """A part of the text with what its marks stand for; `first` is the number of marks before it."""
        pieces = text.split(self.mark)
        return pieces[0] + "".join(plain + piece for plain, piece in zip(self.plain[first:], pieces[1:], strict=False))


class ChatTemplate:
    """One template. Used by any number of threads."""

    def __init__(
        self,
        source: str,
        variables: dict[str, Any],
        special_tokens: Iterable[str],
        processes: TemplateProcesses | None = None,
        normalized: NormalizedTokens | None = None,
    ) -> None:
        """`variables` are the tokenizer's own, such as bos_token; `special_tokens` the texts of its special tokens.

        Those that are looked for after a text was normalized are `normalized` too. It is rendered in `processes`,
        without them in some of its own.
        """
        self._source = source
        self._variables = variables
        self._normalized = normalized if normalized is not None and normalized.texts else None
        texts = {*special_tokens, *(() if self._normalized is None else self._normalized.texts)} - {""}
        special = sorted(texts, key=len, reverse=True)
        self._special = frozenset(special)
        self._pattern = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self._joined = "\0".join(special)
        self._beginnings = tuple({text[:size] for text in special for size in range(1, len(text))})
        self._ends = tuple({text[size:] for text in special for size in range(1, len(text))})
        self._processes = processes or TemplateProcesses()

    def prepare(self) -> None:
        """Make ready what the first conversation would wait for. Raises EngineFault if that cannot be."""
        self._processes.prepare()

    def close(self) -> None:
        """End the processes that render it."""
        self._processes.close()

    def render(
        self,
        messages: list[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> Rendered:
        """Render a conversation as transformers' apply_chat_template does.

        Raises InvalidRequest if the template refuses it or exceeds its bounds, and for variables of reserved names; an
        error of TemplateProcesses.render for what is not the template's.
        """
        for name in RESERVED:
            if name in (variables or {}):
                raise InvalidRequest(f"chat_template_kwargs holds {shown(name)}, which it may not set")
        marks = Marks.unused_in(_texts([messages, tools, variables]))
        for index, message in enumerate(messages):
            _check_content(message, f"messages[{index}]")
        chat = _with_reasoning([_without_nulls(message) for message in self._mark(messages, marks, False)])
        if continue_final_message:
            _tag_last(chat)

        given = {
            **self._variables,
            "documents": None,
            **(self._mark(variables, marks, False) or {}),
            "messages": chat,
            "tools": self._mark(tools, marks, False),
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        try:
            text = self._render(given, chat)
        except RenderError as error:
            raise InvalidRequest(f"the chat template refused the messages: {error}") from error
        text = marks.unescape(text)
        return self._collect(_cut_at_tag(text) if continue_final_message else text, marks)

    def _render(self, given: dict[str, Any], chat: list[Message]) -> str:
        try:
            return self._processes.render(self._source, given)
        except RenderError as error:
            failure = error
        # What some templates cannot take is given to them in another form.
        for adapt in (_give_nulls, _give_contents, _give_objects):
            if adapt(chat):
                try:
                    return self._processes.render(self._source, given)
                except RenderError as error:
                    failure = error
        raise failure

    def _mark(self, value: Any, marks: Marks, users_keys: bool) -> Any:
        """A copy in which special tokens are marked, within values and within keys that users choose."""
        if isinstance(value, str):
            return self._mark_text(value, marks)
        if isinstance(value, list | tuple):
            return [self._mark(item, marks, users_keys) for item in value]
        if not isinstance(value, dict):
            return value

        copy = {}
        for key, item in value.items():
            inside = users_keys or key in _USERS_KEYS
            known = key in ("role", "type") and isinstance(item, str) and item in _KNOWN_WORDS
            name = key
            # Templates ask for keys that are plain words; any other is a user's wherever it stands.
            if isinstance(key, str) and (users_keys or not key.isidentifier() or self._has_special(key)):
                name = self._mark_text(key, marks)
            copy[name] = item if known else self._mark(item, marks, inside)
        return copy

    def _has_special(self, text: str) -> bool:
        """Whether the text of a special token is in it."""
        found = self._pattern.search(text) or (self._normalized is not None and self._normalized.find(text))
        return bool(found)

    def _mark_text(self, text: str, marks: Marks) -> str:
        tokens = self._normalized
        if tokens is None:
            marked, seen = self._mark_written(text, marks), text
        else:
            marked, seen = self._mark_normalized(text, marks, tokens), tokens.normalize(text)
        if not text or (tokens is None and text in self._special):  # it is marked as a whole
            return marked

        # A user's text may also be a part of a special token that the text beside it completes. Where texts are
        # normalized, one that does not begin in ASCII may be composed with what is before it.
        is_part = seen in self._joined
        begins = is_part or seen.startswith(self._ends) or (tokens is not None and not text[0].isascii())
        ends = is_part or seen.endswith(self._beginnings)
        return f"{marks.cut if begins else ''}{marked}{marks.cut if ends else ''}"

    def _mark_written(self, text: str, marks: Marks) -> str:
        """Mark special tokens that are written as they are."""
        return self._pattern.sub(f"{marks.begin}\\g<0>{marks.end}", text)

    def _mark_normalized(self, text: str, marks: Marks, tokens: NormalizedTokens) -> str:
        """Mark also what becomes one by normalization."""
        marked, start = "", 0
        for first, end in tokens.find(text):
            marked += self._mark_written(text[start:first], marks) + marks.begin + text[first:end] + marks.end
            start = end
        return marked + self._mark_written(text[start:], marks)

    def _collect(self, text: str, marks: Marks) -> Rendered:
        plain: list[str] = []

        def stand_for(match: re.Match[str]) -> str:
            plain.append(match[1] or "")
            return marks.stands_for

        any_mark = f"[{marks.begin}{marks.end}{marks.cut}]"
        # What becomes a special token by normalization may be written in any way.
        texts = self._pattern.pattern if self._normalized is None else f"[^{any_mark[1:]}*"
        marked = f"{marks.begin}({texts}){marks.end}|{any_mark}"
        return Rendered(re.sub(marked, stand_for, text), marks.stands_for, plain)


def _give_nulls(chat: list[Message]) -> bool:
    """Give null as the content of answers that only call tools. False if all have one.

    DeepSeek's template asks whether the content is none, and shows the calls only then.
    """
    without = [message for message in chat if message.get("role") == "assistant" and "content" not in message]
    for message in without:
        message["content"] = None
    return bool(without)


def _give_contents(chat: list[Message]) -> bool:
    """Give a text to answers that only call tools: a template may need one of every message. False if all have one."""
    without = [message for message in chat if message.get("role") == "assistant" and message.get("content") is None]
    for message in without:
        message["content"] = ""
    return bool(without)


def _give_objects(chat: list[Message]) -> bool:
    """Make an object of arguments that were cut off: a template may ask for their members. False if all are some."""
    calls = [call for message in chat for call in message.get("tool_calls") or () if isinstance(call, dict)]
    functions = [function for call in calls if isinstance(function := call.get("function"), dict)]
    texts = [function for function in functions if isinstance(function.get("arguments"), str)]
    for function in texts:
        function["arguments"] = {"arguments": function["arguments"]}
    return bool(texts)


def _escapes(mark: str) -> tuple[str, str]:
    """A mark as Python writes it within an object, and as JSON in ASCII does."""
    return repr(mark)[1:-1], json.dumps(mark)[1:-1]


def _texts(value: Any) -> Iterator[str]:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            pending += item.keys()
            pending += item.values()
        elif isinstance(item, list | tuple):
            pending += item


def _check_content(message: Any, name: str) -> None:
    """Raise InvalidRequest for what is no message, and for a content that is null where there must be one."""
    if not isinstance(message, dict):
        raise InvalidRequest(f"a message must be an object with a role and a content, not {shown(message)}")
    if "content" not in message or message["content"] is not None:
        return
    rest = ("tool_calls", "refusal", *_REASONING)
    if message.get("role") != "assistant" or not any(message.get(part) for part in rest):
        raise InvalidRequest(
            f"{name}.content is null, which only a message of the assistant with tool_calls may have: give a text"
        )


def _without_nulls(message: Message) -> Message:
    return {key: value for key, value in message.items() if value is not None}


def _with_reasoning(chat: list[Message]) -> list[Message]:
    """Give an answer's reasoning under each name that templates know it by."""
    result = []
    for message in chat:
        reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
        named = {} if reasoning is None else {"thinking": reasoning}
        last = {} if reasoning is None else {"reasoning_content": reasoning}
        result.append({**named, **message, **last})
    return result


def _tag_last(chat: list[Message]) -> None:
    """Mark the end of the last message's text. Raises InvalidRequest if it has none."""
    content = chat[-1].get("content") if chat else None
    if isinstance(content, str):
        chat[-1]["content"] = content + _CONTINUED
        return
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            part["text"] += _CONTINUED
            return
    raise InvalidRequest("continue_final_message is set, but the last message has no text that could go on")


def _cut_at_tag(text: str) -> str:
    """What comes before the tag. Where the template strips a message's end, that of the text is stripped too."""
    start = text.rfind(_CONTINUED.strip())
    if start < 0:
        raise InvalidRequest("continue_final_message is set, but the chat template leaves the last message out")
    return text[:start] if text.startswith(_CONTINUED, start) else text[:start].rstrip()
