"""/v1/files and /v1/batches, as OpenAI's clients use them."""

from __future__ import annotations

from typing import TypeVar

from ...durable.batches import Batches
from ...durable.files import Files
from ...durable.journaling import Journaling
from ...gateway import Gateway
from ...http.errors import ApiError, invalid
from ...http.exchange import Exchange
from ...http.multipart import Form, boundary_of, parse_form
from ...schemas.journal_api.batches import (
    REFUSED_BATCH,
    BatchList,
    BatchObject,
    BatchRequest,
    DeletedFile,
    FileList,
    FileObject,
    FilesQuery,
    ListQuery,
)

_DEFAULT_LISTED = 20
_PIECE_BYTES = 2**20
_REFUSED_FORM = {"expires_after": "a file is kept for journal_keep_s after its upload, or until it is deleted"}
Listed = TypeVar("Listed", FileObject, BatchObject)


async def upload(gateway: Gateway, exchange: Exchange) -> None:
    """Keep a file of requests (multipart/form-data: purpose=batch, file)."""
    files = _files(gateway)
    boundary = boundary_of(exchange.header(b"content-type") or "")
    try:
        form = parse_form(await exchange.read_file(), boundary)
        _check_fields(form)
        if form.content is None:
            raise invalid("file is required", "file", "missing_required_parameter")
        made = await files.put(exchange.owner, form.filename, form.content)
    finally:
        exchange.release_body()
    await exchange.respond_json(made)


def _check_fields(form: Form) -> None:
    """Raise ApiError (400) unless a form has the fields of a file for a batch."""
    for name in form.fields.keys() - {"purpose"}:
        if why := _REFUSED_FORM.get(name.partition("[")[0]):
            raise invalid(f"{name[:100]} is not supported: {why}", name[:100], "unsupported_parameter")
        raise invalid(f"unknown field {name[:100]!r}", name[:100], "unknown_parameter")
    purpose = form.fields.get("purpose")
    if purpose is None:
        raise invalid("purpose is required", "purpose", "missing_required_parameter")
    if purpose != "batch":
        raise invalid(f"purpose={purpose[:100]!r} is not supported; it must be batch", "purpose")


async def list_files(gateway: Gateway, exchange: Exchange) -> None:
    """List the files that were uploaded, the newest first."""
    query = exchange.read_query(FilesQuery)
    found = [file for file in await _files(gateway).all(exchange.owner) if query.purpose in (None, file.purpose)]
    shown, more = _page(found[::-1] if query.order == "asc" else found, query)
    first, last = (shown[0].id, shown[-1].id) if shown else (None, None)
    await exchange.respond_json(FileList(data=shown, has_more=more, first_id=first, last_id=last))


async def retrieve_file(gateway: Gateway, exchange: Exchange) -> None:
    """Tell about a file."""
    await exchange.respond_json(await _batches(gateway).file(exchange.owner, _path(exchange, "file_id")))


async def delete_file(gateway: Gateway, exchange: Exchange) -> None:
    """Forget a file that was uploaded."""
    file_id = _path(exchange, "file_id")
    await _batches(gateway).delete_file(exchange.owner, file_id)
    await exchange.respond_json(DeletedFile(id=file_id))


async def file_content(gateway: Gateway, exchange: Exchange) -> None:
    """Return a file: as it was uploaded, or what became of a batch's requests, a line for each (JSONL)."""
    files, batches, file_id = _files(gateway), _batches(gateway), _path(exchange, "file_id")
    file = await files.find(exchange.owner, file_id)
    if file is None:
        batch, kind = await batches.batch_of_file(exchange.owner, file_id)
        await exchange.start_file()
        async for line in batches.lines(batch.id, kind):
            await exchange.write(line)
        await exchange.write(b"", last=True)
        return

    # It is held as a whole until its reader has it; in pieces, since a connection takes whatever is written.
    try:
        exchange.hold(file.bytes)
        content = memoryview(await files.content(exchange.owner, file_id))
        await exchange.start_file(len(content))
        for begin in range(0, len(content), _PIECE_BYTES):
            await exchange.write(bytes(content[begin : begin + _PIECE_BYTES]))
        await exchange.write(b"", last=True)
    finally:
        exchange.release_body()


async def create(gateway: Gateway, exchange: Exchange) -> None:
    """Have every request of a file answered, each once; a journal keeps them until they are."""
    batches = _batches(gateway)
    request = await exchange.read(BatchRequest, REFUSED_BATCH)
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


def _journaling(gateway: Gateway) -> Journaling:
    if gateway.journaling is None:
        why = "files and batches need the setting journal, which is null"
        raise ApiError(404, f"this server keeps no journal: {why}", type="not_found_error", code="no_journal")
    return gateway.journaling


def _files(gateway: Gateway) -> Files:
    return _journaling(gateway).files


def _batches(gateway: Gateway) -> Batches:
    return _journaling(gateway).batches


def _path(exchange: Exchange, name: str) -> str:
    return str(exchange.scope["path_params"][name])


def _page(found: list[Listed], query: ListQuery) -> tuple[list[Listed], bool]:
    """(the part of a list that a query asks for, whether there is more)."""
    if query.after is not None:
        matches = [index for index, each in enumerate(found) if each.id == query.after]
        if not matches:
            raise invalid(f"after={query.after[:100]!r} is not the id of an entry", "after")
        found = found[matches[0] + 1 :]
    limit = query.limit or _DEFAULT_LISTED
    return found[:limit], len(found) > limit
