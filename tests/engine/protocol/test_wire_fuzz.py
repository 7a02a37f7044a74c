"""Any bytes from any client: every well-formed request is answered, memory stays flat, and the engine ends as usual.

The long form: `pytest -s -m slow tests/engine/protocol/test_wire_fuzz.py`.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from phalanx.tests.engine.conftest import CONFIG
from phalanx.tests.engine.serving_engine import PATIENCE_S, resident_bytes, serving

CLIENTS = 4
AT_ONCE = 64
"""Well-formed requests under way."""
GROWTH_LIMIT = 96 * 2**20
"""What may wait for the client that never reads (outbox.UNREAD_BYTES), twice for the allocator, and 32 MiB."""
SHARES = {"request": 10, "abort": 8, "status": 4, "ping": 4, "mutated": 40, "random": 20, "frames": 4, "deaf": 10}


class _Fuzz:
    """Several clients of the engine at `address`, and one that never reads, all from this thread."""

    def __init__(self, address: str, seed: int) -> None:
        self._rng = random.Random(seed)
        self._context = zmq.Context()
        self._sockets = [self._connect(address) for _ in range(CLIENTS)]
        self._deaf = self._connect(address, most_unread=1)
        self._poller = zmq.Poller()
        for socket in self._sockets:
            self._poller.register(socket, zmq.POLLIN)
        self._number = 0
        self._unanswered: set[tuple[int, str]] = set()
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()

    def run(self, count: int) -> None:
        """Send `count` messages, then wait for what is owed."""
        for kind in self._rng.choices(list(SHARES), list(SHARES.values()), k=count):
            self._send(kind)
            self.sent[kind] += 1
            self._receive(0)
            deadline = time.monotonic() + PATIENCE_S
            while len(self._unanswered) >= AT_ONCE:
                assert time.monotonic() < deadline, f"{len(self._unanswered)} requests wait for their answers"
                self._receive(100)

        deadline = time.monotonic() + PATIENCE_S
        while self._unanswered:
            assert time.monotonic() < deadline, f"never answered: {sorted(self._unanswered)[:10]}"
            self._receive(100)

    def close(self) -> None:
        """Leave, reading nothing more."""
        for socket in (*self._sockets, self._deaf):
            socket.close(linger=0)
        self._context.term()

    def _connect(self, address: str, most_unread: int = 1_000) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.set(zmq.RCVHWM, most_unread)
        socket.linger = 0
        socket.connect(address)
        return socket

    def _send(self, kind: str) -> None:
        rng, client = self._rng, self._rng.randrange(CLIENTS)
        socket = self._sockets[client]
        if kind == "request":
            fields = self._request(f"well-formed {self._number}")
            self._number += 1
            self._unanswered.add((client, fields["id"]))
            socket.send(_pack(fields))
        elif kind == "abort":
            owed = [name for owner, name in self._unanswered if owner == client]
            socket.send(_pack({"type": "abort", "id": rng.choice([*owed, "unheard of"])}))
        elif kind == "status":
            socket.send(_pack({"type": "status_request"}))
        elif kind == "ping":
            socket.send(_pack({"type": "ping"}))
        elif kind == "mutated":
            socket.send(self._mutated())
        elif kind == "random":
            socket.send(rng.randbytes(rng.choice([0, 1, 3, 20, 300, 5_000])))
        elif kind == "frames":
            socket.send_multipart([rng.randbytes(rng.randrange(4)) for _ in range(rng.randrange(2, 6))])
        else:
            asked = self._request(f"{self._number} " + 20_000 * "x")
            if rng.random() < 0.7:
                asked = {"type": "status_request"}
            self._number += 1
            self._deaf.send(_pack(asked))

    def _request(self, name: str) -> dict[str, Any]:
        rng = self._rng
        begin: dict[str, Any] = rng.choice(
            [
                {"token_ids": [rng.randrange(3, 1031) for _ in range(rng.randrange(1, 20))]},
                {"prompt": "some text 🙂"},
                {"messages": [{"role": "user", "content": "hello"}]},
                {"token_ids": []},  # well-formed, and refused
            ]
        )
        sampling: dict[str, Any] = {"max_tokens": rng.choice([1, 2, 3])}
        if rng.random() < 0.3:
            sampling |= {"temperature": 1.0, "n": 2, "logprobs": 2, "stop": ["e"]}
        return {"type": "submit", "id": name, **begin, "sampling": sampling}

    def _mutated(self) -> bytes:
        rng = self._rng
        data = bytearray(_pack(self._request("mutated")))
        for _ in range(rng.choice([1, 1, 2, 8])):
            place = rng.randrange(len(data))
            change = rng.randrange(5)
            if change == 0:
                data[place] ^= 1 << rng.randrange(8)
            elif change == 1:
                data[place] = rng.randrange(256)
            elif change == 2:
                del data[place : place + rng.randrange(1, 9)]
            elif change == 3:
                data[place:place] = rng.randbytes(rng.randrange(1, 9))
            else:
                data[place:place] = b"\x91" * rng.choice([1, 50, 3_000])
            if not data:
                break
        return bytes(data)

    def _receive(self, patience_ms: int) -> None:
        for socket, _ in self._poller.poll(patience_ms):
            client = self._sockets.index(socket)
            while socket.poll(0):
                for frame in socket.recv_multipart():
                    event = msgspec.msgpack.decode(frame)
                    self.received[event["type"]] += 1
                    if event["type"] in ("finished", "failed"):
                        self._unanswered.discard((client, event["id"]))


def _pack(fields: dict[str, Any]) -> bytes:
    return msgspec.msgpack.encode(fields)


def _fuzz(folder: Path, address: str, count: int) -> None:
    config = {**CONFIG, "max_model_len": 128, "kv_memory": 2**20}
    with serving(folder, address, **config):
        fuzz = _Fuzz(address, seed=0)
        fuzz.run(count // 10)
        before = resident_bytes()
        began = time.monotonic()
        fuzz.run(count - count // 10)
        seconds = time.monotonic() - began
        growth = resident_bytes() - before
        fuzz.close()
    print(f"\nsent {dict(fuzz.sent)}\nreceived {dict(fuzz.received)}")
    print(
        f"{count} messages; the last nine tenths in {seconds:.0f} s, {growth / 2**20:.1f} MiB more in memory after them"
    )
    assert growth <= GROWTH_LIMIT
    assert {"finished", "failed", "status", "pong"} <= set(fuzz.received)


def test_2000_messages_of_every_kind_leave_no_request_unanswered(tiny: Path, tmp_path: Path) -> None:
    _fuzz(tiny, f"ipc://{tmp_path}/engine", 2_000)


@pytest.mark.slow
def test_120000_messages_of_every_kind_leave_no_request_unanswered(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _fuzz(tiny, f"ipc://{tmp_path}/engine", 120_000)
    drops = caplog.text.count("is dropped: it leaves")
    print(f"the client that never reads was dropped {drops} times")
    assert drops
