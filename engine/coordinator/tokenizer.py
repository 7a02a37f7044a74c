"""The model's tokenizer: text and chat messages to token ids, and token ids back to text as they come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...parallel.loading.json_files import LoadError, read_json_object
from ..errors import CheckpointError, ConfigError, InvalidRequest
from .tokenizer_files import check_tokenizer_files, explain_unreadable

Message = dict[str, Any]
INCOMPLETE = "\ufffd"
INCOMPLETE_BYTES = 3
"""Bytes of an incomplete character at most, and so tokens. Some decoders show each as U+FFFD, others all as one."""
USUAL_CHARACTERS = 8
"""Characters of a token at most, in usual text."""
WINDOW_TOKENS = 16
"""Tokens without whole text that are decoded together at most."""
CONTEXT_TOKENS = 6
"""Tokens of the prompt that are decoded before the first new token, as vLLM does."""


class Tokenizer:
    """transformers' tokenizer of a folder. Thread-safe: encoding runs in Rust and releases the GIL."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError if the folder holds no tokenizer that transformers can read."""
        from transformers import AutoTokenizer

        check_tokenizer_files(folder)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                str(folder), config=_default_config(folder), local_files_only=True, trust_remote_code=False
            )
            # What fails with every text fails here.
            self._tokenizer("Probe 1")["input_ids"]
        except KeyError as error:
            import transformers

            raise ConfigError(
                f"transformers {transformers.__version__} does not know {error} of {folder}; a newer one is needed "
                f"(Qwen2 needs 4.37, Qwen3 4.51)"
            ) from error
        except BaseException as error:
            # tokenizers are written in Rust, whose panic is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise explain_unreadable(folder, error) from error
        if not self._tokenizer.is_fast:
            raise CheckpointError(
                f"the tokenizer in {folder} has no tokenizer.json (fast) form; save one with "
                f"AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...)"
            )

        added = self._tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self._special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        self._special = frozenset(self._special_ids.values())
        self._takes_parts: bool | None = None

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """Token ids of a prompt, with the special tokens the model's tokenizer adds by itself.

        Raises InvalidRequest for a long text whose beginning has more than `limit` tokens already.
        """
        return self._encode(text, True, limit)

    def _encode(self, text: str, special: bool, limit: int | None) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the text is not valid Unicode: {error}") from error
        if limit is not None:
            self._check_beginnings(text, limit)
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    def _check_beginnings(self, text: str, limit: int) -> None:
        """To encode a text of many megabytes takes long; a beginning of it tells as well that it is too long."""
        size = USUAL_CHARACTERS * limit
        while size < len(text):
            # Where it is cut, a character or word may be more tokens than in the whole.
            count = len(self._tokenizer(text[:size], add_special_tokens=False)["input_ids"])
            if count > limit + WINDOW_TOKENS:
                raise InvalidRequest(
                    f"the first {size} of {len(text)} characters have {count} tokens already; the prompt may have at "
                    f"most {limit}: shorten it or raise max_model_len"
                )
            size *= 4

    def encode_messages(self, messages: list[Message], limit: int | None = None) -> list[int]:
        """Token ids of a conversation, as transformers' apply_chat_template(add_generation_prompt=True) renders it.

        A content that is a list of text parts reaches a template that knows only text as their lines. Raises
        InvalidRequest if the model has no chat template, the template refuses the messages, or a part is no text; for
        `limit` see encode().
        """
        if not self._tokenizer.chat_template:
            raise InvalidRequest("messages were given, but the model's tokenizer has no chat template; send a prompt")
        if any(isinstance(message.get("content"), list) for message in messages):
            joined = [_with_text(message) for message in messages]
            messages = messages if self._template_takes_parts() else joined
        try:
            text = self._render(messages)
        except Exception as error:
            # A template is the model's own program and may raise anything; the request fails, by name.
            raise InvalidRequest(f"the chat template refused the messages: {error}") from error
        return self._encode(text, False, limit)

    def _render(self, messages: list[Message]) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _template_takes_parts(self) -> bool:
        """Whether the template looks into a list of parts: tried once, with a part whose text must come out alone."""
        if self._takes_parts is None:
            text, kind = "some text of a part", "type"
            try:
                rendered = self._render([{"role": "user", "content": [{kind: "text", "text": text}]}])
            except Exception:  # whatever a template raises, it does not take parts
                rendered = ""
            self._takes_parts = text in rendered and f"'{kind}'" not in rendered and f'"{kind}"' not in rendered
        return self._takes_parts

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends an answer, as the tokenizer has it: of a chat model, its end of a turn."""
        token_id = self._tokenizer.eos_token_id
        return token_id if isinstance(token_id, int) else None

    def special_token_id(self, text: str) -> int | None:
        """The special token whose text this is."""
        return self._special_ids.get(text)

    def decoder(self, skip_special_tokens: bool, prompt: Sequence[int] = ()) -> IncrementalDetokenizer:
        """Return a decoder for one completion of `prompt`, whose last tokens may decide how the first new one reads."""
        skipped = self._special if skip_special_tokens else frozenset()
        return IncrementalDetokenizer(self._tokenizer.backend_tokenizer, skipped, prompt[-CONTEXT_TOKENS:])

    @property
    def size(self) -> int:
        """Token ids the tokenizer knows; the model's vocabulary may be larger (padded)."""
        return len(self._tokenizer)


