"""One group across two hosts, which are network namespaces: their link is cut and mended."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from phalanx import LLM, SamplingParams

WAIT_S = 180
RANKS_TIMEOUT_S = 6
NEW_TOKENS = 96
MESSAGES = [{"role": "user", "content": "Tell me a long story about a small boat."}]
ADDRESSES = {"a": "10.77.13.1", "b": "10.77.13.2"}
ENDPOINT = f"tcp://{ADDRESSES['a']}:5555"

CLIENT = """
import json, sys
from phalanx import LLM, SamplingParams
llm = LLM.connect({endpoint!r}, secret_file={secret!r}, timeout_s={wait}, restart_wait_s={wait})
sampling = SamplingParams(max_tokens={tokens}, temperature=0, ignore_eos=True)
for event in llm.stream(messages={messages!r}, sampling=sampling):
    print(json.dumps([getattr(event, "text", None), getattr(event, "token_ids", None)]), flush=True)
llm.close()
"""


def _ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode == 0


def _may_make_hosts() -> bool:
    name = f"phalanx-{secrets.token_hex(4)}"
    if os.geteuid() != 0 or shutil.which("ip") is None or not _ip("netns", "add", name):
        return False
    return _ip("netns", "delete", name)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _may_make_hosts(), reason="this user may make no network namespaces"),
]


class Hosts:
    """Two namespaces with a link between them, and torchrun's agent of one rank on each."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._folder = folder
        self._model = model
        self._name = f"phalanx-{secrets.token_hex(3)}"
        self._agents: dict[str, subprocess.Popen[bytes]] = {}
        self.secret = folder / "secret"
        self.secret.write_text(secrets.token_hex(32))
        self.secret.chmod(0o600)

        for host in ADDRESSES:
            assert _ip("netns", "add", self._namespace(host))
        link = [f"{self._name[-6:]}{host}" for host in ADDRESSES]
        assert _ip("link", "add", link[0], "type", "veth", "peer", "name", link[1])
        for host, device in zip(ADDRESSES, link, strict=True):
            assert _ip("link", "set", device, "netns", self._namespace(host), "name", "link0")
            assert self._within(host, "addr", "add", f"{ADDRESSES[host]}/24", "dev", "link0")
            assert self._within(host, "link", "set", "lo", "up")
            assert self._within(host, "link", "set", "link0", "up")

    def start(self, host: str) -> None:
        """Start a host's agent."""
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
            "--max-restarts", "20", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES['a']}:29400",
            "--rdzv-id", "two", "--rdzv-conf", f"is_host={str(host == 'a').lower()}", "--local-addr", ADDRESSES[host],
            "-m", "phalanx.launch.worker", f"model={self._model}", "dtype=float32", "ranks=2",
            f"timeout_s={RANKS_TIMEOUT_S}",
            # Both have the same memory, which two hosts have not.
            "collectives=gloo", f"endpoint={ENDPOINT}", f"secret_file={self.secret}",
        ]  # fmt: skip
        environment = {
            **os.environ,
            "GLOO_SOCKET_IFNAME": "link0",
            "OMP_NUM_THREADS": "1",
            # An agent that stays tells a new one where the ranks meet only if they meet anew in each round.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        with (self._folder / f"{host}.log").open("ab") as log:
            self._agents[host] = subprocess.Popen(
                self._command(host, command), env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def client(self) -> subprocess.Popen[str]:
        """Start a client on the first host, which prints what it gets, a line for each event."""
        program = CLIENT.format(
            endpoint=ENDPOINT, secret=str(self.secret), wait=WAIT_S, tokens=NEW_TOKENS, messages=MESSAGES
        )
        command = self._command("a", [sys.executable, "-c", program])
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def cut(self) -> None:
        """Take the link down: nothing that is sent arrives, and nobody is told."""
        assert self._within("b", "link", "set", "link0", "down")

    def mend(self) -> None:
        """Take the link up again."""
        assert self._within("b", "link", "set", "link0", "up")

    def vanish(self, host: str) -> None:
        """End all that runs on a host while its link is down: nobody hears of it."""
        self.cut()
        for pid in subprocess.run(
            ["ip", "netns", "pids", self._namespace(host)], capture_output=True, text=True, check=True
        ).stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        self._agents[host].wait(WAIT_S)

    def close(self) -> None:
        """End everything."""
        for host in ADDRESSES:
            command = ["ip", "netns", "pids", self._namespace(host)]
            for pid in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split():
                with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                    os.kill(int(pid), signal.SIGKILL)
        for agent in self._agents.values():
            agent.wait(WAIT_S)
        for host in ADDRESSES:
            _ip("netns", "delete", self._namespace(host))

    def logs(self) -> str:
        """The ends of what both hosts have written."""
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self._folder.glob("*.log")))

    def _namespace(self, host: str) -> str:
        return f"{self._name}-{host}"

    def _within(self, host: str, *arguments: str) -> bool:
        return _ip("-n", self._namespace(host), *arguments)

    def _command(self, host: str, command: list[str]) -> list[str]:
        return ["ip", "netns", "exec", self._namespace(host), *command]


@pytest.fixture
def hosts(tmp_path: Path, smollm2: Path) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path, smollm2)
    try:
        for host in ADDRESSES:
            hosts.start(host)
        yield hosts
    finally:
        hosts.close()


@pytest.fixture(scope="module")
def expected(smollm2: Path) -> list[int]:
    """The token ids of an engine on one host."""
    with LLM(smollm2, dtype="float32") as llm:
        sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
        return llm.chat(MESSAGES, sampling).outputs[0].token_ids


class Reader:
    """What a client has got so far."""

    def __init__(self, client: subprocess.Popen[str]) -> None:
        self._client = client
        self.token_ids: list[int] = []

    def read(self, tokens: int) -> None:
        """Read until there are so many tokens, or until the end."""
        assert self._client.stdout is not None
        while len(self.token_ids) < tokens:
            line = self._client.stdout.readline()
            if not line:
                break
            values: Any = json.loads(line)
            self.token_ids += values[1] or []

    def end(self) -> int:
        """Read all. Returns the client's exit code."""
        self.read(NEW_TOKENS)
        return self._client.wait(WAIT_S)


def test_an_answer_outlives_a_cut_of_the_link(hosts: Hosts, expected: list[int]) -> None:
    undisturbed = Reader(hosts.client())
    assert undisturbed.end() == 0, hosts.logs()
    assert undisturbed.token_ids == expected

    # Both ranks notice within timeout_s, and come together again when the link is back.
    reader = Reader(hosts.client())
    reader.read(8)
    hosts.cut()
    time.sleep(2 * RANKS_TIMEOUT_S)
    assert "as when another rank has gone or is stuck" in hosts.logs()
    hosts.mend()
    assert reader.end() == 0, hosts.logs()
    assert reader.token_ids == expected


def test_an_answer_outlives_a_host_that_vanishes(hosts: Hosts, expected: list[int]) -> None:
    reader = Reader(hosts.client())
    reader.read(8)
    hosts.vanish("b")
    time.sleep(2 * RANKS_TIMEOUT_S)
    assert "as when another rank has gone or is stuck" in hosts.logs()
    # Another host takes its place, or the same one after its start.
    hosts.mend()
    hosts.start("b")
    assert reader.end() == 0, hosts.logs()
    assert reader.token_ids == expected
