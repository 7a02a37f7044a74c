"""What callers pass for a prompt: any iterable of them, with numbers of any library."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import gc
import itertools
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from phalanx import LLM, AsyncLLM, InvalidRequest, SamplingParams
from phalanx.engine.client.client import Client, RequestHandle
from phalanx.engine.client.requests import as_prompts, make_submit, spread_sampling
from phalanx.engine.protocol.messages import MESSAGE_BYTES, Submit, Tokenize
from phalanx.engine.protocol.structured import StructuredOutput
from phalanx.engine.protocol.transport import InProcess, ZmqConnection


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("text", ["text"]),
        (["a", "b"], ["a", "b"]),
        (("a", "b"), ["a", "b"]),
        ((text for text in "ab"), ["a", "b"]),
        ({"a"}, ["a"]),
        ({"a": 1}.keys(), ["a"]),
        ((token for token in (1, 2)), [[1, 2]]),
        ([iter((1, 2)), (token for token in (3,))], [[1, 2], [3]]),
        ([1, 2], [[1, 2]]),
        ((1, 2), [[1, 2]]),
        (range(3), [[0, 1, 2]]),
        (np.array([1, 2]), [[1, 2]]),
        ([np.int64(1), np.int32(2)], [[1, 2]]),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ([np.array([1, 2]), "a", (3,)], [[1, 2], "a", [3]]),
        ([], []),
    ],
)
def test_prompts_of_every_kind_are_text_or_lists_of_integers(given: Any, taken: list[Any]) -> None:
    assert as_prompts(given) == taken
    assert all(type(token) is int for prompt in as_prompts([*taken]) if isinstance(prompt, list) for token in prompt)


@pytest.mark.parametrize("given", [5, None, 1.5, [None], [{"a": 1}], [b"bytes"], ["a", 5.0], b"a", {"a": 1}])
def test_what_is_no_prompt_is_named(given: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"prompt=.* must be text or a list of token ids"):
        as_prompts(given)


@pytest.mark.parametrize("given", [{5, 6}, [{5, 6}], [frozenset({5})]])
def test_token_ids_without_an_order_are_refused(given: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"prompt=.* is a set, which has no order"):
        as_prompts(given)


@pytest.mark.parametrize("sampling", [5, {"temperature": 0}, [{"temperature": 0}], "greedy"])
def test_what_are_no_sampling_parameters_is_named(sampling: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"sampling=.* must be SamplingParams"):
        spread_sampling(sampling, 1)


@pytest.mark.parametrize("kind", [tuple, iter])
def test_a_conversation_may_come_in_any_iterable(kind: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert make_submit("a", messages=kind(messages)).messages == messages


def test_one_prompt_of_a_stream_may_be_an_array() -> None:
    assert make_submit("a", prompt=np.array([7, 8])).token_ids == [7, 8]


def test_a_conversation_may_hold_values_of_numpy_and_mappings_of_any_kind() -> None:
    image = {"type": "text", "text": np.str_("hi")}
    given = [MappingProxyType({"role": np.str_("user"), "content": (MappingProxyType(image),), "n": np.int64(3)})]
    [message] = make_submit("a", messages=given).messages or []  # type: ignore[arg-type]
    assert message == {"role": "user", "content": [{"type": "text", "text": "hi"}], "n": 3}
    assert {type(message["role"]), type(message["n"])} == {str, int}
    msgspec.msgpack.encode(message)


def test_a_conversation_that_holds_itself_is_refused() -> None:
    message: dict[str, Any] = {"role": "user", "content": "hi"}
    message["again"] = message
    with pytest.raises(InvalidRequest, match="nested too deep, or hold themselves"):
        make_submit("a", messages=[message])


@pytest.mark.parametrize("request_id", [5, None, b"a", "\ud800"])
def test_an_id_that_no_wire_carries_is_refused_before_anything_is_sent(request_id: Any) -> None:
    link = InProcess()
    sent: list[Any] = []
    link.on_command = lambda client, command: sent.append(command)
    client = Client(link.connection)
    events: list[Any] = []
    for command in (Submit(id=request_id, token_ids=[5]), Tokenize(id=request_id, prompt="a")):
        with pytest.raises(InvalidRequest, match=r"id=.* must be a text of valid Unicode"):
            client._send_for(command, events.append)
    assert (sent, events) == ([], [])
    client.close()


@pytest.mark.parametrize("kind", [LLM.chat, LLM.stream, AsyncLLM.generate])
def test_what_are_no_sampling_parameters_is_named_wherever_they_are_given(kind: Any) -> None:
    llm = LLM.__new__(LLM)
    llm.client = Client(InProcess().connection)
    given: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "sampling": {"temperature": 0}}

    def ask() -> None:
        if kind is AsyncLLM.generate:
            asyncio.run(AsyncLLM.from_llm(llm).generate(**given))
        kind(llm, **given)

    with pytest.raises(InvalidRequest, match=r"sampling=.* must be SamplingParams"):
        ask()


def test_texts_of_numpy_are_texts() -> None:
    submit = make_submit("a", prompt=np.str_("hi"), structured=StructuredOutput(choice=np.array(["yes", "no"])))  # type: ignore[arg-type]
    assert type(submit.prompt) is str
    assert submit.structured == StructuredOutput(choice=(text for text in ("yes", "no")))  # type: ignore[arg-type]
    assert StructuredOutput(regex=np.str_("a+")).regex == "a+"
    msgspec.msgpack.encode(submit)
    with pytest.raises(InvalidRequest, match=r"structured\.choice holds 16385 texts"):
        StructuredOutput(choice=map(str, range(10**12))).check()  # type: ignore[arg-type]


def test_a_command_nested_without_end_cannot_be_sent(tmp_path: Path) -> None:
    message: dict[str, Any] = {"role": "user", "content": "hi"}
    message["again"] = message
    connection = ZmqConnection(f"ipc://{tmp_path}/nobody", None)
    try:
        with pytest.raises(InvalidRequest, match="holds a value that cannot be sent"):
            connection.send(Submit(id="a", messages=[message]))
    finally:
        connection.close()


def test_a_priority_is_a_number_that_a_wire_carries() -> None:
    for priority in (2**63, -(2**63) - 1):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({"type": "submit", "id": "a", "priority": priority}, Submit)


def test_a_handle_that_could_not_be_made_is_dropped_in_silence(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(AttributeError):
        RequestHandle(Client(InProcess().connection), None)  # type: ignore[arg-type]
    gc.collect()
    assert not [warning for warning in recwarn if "RequestHandle" in str(warning.message)]


class _Text(str):
    """A text of a class of its own, as template engines make them."""


@dataclasses.dataclass
class _Message:
    role: str
    content: str


def test_texts_and_messages_of_classes_of_their_own_are_plain_before_any_connection_has_them() -> None:
    plain_message = {"role": "user", "content": "Hi"}
    for message in ({_Text("role"): _Text("user"), "content": _Text("Hi")}, _Message("user", _Text("Hi"))):
        submit = make_submit("a", messages=[message])  # type: ignore[list-item]
        assert submit.messages == [plain_message]
        assert {type(value) for each in submit.messages or [] for pair in each.items() for value in pair} == {str}

    assert [type(prompt) for prompt in as_prompts(_Text("a"))] == [str]
    assert [type(prompt) for prompt in as_prompts([_Text("a"), "b"])] == [str, str]
    submit = make_submit("a", prompt=_Text("a"), sampling=SamplingParams(stop=[_Text("b")], bad_words=(_Text("c"),)))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(submit), type=Submit) == submit


class _Id(int):
    """A token id of a class of its own."""


class _Named(enum.IntEnum):
    FIVE = 5


@pytest.mark.parametrize("given", [[_Id(5), _Named.FIVE], (_Named.FIVE, _Id(5)), [[_Id(5), _Named.FIVE]]])
def test_token_ids_of_classes_of_their_own_are_token_ids(given: Any) -> None:
    [prompt] = as_prompts(given)
    assert prompt == [5, 5]
    assert {type(token) for token in prompt} == {int}


def test_bytes_in_a_view_are_no_token_ids_and_an_endless_prompt_is_refused() -> None:
    for given in (memoryview(b"hi"), [memoryview(b"hi")]):
        with pytest.raises(InvalidRequest, match=r"prompt=.* must be text or a list of token ids"):
            as_prompts(given)
    with pytest.raises(InvalidRequest, match=r"more than 33554432 token ids"):
        as_prompts(itertools.count())


def test_parts_of_a_message_may_come_in_any_iterator() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    submit = make_submit("a", messages=[{"role": "user", "content": (part for part in parts)}])
    assert submit.messages == [{"role": "user", "content": parts}]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"token_ids": [_Id(5)]}, "a value that cannot be sent, in its token_ids"),
        ({"token_ids": [2**64]}, "a value that cannot be sent, in its token_ids"),
        ({"messages": [{"role": "user", "content": Path("a")}]}, "a value that cannot be sent, in its messages"),
        ({"messages": [{"role": "user", "content": "a", 5: 6}]}, "ill-typed.*Expected `str`, got `int`"),
        ({"prompt": "\ud800"}, "the prompt is not valid Unicode"),
        ({"token_ids": [5], "priority": 2**63}, "ill-typed.*priority"),
        ({"prompt": "x" * MESSAGE_BYTES}, "at most 33554432"),
    ],
)
def test_a_client_in_the_engines_process_sends_what_a_wire_would_carry_alone(
    fields: dict[str, Any], words: str
) -> None:
    link = InProcess()
    sent: list[Any] = []
    link.on_command = lambda client, command: sent.append(command)
    with pytest.raises(InvalidRequest, match=words):
        link.connection.send(Submit(id="a", **fields))
    assert sent == []


def test_what_a_caller_changes_after_it_was_sent_is_not_the_requests() -> None:
    link = InProcess()
    sent: list[Any] = []
    link.on_command = lambda client, command: sent.append(command)
    submit = Submit(id="a", token_ids=[5, 6], sampling=SamplingParams(n=2))
    link.connection.send(submit)
    assert sent == [submit]
    assert submit.token_ids is not None
    submit.token_ids.append("seven")  # type: ignore[arg-type]
    assert sent[0].token_ids == [5, 6]
