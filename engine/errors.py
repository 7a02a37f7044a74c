"""The errors a caller may catch. Each message names the value given, what was allowed and the setting to change."""

from __future__ import annotations


class PhalanxError(Exception):
    """Base of every error phalanx raises on purpose."""


class InvalidRequest(PhalanxError, ValueError):
    """One request is not acceptable; no other request is affected."""


class ConfigError(PhalanxError, ValueError):
    """The engine cannot be built from this configuration."""


class CheckpointError(PhalanxError):
    """A model folder or one of its tensors is missing, unexpected, mis-shaped or damaged."""


class CapacityExceeded(PhalanxError):
    """The engine's queue is full; the request was not accepted and may be sent again later."""


class EngineStopped(PhalanxError, RuntimeError):
    """The engine is no longer running: it was closed, or a rank failed (the message says which, and why)."""


class EngineFault(PhalanxError, RuntimeError):
    """The engine could not go on with one request, through no fault of the caller's."""


class Timeout(PhalanxError, TimeoutError):
    """Something did not happen within the time the caller allowed."""


ERRORS_BY_NAME: dict[str, type[PhalanxError]] = {
    error.__name__: error
    for error in (InvalidRequest, ConfigError, CheckpointError, CapacityExceeded, EngineStopped, EngineFault, Timeout)
}


def prompt_too_long(tokens: int, max_model_len: int) -> InvalidRequest:
    """The refusal of a prompt that leaves no room for an answer."""
    return InvalidRequest(
        f"the prompt has {tokens} tokens; with max_model_len={max_model_len} it may have at most {max_model_len - 1} "
        f"(one place is for the answer): shorten it or raise max_model_len"
    )
