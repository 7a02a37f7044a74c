"""The same kill and the same stop of a worker in phalanx and in vLLM's server for CPUs, amid four streams."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from phalanx.engine.errors import EngineStopped

STREAMS = 4
TOKENS = 160
WATCHED_S = 60.0
"""Seconds after the fault, or after the last text of any stream, for which streams that have not ended are watched."""
AFTER_END_S = 15.0
"""Seconds for which a server is watched after its streams have ended."""
START_S = 700.0
LOOK_S = 0.1
PROMPT = "Once upon a time, in a village by the sea,"
FAULTS = (signal.SIGSTOP, signal.SIGKILL)


@dataclass(frozen=True)
class Contender:
    """A server that can be started and disturbed."""

    name: str
    command: list[str]
    environment: dict[str, str]
    is_worker: Callable[[str], bool]
    """Whether a process of this name and command line computes a part of the model."""


def contenders(model: Path, vllm: Path, port: int, step_timeout_s: float) -> list[Contender]:
    """Both servers at `port`, each with two workers of one core each and the same model in bfloat16."""
    ours = ["model=" + str(model), "ranks=2", "dtype=bfloat16", "max_model_len=2048", "served_model_names=[m]"]
    ours += [f"port={port}", f"step_timeout_s={step_timeout_s}", "log_level=error"]
    theirs = ["--model", str(model), "--served-model-name", "m", "--tensor-parallel-size", "2", "--port", str(port)]
    theirs += ["--distributed-executor-backend", "mp", "--no-enable-prefix-caching", "--dtype", "bfloat16"]
    theirs += ["--max-model-len", "2048", "--max-num-seqs", "8"]
    binding = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_KVCACHE_SPACE": "2"}
    python = str(vllm / "bin" / "python")
    return [
        Contender(
            "phalanx", [sys.executable, "-m", "phalanx.launch.serve", *ours], {}, lambda text: "ranks.rank" in text
        ),
        Contender(
            "vllm",
            [python, "-m", "vllm.entrypoints.openai.api_server", *theirs],
            {"HF_HUB_OFFLINE": "1", **binding},
            lambda text: "Worker" in text,
        ),
    ]


def disturb_both(model: Path, vllm: Path, step_timeout_s: float) -> dict[str, Any]:
    """Each fault in each server, one server after the other: what ends with a fault is started again for the next."""
    found: dict[str, Any] = {f"{number.name} of a worker": {} for number in FAULTS}
    for contender in contenders(model, vllm, _free_port(), step_timeout_s):
        faults = list(FAULTS)
        while faults:
            faults = _disturb(contender, faults, found)
    ours = [each["phalanx"]["streams"] for each in found.values()]
    return {"faults": found, "well": all(streams == {"finished": STREAMS} for streams in ours)}


def _disturb(contender: Contender, faults: list[signal.Signals], found: dict[str, Any]) -> list[signal.Signals]:
    """Start a server and disturb it, as long as it answers afterwards. Returns the faults that are left."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, open(os.path.join(folder, "log"), "w+") as log:
        began = time.monotonic()
        process = psutil.Popen(
            contender.command,
            stdout=log,
            stderr=log,
            env={**os.environ, **contender.environment},
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{_port(contender)}"
            _wait_until_ready(process, url)
            ready_s = round(time.monotonic() - began, 1)
            answers = True
            while faults and answers:
                number, *faults = faults
                figures = {"ready_s": ready_s, **_Trial(contender, process, url).run(number)}
                print(f"{number.name} in {contender.name}: {json.dumps(figures)}", file=sys.stderr, flush=True)
                found[f"{number.name} of a worker"][contender.name] = figures
                answers = bool(figures["answers_afterwards"])
            return faults
        except (EngineStopped, httpx.HTTPError) as error:
            log.seek(0)
            raise EngineStopped(f"{contender.name}: {error}; it said: {log.read()[-2000:]}") from error
        finally:
            _end(process)


def _port(contender: Contender) -> str:
    command = contender.command
    if "--port" in command:
        return command[command.index("--port") + 1]
    return next(each for each in command if each.startswith("port=")).partition("=")[2]


@dataclass
class _Stream:
    lines: int = 0
    last_at: float = 0.0
    silent_s: float = 0.0
    """Longest time between two lines."""
    ended: str = ""
    """finished, failed, or nothing yet."""
    ended_at: float = 0.0
    why: str = ""


class _Trial:
    """Four streams, one fault, and what comes of it."""

    def __init__(self, contender: Contender, process: psutil.Popen, url: str) -> None:
        self._contender, self._process, self._url = contender, process, url
        self._streams = [_Stream() for _ in range(STREAMS)]
        # Letters, so that every token of a model of random weights has a text, too.
        letters = {"model": "m", "prompt": "a b c d e f g h i j k l", "add_special_tokens": False}
        answer = httpx.post(f"{url}/tokenize", json=letters, timeout=START_S)
        answer.raise_for_status()
        self._letters = sorted(set(answer.json()["tokens"]))

    def run(self, number: signal.Signals) -> dict[str, Any]:
        """Return what was seen, in seconds since the fault."""
        threads = [threading.Thread(target=self._follow, args=(stream,), daemon=True) for stream in self._streams]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + START_S
        while any(stream.lines < 10 for stream in self._streams):
            if time.monotonic() > deadline:
                raise EngineStopped("the streams did not begin")
            time.sleep(LOOK_S)

        workers = self._workers()
        if len(workers) != 2:
            raise EngineStopped(f"{len(workers)} workers were found instead of 2")
        at = time.monotonic()
        workers[-1].send_signal(number)
        health, exited_s = self._watch(at)

        ends = [stream.ended or "hung" for stream in self._streams]
        silence_s = max(self._silence(stream) for stream in self._streams)
        with contextlib.suppress(psutil.NoSuchProcess):
            workers[-1].send_signal(signal.SIGCONT)  # all is noted: the server may serve the next trial
        times = [stream.ended_at - at for stream in self._streams if stream.ended]
        return {
            "streams": {end: ends.count(end) for end in dict.fromkeys(ends)},
            "streams_ended_s": {"first": round(min(times), 1), "last": round(max(times), 1)} if times else None,
            "longest_silence_s": round(silence_s, 1),
            "errors": sorted({stream.why for stream in self._streams if stream.why}),
            "health": health,
            "server_exited_s": exited_s,
            "answers_afterwards": self._answers(),
        }

    def _watch(self, at: float) -> tuple[list[str], float | None]:
        """What /health said, whenever that changed, and when the server exited."""
        said: list[str] = []
        exited_s: float | None = None
        ended_at = 0.0
        while (now := time.monotonic()) - max(at, *(stream.last_at for stream in self._streams)) < WATCHED_S:
            status = "no answer"
            with contextlib.suppress(httpx.HTTPError):
                status = str(httpx.get(f"{self._url}/health", timeout=2.0).status_code)
            if not said or not said[-1].endswith(status):
                said.append(f"{now - at:.1f} s: {status}")
            if exited_s is None and self._process.poll() is not None:
                exited_s = round(now - at, 1)
            if all(stream.ended for stream in self._streams):
                ended_at = ended_at or now
                if now - ended_at > AFTER_END_S:
                    break
            time.sleep(LOOK_S)
        return said, exited_s

    def _silence(self, stream: _Stream) -> float:
        return stream.silent_s if stream.ended else max(stream.silent_s, time.monotonic() - stream.last_at)

    def _answers(self) -> bool:
        """Whether a new request is answered."""
        body = {"model": "m", "prompt": PROMPT, "max_tokens": 4}
        with contextlib.suppress(httpx.HTTPError):
            return httpx.post(f"{self._url}/v1/completions", json=body, timeout=30.0).status_code == 200
        return False

    def _workers(self) -> list[psutil.Process]:
        found = []
        for child in self._process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if self._contender.is_worker(f"{child.name()} {' '.join(child.cmdline())}"):
                    found.append(child)
        return sorted(found, key=lambda process: process.pid)

    def _follow(self, stream: _Stream) -> None:
        body = {"model": "m", "prompt": PROMPT, "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
        body |= {"temperature": 0, "allowed_token_ids": self._letters}
        url = f"{self._url}/v1/completions"
        stream.last_at = time.monotonic()
        try:
            with httpx.stream("POST", url, json=body, timeout=None) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: "):
                        self._note(stream, line)
            if not stream.ended:
                raise EngineStopped("the stream ended without [DONE]")
        except (httpx.HTTPError, EngineStopped) as error:
            stream.ended, stream.why = "failed", stream.why or str(error)[:200]
            stream.ended_at = time.monotonic()

    def _note(self, stream: _Stream, line: str) -> None:
        now = time.monotonic()
        stream.silent_s = max(stream.silent_s, now - stream.last_at)
        stream.last_at, stream.lines = now, stream.lines + 1
        if line == "data: [DONE]" and not stream.ended:
            stream.ended, stream.ended_at = "finished", now
        elif line.startswith('data: {"error"'):
            stream.ended, stream.why, stream.ended_at = "failed", line[6:206], now


def _wait_until_ready(process: psutil.Popen, url: str) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise EngineStopped(f"the server ended with exit code {process.returncode}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/v1/models", timeout=5.0).status_code == 200:
                body = {"model": "m", "prompt": PROMPT, "max_tokens": 4}
                if httpx.post(f"{url}/v1/completions", json=body, timeout=START_S).status_code == 200:
                    return
        time.sleep(0.5)
    raise EngineStopped(f"the server was not ready within {START_S:g} s")


def _end(process: psutil.Popen) -> None:
    """End a server with all that it started, stopped or not."""
    with contextlib.suppress(psutil.Error):
        everyone = process.children(recursive=True)
        for each in everyone:
            with contextlib.suppress(psutil.Error):
                each.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        gone = psutil.wait_procs([process, *everyone], timeout=15.0)[1]
        for each in gone:
            with contextlib.suppress(psutil.Error):
                each.kill()
    with contextlib.suppress(subprocess.TimeoutExpired, psutil.Error):
        process.wait(15.0)


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])
