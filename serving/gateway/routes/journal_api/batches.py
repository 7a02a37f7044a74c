"""/v1/files and /v1/batches, as OpenAI's clients use them."""

from __future__ import annotations

from typing import TypeVar

from ...durable.batches import ERRORS, OUTPUT, Batches
from ...gateway import Gateway
from ...http.errors import ApiError, invalid
from ...http.exchange import Exchange
from ...http.multipart import boundary_of, parse_form
from ...schemas.journal_api.batches import (
    BatchList,
    BatchObject,
    BatchRequest,
    DeletedFile,
    FileList,
    FileObject,
    ListQuery,
)

_DEFAULT_LISTED = 20
Listed = TypeVar("Listed", FileObject, BatchObject)


async def upload(gateway: Gateway, exchange: Exchange) -> None:
    """Keep a file of requests (multipart/form-data: purpose=batch, file)."""
    batches = _batches(gateway)
    boundary = boundary_of(exchange.header(b"content-type") or "")
    form = parse_form(await exchange.read_file(), boundary)
    exchange.release_body()
    if form.content is None:
        raise invalid("file is required", "file", "missing_required_parameter")
    if (purpose := form.fields.get("purpose")) != "batch":
        raise invalid(f"purpose={str(purpose)[:100]!r} is not supported; it must be batch", "purpose")
    await exchange.respond_json(await batches.put_file(exchange.owner, form.filename, form.content))


async def list_files(gateway: Gateway, exchange: Exchange) -> None:
    """List the files that were uploaded, the newest first."""
    query = exchange.read_query(ListQuery)
    shown, more = _page(await _batches(gateway).files(exchange.owner), query)
    first, last = (shown[0].id, shown[-1].id) if shown else (None, None)
    await exchange.respond_json(FileList(data=shown, has_more=more, first_id=first, last_id=last))


async def retrieve_file(gateway: Gateway, exchange: Exchange) -> None:
    """Tell about a file."""
    file, _ = await _batches(gateway).file(exchange.owner, _path(exchange, "file_id"))
    await exchange.respond_json(file)


async def delete_file(gateway: Gateway, exchange: Exchange) -> None:
    """Forget a file that was uploaded."""
    file_id = _path(exchange, "file_id")
    await _batches(gateway).delete_file(exchange.owner, file_id)
    await exchange.respond_json(DeletedFile(id=file_id))


async def file_content(gateway: Gateway, exchange: Exchange) -> None:
    """Return a file: as it was uploaded, or what became of a batch's requests, a line for each (JSONL)."""
    batches, file_id = _batches(gateway), _path(exchange, "file_id")
    file, document = await batches.file(exchange.owner, file_id)
    if document is not None:
        await exchange.respond(document.content, content_type="application/octet-stream")
        return
    kind = ERRORS if file_id.endswith(ERRORS) else OUTPUT
    batch_id = file.filename.removesuffix(f"_{kind}.jsonl")
    await exchange.start_file()
    async for line in batches.lines(batch_id, kind):
        await exchange.write(line)
    await exchange.write(b"", last=True)


async def create(gateway: Gateway, exchange: Exchange) -> None:
    """Have every request of a file answered, each once; a journal keeps them until they are."""
    batches = _batches(gateway)
    request = await exchange.read(BatchRequest)
    await exchange.respond_json(await batches.create(exchange.owner, exchange.salted(None), request))


async def list_batches(gateway: Gateway, exchange: Exchange) -> None:
    """List the batches, the newest first."""
    batches = _batches(gateway)
    shown, more = _page(await batches.batches(exchange.owner), exchange.read_query(ListQuery))
    first, last = (shown[0].id, shown[-1].id) if shown else (None, None)
    data = await batches.current(shown)
    await exchange.respond_json(BatchList(data=data, has_more=more, first_id=first, last_id=last))


async def retrieve(gateway: Gateway, exchange: Exchange) -> None:
    """Tell how far a batch is."""
    await exchange.respond_json(await _batches(gateway).batch(exchange.owner, _path(exchange, "batch_id")))


async def cancel(gateway: Gateway, exchange: Exchange) -> None:
    """Give up what has not ended of a batch."""
    await exchange.respond_json(await _batches(gateway).cancel(exchange.owner, _path(exchange, "batch_id")))


def _batches(gateway: Gateway) -> Batches:
    if gateway.journaling is None:
        why = "files and batches need the setting journal, which is null"
        raise ApiError(404, f"this server keeps no journal: {why}", type="not_found_error", code="no_journal")
    return gateway.journaling.batches


def _path(exchange: Exchange, name: str) -> str:
    return str(exchange.scope["path_params"][name])


def _page(found: list[Listed], query: ListQuery) -> tuple[list[Listed], bool]:
    """(the part of a list that a query asks for, whether there is more)."""
    if query.after is not None:
        places = [place for place, each in enumerate(found) if each.id == query.after]
        if not places:
            raise invalid(f"after={query.after[:100]!r} is not the id of an entry", "after")
        found = found[places[0] + 1 :]
    limit = query.limit or _DEFAULT_LISTED
    return found[:limit], len(found) > limit
