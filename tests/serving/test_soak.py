"""Many clients at once, and clients that leave at any moment: each is answered, and nothing of them is left."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from phalanx.tests.serving.soak import check, place, soak


def test_clients_that_leave_at_any_moment_leave_nothing_behind(tiny: Path, tmp_path: Path) -> None:
    with place(tiny, tmp_path, "max_open_requests=32") as found:
        # Long enough that those who come later find the first ones, however slow this client's machine is.
        report = asyncio.run(soak(found, count=600, connections=200, under_way=64, parts=3, new_tokens=64))
    check(report, connections=200, growth_mb=16.0)
    assert report.crowd["429"] > 0
    assert report.crowd["200"] > 0


@pytest.mark.slow
def test_ten_thousand_clients_that_leave_leave_nothing_behind(smollm2: Path, tmp_path: Path) -> None:
    with place(smollm2, tmp_path) as found:
        report = asyncio.run(soak(found, count=10_000, connections=1000))
    check(report, connections=1000, growth_mb=16.0)
    # max_open_requests=256 were let in, some of which may be of the hundred clients that gave up.
    assert report.crowd["200"] + report.crowd["left"] >= 256
