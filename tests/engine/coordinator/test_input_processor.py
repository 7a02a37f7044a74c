"""InputProcessor: defaults from request, configuration and generation_config, and what never gets as far as a step."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from phalanx import CheckpointError, EngineConfig, InvalidRequest, SamplingParams
from phalanx.engine.coordinator.input_processor import InputProcessor, sampling_defaults
from phalanx.engine.models.spec import ModelSpec, RopeSpec
from phalanx.engine.protocol.messages import Detokenize, Detokenized, Prompt, Submit, Tokenize, Tokenized
from phalanx.engine.scheduling.step_plan import SlotSampling, SlotStart, StepPlan, encode

SPEC = ModelSpec(
    architecture="Qwen2ForCausalLM", vocab_size=100, hidden_size=8, intermediate_size=8, num_layers=1,
    num_query_heads=2, num_kv_heads=1, head_dim=4, rms_norm_eps=1e-6, max_position=64, rope=RopeSpec(),
    tied_embeddings=True, eos_token_ids=(7,),
)  # fmt: skip


class _Words:
    """A tokenizer that knows numbers; the last one is outside the model's vocabulary. 91 is the special token <end>."""

    longest_token_bytes: int | None = 3

    def __init__(self, eos_token_id: int | None = None) -> None:
        self.eos_token_id = eos_token_id

    def special_token_id(self, text: str) -> int | None:
        return {"<end>": 91, "<beyond>": 100}.get(text)

    def encode(self, text: str, limit: int | None = None, special: bool = True) -> list[int]:
        return [int(word) for word in text.split()] + [9] * (not special)

    def encode_conversation(self, prompt: Prompt, limit: int | None = None) -> tuple[str, list[int]]:
        tokens = self.encode_messages(prompt.messages or [], limit)
        return " ".join(map(str, tokens)), tokens

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(map(str, token_ids))

    @property
    def token_bytes(self) -> list[bytes]:
        return [str(token).encode() for token in range(100)]

    def encode_messages(self, messages: list[dict[str, Any]], limit: int | None = None) -> list[int]:
        return [3, *(token for message in messages for token in self.encode(message["content"])), 4]


def _processor(generation: dict[str, Any] | None = None, eos: int | None = None, **config: Any) -> InputProcessor:
    values = {"model": "m", "max_num_seqs": 4, "max_num_batched_tokens": 8, **config}
    return InputProcessor(EngineConfig.from_dict(values), SPEC, _Words(eos), generation or {}, 32)  # type: ignore[arg-type]


def _process(processor: InputProcessor, **fields: Any) -> Any:
    return processor.process(Submit(id="a", **{"token_ids": [5], **fields}), "inner", 1.5)


def _sampling(processor: InputProcessor, **fields: Any) -> SlotSampling:
    sampling = _process(processor, sampling=SamplingParams(**fields)).samplings[0]
    assert isinstance(sampling, SlotSampling)
    return sampling


SAMPLES = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}


def test_a_request_comes_before_the_configuration_and_that_before_generation_config() -> None:
    processor = _processor(SAMPLES, sampling={"top_k": 30, "top_p": 0.9})
    sampling = _sampling(processor, top_p=0.95)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 30, 0.95)
    assert sampling.repetition_penalty == 1.05


def test_of_a_prompt_that_is_truncated_the_end_is_kept_however_long_it_is() -> None:
    processor = _processor()
    words = " ".join(map(str, range(90)))
    long = Submit(id="a", prompt=words, truncate_prompt_tokens=3)
    processor.check_bytes(long, len(words))
    assert processor.process(long, "inner", 1.5).prompt == [87, 88, 89]
    chat = [{"role": "user", "content": words}]
    truncated: dict[str, Any] = {"token_ids": None, "messages": chat, "truncate_prompt_tokens": 2}
    assert _process(processor, **truncated).prompt == [89, 4]
    assert _process(processor, token_ids=[1, 2], truncate_prompt_tokens=5).prompt == [1, 2]
    answer = processor.answer(Tokenize(id="a", prompt=words, truncate_prompt_tokens=1))
    assert isinstance(answer, Tokenized)
    assert (answer.token_ids, answer.token_bytes) == ([89], [b"89"])
    with pytest.raises(InvalidRequest, match="truncate_prompt_tokens=0 is out of range"):
        _process(processor, truncate_prompt_tokens=0)


