"""The model's tokenizer: text and chat messages to token ids, and token ids back to text as they come."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...parallel.loading.json_files import LoadError, read_json_object, shortened, shown
from ..constraints.matcher import Beginning
from ..errors import CheckpointError, InvalidRequest
from ..protocol.messages import Prompt
from .text.chat_template import ChatTemplate
from .text.normalized_tokens import NormalizedTokens
from .text.plain_text import PlainText
from .text.reasoning import Phase, ReasoningSplitter, find_tags, phase_after
from .text.template_processes import TemplateProcesses
from .text.token_text import WINDOW_TOKENS, IncrementalDetokenizer, TokenBytes
from .text.tokenizer_store import StoredTokenizer, TokenizerStore
from .tokenizer_files import check_tokenizer_files, check_tokens, explain_unreadable

Message = dict[str, Any]
USUAL_CHARACTERS = 8
"""Characters of a token at most, in usual text."""
DEFAULT, TOOLS = "default", "tool_use"
"""Names of a model's chat templates, as transformers gives and chooses them."""
CONTEXT_TOKENS = 6
"""Tokens of the prompt that are decoded before the first new token, as vLLM does."""


class Tokenizer:
    """transformers' tokenizer of a folder. Thread-safe: encoding runs in Rust and releases the GIL."""

    def __init__(self, folder: Path, store: Path | None = None, processes: TemplateProcesses | None = None) -> None:
        """`store` is a folder that keeps tokenizers from one start to the next; without one this is not kept.

        The chat template is rendered in `processes`, without them in some of its own, which close() ends.

        Raises CheckpointError if the folder holds no tokenizer that transformers can read.
        """
        check_tokenizer_files(folder)
        stored = None if store is None else TokenizerStore(store, folder)
        self._tokenizer: Any = stored and stored.load()
        made = self._tokenizer is None
        if made:
            self._tokenizer = _make(folder)

        self._backend = self._tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        check_tokens(folder, self._token_ids("Probe 1"), self._special_ids)
        self._special = frozenset(self._special_ids.values())
        self._takes_parts: dict[ChatTemplate, bool] = {}
        self._templates = self._chat_templates(processes or TemplateProcesses())
        self._plain_text = PlainText(self._backend, self._special)
        ids = {token.content: token_id for token_id, token in added.items()}
        self._reasoning_tags = find_tags(ids, self.chat_template)
        """What the model's thinking is enclosed in."""
        self.token_bytes = TokenBytes(self._backend, self.size)
        """The bytes of each token by its id."""

        if made and stored is not None:
            stored.save(
                self._tokenizer,
                kind=self.kind,
                chat_templates=self._template_texts,
                longest_token_bytes=self.longest_token_bytes,
            )

    @functools.cached_property
    def longest_token_bytes(self) -> int | None:
        """Bytes of text that one token may stand for at most; None if this cannot be said of the tokenizer.

        Where a normalizer may shorten text, as NFC does, four times the longest token's.
        """
        if isinstance(self._tokenizer, StoredTokenizer):
            return self._tokenizer.longest_token_bytes
        backend = self._backend
        model = json.loads(backend.to_str())["model"]
        decoder = str(backend.decoder)
        # Other models have one token for an unknown word of any length.
        if model["type"] != "BPE" or not (model.get("byte_fallback") or "ByteLevel" in decoder):
            return None
        # A byte-level token has a character for each byte; others have UTF-8, and a mark of 3 bytes for a space.
        longest = max(len(token.encode()) for token in backend.get_vocab())
        return longest if backend.normalizer is None else 4 * longest

    def encode(self, text: str, limit: int | None = None, special: bool = True) -> list[int]:
        """Token ids of a prompt, with the special tokens the model's tokenizer adds by itself unless not `special`.

        Raises InvalidRequest for a long text whose beginning has more than `limit` tokens already.
        """
        return self._encode(text, special, limit)

    def _encode(self, text: str, special: bool, limit: int | None) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the text is not valid Unicode: {error}") from error
        if limit is not None:
            self._check_beginnings(text, limit)
        return self._token_ids(text, special)

    def _token_ids(self, text: str, special: bool = True) -> list[int]:
        # A batch, unlike a single text, is encoded without the GIL.
        [encoded] = self._backend.encode_batch([text], add_special_tokens=special)
        return list(encoded.ids)

    def _check_beginnings(self, text: str, limit: int) -> None:
        """To encode a text of many megabytes takes long; a beginning of it tells as well that it is too long."""
        size = USUAL_CHARACTERS * limit
        while size < len(text):
            # Where it is cut, a character or word may be more tokens than in the whole.
            count = len(self._token_ids(text[:size], special=False))
            if count > limit + WINDOW_TOKENS:
                raise InvalidRequest(
                    f"the first {size} of {len(text)} characters have {count} tokens already; the prompt may have at "
                    f"most {limit}: shorten it or raise max_model_len"
                )
            size *= 4

    def encode_messages(self, messages: list[Message], limit: int | None = None) -> list[int]:
        """Token ids of a conversation up to the beginning of an answer; see encode_conversation()."""
        return self.encode_conversation(Prompt(messages=messages), limit)[1]

    def encode_conversation(self, prompt: Prompt, limit: int | None = None) -> tuple[str, list[int]]:
        """The text of a prompt's messages, as transformers' apply_chat_template renders it, and its token ids.

        A special token in it is the template's own: what users wrote is encoded as plain text, also where it is the
        text of a special token. A content that is a list of text parts reaches a template that knows only text as their
        lines. Raises InvalidRequest if the model has no chat template, the template refuses the messages, or a part is
        no text; for `limit` see encode().
        """
        messages = prompt.messages or []
        template = self._template_for(prompt)
        if any(isinstance(message.get("content"), list) for message in messages):
            joined = [_with_text(message) for message in messages]
            messages = messages if self._template_takes_parts(template) else joined

        rendered = template.render(
            messages,
            tools=prompt.tools,
            variables=prompt.chat_template_kwargs,
            add_generation_prompt=prompt.add_generation_prompt,
            continue_final_message=prompt.continue_final_message,
        )
        text = rendered.expand(rendered.text)
        if not rendered.plain:
            return text, self._encode(text, False, limit)
        if limit is not None:
            self._check_beginnings(text, limit)
        return text, self._plain_text.encode(rendered)

    def _template_for(self, prompt: Prompt) -> ChatTemplate:
        """The template of a conversation: where a model has several, the one named tool_use is for those with tools."""
        named = self._templates.get(TOOLS) if prompt.tools else None
        template = named or self._templates.get(DEFAULT)
        if template is not None:
            return template
        if self._templates:
            raise InvalidRequest(
                f"messages were given, but of the chat templates of the model's tokenizer "
                f"({', '.join(map(shortened, self._templates))}) none is named {DEFAULT}; send a prompt"
            )
        raise InvalidRequest("messages were given, but the model's tokenizer has no chat template; send a prompt")

    def _chat_templates(self, processes: TemplateProcesses) -> dict[str, ChatTemplate]:
        variables = dict(self._tokenizer.special_tokens_map)
        normalized = NormalizedTokens(self._backend)
        return {
            name: ChatTemplate(text, variables, self._special_ids, processes, normalized)
            for name, text in self._template_texts.items()
        }

    def _template_takes_parts(self, template: ChatTemplate) -> bool:
        """Whether the template looks into a list of parts: tried once, with a part whose text must come out alone."""
        if template not in self._takes_parts:
            text, kind = "some text of a part", "type"
            try:
                rendered = template.render([{"role": "user", "content": [{kind: "text", "text": text}]}]).text
            except InvalidRequest:  # whatever a template refuses, it does not take parts
                rendered = ""
            takes = text in rendered and f"'{kind}'" not in rendered and f'"{kind}"' not in rendered
            self._takes_parts[template] = takes
        return self._takes_parts[template]

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends an answer, as the tokenizer has it: of a chat model, its end of a turn."""
        token_id = self._tokenizer.eos_token_id
        return token_id if isinstance(token_id, int) else None

    def special_token_id(self, text: str) -> int | None:
        """The special token whose text this is."""
        return self._special_ids.get(text)

    def prepare(self) -> None:
        """Make ready what the first conversation would wait for. Raises EngineFault if that cannot be."""
        for template in self._templates.values():
            template.prepare()

    def close(self) -> None:
        """End what renders conversations."""
        for template in self._templates.values():
            template.close()

    def definition(self) -> str:
        """The text of a tokenizer.json that has everything this tokenizer has."""
        backend = type(self._backend).from_str(self._backend.to_str())
        backend.no_padding()
        backend.no_truncation()
        return str(backend.to_str())

    def reasoning_phase(self, prompt: Sequence[int], continues: bool) -> Phase:
        """Whether the answer to a prompt begins with thinking, may begin with it, or does not; see phase_after()."""
        special = self._special - self._reasoning_tags.ids
        return phase_after(prompt, self._reasoning_tags, special, self.decode, continues)

    def grammar_beginning(self, prompt: Sequence[int], continues: bool) -> Beginning:
        """Where the grammar of an answer to `prompt` begins: after its thinking, if the model thinks.

        That is at once if the prompt has closed the thinking, or if the tags are no tokens of their own.
        """
        tags, phase = self._reasoning_tags, self.reasoning_phase(prompt, continues)
        if tags.closing_id is None or phase is Phase.ANSWER:
            return Beginning()
        thinking = phase is Phase.THINKING
        return Beginning(after=tags.closing_id, opens=None if thinking else tags.opening_id, open=thinking)

    def reasoning_splitter(self, phase: Phase) -> ReasoningSplitter:
        """Return what tells the thinking of one completion from its answer."""
        return ReasoningSplitter(self._reasoning_tags, phase)

    def decoder(
        self, skip_special_tokens: bool, prompt: Sequence[int] = (), *, shows_reasoning_tags: bool = False
    ) -> IncrementalDetokenizer:
        """Return a decoder for one completion of `prompt`, whose last tokens may decide how the first new one reads.

        With `shows_reasoning_tags` the tags of thinking have their text also if they are special tokens.
        """
        skipped = self._special if skip_special_tokens else frozenset()
        if shows_reasoning_tags:
            skipped -= self._reasoning_tags.ids
        return IncrementalDetokenizer(self._backend, skipped, prompt[-CONTEXT_TOKENS:])

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included; ids that are no tokens have none."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=False))

    @property
    def kind(self) -> str:
        """The name of transformers' class."""
        stored = isinstance(self._tokenizer, StoredTokenizer)
        return str(self._tokenizer.kind) if stored else type(self._tokenizer).__name__

    @property
    def chat_template(self) -> str | None:
        """The template of conversations, if the model has one."""
        return self._template_texts.get(DEFAULT)

    @property
    def _template_texts(self) -> dict[str, str]:
        """The model's templates by name: it has one, or a list of them, of which transformers knows what each is for.

        A byte-order mark, as editors leave it, is no part of any.
        """
        template = self._tokenizer.chat_template
        named = template if isinstance(template, dict) else {DEFAULT: template}
        texts = {name: text.removeprefix("\ufeff") for name, text in named.items() if isinstance(text, str)}
        return {name: text for name, text in texts.items() if text}

    @property
    def size(self) -> int:
        """Token ids the tokenizer knows; the model's vocabulary may be larger (padded)."""
        return len(self._tokenizer)


