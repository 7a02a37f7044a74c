"""Commands and events over ZeroMQ: every message survives the way, and no client's fault reaches another."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from phalanx import InvalidRequest, SamplingParams
from phalanx.engine.client.client import Client, RequestHandle
from phalanx.engine.client.llm import choose_device
from phalanx.engine.client.requests import OutputBuilder, RequestOutput
from phalanx.engine.config import EngineConfig
from phalanx.engine.engine import Engine, EngineThread
from phalanx.engine.protocol.logprobs import TokenLogprobs
from phalanx.engine.protocol.messages import (
    Abort,
    Accepted,
    Command,
    Completion,
    Delta,
    Detokenize,
    Detokenized,
    Event,
    Failed,
    Finished,
    ModelInfo,
    ModelInfoRequest,
    Shutdown,
    Status,
    StatusRequest,
    Submit,
    Timings,
    Tokenize,
    Tokenized,
    Usage,
)
from phalanx.engine.protocol.transport import ZmqConnection, ZmqTransport
from phalanx.parallel.group import local_group
from phalanx.tests.engine.conftest import CONFIG

PATIENCE_S = 60
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=500, temperature=0, ignore_eos=True)
LOGPROBS = [TokenLogprobs(3, -0.5, 1, [3, 4], [-0.5, -1.5])]

COMMANDS: list[Command] = [
    Submit(
        id="a",
        prompt="héllo 🙂",
        sampling=SamplingParams(max_tokens=3, stop=("x",), stop_token_ids=(1, 2), logit_bias={7: -1.5}, seed=-(2**63)),
        priority=-3,
        cache_salt="salt",
    ),
    Submit(id="b", token_ids=[0, 2**31 - 1]),
    Submit(id="c", messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}], "n": 1, "x": None}]),
    Submit(id="d", prompt="x", sampling=SamplingParams(bad_words=("no",), allowed_token_ids=(1, 2)), tools=[{"a": 1}]),
    Tokenize(id="e", messages=[], chat_template_kwargs={"enable_thinking": False}, continue_final_message=True),
    Detokenize(id="f", token_ids=[1]),
    Abort("a"),
    StatusRequest(),
    ModelInfoRequest(),
    Shutdown(),
]
EVENTS: list[Event] = [
    Accepted(id="a", prompt_tokens=3, seed=-(2**63), max_tokens=9),
    Tokenized(id="a", token_ids=[1], text=None, token_bytes=[b"\xf0"]),
    Detokenized(id="a", text="é"),
    Delta("a", 1, "text 🙂", [1, 2], LOGPROBS),
    Delta("a", 0, "", []),
    Finished(
        "a", [Completion(0, "stop", "x"), Completion(1, "length", 5)], Usage(3, 2, 1), Timings(0.1, 0.2, 3.0, 4.0),
        [1, 2, 3], LOGPROBS,
    ),
    Failed("a", "InvalidRequest", "no"),
    Status(
        ready=True, ranks=2, max_model_len=3, max_num_seqs=4, block_size=5, total_blocks=6, free_blocks=7, running=8,
        waiting=9, steps=10, preemptions=11, prefix_hits=12, peak_memory=[13, 14], report=["one", "two"],
    ),
]  # fmt: skip


def _lost(error: Exception) -> None:
    raise AssertionError(error)


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/engine"


def test_a_request_whose_taking_in_fails_is_answered_and_the_next_command_is_served(address: str) -> None:
    transport, connection = ZmqTransport(address), ZmqConnection(address)
    served: queue.SimpleQueue[Command] = queue.SimpleQueue()
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def on_command(client: bytes, command: Command) -> None:
        if isinstance(command, Abort):
            served.put(command)
            return
        raise ZeroDivisionError("a fault of the engine's own")

    transport.start(on_command)
    connection.start(events.put, _lost)
    for command in (Submit(id="a", token_ids=[1]), Tokenize(id="b", prompt="x"), Detokenize(id="c", token_ids=[1])):
        connection.send(command)
        failed = events.get(timeout=PATIENCE_S)
        assert isinstance(failed, Failed)
        assert (failed.id, failed.error) == (command.id, "EngineFault")
    connection.send(Abort("a"))
    assert served.get(timeout=PATIENCE_S) == Abort("a")
    connection.close()
    transport.close()


def test_every_command_and_every_event_survives_the_way(address: str) -> None:
    transport, connection = ZmqTransport(address), ZmqConnection(address)
    commands: queue.SimpleQueue[tuple[bytes, Command]] = queue.SimpleQueue()
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    transport.start(lambda client, command: commands.put((client, command)))
    connection.start(events.put, _lost)
    for command in COMMANDS:
        connection.send(command)
    received = [commands.get(timeout=PATIENCE_S) for _ in COMMANDS]
    assert [command for _, command in received] == COMMANDS
    for event in EVENTS:
        transport.send(received[0][0], event)
    transport.send(received[0][0], *EVENTS)  # as one message
    assert [events.get(timeout=PATIENCE_S) for _ in 2 * EVENTS] == 2 * EVENTS
    connection.close()
    transport.close()


def test_what_was_sent_just_before_closing_still_arrives(address: str) -> None:
    transport, connection = ZmqTransport(address), ZmqConnection(address)
    clients: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    transport.start(lambda client, command: clients.put(client))
    connection.start(events.put, _lost)
    connection.send(StatusRequest())
    client = clients.get(timeout=PATIENCE_S)
    count = 20_000  # far more than ZeroMQ's own limits would hold
    for number in range(count):
        transport.send(client, Delta("a", number, "", []))
    transport.close()
    indices = []
    for _ in range(count):
        event = events.get(timeout=PATIENCE_S)
        assert isinstance(event, Delta)
        indices.append(event.index)
    assert indices == list(range(count))
    connection.close()


def test_a_client_may_be_there_before_its_coordinator(address: str) -> None:
    connection = ZmqConnection(address)
    connection.start(lambda event: None, _lost)
    connection.send(Abort("early"))
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
    transport = ZmqTransport(address)
    transport.start(lambda client, command: commands.put(command))
    assert commands.get(timeout=PATIENCE_S) == Abort("early")
    connection.close()
    transport.close()


def test_closing_twice_and_sending_after_closing_are_harmless(address: str) -> None:
    transport, connection = ZmqTransport(address), ZmqConnection(address)
    transport.start(lambda client, command: None)
    connection.start(lambda event: None, _lost)
    for end in (connection, transport):
        end.close()
        end.close()
    connection.send(Abort("late"))
    transport.send(b"nobody", EVENTS[0])


@pytest.mark.parametrize(
    "submit",
    [
        Submit(id="a", prompt="\ud800"),
        Submit(id="a", token_ids=[2**70]),
        Submit(id="a", messages=[{"role": "user", "content": object()}]),
    ],
)
def test_what_the_wire_cannot_carry_is_an_invalid_request(address: str, submit: Submit) -> None:
    client = Client(ZmqConnection(address))
    for _ in range(2):  # the second would be refused as a duplicate, were the first not forgotten
        with pytest.raises(InvalidRequest, match=r"cannot be sent|not valid Unicode"):
            next(RequestHandle(client, submit))
    client.close()


# ---- an engine behind the wire


@pytest.fixture(scope="module")
def served(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an engine that serves over ZeroMQ; nothing may be left in it, and no block lost."""
    address = f"ipc://{tmp_path_factory.mktemp('served')}/engine"
    config = EngineConfig.from_dict({"model": str(tiny), **CONFIG})
    engine = Engine(config, local_group(choose_device(config)), ZmqTransport(address))
    assert engine.coordinator is not None
    engine.coordinator.start()
    failures: list[Exception] = []
    thread = EngineThread(engine, failures.append)
    yield address
    client = Client(ZmqConnection(address))
    status = client.status(PATIENCE_S)
    assert (status.running, status.waiting, status.free_blocks) == (0, 0, status.total_blocks)
    client.close()
    thread.stop()
    engine.coordinator.close()
    assert failures == []


