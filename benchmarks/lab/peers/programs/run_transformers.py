"""transformers' `generate` with torch's own attention: run_transformers.py MODEL [threads=] [dtype=] [CASE ...]

See program.py.

All prompts are one static batch of equal lengths: it knows no later arrivals.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from program import Case, Engine, Seen, cores, main
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing; notes when each token of the batch was known."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.moments.append(time.monotonic())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Transformers:
    """The model, in a dtype of its own."""

    version = f"transformers {transformers.__version__}"

    def __init__(self, model: str, dtype: str) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa")

    def run(self, case: Case) -> list[Seen]:
        """As Engine's. Raises ValueError for requests that are not all due at once."""
        if any(case.due_s):
            raise ValueError("transformers' generate takes all requests at once: no rate")
        batch = torch.tensor(case.prompts)
        clock = Clock()
        new = case.new_tokens
        started = time.monotonic()
        output = self._model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        first, last = clock.moments[0] - started, time.monotonic() - started
        return [Seen(row, first, last) for row in output[:, batch.shape[1] :].tolist()]


def make(model: str, options: dict[str, str]) -> Engine:
    """The model on all cores of this process."""
    torch.set_num_threads(int(options.get("threads", len(cores()))))
    return Transformers(model, options.get("dtype", "bfloat16"))


if __name__ == "__main__":
    main(make)
