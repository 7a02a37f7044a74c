"""launch.generate, with a fault put into rank 1: its third step raises."""

from __future__ import annotations

import os
from typing import Any

from phalanx.engine.execution.rank_worker import Worker
from phalanx.launch.cli.program import run_program
from phalanx.launch.generate import GenerateKeys, generate

FAULT = "this rank was broken on purpose"
_compute = Worker.launch
_steps: list[int] = []


def _execute(self: Worker, plan: Any) -> Any:
    _steps.append(plan.step)
    if len(_steps) == 3:
        raise ZeroDivisionError(FAULT)
    return _compute(self, plan)


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        Worker.launch = _execute  # type: ignore[method-assign]
    run_program(GenerateKeys, generate, __name__, "generate, with a fault")