def _make(folder: Path) -> Any:
    """Return transformers' tokenizer of a folder. Raises CheckpointError as Tokenizer does."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(  # nosec B615 # a folder of this host: nothing is fetched
            str(folder), config=_default_config(folder), local_files_only=True, trust_remote_code=False
        )
        # What fails with every text fails here. Truncation and padding, which some folders are saved with, end here.
        tokenizer("Probe 1")
    except BaseException as error:
        # tokenizers are written in Rust, whose panic is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise explain_unreadable(folder, error) from error
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"the tokenizer in {folder} has no tokenizer.json (fast) form; save one with "
            f"AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...)"
        )
    return tokenizer


def _default_config(folder: Path) -> Any:
    """Return a configuration of transformers with the folder's model_type and default values; None without one.

    It says which class of tokenizer belongs to the model. transformers would read all of config.json for that, and
    refuse a value of an unusual type that neither a tokenizer nor this engine has a use for (engine/models/spec.py
    checks those that have one).
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    try:
        model_type = read_json_object(folder / "config.json")["model_type"]
        if not (_names_its_class(folder) and model_type in CONFIG_MAPPING):
            return AutoConfig.for_model(model_type)
    except (LoadError, ValueError, KeyError, TypeError):
        return None  # no config.json, or no model_type that is known: the tokenizer's own files have to do

    # The class of that model type would import all that computes with a model, which takes a second.
    config: Any = PretrainedConfig()
    config.model_type = model_type
    return config


