"""phalanx: run_phalanx.py MODEL [FIELD=VALUE of EngineConfig ...] [CASE ...]; see program.py."""

from __future__ import annotations

import queue
import time
from typing import Any

import yaml
from phalanx import LLM, SamplingParams, __version__
from phalanx.benchmarks.lab.peers.programs.program import Case, Engine, Seen, main, note
from phalanx.engine.client.client import to_error
from phalanx.engine.protocol.messages import Delta, Event, Failed, Finished, Submit


class Phalanx:
    """An LLM, and a client of it that sends requests when they are due."""

    version = f"phalanx {__version__}"

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._cases = 0

    def run(self, case: Case) -> list[Seen]:
        """As Engine's."""
        self._cases += 1
        started = time.monotonic()
        sampling = SamplingParams(max_tokens=case.new_tokens, temperature=0.0, ignore_eos=True)
        everything: list[Seen] = []
        ends: queue.SimpleQueue[Finished | Failed] = queue.SimpleQueue()
        for number, (due, prompt) in enumerate(zip(case.due_s, case.prompts, strict=True)):
            time.sleep(max(0.0, started + due - time.monotonic()))
            seen = Seen()
            everything.append(seen)

            def on_event(event: Event, seen: Seen = seen) -> None:
                if isinstance(event, Delta):
                    note(seen, event.token_ids, time.monotonic() - started)
                elif isinstance(event, Finished | Failed):
                    ends.put(event)

            self._llm.submit(
                Submit(id=f"{self._cases}:{number}", token_ids=prompt, sampling=sampling), on_event, quick=True
            )
        for _ in everything:
            end = ends.get()
            if isinstance(end, Failed):
                raise to_error(end)
        return everything


def make(model: str, options: dict[str, str]) -> Engine:
    """An LLM with the given fields; prefix caching is off, as the peers' is, unless it is asked for."""
    fields: dict[str, Any] = {
        "prefix_cache": False,
        "max_num_batched_tokens": 1024,
        "max_model_len": 2048,
        "tokenizer": "none",
    }
    return Phalanx(LLM(model, **fields | {name: yaml.safe_load(value) for name, value in options.items()}))


if __name__ == "__main__":
    main(make)
