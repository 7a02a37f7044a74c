"""Every route: what the app serves, the OpenAPI document declares and the page of routes tells."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from ..gateway import Gateway
from ..http.error_shapes import AnthropicErrorBody
from ..http.errors import ErrorBody
from ..http.exchange import Exchange
from ..schemas.chat import ChatRequest
from ..schemas.completions import CompletionRequest
from ..schemas.journal_api.batches import (
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
from ..schemas.journal_api.requests import JournaledRequest
from ..schemas.messages_api.answer import MessageAnswer, MessageEvent, TokenCount
from ..schemas.messages_api.request import (
    REFUSED_COUNT_TOKENS,
    REFUSED_MESSAGES,
    CountTokensRequest,
    MessagesRequest,
)
from ..schemas.refused import REFUSED_CHAT, REFUSED_COMPLETION, REFUSED_GENERATE, REFUSED_TOKENIZE
from ..schemas.responses import (
    ChatChunk,
    ChatCompletion,
    Completion,
    DetokenizeResponse,
    GenerateResponse,
    HealthInfo,
    LoadInfo,
    ModelCard,
    ModelList,
    TokenizeResponse,
    TokenizerInfo,
    VersionInfo,
)
from ..schemas.responses_api.answer import (
    CompactedResponse,
    DeletedResponse,
    InputItems,
    InputTokens,
    ResponseEvent,
    ResponseObject,
)
from ..schemas.responses_api.request import (
    REFUSED_COMPACT,
    REFUSED_RESPONSES,
    CompactRequest,
    InputItemsQuery,
    ResponseQuery,
    ResponsesRequest,
)
from ..schemas.tokens import DetokenizeRequest, GenerateRequest, TokenizeRequest
from . import chat, completions, generate, information, tokens
from .journal_api import batches as batch_api
from .journal_api import requests as journal_api
from .messages_api import handlers as messages_api
from .responses_api import handlers as responses_api

Handler = Callable[[Gateway, Exchange], Awaitable[None]]
Struct = type[msgspec.Struct]


@dataclass(frozen=True)
class Operation:
    """One route."""

    method: str
    path: str
    handler: Handler
    answer: Struct
    request: Struct | None = None
    chunk: Struct | None = None
    """What each event of a stream holds, where there may be one."""
    refused: Mapping[str, str] = field(default_factory=dict)
    statuses: tuple[int, ...] = ()
    """Statuses of errors, beside those that any route may have."""
    query: Struct | None = None
    """The parameters of its query."""
    error: Struct = ErrorBody
    """The body of its errors."""
    done: bool = True
    """Whether its stream ends with [DONE]."""


_BODY = (400, 408, 413, 415)
_COMPUTES = (*_BODY, 404, 429, 500, 503, 504)
_ANTHROPIC = (*_BODY, 404, 429, 500, 504, 529)

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "POST",
        "/v1/chat/completions",
        chat.chat_completions,
        ChatCompletion,
        ChatRequest,
        ChatChunk,
        REFUSED_CHAT,
        _COMPUTES,
    ),
    Operation(
        "POST",
        "/v1/completions",
        completions.completions,
        Completion,
        CompletionRequest,
        Completion,
        REFUSED_COMPLETION,
        _COMPUTES,
    ),
    Operation(
        "POST",
        "/v1/responses",
        responses_api.create,
        ResponseObject,
        ResponsesRequest,
        ResponseEvent,
        REFUSED_RESPONSES,
        _COMPUTES,
        done=False,
    ),
    Operation(
        "POST",
        "/v1/responses/input_tokens",
        responses_api.count_input_tokens,
        InputTokens,
        ResponsesRequest,
        None,
        REFUSED_RESPONSES,
        _COMPUTES,
    ),
    Operation(
        "POST",
        "/v1/responses/compact",
        responses_api.compact,
        CompactedResponse,
        CompactRequest,
        None,
        REFUSED_COMPACT,
        (*_COMPUTES, 422),
    ),
    Operation(
        "GET",
        "/v1/responses/{response_id}/input_items",
        responses_api.list_input_items,
        InputItems,
        statuses=(400, 404),
        query=InputItemsQuery,
    ),
    Operation("POST", "/v1/responses/{response_id}/cancel", responses_api.cancel, ResponseObject, statuses=(400, 404)),
    Operation(
        "GET",
        "/v1/responses/{response_id}",
        responses_api.retrieve,
        ResponseObject,
        statuses=(400, 404),
        query=ResponseQuery,
    ),
    Operation("DELETE", "/v1/responses/{response_id}", responses_api.delete, DeletedResponse, statuses=(404,)),
    Operation(
        "POST",
        "/v1/messages",
        messages_api.messages,
        MessageAnswer,
        MessagesRequest,
        MessageEvent,
        REFUSED_MESSAGES,
        _ANTHROPIC,
        error=AnthropicErrorBody,
        done=False,
    ),
    Operation(
        "POST",
        "/v1/messages/count_tokens",
        messages_api.count_tokens,
        TokenCount,
        CountTokensRequest,
        None,
        REFUSED_COUNT_TOKENS,
        _ANTHROPIC,
        error=AnthropicErrorBody,
    ),
    Operation(
        "POST",
        "/inference/v1/generate",
        generate.generate,
        GenerateResponse,
        GenerateRequest,
        GenerateResponse,
        REFUSED_GENERATE,
        _COMPUTES,
    ),
    Operation("GET", "/v1/requests/{request_id}", journal_api.retrieve, JournaledRequest, statuses=(404, 503)),
    Operation("POST", "/v1/files", batch_api.upload, FileObject, statuses=(400, 404, 408, 413, 415, 429, 503)),
    Operation("GET", "/v1/files", batch_api.list_files, FileList, statuses=(400, 404, 503), query=FilesQuery),
    Operation("GET", "/v1/files/{file_id}/content", batch_api.file_content, FileObject, statuses=(404, 429, 503)),
    Operation("GET", "/v1/files/{file_id}", batch_api.retrieve_file, FileObject, statuses=(404, 503)),
    Operation("DELETE", "/v1/files/{file_id}", batch_api.delete_file, DeletedFile, statuses=(400, 404, 503)),
    Operation(
        "POST",
        "/v1/batches",
        batch_api.create,
        BatchObject,
        BatchRequest,
        None,
        REFUSED_BATCH,
        statuses=(*_BODY, 404, 429, 503),
    ),
    Operation("GET", "/v1/batches", batch_api.list_batches, BatchList, statuses=(400, 404, 503), query=ListQuery),
    Operation("POST", "/v1/batches/{batch_id}/cancel", batch_api.cancel, BatchObject, statuses=(404, 503)),
    Operation("GET", "/v1/batches/{batch_id}", batch_api.retrieve, BatchObject, statuses=(404, 503)),
    Operation(
        "POST", "/tokenize", tokens.tokenize, TokenizeResponse, TokenizeRequest, None, REFUSED_TOKENIZE, _COMPUTES
    ),
    Operation("POST", "/detokenize", tokens.detokenize, DetokenizeResponse, DetokenizeRequest, statuses=_COMPUTES),
    Operation("GET", "/tokenizer_info", tokens.tokenizer_info, TokenizerInfo, statuses=(503,)),
    Operation("GET", "/v1/models", information.models, ModelList),
    Operation("GET", "/v1/models/{model}", information.model, ModelCard, statuses=(404, 503)),
    Operation("GET", "/version", information.version, VersionInfo),
    Operation("GET", "/load", information.load, LoadInfo),
    Operation("GET", "/health", information.ready, HealthInfo, statuses=(503,)),
    Operation("GET", "/health/live", information.live, HealthInfo),
    Operation("GET", "/health/ready", information.ready, HealthInfo, statuses=(503,)),
)

JOURNALED: tuple[Handler, ...] = (
    chat.chat_completions,
    completions.completions,
    responses_api.create,
    messages_api.messages,
    generate.generate,
)
"""What a journal keeps until it is answered."""
