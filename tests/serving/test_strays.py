"""Requests whose engines have ended: who waits for an engine, who for a turn, and who is to blame."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from phalanx.serving.pool.strays import Strays


class Fake:
    """A request; `places` has an entry for each that an engine could take now."""

    def __init__(self, name: str, places: list[str], deaths: int = 1) -> None:
        self.name, self.places = name, places
        self.deaths = deaths
        self.aborted = False
        self.stranded_at: float | None = None
        self.end = ""

    def go(self) -> bool:
        if not self.places:
            return False
        self.places.pop()
        self.end = "sent"
        return True

    def give_up(self) -> None:
        self.end = "given up"

    def blame(self) -> None:
        self.end = "blamed"


def _check(body: Callable[[Strays], Awaitable[None]], wait_s: float = 60.0) -> None:
    async def main() -> None:
        await body(Strays(wait_s, asyncio.get_running_loop()))

    asyncio.run(main())


def test_what_waits_is_sent_in_its_order_as_soon_as_there_is_room() -> None:
    async def body(strays: Strays) -> None:
        places: list[str] = []
        waiting = [Fake(name, places) for name in "abc"]
        for each in waiting:
            strays.add(each)
        assert len(strays) == 3
        places.extend("xy")
        strays.send_on()
        assert [each.end for each in waiting] == ["sent", "sent", ""]
        waiting[2].aborted = True
        strays.send_on()
        assert (waiting[2].end, len(strays)) == ("given up", 0)

    _check(body)


def test_suspects_are_tried_one_at_a_time_and_the_one_that_kills_is_blamed() -> None:
    async def body(strays: Strays) -> None:
        places = list("many places")
        innocent, killer, third = (Fake(name, places, deaths=2) for name in ("innocent", "killer", "third"))
        neighbour = Fake("neighbour", places)
        for each in (innocent, killer, third, neighbour):
            strays.add(each)
        assert [each.end for each in (innocent, killer, third, neighbour)] == ["sent", "", "", "sent"]
        innocent.deaths = 0
        strays.got_on(innocent)
        assert (killer.end, third.end) == ("sent", "")
        killer.deaths = 3
        strays.add(killer)
        assert (killer.end, third.end, len(strays)) == ("blamed", "sent", 0)

    _check(body)


def test_the_time_without_an_engine_is_bounded_and_a_turn_is_waited_for_without_bound() -> None:
    async def body(strays: Strays) -> None:
        places = ["x"]
        tried, suspect, free = Fake("tried", places, 2), Fake("suspect", places, 2), Fake("free", places)
        for each in (tried, suspect, free):
            strays.add(each)
        for _ in range(4):
            await asyncio.sleep(0.02)
            strays.send_on()
        assert [each.end for each in (tried, suspect, free)] == ["sent", "", "given up"]
        strays.give_up()
        assert (suspect.end, len(strays)) == ("given up", 0)

    _check(body, wait_s=0.05)
