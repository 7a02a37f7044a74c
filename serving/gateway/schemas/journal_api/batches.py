"""Files and batches, as OpenAI's API has them."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

MOST_LISTED = 100
Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/inference/v1/generate"]
BatchStatus = Literal["failed", "in_progress", "completed", "cancelling", "cancelled", "expired"]
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
    Meta(max_length=16, description="Texts that are kept with it."),
]
REFUSED_BATCH = {"output_expires_after": "what became of a batch is kept for journal_keep_s"}


class FileObject(msgspec.Struct, kw_only=True):
    """A file: the input of a batch, or what became of one."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    """When it is forgotten, Unix time in seconds; null of a batch that has not ended."""
    filename: str
    purpose: Literal["batch", "batch_output"] = "batch"
    status: Literal["processed"] = "processed"


class FileList(msgspec.Struct, kw_only=True):
    """The files that were uploaded."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class DeletedFile(msgspec.Struct, kw_only=True):
    """A file that is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class BatchRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A batch to be computed."""

    input_file_id: Annotated[str, Meta(max_length=100, description="A file that was uploaded with purpose=batch.")]
    endpoint: Annotated[Endpoint, Meta(description="The route of every request in the file.")]
    completion_window: Annotated[
        Literal["24h"],
        Meta(description="What has not ended by then is batch_expired in the error file."),
    ]
    metadata: Metadata | None = None


class RequestCounts(msgspec.Struct, kw_only=True):
    """The requests of a batch."""

    total: int
    completed: int = 0
    failed: int = 0


class BatchError(msgspec.Struct, kw_only=True):
    """Why a file is no batch."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(msgspec.Struct, kw_only=True):
    """What is wrong with a file, the first lines of it that are."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class BatchObject(msgspec.Struct, kw_only=True):
    """A batch."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str = "24h"
    status: BatchStatus
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    metadata: dict[str, str] | None = None


class BatchList(msgspec.Struct, kw_only=True):
    """The batches that there are."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class ListQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The query of a list, the newest first."""

    limit: Annotated[int, Meta(ge=1, le=MOST_LISTED, description="Most entries (20).")] | None = None
    after: Annotated[str, Meta(description="The id of the entry after which to begin.")] | None = None


class FilesQuery(ListQuery, kw_only=True, forbid_unknown_fields=True):
    """The query of the list of files."""

    order: Annotated[Literal["asc", "desc"], Meta(description="The newest first (desc) or last.")] | None = None
    purpose: (
        Annotated[str, Meta(description="Only files of this purpose: those that were uploaded have batch.")] | None
    ) = None