def test_an_explicit_zero_or_one_is_a_value_and_no_absence() -> None:
    sampling = _sampling(_processor(SAMPLES), temperature=0, top_k=0, top_p=1.0, repetition_penalty=1.0)
    assert sampling == SlotSampling(seed=sampling.seed, end_token_ids=(7,))


def test_generation_config_is_greedy_unless_it_samples() -> None:
    assert sampling_defaults({"temperature": 0.7, "top_p": 0.8}) == {}
    assert sampling_defaults({"do_sample": True}) == {"temperature": 1.0}
    assert sampling_defaults({"max_new_tokens": 9, "repetition_penalty": 1.0}) == {"max_tokens": 9}


def test_a_server_gives_what_generation_config_states_even_where_that_does_not_sample() -> None:
    assert _processor().server_defaults == {}
    assert _processor({"temperature": 0.7, "top_k": 20}).server_defaults == {"temperature": 0.7, "top_k": 20.0}
    assert _processor({"temperature": 0.7}, sampling={"temperature": 0}).server_defaults == {"temperature": 0.0}
    with pytest.raises(CheckpointError, match=r"^generation_config.json: top_p=0"):
        _processor({"top_p": 0})


def test_max_tokens_falls_back_to_generation_config_and_then_to_the_context() -> None:
    assert _process(_processor({"max_new_tokens": 9})).max_tokens == 9
    assert _process(_processor({"max_new_tokens": 9}, sampling={"max_tokens": 5})).max_tokens == 5
    assert _process(_processor()).max_tokens == 32


def test_a_stop_string_that_is_a_special_token_stops_at_that_token() -> None:
    request = _process(_processor(), sampling=SamplingParams(stop=("<end>", "<beyond>", "text"), stop_token_ids=(5,)))
    assert request.stop_token_ids == {5, 91}
    assert request.samplings[0].end_token_ids == (5, 7, 91)


@pytest.mark.parametrize(
    ("field", "value", "sample"),
    [
        ("eos_token_id", 258.0, None),
        ("eos_token_id", ["258"], None),
        ("eos_token_id", [None], None),
        ("eos_token_id", [True], None),
        ("eos_token_id", -1, None),
        ("eos_token_id", {"a": 1}, None),
        ("temperature", -0.5, True),
        ("temperature", float("nan"), True),
        ("temperature", [1], True),
        ("top_k", 1.5, True),
        ("top_p", 0, True),
        ("min_p", "0.1", True),
        ("repetition_penalty", 0.0, None),
        ("max_new_tokens", 0, None),
        ("max_new_tokens", 1e9, None),
        ("do_sample", "yes", "yes"),
    ],
)
def test_what_no_request_may_ask_a_generation_config_may_not_either(field: str, value: Any, sample: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"^generation_config.json: {field}="):
        _processor({field: value, "do_sample": sample})


def test_a_generation_configs_zero_is_a_value() -> None:
    assert sampling_defaults({"do_sample": True, "temperature": 0, "top_k": 0}) == {"temperature": 0, "top_k": 0}


def test_end_of_sequence_comes_from_generation_config_if_it_names_any() -> None:
    assert _process(_processor()).eos_token_ids == {7}
    assert _process(_processor({"eos_token_id": [8, 9]})).eos_token_ids == {8, 9}
    # A chat's fine-tuning may have changed the tokenizer's alone; what is outside the vocabulary is never sampled.
    assert _process(_processor({"eos_token_id": 8}, eos=9)).eos_token_ids == {8, 9}
    assert _process(_processor({"eos_token_id": [8, 100]}, eos=101)).eos_token_ids == {8}
    ignoring = _process(_processor(), sampling=SamplingParams(ignore_eos=True, stop_token_ids=(5,)))
    assert (ignoring.eos_token_ids, ignoring.stop_token_ids) == (set(), {5})
    assert ignoring.samplings[0].end_token_ids == (5,)


def test_completions_and_unseeded_requests_have_seeds_of_their_own_and_equal_seeds_agree() -> None:
    processor = _processor()
    seeded = [_process(processor, sampling=SamplingParams(seed=3, n=3)).samplings for _ in range(2)]
    assert [s.seed for s in seeded[0]] == [s.seed for s in seeded[1]]
    assert len({s.seed for s in seeded[0]}) == 3
    drawn = [_sampling(processor).seed for _ in range(5)]
    assert len(set(drawn)) == 5
    again = _processor()
    assert [_sampling(again).seed for _ in range(5)] == drawn
    assert _sampling(_processor(seed=1)).seed != drawn[0]


