"""The gateway's settings: names, addresses, bounds."""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import dataclass

from ...engine.errors import ConfigError

VERSION = str(sys.modules[__name__.partition(".")[0]].__version__)
"""phalanx's."""
TOOL_SYNTAXES = ("auto", "hermes", "qwen3_coder", "none")
REASONING_MODES = ("auto", "think", "none")


@dataclass(frozen=True)
class GatewayConfig:
    """How the gateway listens and what it lets in. Raises ConfigError for a value that cannot be."""

    host: str = "127.0.0.1"
    """Address to listen at; the default is reached from this machine only."""
    port: int = 8000
    """TCP port to listen at; 0 takes a free one."""
    served_model_names: tuple[str, ...] = ()
    """Names under which requests may ask for the model, the first one in answers; none takes the model's own."""

    max_body_bytes: int = 8 * 1024 * 1024
    """Longest request body in bytes; a longer one is answered 413 and not read on. Other requests wait while the lists
    of a long body are made, some 20 ms for a megabyte."""
    max_file_bytes: int = 64 * 1024 * 1024
    """Longest file of requests for a batch in bytes; a longer one is answered 413."""
    max_files: int = 1000
    """Most uploaded files that the journal keeps for one API key; more are answered 429."""
    max_batches: int = 1000
    """Most batches that the journal keeps for one API key, those that have ended too; more are answered 429."""
    max_open_body_bytes: int = 256 * 1024 * 1024
    """Bytes of request bodies that are held until they are parsed, one long body at a time; more are answered 429."""
    head_timeout_s: float = 30.0
    """Longest time in seconds for a request's head to arrive; a slower one is answered 408."""
    body_timeout_s: float = 30.0
    """Longest time in seconds for a request's body to arrive; a slower one is answered 408."""
    max_prompts: int = 1024
    """Most prompts in one request for completions."""
    max_n: int = 128
    """Most completions of one prompt (`n`)."""
    max_stop_strings: int = 64
    """Most stop strings of a request; the same bound holds for bad_words."""
    max_stop_chars: int = 1024
    """Longest stop string or bad word in characters."""
    max_logit_bias: int = 1024
    """Most entries of a request's logit_bias."""
    max_messages: int = 4096
    """Most messages of one conversation."""

    max_open_requests: int = 1024
    """Requests to the engine that the gateway holds at once, each prompt counted; more are answered 429."""
    max_open_tokens: int = 16 * 1024 * 1024
    """Prompt tokens (estimated from bytes for text) that the gateway holds at once; more are answered 429."""
    max_connections: int = 4096
    """Connections at once; more are answered 503, but for probes of /health."""
    request_timeout_s: float = 600.0
    """Longest time in seconds from a request's arrival to the end of its answer; 0 sets no limit."""
    max_stream_bytes: int = 1024 * 1024
    """Bytes of an answer that wait for a slow reader, above which its request is aborted."""
    max_answer_bytes: int = 64 * 1024 * 1024
    """Bytes of an answer that is not streamed, about, above which its request is aborted."""
    stored_responses: int = 1024
    """Most responses of /v1/responses that are kept for previous_response_id; 0 keeps none."""
    stored_response_bytes: int = 64 * 1024 * 1024
    """Bytes that kept responses take together, each with all of its input; the least recently used make room."""
    stored_response_s: float = 3600.0
    """Seconds after its last use until a kept response is forgotten."""
    journal: str | None = None
    """A file, made if there is none, that keeps every request that is accepted and not streamed until it is answered,
    and its answer for a while: what a crash of this process interrupts is computed after its next start. It holds
    requests and answers as they are, and API keys only as a digest; null keeps nothing."""
    journal_max_mb: int = 1024
    """Most mebibytes that the journal holds; the oldest answers make room, and what then does not fit is answered
    503. Files and batches that are new are answered 429 where they would take more than half of it."""
    journal_keep_s: float = 86400.0
    """Seconds for which the journal keeps an answer, a file from its upload, and a batch from its end."""
    keep_alive_s: float = 15.0
    """Seconds of silence in a stream after which a comment is sent; 0 sends none."""

    require_model: bool = False
    """Refuse requests that name no model, as OpenAI's API does; otherwise they get the only one."""
    default_temperature: float | None = None
    """Temperature of a request that has none; null takes the model's generation_config, or else 1."""
    tool_syntax: str = "auto"
    """How the model writes calls of tools: auto (as its chat template says), hermes (JSON within <tool_call>),
    qwen3_coder (<function=name> and <parameter=name>) or none, with which requests that offer tools are refused."""
    reasoning: str = "auto"
    """Whether thinking is split from answers of chats: auto (if the chat template knows of it), think or none, with
    which it is text."""
    otlp_endpoint: str | None = None
    """Where OpenTelemetry spans go, one for each request, by OTLP over HTTP: a collector's address such as
    http://127.0.0.1:4318. It needs the extra otel; null sends none."""

    def __post_init__(self) -> None:
        for name, values in (("tool_syntax", TOOL_SYNTAXES), ("reasoning", REASONING_MODES)):
            if getattr(self, name) not in values:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {', '.join(values)}")

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", "float") and field.name != "port" and not value >= 0:
                raise ConfigError(f"{field.name}={value!r} is out of range: it must be in [0, inf)")
            if field.name.startswith("max_") and value < 1:
                raise ConfigError(f"{field.name}={value!r} is out of range: it must be at least 1")

        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port!r} is out of range: it must be in [0, 65535]")
        if self.default_temperature is not None and not 0 <= self.default_temperature < float("inf"):
            value = self.default_temperature
            raise ConfigError(f"default_temperature={value!r} is out of range: it must be in [0, inf)")

        for name in ("head_timeout_s", "body_timeout_s"):
            if getattr(self, name) == 0:
                raise ConfigError(f"{name}=0 is out of range: it must be above 0")

        if self.max_open_body_bytes < self.max_body_bytes:
            raise ConfigError(
                f"max_open_body_bytes={self.max_open_body_bytes} is below max_body_bytes={self.max_body_bytes}: raise "
                f"it, or lower that"
            )
        if self.journal is not None and self.max_open_body_bytes < self.max_file_bytes:
            raise ConfigError(
                f"max_open_body_bytes={self.max_open_body_bytes} is below max_file_bytes={self.max_file_bytes}: raise "
                f"it, or lower that"
            )
        if self.journal is not None and not self.max_body_bytes < self.journal_max_mb * 2**20:
            raise ConfigError(
                f"journal_max_mb={self.journal_max_mb} has no room for a body of max_body_bytes={self.max_body_bytes}: "
                f"raise it, or lower that"
            )
        if self.journal is not None and not self.max_file_bytes < self.journal_files_bytes:
            raise ConfigError(
                f"journal_max_mb={self.journal_max_mb} has no room for a file of max_file_bytes={self.max_file_bytes} "
                f"in its half that is for files and batches: raise it, or lower that"
            )

        if self.otlp_endpoint is not None and not re.fullmatch(r"https?://[^/?#\s]+(/[^?#\s]*)?", self.otlp_endpoint):
            raise ConfigError(
                f"otlp_endpoint={self.otlp_endpoint!r} is no address: it must be http://HOST:PORT or https://HOST:PORT"
            )
        if len(set(self.served_model_names)) != len(self.served_model_names) or "" in self.served_model_names:
            raise ConfigError(f"served_model_names={self.served_model_names!r} must be non-empty and differ")

    @property
    def journal_files_bytes(self) -> int:
        """Most bytes of the journal that files and batches may take: half of it, so that requests find room."""
        return self.journal_max_mb * 2**19
