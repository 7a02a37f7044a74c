"""Each bad input fails by itself, in words that help, and a request beside it does not notice."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from phalanx import (
    LLM,
    CapacityExceeded,
    CheckpointError,
    ConfigError,
    EngineConfig,
    EngineFault,
    InvalidRequest,
    SamplingParams,
)
from phalanx.engine.protocol.messages import Submit
from phalanx.engine.protocol.sampling_params import REPETITION_PENALTIES
from phalanx.launch.model_files.random_model import make_random_model
from phalanx.tests.engine.conftest import CONFIG
from phalanx.tests.models import TINY_SHAPE, score
from safetensors.torch import load_file, save_file

BESIDE = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


def _beside(llm: LLM) -> list[int]:
    return llm.generate([[5, 6, 7, 8]], BESIDE)[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": 0}, r"max_tokens=0 .*\[1, inf\)"),
        ({"max_tokens": -3}, "max_tokens=-3"),
        ({"min_tokens": 9, "max_tokens": 4}, "min_tokens=9 .*max_tokens=4"),
        ({"temperature": -0.1}, r"temperature=-0.1 .*\[0, inf\)"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_p": 0.0}, r"top_p=0.0 .*\(0, 1\]"),
        ({"top_p": 1.5}, r"top_p=1.5"),
        ({"top_k": -2}, r"top_k=-2 .*\[-1, inf\)"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"min_p": 2}, "min_p=2"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"presence_penalty": 3}, "presence_penalty=3"),
        ({"n": 0}, "n=0"),
        ({"logprobs": 21}, r"logprobs=21 .*\[0, 20\]"),
        ({"logit_bias": {3: 101}}, r"logit_bias\[3\]=101"),
        ({"stop": [""]}, "stop=.*non-empty"),
        ({"stop": 3}, "stop"),
        ({"seed": 2**70}, "seed|Integer"),
        ({"logprobs_mode": "loud"}, "logprobs_mode='loud'"),
        ({"max_tokns": 3}, "unknown sampling field 'max_tokns'.*max_tokens"),
        ({"temperature": "hot"}, "temperature.*'hot'"),
        ({"stop": ["\ud83d"]}, "stop=.*valid Unicode"),
    ],
)
def test_a_sampling_value_out_of_range_is_refused_with_its_name_and_range(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        SamplingParams.from_dict(fields)


@pytest.mark.parametrize(
    ("request_fields", "words"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"token_ids": []}, "token_ids is empty"),
        ({"token_ids": list(range(600))}, "600 tokens.*max_model_len=512.*511"),
        ({"prompt": "long " * 400}, "max_model_len=512"),
        ({"token_ids": [5, 1031]}, "1031.*0 to 1030"),
        ({"token_ids": [-1]}, "-1.*0 to 1030"),
        ({"token_ids": [5], "sampling": SamplingParams(stop_token_ids=(4000,))}, "stop_token_ids.*4000.*1030"),
        ({"token_ids": [5], "sampling": SamplingParams(logit_bias={4000: 1.0})}, "logit_bias.*4000.*1030"),
        ({"token_ids": [5], "sampling": SamplingParams(n=9)}, "n=9.*max_num_seqs=8"),
        ({}, "exactly one of prompt, messages and token_ids"),
        ({"prompt": "a", "token_ids": [5]}, "exactly one of"),
        ({"prompt": "broken \ud800 text"}, "Unicode"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hello"}, "ill-typed.*messages"),
        ({"messages": ["hello"]}, r"ill-typed.*messages\[0\]"),
        ({"token_ids": [5, "6"]}, r"ill-typed.*token_ids\[1\]"),
        ({"token_ids": [5], "cache_salt": "\ud800"}, "cache_salt is not valid Unicode"),
        ({"messages": [{"role": "user"}]}, "messages"),
    ],
)
def test_a_bad_request_fails_alone(llm: LLM, request_fields: dict[str, Any], words: str) -> None:
    alone = _beside(llm)
    beside = llm.submit(Submit(id="beside", token_ids=[5, 6, 7, 8], sampling=BESIDE))
    assert beside is not None
    with pytest.raises(InvalidRequest, match=words):
        list(llm.submit(Submit(id="bad", **request_fields)) or ())
    tokens = [token for event in beside for token in getattr(event, "token_ids", [])]
    assert tokens == alone


@pytest.mark.parametrize("penalty", REPETITION_PENALTIES)
def test_no_request_makes_logits_that_are_no_numbers(tiny: Path, penalty: float) -> None:
    # The smallest temperature divides what the largest penalty has multiplied; the answer is the greedy one.
    greedy = SamplingParams(
        max_tokens=8, temperature=0, repetition_penalty=penalty, logit_bias={5: 100}, ignore_eos=True
    )
    with LLM(str(tiny), **CONFIG) as llm:
        expected = llm.generate([[9, 10]], greedy)[0].outputs[0].token_ids
        for more in ({}, {"top_p": 0.9, "min_p": 0.1}, {"logprobs": 3, "logprobs_mode": "processed"}):
            sampling = msgspec.structs.replace(greedy, temperature=5e-324, **more)
            assert llm.generate([[9, 10]], sampling)[0].outputs[0].token_ids == expected


def test_a_chat_template_that_raises_fails_its_request_alone(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with LLM(str(folder), **CONFIG) as llm:
        with pytest.raises(InvalidRequest, match="roles must alternate"):
            llm.chat([{"role": "user", "content": "hi"}])
        assert len(_beside(llm)) == 24


def test_messages_without_a_chat_template_are_refused(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with LLM(str(folder), **CONFIG) as llm, pytest.raises(InvalidRequest, match="no chat template"):
        llm.chat([{"role": "user", "content": "hi"}])


def test_a_stop_string_that_never_comes_costs_nothing(llm: LLM) -> None:
    plain = llm.generate(["abc"], BESIDE)[0].outputs[0]
    stopped = llm.generate(["abc"], msgspec.structs.replace(BESIDE, stop=("never to be seen",)))[0].outputs[0]
    assert (stopped.text, stopped.token_ids, stopped.finish_reason) == (plain.text, plain.token_ids, "length")


def test_an_id_in_use_is_refused_and_the_first_goes_on(llm: LLM) -> None:
    first = llm.submit(Submit(id="same", token_ids=[5], sampling=BESIDE))
    with pytest.raises(InvalidRequest, match="id='same' is in use"):
        llm.submit(Submit(id="same", token_ids=[6]))
    assert sum(len(getattr(event, "token_ids", [])) for event in first or ()) == 24


def test_a_full_queue_refuses_the_next_and_names_max_queue(tiny: Path) -> None:
    with LLM(str(tiny), **{**CONFIG, "max_num_seqs": 1, "max_queue": 2}) as llm:
        handles = [llm.submit(Submit(id=str(i), token_ids=[5], sampling=BESIDE)) for i in range(12)]
        outcomes, refusals = [], set()
        for handle in handles:
            try:
                outcomes.append(len(list(handle or ())) > 0)
            except CapacityExceeded as error:
                outcomes.append(False)
                refusals.add(str(error))
        assert outcomes[0]
        assert refusals == {"2 requests wait, as many as max_queue=2: retry later or raise it"}


@pytest.mark.parametrize(("dtype", "value"), [("float32", float("nan")), ("float16", float("inf"))])
def test_logits_that_are_no_numbers_fail_their_own_request(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, value: float
) -> None:
    from phalanx.engine.models.decoder import CausalLM

    with LLM(str(tiny), **{**CONFIG, "dtype": dtype}) as llm:
        alone = _beside(llm)
        compute = CausalLM.forward

        def poisoned(self: CausalLM, batch: Any, cache: Any, logits_indices: torch.Tensor) -> torch.Tensor:
            hidden = compute(self, batch, cache, logits_indices)
            hidden[batch.token_ids[logits_indices] == 13] = value
            return hidden

        monkeypatch.setattr(CausalLM, "forward", poisoned)
        beside = llm.submit(Submit(id="beside", token_ids=[5, 6, 7, 8], sampling=BESIDE))
        with pytest.raises(EngineFault, match=r"not a number.*float16"):
            llm.generate([[12, 13]], BESIDE)
        assert [token for event in beside or () for token in getattr(event, "token_ids", [])] == alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prompt_that_overflows_at_one_token_leaves_nothing_to_those_that_begin_as_it_does(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    from phalanx.parallel.layers import VocabParallelEmbedding

    look_up = VocabParallelEmbedding.forward

    def overflowing(self: VocabParallelEmbedding, token_ids: torch.Tensor) -> torch.Tensor:
        hidden = look_up(self, token_ids)
        hidden[token_ids == 13] = float("inf")
        return hidden

    monkeypatch.setattr(VocabParallelEmbedding, "forward", overflowing)
    beginning = [3 + i % 9 for i in range(48)]  # with what overflows in a chunk after which another one comes
    sampling = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    with LLM(str(tiny), **{**CONFIG, "dtype": dtype}) as llm:
        alone = [output.outputs[0].token_ids for output in llm.generate([[*beginning, 20]], sampling)]
    with LLM(str(tiny), **{**CONFIG, "dtype": dtype}) as llm:
        with pytest.raises(EngineFault, match="not a number"):
            llm.generate([[*beginning, 13, *[20] * 30]], sampling)
        for _ in range(2):
            found = llm.generate([[*beginning, 20]], sampling)
            assert [output.outputs[0].token_ids for output in found] == alone
        assert llm.status().prefix_hits > 0  # the second time


def test_a_head_that_is_stored_beside_tied_embeddings_is_used_if_it_is_another(tmp_path: Path) -> None:
    folder = make_random_model(tmp_path / "tied", {**TINY_SHAPE, "tie_word_embeddings": True}, dtype="float32")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    prompt, sampling = [5, 6, 7, 8], SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)

    def answer() -> tuple[list[int], bool]:
        with LLM(str(folder), **CONFIG) as llm:
            said = any("lm_head" in line for line in llm.status().report)
            return llm.generate([prompt], sampling)[0].outputs[0].token_ids, said

    tied, said = answer()
    assert not said
    embeddings = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embeddings.clone()}, file, {"format": "pt"})
    assert answer() == (tied, False)
    save_file({**tensors, "lm_head.weight": embeddings.roll(1, 0)}, file, {"format": "pt"})
    untied, said = answer()
    assert said
    assert untied != tied
    whole = [*prompt, *untied]
    assert untied == score(folder, whole[:-1]).logits[len(prompt) - 1 :].argmax(-1).tolist()


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: [path.unlink() for path in folder.glob(name)] and None


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_without("config.json"), r"config\.json"),
        (_without("tokenizer*"), "no tokenizer"),
        (_without("*.safetensors"), "weights|safetensors"),
    ],
)
def test_a_folder_that_lacks_something_is_refused_by_what_it_lacks(
    tiny: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        LLM(str(folder), **CONFIG)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_memory": 20000}, "max_model_len=512.*kv_memory"),
        ({"max_model_len": 4096}, "max_model_len=4096.*512"),
        ({"dtype": "int3"}, "dtype='int3'.*bfloat16"),
        ({"attention": "magic"}, "attention='magic'.*torch"),
        ({"quantization": "int2"}, "quantization='int2'.*none"),
        ({"load_format": "pickle"}, "load_format='pickle'.*dummy"),
        ({"ranks": 0}, "ranks=0"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"max_num_seqs": 10**12, "max_num_batched_tokens": 10**12}, "max_num_seqs=1000000000000.*lower max_num_seqs"),
        ({"max_num_batched_tokens": 4}, "max_num_batched_tokens=4.*max_num_seqs=8"),
        ({"block_size": -1}, "block_size=-1"),
        ({"kv_memory": -1}, "kv_memory=-1"),
        ({"rank_weights": [1, 2]}, "rank_weights"),
        ({"max_modl_len": 3}, "max_modl_len.*did you mean 'max_model_len'"),
        ({"sampling": {"top_p": 7}}, "top_p=7"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_by_name(tiny: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises((ConfigError, InvalidRequest), match=words):
        LLM(str(tiny), **{**CONFIG, **changes})


def test_more_ranks_than_query_heads_are_refused_before_anything_is_loaded(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"ranks=500.*4 query heads.*1 to 4"):
        LLM(str(tiny), ranks=500, **CONFIG)


@pytest.mark.parametrize("name", ["nobody/has-this-model", "/no/such/folder", "no-such-name"])
def test_a_model_that_is_nowhere_is_refused_within_seconds(name: str) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=name):
        LLM(name)
    # A bound on patience, not a measurement: hub clients retry for minutes by themselves.
    assert time.monotonic() - started < 60


def test_a_file_is_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="get_model gguf="):
        LLM(str(tmp_path / "model.gguf"))


def test_a_config_is_frozen() -> None:
    config = EngineConfig(model="x")
    with pytest.raises(AttributeError):
        config.ranks = 2  # type: ignore[misc]
