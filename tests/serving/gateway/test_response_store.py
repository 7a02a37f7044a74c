"""Responses that are kept: for their own caller, up to bounds, for a while."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from phalanx.serving.gateway.config import GatewayConfig
from phalanx.serving.gateway.generation.response_store import ResponseStore, StoredResponse
from phalanx.serving.gateway.routes.responses_api import handlers


def record(item_id: str = "msg_1", size: int = 0) -> StoredResponse:
    body = {"output": [{"id": item_id, "text": "x" * size}]}
    return StoredResponse(json.dumps(body).encode(), b"[]", item_ids=[item_id])


def test_what_was_used_longest_ago_makes_room() -> None:
    store = ResponseStore(GatewayConfig(stored_responses=2))
    for name in ("a", "b"):
        store.put("", name, record(name))
    assert store.get("", "a") is not None
    store.put("", "c", record("c"))
    assert [store.holds("", name) for name in ("a", "b", "c")] == [True, False, True]
    assert store.find_item("", "b") is None
    assert (store.find_item("", "c") or {})["id"] == "c"


def test_bytes_are_bounded_and_counted() -> None:
    store = ResponseStore(GatewayConfig(stored_response_bytes=10_000))
    for number in range(20):
        assert store.put("", str(number), record(f"m{number}", size=1000))
        assert store.bytes <= 10_000
    assert 4 < len(store) < 10
    assert not store.put("", "long", record(size=20_000))
    assert store.get("", "long") is None
    for number in range(20):
        store.delete("", str(number))
    assert (store.bytes, len(store)) == (0, 0)


def test_a_response_is_forgotten_a_while_after_its_last_use() -> None:
    now = 0.0
    store = ResponseStore(GatewayConfig(stored_response_s=10), lambda: now)
    store.put("", "a", record())
    now = 9.0
    assert store.get("", "a") is not None
    now = 18.0
    assert store.get("", "a") is not None
    now = 28.0
    assert store.get("", "a") is None
    assert store.bytes == 0


def test_callers_share_nothing() -> None:
    store = ResponseStore(GatewayConfig())
    store.put("ann", "a", record())
    assert store.get("bob", "a") is None
    assert store.find_item("bob", "msg_1") is None
    assert not store.delete("bob", "a")
    assert store.find_item("ann", "msg_1") is not None


def test_a_response_that_loses_its_place_is_computed_no_longer() -> None:
    async def main() -> bool:
        store = ResponseStore(GatewayConfig(stored_responses=1))
        task = asyncio.create_task(asyncio.sleep(60))
        store.put("", "a", StoredResponse(b"{}", b"[]", task))  # type: ignore[arg-type]
        store.put("", "b", record())
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(main())


def test_a_store_of_no_responses_keeps_none() -> None:
    store = ResponseStore(GatewayConfig(stored_responses=0))
    assert not store.keeps
    assert not store.put("", "a", record())


@pytest.mark.parametrize("route", [handlers.cancel, handlers.delete])
def test_a_response_that_is_just_being_taken_up_again_is_stopped_once_it_has_its_task(route: Any) -> None:
    """As after a restart: the journal's request is open, and what computes it begins a moment later."""
    store = ResponseStore(GatewayConfig())
    body = {"id": "resp_a", "background": True, "status": "queued", "output": []}
    store.put("ann", "resp_a", StoredResponse(json.dumps(body).encode(), b"[]"))
    answers: list[bytes] = []

    async def compute() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if store.holds("ann", "resp_a"):
                store.put("ann", "resp_a", StoredResponse(json.dumps({**body, "status": "cancelled"}).encode(), b"[]"))
            raise

    async def give_up(request_id: str) -> bool:
        return request_id not in requests.open

    async def respond(answer: bytes) -> None:
        answers.append(answer)

    async def respond_json(answer: Any) -> None:
        answers.append(msgspec.json.encode(answer))

    async def main() -> asyncio.Task[None]:
        stopping = asyncio.create_task(route(gateway, exchange))
        await asyncio.sleep(0.05)
        assert not stopping.done()
        task = asyncio.create_task(compute())
        await asyncio.sleep(0)
        store.put("ann", "resp_a", StoredResponse(json.dumps(body).encode(), b"[]", task))
        await stopping
        return task

    requests = SimpleNamespace(open={"a": SimpleNamespace(left=asyncio.Event())}, give_up=give_up)
    gateway = SimpleNamespace(responses=store, journaling=SimpleNamespace(requests=requests))
    scope = {"path_params": {"response_id": "resp_a"}}
    exchange = SimpleNamespace(owner="ann", scope=scope, respond=respond, respond_json=respond_json)
    task = asyncio.run(main())
    assert task.cancelled()
    if route is handlers.cancel:
        assert json.loads(answers[0])["status"] == "cancelled"
    else:
        assert json.loads(answers[0])["deleted"]
        assert not store.holds("ann", "resp_a")
