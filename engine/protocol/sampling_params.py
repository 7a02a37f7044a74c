"""What a request may ask of the sampler, and what each value must be."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import re
import sys
from collections.abc import Iterable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

import msgspec

from ...parallel.loading.json_files import shown
from ..errors import InvalidRequest

LOGPROBS_LIMIT = 20
SEED_LIMIT = 2**63 - 1
N_LIMIT = 16384
"""Completions of one prompt at most, whatever max_num_seqs is."""
STOP_LIMIT = 64
"""Stop strings of a request at most."""
BAD_WORDS_LIMIT = 128
"""Bad words of a request at most."""
TEXT_LIMIT = 1024
"""Characters of a stop string or a bad word at most."""
IDS_LIMIT = 1024
"""Entries of logit_bias, and of stop_token_ids, at most."""
ALLOWED_LIMIT = 1 << 20
"""Entries of allowed_token_ids at most."""
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
MAX_FLOAT = sys.float_info.max
REPETITION_PENALTIES = (1e-18, 1e18)
"""Bounds of a repetition_penalty: a logit times it, or divided by it, is a number in float32."""
_LISTS = {
    "stop": STOP_LIMIT,
    "bad_words": BAD_WORDS_LIMIT,
    "stop_token_ids": IDS_LIMIT,
    "allowed_token_ids": ALLOWED_LIMIT,
}


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How to choose and when to stop. A field left at None takes the model's generation_config value, if it has one.

    The order of the sampler is fixed: logit_bias, repetition, presence and frequency penalties, the masks of
    min_tokens, allowed_token_ids and bad_words, temperature, top_k, top_p (over what top_k kept, renormalised), min_p,
    then one draw.
    """

    max_tokens: int | None = None
    """Most new tokens, >= 1. None takes generation_config.max_new_tokens, or else as many as max_model_len allows."""
    min_tokens: int = 0
    """New tokens before end-of-sequence or a stop token id may be chosen, >= 0."""
    temperature: float | None = None
    """0 is greedy. None takes generation_config's if it samples, or else 0."""
    top_k: int | None = None
    """Keep the k likeliest tokens; 0 or -1 keeps all."""
    top_p: float | None = None
    """Keep the smallest set of likeliest tokens whose probability reaches top_p, in (0, 1]."""
    min_p: float | None = None
    """Keep tokens at least min_p times as likely as the likeliest, in [0, 1]."""
    repetition_penalty: float | None = None
    """Divide positive, multiply negative logits of tokens already in prompt or output (CTRL, arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens already in the output, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time it occurs in the output, in [-2, 2]."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of these token ids, each in [-100, 100]."""
    seed: int | None = None
    """The same seed gives the same tokens, whatever the batch or the number of ranks. None: drawn from the engine's."""
    n: int = 1
    """Completions of the same prompt, 1 to max_num_seqs."""
    stop: tuple[str, ...] = ()
    """Text at which to stop: at most 64 strings of at most 1,024 characters. It is not returned unless
    include_stop_str_in_output says so."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids at which to stop, besides the model's end-of-sequence."""
    include_stop_str_in_output: bool = False
    """Return the stop string that ended the text, too."""
    bad_words: tuple[str, ...] = ()
    """Texts whose tokens may not be sampled in this order, at most 128; each is meant with and without a space before
    it."""
    allowed_token_ids: tuple[int, ...] | None = None
    """The only token ids that may be sampled; None allows all."""
    ignore_eos: bool = False
    """Go on past the model's end-of-sequence."""
    logprobs: int | None = None
    """Return the chosen token's log-probability and those of the k likeliest, 0 to 20."""
    prompt_logprobs: int | None = None
    """The same for each prompt token but the first, 0 to 20."""
    logprobs_mode: str = "raw"
    """"raw": of the model's distribution; "processed": after penalties, temperature and truncation."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        # OpenAI's API has null for what is absent.
        for name, default in _defaults():
            value = exact(plain(getattr(self, name)))
            msgspec.structs.force_setattr(self, name, default if value is None else value)

        # Above 64 bits no wire carries a number; all of these mean no limit long before.
        for name in ("max_tokens", "min_tokens", "top_k"):
            value = getattr(self, name)
            if isinstance(value, int) and value > SEED_LIMIT:
                msgspec.structs.force_setattr(self, name, SEED_LIMIT)

        # A list from JSON, any other collection or a single stop string is what users write; a tuple is stored.
        for name, limit in _LISTS.items():
            value = getattr(self, name)
            value = (value,) if isinstance(value, str) and name in ("stop", "bad_words") else listed(value, limit + 1)
            msgspec.structs.force_setattr(self, name, tuple(value) if isinstance(value, list) else value)
        msgspec.structs.force_setattr(self, "logit_bias", _bias(self.logit_bias))
        self._validate()

        # An integer above 64 bits is a number in range, too, and no wire carries it.
        for name in _FLOATS:
            value = getattr(self, name)
            if value is not None:
                msgspec.structs.force_setattr(self, name, float(value))

    def _validate(self) -> None:
        _check_number("max_tokens", self.max_tokens, 1, math.inf, integer=True, optional=True)
        _check_number("min_tokens", self.min_tokens, 0, math.inf, integer=True)
        _check_number("temperature", self.temperature, 0, math.inf, optional=True)
        _check_number("top_k", self.top_k, -1, math.inf, integer=True, optional=True)
        _check_number("top_p", self.top_p, 0, 1, optional=True, open_low=True)
        _check_number("min_p", self.min_p, 0, 1, optional=True)
        _check_number("repetition_penalty", self.repetition_penalty, *REPETITION_PENALTIES, optional=True)
        _check_number("presence_penalty", self.presence_penalty, -2, 2)
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_number("seed", self.seed, -SEED_LIMIT - 1, SEED_LIMIT, integer=True, optional=True)
        _check_number("n", self.n, 1, N_LIMIT, integer=True)
        _check_number("logprobs", self.logprobs, 0, LOGPROBS_LIMIT, integer=True, optional=True)
        _check_number("prompt_logprobs", self.prompt_logprobs, 0, LOGPROBS_LIMIT, integer=True, optional=True)

        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}: "
                f"set min_tokens to at most {self.max_tokens}"
            )
        if self.logprobs_mode not in ("raw", "processed"):
            raise InvalidRequest(f'logprobs_mode={shown(self.logprobs_mode)} is not one of "raw", "processed"')

        self._validate_texts("stop", self.stop, STOP_LIMIT)
        self._validate_texts("bad_words", self.bad_words, BAD_WORDS_LIMIT)
        self._validate_token_ids()

        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequest(f"{name}={shown(getattr(self, name))} must be true or false")

    def _validate_texts(self, name: str, texts: object, limit: int) -> None:
        if not isinstance(texts, tuple) or not all(_is_text(text) for text in texts):
            raise InvalidRequest(
                f"{name}={shown(texts)} must be a string or a list of non-empty strings of valid Unicode"
            )
        if len(texts) > limit:
            raise InvalidRequest(f"{name} holds {len(texts)} strings; it may hold at most {limit}")
        longest = max(map(len, texts), default=0)
        if longest > TEXT_LIMIT:
            raise InvalidRequest(f"{name} holds a string of {longest} characters; each may have at most {TEXT_LIMIT}")

    def _validate_token_ids(self) -> None:
        if not isinstance(self.stop_token_ids, tuple):
            raise InvalidRequest(f"stop_token_ids={shown(self.stop_token_ids)} must be a list of token ids")
        if not isinstance(self.allowed_token_ids, tuple | None) or self.allowed_token_ids == ():
            raise InvalidRequest(
                f"allowed_token_ids={shown(self.allowed_token_ids)} must be a list of token ids that is not empty, or "
                f"null, which allows all"
            )
        if not isinstance(self.logit_bias, dict | None):
            raise _no_bias(self.logit_bias)

        sizes = {"stop_token_ids": IDS_LIMIT, "allowed_token_ids": ALLOWED_LIMIT, "logit_bias": IDS_LIMIT}
        for name, limit in sizes.items():
            entries = getattr(self, name) or ()
            if len(entries) > limit:
                raise InvalidRequest(f"{name} holds {len(entries)} token ids; it may hold at most {limit}")
        for name in ("stop_token_ids", "allowed_token_ids"):
            for token in getattr(self, name) or ():
                _check_number(name, token, 0, SEED_LIMIT, integer=True)
        for token, bias in (self.logit_bias or {}).items():
            _check_number("logit_bias key", token, 0, SEED_LIMIT, integer=True)
            _check_number(f"logit_bias[{shown(token)}]", bias, -100, 100)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SamplingParams:
        """Build from JSON-like data; an unknown field or an ill-typed value raises InvalidRequest naming it.

        A null is as good as no value.
        """
        unknown = sorted(set(values) - set(cls.__struct_fields__))
        if unknown:
            raise InvalidRequest(
                f"unknown sampling field {shown(unknown[0])}; the fields are {', '.join(cls.__struct_fields__)}"
            )
        values = {
            name: _plain_within(listed(plain(value), _LISTS[name] + 1) if name in _LISTS else value)
            for name, value in values.items()
            if value is not None
        }
        if not isinstance(values.get("logit_bias", {}), Mapping):
            raise _no_bias(values["logit_bias"])
        for name in ("stop", "bad_words"):
            if isinstance(values.get(name), str):
                values[name] = [values[name]]
        try:
            return msgspec.convert(values, cls, strict=True, str_keys=True)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"sampling parameters: {error}{_value_at(values, str(error))}") from error
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"sampling parameters: a text is not valid Unicode: {error}") from error


@functools.cache
def _defaults() -> tuple[tuple[str, Any], ...]:
    """The fields and what each is by itself; to ask msgspec takes longer than all checks."""
    return tuple((field.name, field.default) for field in msgspec.structs.fields(SamplingParams))


_PLAIN: dict[type, Any] = {str: str.__str__, int: int.__int__, float: float.__float__}
"""What makes a plain value of a subclass's, whatever that has in the place of these."""


def plain(value: Any) -> Any:
    """Return a number or an array of numpy or torch as Python's number or list; anything else as it is.

    A text or number of a class of its own, such as a template engine's or an enumeration's, becomes a plain one: no
    wire takes another.
    """
    kind = type(value)
    if kind is str or kind is int:
        return value
    for own in (str, int, float):
        if isinstance(value, own) and kind is not own and kind is not bool:
            return _PLAIN[own](value)
    if kind.__module__.partition(".")[0] in ("numpy", "torch") and hasattr(value, "tolist"):
        return value.tolist()
    return value


def listed(value: Any, most: int) -> Any:
    """Return what a collection or an iterator holds as a list or tuple of plain values; anything else as it is.

    Of what is not in memory yet `most` are taken: an iterator may not end, and a range may hold more than memory does.
    A set, whose order is by chance, is sorted. Texts, bytes and mappings are no lists.
    """
    if isinstance(value, str | bytes | bytearray | memoryview | Mapping) or not isinstance(value, Iterable):
        return value
    if isinstance(value, tuple) and set(map(type, value)) <= {int, str}:
        return value  # as it is stored: there may be a million, and each passage of the wire comes by here
    if isinstance(value, set | frozenset):
        value = sorted(value, key=repr)
    return [plain(each) for each in (value if isinstance(value, list | tuple) else itertools.islice(value, most))]


