"""How much longer steps take when a grammar limits half of their rows.

    python -m phalanx.benchmarks.parts.structured_steps model=models/smollm2-135m [rows=32] [ranks=1] [out=FILE]

The same prompts are answered with and without a schema on half of them, in turn, and no answer ends early. The last
line is JSON: the median milliseconds in which every row gets a token, with and without schemas, their ratio in the
median repeat, and the steps that the tokens took: more than `tokens` of them, if rows were left out because their masks
were late.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING
from phalanx import LLM, SamplingParams, StructuredOutput
from phalanx.benchmarks.lab.common import run

SCHEMA = {
    "type": "array",
    "minItems": 10_000,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"enum": ["a", "b", "c"]}},
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
}


@dataclass
class Options:
    """What the command line may say."""

    model: str = MISSING
    ranks: int = 1
    rows: int = 32
    tokens: int = 64
    repeats: int = 5
    out: str | None = None


def measure(llm: LLM, rows: int, constrained: int, tokens: int) -> tuple[float, int]:
    """Milliseconds for each token of `rows` sequences, the first `constrained` of which follow the schema; steps."""
    form = StructuredOutput(json_schema=json.dumps(SCHEMA))
    prompts = [f"Number {row}: a list of people as JSON:" for row in range(rows)]
    sampling = SamplingParams(temperature=1.0, seed=1, max_tokens=tokens, min_tokens=tokens, ignore_eos=True)
    first = llm.status().steps
    started = time.perf_counter()
    llm.generate(prompts, sampling, [form if row < constrained else None for row in range(rows)])
    return 1000 * (time.perf_counter() - started) / tokens, llm.status().steps - first


def benchmark(options: Options) -> dict[str, Any]:
    """Measure in turn."""
    config: dict[str, Any] = {"max_num_seqs": options.rows, "max_model_len": 512, "kv_memory": 2**30}
    half = options.rows // 2
    found: dict[int, list[tuple[float, int]]] = {0: [], half: []}
    with LLM(options.model, ranks=options.ranks, **config) as llm:
        for constrained in found:
            measure(llm, options.rows, constrained, options.tokens)
        for _ in range(options.repeats):
            for constrained, values in found.items():
                values.append(measure(llm, options.rows, constrained, options.tokens))

    plain, masked = ([ms for ms, _ in values] for values in found.values())
    return {
        "benchmark": "structured_steps",
        "rows": options.rows,
        "constrained": half,
        "ranks": options.ranks,
        "step_ms": round(statistics.median(plain), 3),
        "constrained_step_ms": round(statistics.median(masked), 3),
        "ratio": round(statistics.median(b / a for a, b in zip(plain, masked, strict=True)), 4),
        "ratios": [round(b / a, 4) for a, b in zip(plain, masked, strict=True)],
        "steps": statistics.median_low([steps for _, steps in found[0]]),
        "constrained_steps": statistics.median_low([steps for _, steps in found[half]]),
    }


if __name__ == "__main__":
    run(Options, benchmark)
