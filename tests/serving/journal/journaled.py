"""A gateway with a journal in this process, in front of a scripted pool, and what is sent to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from phalanx.serving.gateway.auth import Auth, AuthConfig
from phalanx.serving.gateway.config import GatewayConfig
from phalanx.tests.serving.gateway.conftest import Server
from starlette.middleware import Middleware

COMPLETIONS = "/v1/completions"
FORM = "multipart/form-data; boundary=x"


class Journaled(Server):
    """A server whose recovery runs too, so that batches are computed."""

    def __init__(self, folder: Path, *, keys: bool = False, **settings: Any) -> None:
        """With `keys` the folder's file "keys" has those that are let in."""
        auth = AuthConfig(api_keys_file=f"{folder}/keys") if keys else AuthConfig()
        super().__init__(
            GatewayConfig(journal=f"{folder}/journal", **settings), middleware=[Middleware(Auth, config=auth)]
        )
        self.gateway = self.app.state.gateway
        self.loop: asyncio.AbstractEventLoop = self._server.servers[0].get_loop()
        self.loop.call_soon_threadsafe(self.gateway.start)

    @property
    def kept_bytes(self) -> int:
        """Bytes that the journal holds."""
        return int(self.gateway.journaling.journal.size.bytes)

    @property
    def held_bytes(self) -> int:
        """Bytes of bodies that the gateway holds."""
        return int(self.gateway.bodies.held)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.gateway.stop)
        super().close()
        self.gateway.close()


@contextlib.contextmanager
def journaled(folder: Path, *, keys: bool = False, **settings: Any) -> Iterator[Journaled]:
    """A server of a test's own."""
    folder.chmod(0o700)
    server = Journaled(folder, keys=keys, **settings)
    try:
        yield server
    finally:
        server.close()


def line(number: object = 0, **changes: Any) -> dict[str, Any]:
    """A right line of a batch's file, but for `changes`."""
    body = {"prompt": "Hi", "max_tokens": 4}
    return {"custom_id": f"line {number}", "method": "POST", "url": COMPLETIONS, "body": body, **changes}


def batch_now(http: httpx.Client, batch_id: str) -> Any:
    """A batch as it is now."""
    return http.get(f"/v1/batches/{batch_id}").json()


def jsonl(*lines: dict[str, Any]) -> bytes:
    return "".join(f"{json.dumps(each)}\n" for each in lines).encode()


def upload(http: httpx.Client, content: bytes) -> Any:
    """The file, once it is kept."""
    answer = http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", content)})
    assert answer.status_code == 200, answer.text
    return answer.json()


def create(http: httpx.Client, content: bytes, endpoint: str = COMPLETIONS) -> Any:
    """A batch of a file with this content."""
    body = {"input_file_id": upload(http, content)["id"], "endpoint": endpoint, "completion_window": "24h"}
    answer = http.post("/v1/batches", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def part(head: bytes, content: bytes = b"batch") -> bytes:
    """A part of a form."""
    return b"--x\r\n" + head + b"\r\n\r\n" + content + b"\r\n"


def named(name: bytes, content: bytes = b"batch", filename: bytes | None = None) -> bytes:
    """A part of a form with a name."""
    more = b"" if filename is None else b'; filename="' + filename + b'"'
    return part(b'Content-Disposition: form-data; name="' + name + b'"' + more, content)
