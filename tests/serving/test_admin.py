"""The administrator's routes: what engines there are, and draining one."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import httpx
from phalanx.serving.gateway.admin import admin_routes
from phalanx.tests.serving.fake_engine import FakeEngine, address
from phalanx.tests.serving.test_pool import open_pool
from starlette.applications import Starlette


def test_engines_are_listed_drained_and_resumed(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_pool(address(tmp_path)) as pool:
            transport = httpx.ASGITransport(app=Starlette(routes=admin_routes(pool)))
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                listed = (await client.get("/admin/engines")).json()
                described = {
                    "engine": "0", "name": address(tmp_path), "state": "ready", "trouble": None, "open_requests": 0
                }  # fmt: skip
                assert listed == {"state": "ready", "engines": [described]}

                drained = await client.post("/admin/drain", json={"engine": 0})
                assert (drained.status_code, drained.json()["state"]) == (200, "draining")
                assert not pool.ready()
                resumed = await client.post("/admin/resume", json={"engine": address(tmp_path)})
                assert (resumed.status_code, resumed.json()["state"]) == (200, "ready")
                assert pool.ready()

                unknown = await client.post("/admin/drain", json={"engine": "7"})
                assert (unknown.status_code, unknown.json()["error"]["param"]) == (404, "engine")
                for body in (b"", b"[]", b'{"engine": null}', b'{"other": 1}', b"\xff", b"[" * 4000):
                    assert (await client.post("/admin/drain", content=body)).status_code == 400, body
                assert (await client.post("/admin/drain", content=b" " * 5000)).status_code == 413

    with contextlib.closing(FakeEngine(address(tmp_path))):
        asyncio.run(main())