class _Answer:
    """Collects one request's events."""

    def __init__(self, client: Client, submit: Submit) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._builder = OutputBuilder(submit.sampling.n)
        client.submit(submit, self._events.put)

    def first(self) -> None:
        self._builder.add(self._events.get(timeout=PATIENCE_S))

    def whole(self) -> RequestOutput:
        while True:
            output = self._builder.add(self._events.get(timeout=PATIENCE_S))
            if output is not None:
                return output


def test_two_clients_with_equal_ids_get_each_its_own_answer(served: str) -> None:
    clients = [Client(ZmqConnection(served)) for _ in range(2)]
    prompts = [[5, 6, 7], [9]]
    alone = [_Answer(clients[0], Submit(id=str(i), token_ids=prompt, sampling=GREEDY)).whole()
             for i, prompt in enumerate(prompts)]  # fmt: skip
    answers = [
        _Answer(client, Submit(id="same", token_ids=prompt, sampling=GREEDY, return_prompt_token_ids=True))
        for client, prompt in zip(clients, prompts, strict=True)
    ]
    for answer, expected, prompt in zip(answers, alone, prompts, strict=True):
        output = answer.whole()
        assert (output.id, output.prompt_token_ids) == ("same", prompt)
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
    for client in clients:
        client.close()


def test_aborting_an_id_leaves_another_clients_request_of_that_id_alone(served: str) -> None:
    mine, theirs = (Client(ZmqConnection(served)) for _ in range(2))
    kept = _Answer(mine, Submit(id="same", token_ids=[5], sampling=GREEDY))
    dropped = _Answer(theirs, Submit(id="same", token_ids=[5], sampling=ENDLESS))
    theirs.abort("same")
    assert dropped.whole().outputs[0].finish_reason == "abort"
    assert kept.whole().outputs[0].finish_reason == "length"
    mine.close()
    theirs.close()