def test_prompt_logprobs_are_computed_for_the_first_completion_alone() -> None:
    request = _process(_processor(), sampling=SamplingParams(n=3, prompt_logprobs=2))
    assert [sampling.prompt_logprobs for sampling in request.samplings] == [2, -1, -1]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"token_ids": None}, "exactly one of prompt, messages and token_ids must be given; got none"),
        ({"prompt": "5"}, "got prompt, token_ids"),
        ({"token_ids": []}, "the token_ids is empty"),
        ({"token_ids": None, "prompt": ""}, "the prompt is empty"),
        ({"token_ids": None, "messages": []}, "the messages is empty"),
        ({"token_ids": [5, 100]}, r"token_ids holds 100, .*0 to 99"),
        ({"token_ids": [-1]}, "token_ids holds -1"),
        ({"token_ids": None, "prompt": "5 100"}, "prompt holds 100"),
        ({"token_ids": None, "messages": [{"content": "100"}]}, "messages holds 100"),
        ({"token_ids": [5] * 32}, "the prompt has 32 tokens; with max_model_len=32 it may have at most 31"),
        ({"sampling": SamplingParams(n=5)}, "n=5 is above max_num_seqs=4"),
        ({"sampling": SamplingParams(stop_token_ids=(100,))}, "stop_token_ids holds 100"),
        ({"sampling": SamplingParams(logit_bias={100: 1})}, "logit_bias holds 100"),
        ({"token_ids": None, "prompt": "\udc80"}, "the prompt is not valid Unicode text"),
        ({"cache_salt": "\udc80"}, "the cache_salt is not valid Unicode text"),
        ({"token_ids": "five"}, r"ill-typed.*token_ids"),
        ({"token_ids": [5, "6"]}, r"ill-typed.*token_ids\[1\]"),
        ({"token_ids": [5.0]}, r"ill-typed.*token_ids\[0\]"),
        ({"token_ids": None, "prompt": 5}, r"ill-typed.*prompt"),
        ({"token_ids": None, "messages": "hello"}, r"ill-typed.*messages"),
        ({"token_ids": None, "messages": ["hello"]}, r"ill-typed.*messages\[0\]"),
        ({"token_ids": None, "messages": {"role": "user"}}, r"ill-typed.*messages"),
        ({"priority": "high"}, r"ill-typed.*priority"),
        ({"cache_salt": None}, r"ill-typed.*cache_salt"),
        ({"sampling": {"n": 1, "top_p": 3}}, r"ill-typed.*top_p=3"),
    ],
)
def test_what_cannot_run_is_refused_by_value_range_and_setting(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        _process(_processor(), **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 10**30},
        {"min_tokens": 10**30},
        {"presence_penalty": np.float64(0.5)},
        {"frequency_penalty": np.float64(0.5), "temperature": np.float64(1.5), "top_p": np.float64(0.5)},
        {"logit_bias": {5: np.float64(0.5)}},
    ],
)
def test_every_accepted_value_fits_the_plan_that_carries_it(fields: dict[str, Any]) -> None:
    start = SlotStart(0, 1, [5], _sampling(_processor(), **fields))
    plan = StepPlan(0, [start], [], [], [], [], [], [], [], [], 0, [])
    assert msgspec.msgpack.decode(encode(plan), type=StepPlan).starts == [start]


def test_bad_words_are_meant_with_and_without_a_space_before_them() -> None:
    class Letters(_Words):
        def encode(self, text: str, limit: int | None = None, special: bool = True) -> list[int]:
            assert not special
            return [{"a": 1, " a": 2}[text]]

    config = EngineConfig.from_dict({"model": "m", "max_num_seqs": 4, "max_num_batched_tokens": 8})
    processor = InputProcessor(config, SPEC, Letters(), {}, 32)  # type: ignore[arg-type]
    assert _sampling(processor, bad_words=("a",)).bad_words == ((1,), (2,))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"allowed_token_ids": (100,)},
            "allowed_token_ids holds 100, which is outside the model's vocabulary: 0 to 99",
        ),
        ({"allowed_token_ids": (7,), "min_tokens": 2}, "no token is left to choose from"),
        ({"bad_words": ("5",), "allowed_token_ids": (5, 9)}, "no token is left to choose from"),
        ({"bad_words": ("100",)}, "bad_words holds '100', which is no token of the model"),
    ],
)
def test_a_choice_of_no_token_is_refused(fields: dict[str, Any], words: str) -> None:
    class Plain(_Words):
        def encode(self, text: str, limit: int | None = None, special: bool = True) -> list[int]:
            return [int(text) if text[0] != " " else 9]

    config = EngineConfig.from_dict({"model": "m", "max_num_seqs": 4, "max_num_batched_tokens": 8})
    with pytest.raises(InvalidRequest, match=words):
        _sampling(InputProcessor(config, SPEC, Plain(), {}, 32), **fields)  # type: ignore[arg-type]