def _names_its_class(folder: Path) -> bool:
    """Whether tokenizer_config.json alone names the tokenizer's class, a class of transformers."""
    try:
        named = read_json_object(folder / "tokenizer_config.json")
        return isinstance(named["tokenizer_class"], str) and "auto_map" not in named
    except (LoadError, KeyError):
        return False


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
                f'a content part must be {{"type": "text", "text": "..."}}, this model reads text alone: {shown(part)}'
            )
        texts.append(text)
    return {**message, "content": "\n".join(texts)}


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json, or nothing if the folder has none. Raises CheckpointError if it is no JSON object."""
    path = folder / "generation_config.json"
    if not path.exists():
        return {}
    try:
        return read_json_object(path)
    except LoadError as error:
        raise CheckpointError(str(error)) from error


_UNUSED: dict[str, Any] = {
    "bad_words_ids": None, "begin_suppress_tokens": None, "encoder_repetition_penalty": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "exponential_decay_length_penalty": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "min_length": 0, "min_new_tokens": None, "no_repeat_ngram_size": 0, "num_beams": 1,
    "penalty_alpha": None, "sequence_bias": None, "stop_strings": None, "suppress_tokens": None, "top_h": None,
    "typical_p": 1.0,
}  # fmt: skip
"""Fields of generation_config.json that change what transformers generates and nothing here, and their defaults."""


def unused_fields(generation_config: dict[str, Any]) -> str:
    """Return in words what a generation_config asks for and does not get; empty if there is nothing."""
    asked = [name for name, default in _UNUSED.items() if generation_config.get(name) not in (None, default)]
    values = ", ".join(f"{name}={shown(generation_config[name])}" for name in asked)
    return f"; it gives what is not used: {values}" if values else ""