def _default_config(folder: Path) -> Any:
    """Return transformers' configuration of the folder's model_type with its default values; None without one.

    It says which class of tokenizer belongs to the model. transformers would read all of config.json for that, and
    refuse a value of an unusual type that neither a tokenizer nor this engine has a use for (engine/models/spec.py
    checks those that have one).
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(read_json_object(folder / "config.json")["model_type"])
    except (LoadError, ValueError, KeyError, TypeError):
        return None  # no config.json, or no model_type that is known: the tokenizer's own files have to do


def _with_text(message: Message) -> Message:
    """A message whose content is no list of text parts any more, but their lines. Raises InvalidRequest."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise InvalidRequest(
                f'a content part must be {{"type": "text", "text": "..."}}, this model reads text alone: {part!r}'
            )
        texts.append(text)
    return {**message, "content": "\n".join(texts)}


class IncrementalDetokenizer:
    """Decodes one completion token by token; text appears once it is whole UTF-8.

    The tokens of the last piece of text are decoded again together with those after it, since what a token's text is
    may depend on the token before it. A window of tokens begins where text was whole.

    The first window begins with the prompt's last tokens: where a tokenizer marks the beginning of a word with a space
    (SentencePiece), decoding an answer by itself would swallow the space before its first word.
    """

    def __init__(self, backend: Any, skipped: frozenset[int], prompt: Sequence[int] = ()) -> None:
        """`backend` is a tokenizers.Tokenizer; the token ids in `skipped` have no text. `prompt` is its last tokens."""
        self._backend = backend
        self._skipped = skipped
        self._window = [token for token in prompt if token not in skipped and backend.id_to_token(token) is not None]
        self._text = self._decode() if self._window else ""
        # An answer to a prompt that ends within a character is decoded by itself.
        if self._text.endswith(INCOMPLETE):
            self._window, self._text = [], ""
        self._context = len(self._window)  # tokens of the window whose text is shown in full
        self._shown = len(self._text)  # characters of the window's text that were returned, or are the prompt's

    def step(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is incomplete."""
        if token_id in self._skipped or self._backend.id_to_token(token_id) is None:
            return ""
        self._window.append(token_id)
        self._text = self._decode()

        pending = len(self._window) - self._context
        if not self._text.endswith(INCOMPLETE):
            text = self._show(len(self._text))
            if text:
                self._begin_window(self._context)
                self._context = len(self._window)
            return text

        if pending <= INCOMPLETE_BYTES:
            return ""

        # Bytes that are no UTF-8 and never will be. The last of them may still begin a character.
        text = self._show(max(len(self._text.rstrip(INCOMPLETE)), len(self._text) - INCOMPLETE_BYTES))
        if pending == WINDOW_TOKENS:
            self._begin_window(len(self._window) - WINDOW_TOKENS // 2)
            self._context = 0
        return text

    def flush(self) -> str:
        """What an incomplete character at the very end decodes to (U+FFFD), as decoding all at once would show it."""
        return self._show(len(self._text))

    def _show(self, end: int) -> str:
        start, self._shown = self._shown, max(self._shown, end)
        return self._text[start:end]

    def _begin_window(self, first: int) -> None:
        held = len(self._text) - self._shown
        self._window = self._window[first:]
        self._text = self._decode()
        self._shown = len(self._text) - held

    def _decode(self) -> str:
        return str(self._backend.decode(self._window, skip_special_tokens=False))


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json, or nothing if the folder has none. Raises CheckpointError if it is no JSON object."""
    path = folder / "generation_config.json"
    if not path.exists():
        return {}
    try:
        return read_json_object(path)
    except LoadError as error:
        raise CheckpointError(str(error)) from error
