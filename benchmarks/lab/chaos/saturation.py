"""Saturates a group with long prefills for as long as is wanted: nothing of it may be taken for a hang."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from .server import Server, percentile

PROMPT_TOKENS, NEW_TOKENS = 4096, 4
VOCABULARY = 40_000
"""Token ids of prompts are below this."""
LOOK_S = 0.25


def saturate(model: Path, ranks: int, seconds: float, clients: int, step_timeout_s: float, seed: int) -> dict[str, Any]:
    """Keep `clients` prefills of 4,096 tokens waiting, each in one step, while the server is watched."""
    limits = (f"max_model_len={PROMPT_TOKENS + 512}", f"max_num_batched_tokens={PROMPT_TOKENS}", "max_num_seqs=8")
    server = Server(model, ranks, f"step_timeout_s={step_timeout_s}", "prefix_cache=false", *limits)
    until = time.monotonic() + seconds
    verdicts: Counter[str] = Counter()
    took: list[float] = []
    asked: list[int] = []
    lock = threading.Lock()

    def ask_on(number: int) -> None:
        random_ids = random.Random(f"{seed}/{number}")
        # However slow the machine is, one of them asks again while the others wait.
        while time.monotonic() < until or len(asked) <= clients:
            asked.append(number)
            prompt = [random_ids.randrange(100, VOCABULARY) for _ in range(PROMPT_TOKENS)]
            body = {"model": "m", "prompt": prompt, "max_tokens": NEW_TOKENS, "ignore_eos": True, "temperature": 0}
            began = time.monotonic()
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=None)
            with lock:
                verdicts[str(answer.status_code)] += 1
                took.append(time.monotonic() - began)

    left: list[str] = []
    not_ready: Counter[str] = Counter()
    phases: Counter[str] = Counter()
    try:
        threads = [threading.Thread(target=ask_on, args=(number,), daemon=True) for number in range(clients)]
        for thread in threads:
            thread.start()
        looks = 0
        while any(thread.is_alive() for thread in threads):
            looks += 1
            ready, reason = server.readiness()
            if not ready:
                not_ready[reason] += 1
            phases[server.state.phase] += 1
            time.sleep(LOOK_S)
        state = server.state
    finally:
        left = server.stop()

    alarms = server.log.count("nothing has moved") + state.restarts + phases["stalled"] + phases["restarting"]
    well = not alarms and not not_ready and set(verdicts) == {"200"} and not left
    if well:
        server.remove()
    else:
        print(f"what the server said is in {server.folder}", file=sys.stderr)
    return {
        "prompts": sum(verdicts.values()),
        "statuses": dict(verdicts),
        "prompt_tokens": PROMPT_TOKENS * sum(verdicts.values()),
        "seconds_of_a_request": {"median": percentile(took, 0.5), "most": round(max(took), 1) if took else None},
        "looks": looks,
        "not_ready": dict(not_ready),
        "false_alarms": alarms,
        "left_behind": left,
        "well": well,
    }
