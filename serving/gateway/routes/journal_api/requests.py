"""/v1/requests: what became of requests that the journal keeps."""

from __future__ import annotations

import asyncio

import msgspec

from ....journal.writer import JournalError
from ...durable.requests import kept_answer
from ...gateway import Gateway
from ...http.errors import ApiError, unavailable
from ...http.exchange import Exchange
from ...schemas.journal_api.requests import JournaledAnswer, JournaledRequest


async def retrieve(gateway: Gateway, exchange: Exchange) -> None:
    """Return the answer of a request that the journal keeps, by its X-Request-Id."""
    name = str(exchange.scope["path_params"]["request_id"])
    if gateway.journaling is None:
        raise _unknown(name, "this server keeps no journal (journal=null)")
    try:
        entry = await asyncio.wrap_future(gateway.journaling.journal.by_name(exchange.owner, name))
    except JournalError as error:
        raise unavailable(str(error), "journal_failed") from None
    if entry is None:
        raise _unknown(name, "it was never accepted, or streamed, or is forgotten, or belongs to another key")

    made = JournaledRequest(id=name, path=entry.request.kind, status="in_progress", created_at=int(entry.accepted_at))
    if entry.finished_at is not None:
        answer = kept_answer(entry)
        made.status, made.completed_at = "completed", int(entry.finished_at)
        made.response = JournaledAnswer(status_code=answer.status, request_id=name, body=msgspec.Raw(answer.body))
    await exchange.respond_json(made)


def _unknown(name: str, why: str) -> ApiError:
    return ApiError(
        404,
        f"request_id={name[:100]!r} is not known: {why}",
        type="not_found_error",
        param="request_id",
        code="request_not_found",
    )