def test_text_is_tokenized_and_tokens_are_text_again() -> None:
    processor = _processor()
    tokenized = processor.answer(Tokenize(id="a", prompt="5 6"))
    assert tokenized == Tokenized(id="a", token_ids=[5, 6], text="5 6", token_bytes=[b"5", b"6"])
    assert processor.answer(Tokenize(id="a", prompt="5", add_special_tokens=False)).token_ids == [5, 9]  # type: ignore[union-attr]
    chat = processor.answer(Tokenize(id="a", messages=[{"role": "user", "content": "5"}]))
    assert chat == Tokenized(id="a", token_ids=[3, 5, 4], text="3 5 4", token_bytes=[b"3", b"5", b"4"])
    assert processor.answer(Tokenize(id="a", token_ids=[8])).text is None  # type: ignore[union-attr]
    assert processor.answer(Tokenize(id="a", prompt="")).token_ids == []  # type: ignore[union-attr]
    assert processor.answer(Detokenize(id="a", token_ids=[5, 6])) == Detokenized(id="a", text="5 6")
    for question in (
        Tokenize(id="a"),
        Tokenize(id="a", prompt="5", token_ids=[5]),
        Tokenize(id="a", token_ids=[100]),
        Detokenize(id="a", token_ids=[-1]),
        Detokenize(id="a", token_ids=["5"]),  # type: ignore[list-item]
    ):
        with pytest.raises(InvalidRequest):
            processor.answer(question)


def test_priorities_that_clients_may_not_choose_are_ignored_and_the_log_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = EngineConfig.from_dict({"model": "m", "max_num_seqs": 4, "max_num_batched_tokens": 8})
    processor = InputProcessor(config, SPEC, _Words(), {}, 32, keeps_priorities=False)  # type: ignore[arg-type]
    assert [_process(processor, priority=priority).priority for priority in (0, -3, 5)] == [0, 0, 0]
    assert [record.getMessage().split(",")[0] for record in caplog.records] == ["a request's priority=-3 is ignored"]
    assert _process(_processor(), priority=-3).priority == -3


def test_seeds_that_are_given_as_requests_arrive_are_those_that_they_would_get_one_after_the_other() -> None:
    alone, side_by_side = _processor(), _processor()
    submits = [Submit(id=str(number), token_ids=[5], sampling=SamplingParams(n=2)) for number in range(3)]
    expected = [alone.process(submit, submit.id, 0.0).samplings for submit in submits]
    seeds = [side_by_side.next_seed(submit) for submit in submits]
    for submit, seed, samplings in reversed(list(zip(submits, seeds, expected, strict=True))):
        assert side_by_side.process(submit, submit.id, 0.0, seed).samplings == samplings


def test_a_request_with_a_seed_of_its_own_changes_no_other_requests_seed() -> None:
    one, other = _processor(), _processor()
    assert one.next_seed(Submit(id="a", sampling=SamplingParams(seed=7))) is None
    assert one.next_seed(Submit(id="b")) == other.next_seed(Submit(id="b"))
    assert _sampling(one, seed=7) == _sampling(other, seed=7)


def test_text_of_more_bytes_than_can_ever_fit_is_refused_by_the_bound() -> None:
    processor = _processor()
    processor.check_bytes(Submit(id="a", prompt="x"), 96)
    processor.check_bytes(Submit(id="a", token_ids=[1] * 40), 320)  # counted in tokens
    words = (
        "begins with more than 96 bytes of text; with max_model_len=32 .* no token has more than 3: shorten it or raise"
    )
    with pytest.raises(InvalidRequest, match=words):
        processor.check_bytes(Submit(id="a", prompt="x"), 97)
