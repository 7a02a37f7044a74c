"""The same requests as a server gets, in the process that asks: what AsyncLLM computes without a gateway.

    python benchmarks/lab/http_load/in_process.py MODEL RANKS DTYPE MAX_MODEL_LEN < requests.json

The requests are a list of rounds, each a list of [prompt, new tokens] that are all under way at once. Each line that it
prints is the JSON of a round's figures.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import uvloop
from phalanx.engine.client.async_llm import AsyncLLM
from phalanx.engine.protocol.messages import Finished
from phalanx.engine.protocol.sampling_params import SamplingParams

Round = list[tuple[str, int]]


async def run_round(engine: AsyncLLM, requests: Round) -> dict[str, float]:
    """Stream every request of a round at once."""

    async def one(prompt: str, new_tokens: int) -> int:
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
        async for event in engine.stream(prompt, sampling=sampling):
            if isinstance(event, Finished):
                return event.usage.completion_tokens
        return 0

    started = time.monotonic()
    tokens = sum(await asyncio.gather(*(one(prompt, new_tokens) for prompt, new_tokens in requests)))
    seconds = time.monotonic() - started
    return {"output_tokens": tokens, "seconds": round(seconds, 3), "output_tokens_per_s": round(tokens / seconds, 1)}


async def run_rounds(engine: AsyncLLM, rounds: list[Round]) -> None:
    """Run one after the other, and end the engine."""
    for requests in rounds:
        print(json.dumps(await run_round(engine, requests)), flush=True)
    await engine.close()


if __name__ == "__main__":
    model, ranks, dtype, max_model_len = sys.argv[1:]
    uvloop.run(
        run_rounds(
            AsyncLLM(model, ranks=int(ranks), dtype=dtype, max_model_len=int(max_model_len)), json.load(sys.stdin)
        )
    )
