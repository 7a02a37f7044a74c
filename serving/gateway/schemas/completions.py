"""The request of /v1/completions."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from ....engine.protocol.sampling_params import LOGPROBS_LIMIT
from ..config import GatewayConfig
from ..http.errors import invalid
from .fields import OpenAIFields, TokenId

Prompt = str | list[int]


class CompletionRequest(OpenAIFields, kw_only=True, forbid_unknown_fields=True):
    """Texts or token ids to be continued."""

    prompt: Annotated[
        str | list[str | TokenId | list[TokenId]],
        Meta(description="A text, token ids, or a list of either; a list is of one kind."),
    ]
    max_tokens: (
        Annotated[int, Meta(ge=0, description="Most new tokens (16); 0 only with echo or prompt_logprobs.")] | None
    ) = None
    logprobs: (
        Annotated[int, Meta(ge=0, le=LOGPROBS_LIMIT, description="Log-probabilities of tokens and the k likeliest.")]
        | None
    ) = None
    echo: Annotated[bool, Meta(description="Begin the text, and the log-probabilities, with the prompt's.")] | None = (
        None
    )
    best_of: Annotated[int, Meta(ge=1, description="Only the same as n: all answers are returned.")] | None = None


def prompts_of(request: CompletionRequest, config: GatewayConfig) -> list[Prompt]:
    """The prompts of a request. Raises ApiError for a list that is empty, too long, or of several kinds."""
    given = request.prompt
    if isinstance(given, str):
        return [given]
    if not given:
        raise invalid("prompt is empty: give a text or token ids", "prompt")
    first = type(given[0])
    for index, item in enumerate(given):
        if type(item) is not first:
            raise invalid("prompt must be texts only, token ids only, or lists of token ids only", f"prompt[{index}]")
        if item == []:
            raise invalid(f"prompt[{index}] is empty", f"prompt[{index}]")
    if first is int:
        return [[item for item in given if isinstance(item, int)]]
    if len(given) > config.max_prompts:
        raise invalid(f"prompt has {len(given)} prompts; at most {config.max_prompts} (max_prompts)", "prompt")
    return [item for item in given if not isinstance(item, int)]


def check_completion(request: CompletionRequest) -> None:
    """Raise ApiError for what the schema allows and this server does not do."""
    n = request.n or 1
    if request.best_of is not None and request.best_of != n:
        why = f"only n={n}, with which all answers are returned; use n and choose among them"
        raise invalid(f"best_of={request.best_of} is not supported: {why}", "best_of", "unsupported_value")
    if request.max_tokens == 0 and not request.echo and request.prompt_logprobs is None:
        raise invalid("max_tokens=0 is only for echo=true or prompt_logprobs", "max_tokens")
    if request.stream and request.echo and request.logprobs is not None:
        raise invalid("echo with logprobs cannot be streamed; set stream=false", "echo")
