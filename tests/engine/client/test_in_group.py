"""An engine on somebody else's process group: what rank 0 alone meets, every rank hears of at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from phalanx.tests.engine import programs
from phalanx.tests.engine.conftest import CONFIG


@pytest.mark.parametrize(("ranks", "collectives"), [(2, "auto"), (3, "auto"), (2, "gloo")])
def test_an_error_of_rank_0_reaches_every_rank_at_once(
    run_ranks: Callable[..., list[Any]], tiny: Path, ranks: int, collectives: str
) -> None:
    # A rank that hears nothing waits longer than run_ranks() does.
    config = {**CONFIG, "collectives": collectives, "timeout_s": 3600}
    raised = run_ranks(ranks, programs.fail_on_rank_0, str(tiny), config)
    for rank, errors in enumerate(raised):
        name, message = errors["settings"]
        assert (name, "max_num_seqs=0" in message) == ("ConfigError", True)
        assert errors["call"] == (
            ("KeyboardInterrupt", "Ctrl-C")
            if rank == 0
            else ("EngineStopped", "rank 0 was interrupted by KeyboardInterrupt: Ctrl-C")
        )
        assert errors["model"][0] == "CheckpointError"
        assert errors["model"][1].endswith("the tokenizer is damaged")
        if collectives == "gloo" and rank:  # the others notice that rank 0 has gone
            assert errors["step"][0] == errors["afterwards"][0] == "EngineStopped"
            continue
        assert errors["step"] == ("EngineStopped", "rank 0 failed: RuntimeError: a card fell out")
        assert errors["afterwards"] == errors["step"]
