"""A headless Chromium, driven over the WebDriver protocol by Debian's chromedriver."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from typing import Any

import httpx

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
"""What this machine lacks to run it."""
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,900")
TIMEOUT_S = 30.0


class Browser:
    """One window with one tab."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
        self._session = ""
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        wanted = {"goog:loggingPrefs": {"browser": "ALL"}, "goog:chromeOptions": {"args": list(OPTIONS)}}
        deadline = time.monotonic() + TIMEOUT_S
        while not self._session:
            try:
                made = self._post("/session", {"capabilities": {"alwaysMatch": wanted}})
                self._session = f"/session/{made['sessionId']}"
            except httpx.TransportError:
                assert time.monotonic() < deadline, "chromedriver does not answer"
                threading.Event().wait(0.05)

    def go(self, url: str) -> None:
        """Open a page, and wait until it is loaded."""
        self._post(f"{self._session}/url", {"url": url})

    def run(self, script: str, *arguments: object) -> Any:
        """What the body of a function returns in the page."""
        return self._post(f"{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, element: str) -> str:
        """The text that is shown of the element with this id."""
        return str(self.run("return document.getElementById(arguments[0]).innerText", element))

    def click(self, element: str) -> None:
        """Click the element with this id."""
        self.run("document.getElementById(arguments[0]).click()", element)

    def until(self, script: str, *arguments: object) -> Any:
        """What a script returns, once that is true."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (found := self.run(script, *arguments)):
            assert time.monotonic() < deadline, f"{script} did not become true"
            threading.Event().wait(0.05)
        return found

    def messages(self) -> list[str]:
        """What the page has written to the console since the last call: errors, refusals of its policy."""
        entries = self._post(f"{self._session}/se/log", {"type": "browser"})
        return [str(entry["message"]) for entry in entries]

    def close(self) -> None:
        """End it."""
        try:
            if self._session:
                self._http.delete(self._session)
        finally:
            self._http.close()
            self._driver.terminate()
            self._driver.wait(TIMEOUT_S)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self._http.post(path, json=body).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer
