"""From a Submit to a request the scheduler takes: defaults resolved, text encoded, everything checked."""

from __future__ import annotations

import itertools
import logging
from functools import partial
from typing import Any

import msgspec

from ...kernels.sampling import derive_seed
from ...parallel.loading.json_files import shortened, shown
from ..config import EngineConfig
from ..constraints.compiler import GrammarCompiler
from ..constraints.matcher import Matcher
from ..errors import CheckpointError, InvalidRequest, prompt_too_long
from ..models.spec import ModelSpec
from ..protocol.messages import Detokenize, Detokenized, Prompt, Resume, Submit, Tokenize, Tokenized
from ..protocol.sampling_params import SamplingParams
from ..scheduling.request import Request
from ..scheduling.step_plan import SlotSampling
from .resumed import resumed_outputs
from .tokenizer import Tokenizer, unused_fields

_log = logging.getLogger(__name__)

TOKENIZE_LIMIT = 1 << 20
"""Tokens of a text that is only to be tokenized, or of which only the end is kept, about as many at most."""
INHERITED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class InputProcessor:
    """Turns client messages into requests; a bad one raises InvalidRequest and touches nothing else."""

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        tokenizer: Tokenizer | None,
        generation_config: dict[str, Any],
        max_model_len: int,
        keeps_priorities: bool = True,
    ) -> None:
        """`keeps_priorities` says whether a request's own priority counts; otherwise all have priority 0."""
        self._keeps_priorities = keeps_priorities
        self._config = config
        self._spec = spec
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._generation = sampling_defaults(generation_config)
        self._stated = stated_defaults(generation_config)
        self._unused = unused_fields(generation_config)
        self.eos_token_ids = _eos_token_ids(generation_config, spec, tokenizer)
        self._unseeded = itertools.count()
        self._grammars: GrammarCompiler | None = None
        if tokenizer is not None:
            eos = self.eos_token_ids[0] if self.eos_token_ids else None
            self._grammars = GrammarCompiler(partial(Tokenizer.definition, tokenizer), spec.vocab_size, eos)
        self._told_of_priorities = False

    @property
    def defaults_report(self) -> str:
        """In words: what requests get that leave a field unset."""
        values = ", ".join(f"{name}={value}" for name, value in self._generation.items())
        given = f"generation_config defaults applied where a request and sampling.* leave a field unset: {values}"
        none = "generation_config gives no sampling defaults: requests are greedy unless they say otherwise"
        return (given if values else none) + self._unused

    @property
    def server_defaults(self) -> dict[str, float]:
        """What a server gives to requests that leave a field of INHERITED unset; without an entry the field's default.

        As in vLLM's server, generation_config counts whatever its do_sample says: who sends no temperature over HTTP
        expects an answer that is sampled.
        """
        values = {name: _first(getattr(self._config.sampling, name), self._stated.get(name)) for name in INHERITED}
        return {name: float(value) for name, value in values.items() if value is not None}

    def next_seed(self, submit: Submit) -> int | None:
        """Return the seed of a request that names none, by the order of the calls; None for one that does.

        Requests are encoded side by side; called as they arrive, this makes their draws depend on that order alone.
        """
        if not isinstance(submit.sampling, SamplingParams) or submit.sampling.seed is not None:
            return None
        return derive_seed(self._config.seed, next(self._unseeded))

    def check_bytes(self, submit: Submit, size: int) -> None:
        """Raise InvalidRequest for `size` bytes of text that are too many for max_model_len, however it is encoded."""
        if submit.truncate_prompt_tokens is not None:
            return
        longest = None if self._tokenizer is None else self._tokenizer.longest_token_bytes
        if longest is None or submit.token_ids is not None or size <= self._max_model_len * longest:
            return
        raise InvalidRequest(
            f"the request begins with more than {self._max_model_len * longest} bytes of text; with "
            f"max_model_len={self._max_model_len} more can never fit, as no token has more than {longest}: shorten it "
            f"or raise max_model_len"
        )

    def process(self, submit: Submit, request_id: str, arrived_at: float, seed: int | None = None) -> Request:
        """Resolve, encode and check one request; without a seed of its own it gets `seed`, or else the next.

        Any thread may call it. Raises InvalidRequest naming the value, the range and the setting.
        """
        _check_types(submit)
        params = submit.sampling
        if params.n > self._config.max_num_seqs:
            raise InvalidRequest(
                f"n={params.n} is above max_num_seqs={self._config.max_num_seqs}: ask for at most "
                f"{self._config.max_num_seqs} completions, or raise max_num_seqs"
            )

        self._check_vocabulary(params)
        limit = self._max_model_len - 1
        _, prompt = self._encode(submit, limit)
        if not prompt:
            raise InvalidRequest(f"the {_given(submit)} is empty: it must hold at least 1 token")
        if len(prompt) > limit:
            raise prompt_too_long(len(prompt), self._max_model_len)

        # What may take long, a grammar, comes after all that may be refused at once.
        bad_words = self._bad_words(params.bad_words)
        eos = frozenset() if params.ignore_eos else frozenset(self.eos_token_ids)
        stops = frozenset(params.stop_token_ids) | self._special_tokens(params.stop)
        seed = params.seed if params.seed is not None else seed
        seed = derive_seed(self._config.seed, next(self._unseeded)) if seed is None else seed
        max_tokens = _first(params.max_tokens, self._config.sampling.max_tokens, self._generation.get("max_tokens"))

        outputs = []
        if submit.resume is not None:
            outputs = resumed_outputs(submit.resume, params.n, len(prompt), self._max_model_len, self._check_tokens)
        resume = submit.resume or Resume(completions=[])
        arrived_at -= resume.age_s
        samplings = self._samplings(params, seed, tuple(sorted(eos | stops)), bad_words)
        return Request(
            id=request_id,
            prompt=prompt,
            samplings=samplings,
            constraints=self._constraints(submit, prompt, samplings),
            max_tokens=int(max_tokens) if max_tokens is not None else self._max_model_len,
            eos_token_ids=eos,
            stop_token_ids=stops,
            priority=self._priority(submit),
            cache_salt=submit.cache_salt,
            seed=seed,
            arrived_at=arrived_at,
            outputs=outputs,
            first_token_at=None if resume.ttft_s is None else arrived_at + resume.ttft_s,
            cached_before=resume.cached_tokens,
        )

    def prepare(self) -> None:
        """Make ready what the first conversation and the first request with a grammar would wait for."""
        if self._tokenizer is not None:
            self._tokenizer.prepare()
        if self._grammars is not None:
            self._grammars.prepare()

    def close(self) -> None:
        """End what was made ready. No request is processed any more."""
        if self._tokenizer is not None:
            self._tokenizer.close()

    def _constraints(self, submit: Submit, prompt: list[int], samplings: list[SlotSampling]) -> tuple[Matcher, ...]:
        """A matcher for each completion of a request that says what its answers must match."""
        if submit.structured is None:
            return ()
        if self._grammars is None:
            raise InvalidRequest("structured needs a tokenizer, and the engine was started without one")
        grammar = self._grammars.compile(submit.structured)
        beginning = None
        if submit.split_reasoning and self._tokenizer is not None:
            beginning = self._tokenizer.grammar_beginning(prompt, submit.continue_final_message)
        matchers = tuple(grammar.matcher(sampling.end_token_ids, beginning) for sampling in samplings)

        # The first masks are made here, so that no step waits for them; a resumed request has tokens to take in first.
        for matcher in matchers:
            if submit.resume is None:
                matcher.make_mask()
            else:
                matcher.defer()
        return matchers

    def answer(self, question: Tokenize | Detokenize) -> Tokenized | Detokenized:
        """Answer a question about text. Raises InvalidRequest as process() does."""
        _check_types(question)
        if isinstance(question, Detokenize):
            self._check_tokens("token_ids", question.token_ids)
            if self._tokenizer is None:
                raise InvalidRequest("the engine was started without a tokenizer: it knows no text of token ids")
            return Detokenized(id=question.id, text=self._tokenizer.decode(question.token_ids))

        text, tokens = self._encode(question, TOKENIZE_LIMIT)
        token_bytes = [self._tokenizer.token_bytes[token] if self._tokenizer else b"" for token in tokens]
        return Tokenized(id=question.id, token_ids=tokens, text=text, token_bytes=token_bytes)

    def _priority(self, submit: Submit) -> int:
        if self._keeps_priorities or not submit.priority:
            return submit.priority
        if not self._told_of_priorities:
            self._told_of_priorities = True
            _log.warning(
                "a request's priority=%d is ignored, as client_priorities=%s has it: all run in the order in which "
                "they came; client_priorities=always honours what clients ask",
                submit.priority,
                self._config.client_priorities,
            )
        return 0

    def _special_tokens(self, stops: tuple[str, ...]) -> frozenset[int]:
        """The ids of stop strings that are special tokens: where these are left out of the text, none would show."""
        if self._tokenizer is None:
            return frozenset()
        found = (self._tokenizer.special_token_id(text) for text in stops)
        return frozenset(token for token in found if token is not None and token < self._spec.vocab_size)

    def _encode(self, prompt: Prompt, limit: int) -> tuple[str | None, list[int]]:
        """The text of a prompt, None for token ids, and its token ids: those that are kept of it."""
        given = _given(prompt)
        kept = prompt.truncate_prompt_tokens
        if kept is not None:
            if kept < 1:
                raise InvalidRequest(f"truncate_prompt_tokens={kept} is out of range: it must be at least 1")
            limit = TOKENIZE_LIMIT
        text: str | None = None
        if prompt.token_ids is not None:
            tokens = list(prompt.token_ids)
        elif self._tokenizer is None:
            raise InvalidRequest(f"{given} needs a tokenizer, and the engine was started without one: send token_ids")
        elif prompt.prompt is not None:
            text = prompt.prompt
            tokens = self._tokenizer.encode(text, limit, special=prompt.add_special_tokens)
        else:
            text, tokens = self._tokenizer.encode_conversation(prompt, limit) if prompt.messages else ("", [])

        self._check_tokens(given, tokens)
        return text, tokens if kept is None else tokens[-kept:]

    def _bad_words(self, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """The token ids of each bad word, without and with a space before it."""
        if not words:
            return ()
        if self._tokenizer is None:
            raise InvalidRequest("bad_words needs a tokenizer, and the engine was started without one")

        found: dict[tuple[int, ...], None] = {}
        for word in words:
            for space in ("", " "):
                token_ids = tuple(self._tokenizer.encode(space + word.lstrip(), special=False))
                if not token_ids or max(token_ids) >= self._spec.vocab_size:
                    raise InvalidRequest(f"bad_words holds {word!r}, which is no token of the model")
                found[token_ids] = None
        return tuple(found)

    def _check_choice(self, sampling: SlotSampling) -> None:
        """Raise InvalidRequest if the fields that forbid tokens leave none for the first place."""
        allowed = set(sampling.allowed_token_ids or range(self._spec.vocab_size))
        allowed -= {word[0] for word in sampling.bad_words if len(word) == 1}
        if sampling.min_tokens:
            allowed -= set(sampling.end_token_ids)
        if not allowed:
            raise InvalidRequest(
                "no token is left to choose from: allowed_token_ids must hold one that neither bad_words nor, before "
                "min_tokens, the ends of an answer forbid"
            )

    def _samplings(
        self, params: SamplingParams, seed: int, end_token_ids: tuple[int, ...], bad_words: tuple[tuple[int, ...], ...]
    ) -> list[SlotSampling]:
        values = {
            name: _first(getattr(params, name), getattr(self._config.sampling, name), self._generation.get(name))
            for name in INHERITED
        }

        bias = sorted((params.logit_bias or {}).items())
        samplings = [
            SlotSampling(
                temperature=float(_first(values["temperature"], 0.0)),
                top_k=min(max(0, int(_first(values["top_k"], 0))), self._spec.vocab_size),
                top_p=float(_first(values["top_p"], 1.0)),
                min_p=float(_first(values["min_p"], 0.0)),
                repetition_penalty=float(_first(values["repetition_penalty"], 1.0)),
                presence_penalty=float(params.presence_penalty),
                frequency_penalty=float(params.frequency_penalty),
                seed=derive_seed(seed, index),
                min_tokens=min(params.min_tokens, self._max_model_len),
                end_token_ids=end_token_ids,
                bias_token_ids=tuple(token for token, _ in bias),
                bias_values=tuple(float(value) for _, value in bias),
                logprobs=-1 if params.logprobs is None else params.logprobs,
                prompt_logprobs=-1 if params.prompt_logprobs is None or index else params.prompt_logprobs,
                processed_logprobs=params.logprobs_mode == "processed",
                bad_words=bad_words,
                allowed_token_ids=tuple(sorted(set(params.allowed_token_ids or ()))),
            )
            for index in range(params.n)
        ]
        if params.allowed_token_ids:
            self._check_choice(samplings[0])
        return samplings

    def _check_vocabulary(self, params: SamplingParams) -> None:
        self._check_tokens("stop_token_ids", list(params.stop_token_ids))
        self._check_tokens("allowed_token_ids", list(params.allowed_token_ids or ()))
        self._check_tokens("logit_bias", list(params.logit_bias or ()))

    def _check_tokens(self, name: str, token_ids: list[int]) -> None:
        size = self._spec.vocab_size
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= size):
            bad = next(token for token in token_ids if not 0 <= token < size)
            raise InvalidRequest(f"{name} holds {shown(bad)}, which is outside the model's vocabulary: 0 to {size - 1}")


def _given(prompt: Prompt) -> str:
    """Which of its three forms a prompt has. Raises InvalidRequest unless it has exactly one."""
    given = [name for name in ("prompt", "messages", "token_ids") if getattr(prompt, name) is not None]
    if len(given) != 1:
        raise InvalidRequest(
            f"exactly one of prompt, messages and token_ids must be given; got {', '.join(given) or 'none'}"
        )
    return given[0]


def _check_types(command: Submit | Tokenize | Detokenize) -> None:
    """A client in this process is not held to the protocol's types by a wire; what is wrong must not reach a step."""
    kind = type(command)
    try:
        msgspec.convert({"type": kind.__struct_config__.tag, **msgspec.structs.asdict(command)}, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise InvalidRequest(f"the request is ill-typed: {error}") from error
    for name in ("prompt", "cache_salt"):
        try:
            (getattr(command, name, None) or "").encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the {name} is not valid Unicode text: {error}") from error


def sampling_defaults(generation_config: dict[str, Any]) -> dict[str, Any]:
    """The sampling fields a generation_config sets. As in transformers, it is greedy unless do_sample is true.

    Raises CheckpointError naming the field for what no request may ask either.
    """
    sample = generation_config.get("do_sample")
    if not isinstance(sample, bool | None):
        raise _bad_generation_config("do_sample", sample, "must be true or false")

    names = {"repetition_penalty": "repetition_penalty", "max_tokens": "max_new_tokens"}
    if sample:
        names |= {name: name for name in ("temperature", "top_k", "top_p", "min_p")}
    defaults = {name: generation_config.get(there) for name, there in names.items()}
    if sample and defaults["temperature"] is None:
        defaults["temperature"] = 1.0

    for name, value in defaults.items():
        _check_default(name, names[name], value)
    if defaults["repetition_penalty"] == 1.0:
        del defaults["repetition_penalty"]
    return {name: value for name, value in defaults.items() if value is not None}


def stated_defaults(generation_config: dict[str, Any]) -> dict[str, Any]:
    """What a generation_config says of the fields in INHERITED, whether or not it samples.

    Raises CheckpointError naming the field for what no request may ask either.
    """
    stated = {name: value for name in INHERITED if (value := generation_config.get(name)) is not None}
    for name, value in stated.items():
        _check_default(name, name, value)
    return stated


def _check_default(name: str, field: str, value: object) -> None:
    try:
        SamplingParams.from_dict({name: value})
    except InvalidRequest as error:
        raise _bad_generation_config(field, value, str(error)) from error


def _bad_generation_config(field: str, value: object, why: str) -> CheckpointError:
    return CheckpointError(f"generation_config.json: {field}={shown(value)}: {shortened(why)}")


def _eos_token_ids(generation_config: dict[str, Any], spec: ModelSpec, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The ids of generation_config, or else of config, and the tokenizer's own, which a chat's fine-tuning may have
    changed alone. An id outside the vocabulary is left out: it is never sampled."""
    eos = generation_config.get("eos_token_id")
    named = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in named):
        raise _bad_generation_config("eos_token_id", eos, "must be a token id or a list of token ids")

    all_ids = list(spec.eos_token_ids) if eos is None else named
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        all_ids.append(tokenizer.eos_token_id)
    return tuple(token for token in dict.fromkeys(all_ids) if token < spec.vocab_size)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
