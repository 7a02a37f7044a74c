"""How much longer a step takes when a grammar limits half of its rows.

    python -m phalanx.benchmarks.parts.structured_steps --model models/smollm2-135m [--rows 32] [--ranks 1]

The same prompts are answered with and without a schema on half of them, in turn, and no answer ends early. The last
line is JSON: the median milliseconds of a step of each kind, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from phalanx import LLM, SamplingParams, StructuredOutput

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


def step_ms(llm: LLM, rows: int, constrained: int, tokens: int) -> float:
    """Milliseconds of a step of `rows` sequences, the first `constrained` of which follow the schema."""
    form = StructuredOutput(json_schema=json.dumps(SCHEMA))
    prompts = [f"Number {row}: a list of people as JSON:" for row in range(rows)]
    sampling = SamplingParams(temperature=1.0, seed=1, max_tokens=tokens, min_tokens=tokens, ignore_eos=True)
    first = llm.status().steps
    started = time.perf_counter()
    llm.generate(prompts, sampling, [form if row < constrained else None for row in range(rows)])
    return 1000 * (time.perf_counter() - started) / (llm.status().steps - first)


def main() -> None:
    """Measure in turn, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    config: dict[str, Any] = {"max_num_seqs": arguments.rows, "max_model_len": 512, "kv_memory": 2**30}
    times: dict[int, list[float]] = {0: [], arguments.rows // 2: []}
    with LLM(arguments.model, ranks=arguments.ranks, **config) as llm:
        for constrained in times:
            step_ms(llm, arguments.rows, constrained, arguments.tokens)
        for _ in range(arguments.repeats):
            for constrained, found in times.items():
                found.append(step_ms(llm, arguments.rows, constrained, arguments.tokens))

    plain, masked = (statistics.median(found) for found in times.values())
    print(
        json.dumps(
            {
                "benchmark": "structured_steps",
                "rows": arguments.rows,
                "constrained": arguments.rows // 2,
                "ranks": arguments.ranks,
                "step_ms": round(plain, 3),
                "constrained_step_ms": round(masked, 3),
                "ratio": round(masked / plain, 4),
            }
        )
    )


if __name__ == "__main__":
    main()