def _nested(depth: int) -> bytes:
    """A Submit with lists in lists."""
    fields = {"type": "submit", "id": "deep", "messages": 0}
    return msgspec.msgpack.encode(fields)[:-1] + b"\x91\x81\xa1a" + b"\x91" * depth + b"\x90"


GARBAGE: list[list[bytes]] = [
    [_nested(500)],
    [_nested(1_000)],
    [_nested(100_000)],
    [b""],
    [b"garbage"],
    [b"", b""],
    [b"one", b"two", b"three"],
    [b"\x91" * 10_000],
    [msgspec.msgpack.encode({"type": "unheard of"})],
    [msgspec.msgpack.encode({"type": "abort"})],
    [msgspec.msgpack.encode({"type": "submit", "token_ids": [1]})],
    [b"\x82\xa4type\xa6submit\xa2id\xa2\xff\xfe"],
]


@pytest.mark.parametrize("frames", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_from_one_client_does_not_reach_another(served: str, frames: list[bytes]) -> None:
    client = Client(ZmqConnection(served))
    answer = _Answer(client, Submit(id="beside", token_ids=[5], sampling=GREEDY))
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(served)
        socket.send_multipart(frames)
        # The same socket is served afterwards, so the garbage was read and survived.
        socket.send(msgspec.msgpack.encode(StatusRequest()))
        kinds = []
        while "status" not in kinds:
            assert socket.poll(PATIENCE_S * 1000)
            kinds.append(msgspec.msgpack.decode(socket.recv())["type"])
        assert set(kinds) <= {"status", "failed"}
    assert len(answer.whole().outputs[0].token_ids) == 24
    client.close()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sampling": {"max_tokens": 0}}, "max_tokens=0 is out of range"),
        ({"sampling": {"temprature": 1}}, "temprature"),
        ({"token_ids": "five"}, "token_ids"),
    ],
)
def test_an_ill_formed_request_from_any_program_is_answered(served: str, fields: dict[str, Any], words: str) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(served)
        socket.send(msgspec.msgpack.encode({"type": "submit", "id": "mine", **fields}))
        assert socket.poll(PATIENCE_S * 1000)
        failed = msgspec.msgpack.decode(socket.recv(), type=Event)
    assert isinstance(failed, Failed)
    assert (failed.id, failed.error) == ("mine", "InvalidRequest")
    assert words in failed.message


def test_a_client_that_vanishes_has_its_requests_aborted(served: str) -> None:
    gone = Client(ZmqConnection(served))
    answers = [_Answer(gone, Submit(id=str(i), token_ids=[5 + i], sampling=ENDLESS)) for i in range(3)]
    for answer in answers:
        answer.first()
    gone.close()
    client = Client(ZmqConnection(served))
    steps = client.status(PATIENCE_S).steps
    while client.status(PATIENCE_S).running:
        pass
    assert client.status(PATIENCE_S).steps - steps < 400, "they ran to their end"
    client.close()


def test_many_clients_at_once_get_each_its_own_answer(served: str) -> None:
    outputs: dict[int, RequestOutput] = {}

    def ask(number: int) -> None:
        client = Client(ZmqConnection(served))
        submit = Submit(id="x", token_ids=[5 + number], sampling=GREEDY, return_prompt_token_ids=True)
        outputs[number] = _Answer(client, submit).whole()
        client.close()

    threads = [threading.Thread(target=ask, args=[number], daemon=True) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert {number: output.prompt_token_ids for number, output in outputs.items()} == {i: [5 + i] for i in range(12)}


def test_questions_beside_requests_are_answered(served: str) -> None:
    connection = ZmqConnection(served)
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    connection.start(events.put, lambda error: None)
    try:
        for question in (
            ModelInfoRequest(),
            Tokenize(id="t", prompt="ab"),
            Detokenize(id="d", token_ids=[]),
            Tokenize(id="bad", token_ids=[10**6]),
        ):
            connection.send(question)
        answers = {type(event): event for event in (events.get(timeout=60) for _ in range(4))}
    finally:
        connection.close()
    info, tokenized = answers[ModelInfo], answers[Tokenized]
    assert isinstance(info, ModelInfo)
    assert isinstance(tokenized, Tokenized)
    assert (info.ranks, info.chat_template is not None, info.max_model_len) == (1, True, 512)
    assert (tokenized.id, tokenized.token_bytes) == ("t", [b"a", b"b"])
    assert answers[Detokenized] == Detokenized(id="d", text="")
    failed = answers[Failed]
    assert isinstance(failed, Failed)
    assert (failed.id, failed.error) == ("bad", "InvalidRequest")