def exact(value: Any) -> Any:
    """Return an exact number of Python's library as a float; anything else as it is."""
    if isinstance(value, Decimal | Fraction):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    return value


def _no_bias(value: object) -> InvalidRequest:
    return InvalidRequest(f"logit_bias={shown(value)} must map token ids to numbers in [-100, 100]")


def _bias(value: Any) -> Any:
    """Return a logit_bias with plain numbers, whose keys may be the text of numbers, as in JSON."""
    if not isinstance(value, Mapping):
        return value
    bias: dict[Any, Any] = {}
    for key, number in value.items():
        token = plain(key)
        if isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 20:
            token = int(token)
        if token in bias:
            raise InvalidRequest(f"logit_bias holds token id {shown(token)} twice, as a number and as text")
        bias[token] = exact(plain(number))
    return bias


def _plain_within(value: Any) -> Any:
    """Return plain() of a value, or of what a list or mapping holds."""
    if isinstance(value, dict):
        return {plain(key): exact(plain(each)) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else exact(plain(value))


def _is_text(value: Any) -> bool:
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: no tokenizer and no wire takes it
        return False
    return True


def _value_at(values: dict[str, Any], message: str) -> str:
    """The value that a msgspec message's path, "... at `$.stop[0]`", leads to: msgspec names its type alone."""
    field = re.search(r"`\$\.(\w+)", message)
    return f"; got {field[1]}={shown(values[field[1]])}" if field else ""


def _check_number(
    name: str,
    value: Any,
    low: float,
    high: float,
    *,
    integer: bool = False,
    optional: bool = False,
    open_low: bool = False,
) -> None:
    if value is None and optional:
        return

    kinds = (int,) if integer else (int, float)
    allowed = f"{'(' if open_low else '['}{low:g}, {'inf)' if high == math.inf else f'{high:g}]'}"
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise InvalidRequest(f"{name}={shown(value)} must be {'an integer' if integer else 'a number'} in {allowed}")
    # "not (a <= b)" rather than "a > b": NaN fails every comparison and must be refused.
    if not (low < value if open_low else low <= value) or not value <= high or not (integer or abs(value) <= MAX_FLOAT):
        raise InvalidRequest(f"{name}={shown(value)} is out of range: it must be in {allowed}")
