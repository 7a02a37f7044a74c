"""The wire: any bytes that reach either end bring an answer, a refusal or silence; what is well-formed is checked."""

from __future__ import annotations

import itertools
import time
from functools import cache
from typing import Any

import msgspec
from phalanx.engine.config import EngineConfig
from phalanx.engine.coordinator.input_processor import InputProcessor
from phalanx.engine.coordinator.tokenizer import Tokenizer
from phalanx.engine.errors import InvalidRequest
from phalanx.engine.models.spec import read_config, spec_from_config
from phalanx.engine.protocol import messages
from phalanx.engine.protocol.messages import Command, Event, Submit, Tokenize
from phalanx.engine.protocol.sampling_params import SamplingParams
from phalanx.engine.protocol.structured import StructuredOutput
from phalanx.engine.protocol.transport import UNDECODABLE, ZmqConnection, ZmqTransport
from phalanx.tests.fuzz.bounds import in_time
from phalanx.tests.fuzz.choices import Choices
from phalanx.tests.fuzz.folders import scratch, tiny_model

MAX_MODEL_LEN = 64
KINDS: tuple[Any, ...] = tuple(
    kind
    for kind in vars(messages).values()
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__struct_config__.tag is not None
)
COMMANDS: tuple[dict[str, Any], ...] = (
    {"type": "submit", "id": "a", "prompt": "hi", "sampling": {"max_tokens": 2, "stop": ["a"], "bad_words": ["b"]}},
    {"type": "submit", "id": "a", "messages": [{"role": "user", "content": "hi"}], "tools": [{}],
    "split_reasoning": True},
    {"type": "submit", "id": "a", "token_ids": [5, 6], "resume": {"completions": [{"token_ids": [7],
    "characters": 1}]}},
    {"type": "submit", "id": "a", "token_ids": [5], "structured": {"regex": "a+"},
    "sampling": {"logit_bias": {4: 2.0}}},
    {"type": "tokenize", "id": "a", "prompt": "hi", "truncate_prompt_tokens": 2},
    {"type": "detokenize", "id": "a", "token_ids": [5, 6]},
    {"type": "abort", "id": "a"}, {"type": "ping"}, {"type": "status_request"}, {"type": "shutdown"},
)  # fmt: skip
EVENTS: tuple[dict[str, Any], ...] = (
    {"type": "accepted", "id": "a", "prompt_tokens": 1, "seed": 1, "max_tokens": 2},
    {"type": "delta", "id": "a", "index": 0, "text": "x", "token_ids": [1], "position": 0},
    {"type": "failed", "id": "a", "error": "InvalidRequest", "message": "m"},
    {"type": "pong", "epoch": "e", "client": "c", "version": 3},
    {"type": "detokenized", "id": "a", "text": "x"},
    {
        "type": "finished", "id": "a", "completions": [{"index": 0, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1},
        "timings": {"queued_s": 0.0, "ttft_s": 0.0, "tpot_ms": 0.0, "total_s": 0.0},
    },
)  # fmt: skip
WORDS = (
    *(str(kind.__struct_config__.tag) for kind in KINDS),
    *itertools.chain(*(kind.__struct_fields__ for kind in (*KINDS, SamplingParams, StructuredOutput))),
    "role", "content", "user", "assistant", "type", "text", "<|im_end|>",
)  # fmt: skip


class _Ends:
    """Both ends of a wire, on this thread alone: what they do with frames that arrive."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.events: list[Event] = []
        self.refusals = 0
        transport, connection = ZmqTransport(f"ipc://{scratch()}/wire"), ZmqConnection(f"ipc://{scratch()}/wire")
        handlers: list[Any] = []
        for end in (transport, connection):
            # Without its thread a wire is used by this one.
            end._wire.start = lambda on_frames, **_: handlers.append(on_frames)  # type: ignore[method-assign]
        transport._outboxes.send = self._refused  # type: ignore[method-assign]
        transport.start(lambda client, command: self.commands.append(command))
        connection.start(self.events.append, lambda error: None)
        self.to_engine, self.to_client = handlers

    def _refused(self, frames: list[bytes]) -> None:
        msgspec.msgpack.decode(frames[-1], type=messages.Failed | messages.Pong)
        self.refusals += 1


@cache
def _ends() -> _Ends:
    return _Ends()


@cache
def _processor() -> InputProcessor:
    folder = tiny_model()
    spec = spec_from_config(read_config(folder), str(folder))
    return InputProcessor(EngineConfig(model=str(folder)), spec, Tokenizer(folder), {}, MAX_MODEL_LEN)


def fuzz_one(data: bytes) -> None:
    """Deliver a message to both ends, and process it if it is a request."""
    choices = Choices(data)
    if choices.number(5) == 0:
        frame = choices.rest()
    else:
        fields = choices.pick((*COMMANDS, *EVENTS))
        for _ in range(choices.number(4)):
            fields = choices.changed(fields, WORDS)
        try:
            frame = msgspec.msgpack.encode(fields)
        except (OverflowError, UnicodeEncodeError):
            return  # what no client can send
        if choices.number(3) == 0:
            frame = choices.mutated(frame)
        if choices.number(20) == 0:
            frame = b"\x91" * 3000 + frame

    ends = _ends()
    _processor()
    ends.commands.clear()
    ends.events.clear()
    with in_time():
        ends.to_engine([b"client", *([b""] * choices.number(2)), frame])
        try:
            ends.to_client([frame])
        except UNDECODABLE:
            assert not ends.events
    for command in ends.commands:
        msgspec.msgpack.encode(command)
        _process(command)


def _process(command: Command) -> None:
    try:
        with in_time():
            if isinstance(command, Submit):
                _processor().next_seed(command)
                request = _processor().process(command, "inner", time.monotonic())
                assert 1 <= len(request.prompt) < MAX_MODEL_LEN
                assert all(0 <= token < 1031 for token in request.prompt)
            elif isinstance(command, Tokenize | messages.Detokenize):
                msgspec.msgpack.encode(_processor().answer(command))
    except InvalidRequest as error:
        msgspec.msgpack.encode(str(error))
