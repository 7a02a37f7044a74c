"""What OpenAI's clients, transformers and vLLM accept means the same here, or is refused by name."""

from __future__ import annotations

import json
import queue
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from phalanx import LLM, CheckpointError, InvalidRequest, SamplingParams
from phalanx.engine.protocol.messages import Tokenize
from phalanx.launch.model_files.random_model import make_random_model
from phalanx.tests.engine import programs
from phalanx.tests.engine.conftest import CONFIG
from phalanx.tests.models import TINY_SHAPE, score
from safetensors.torch import load_file, save_file

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


def test_a_model_may_be_a_path_and_prompts_may_come_in_any_iterable(tiny: Path) -> None:
    with LLM(tiny, **CONFIG) as llm:  # type: ignore[arg-type]
        expected = [output.outputs[0].token_ids for output in llm.generate(["a", "b"], GREEDY)]
        for prompts in (("a", "b"), (text for text in "ab"), iter("ab"), {"a": 1, "b": 2}.keys()):
            outputs = llm.generate(prompts, (GREEDY for _ in range(2)))  # type: ignore[arg-type]
            assert [output.outputs[0].token_ids for output in outputs] == expected
        prompts_of_a_set = {"a", "b"}
        in_its_order = [expected["ab".index(text)] for text in prompts_of_a_set]
        found = llm.generate(prompts_of_a_set, GREEDY)  # type: ignore[arg-type]
        assert [output.outputs[0].token_ids for output in found] == in_its_order


def test_min_tokens_holds_back_stop_token_ids_and_special_stop_strings(llm: LLM) -> None:
    free = llm.generate([[5, 6, 7, 8]], GREEDY)[0].outputs[0].token_ids
    stopped = llm.generate([[5, 6, 7, 8]], msgspec.structs.replace(GREEDY, stop_token_ids=(free[0],)))[0].outputs[0]
    assert (stopped.token_ids, stopped.finish_reason, stopped.stop_reason) == ([free[0]], "stop", free[0])
    for least in range(1, 5):
        held = msgspec.structs.replace(GREEDY, stop_token_ids=(free[0],), min_tokens=least)
        tokens = llm.generate([[5, 6, 7, 8]], held)[0].outputs[0].token_ids
        assert free[0] not in tokens[:least]
        assert len(tokens) > least


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("include", [True, False])
def test_a_stop_string_that_is_a_special_token_ends_the_answer_whether_it_is_shown_or_not(
    llm: LLM, skip: bool, include: bool
) -> None:
    end = "<|im_end|>"
    bias = {_token(llm, end): 100.0}
    sampling = SamplingParams(
        max_tokens=8,
        temperature=0,
        ignore_eos=True,
        logit_bias=bias,
        stop=(end,),
        skip_special_tokens=skip,
        include_stop_str_in_output=include,
    )
    output = llm.generate(["a"], sampling)[0].outputs[0]
    assert (output.finish_reason, output.stop_reason) == ("stop", end)
    assert len(output.token_ids) == 1
    assert output.text == (end if include else "")


def _token(llm: LLM, text: str) -> int:
    """The id of a special token."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    llm.client.ask(Tokenize(id="token", prompt=text, add_special_tokens=False), answers.put)
    [token] = answers.get(timeout=60).token_ids
    return int(token)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], None),
        ([{"type": "text", "text": ""}], None),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], None),
        ([{"type": "text", "text": None}], "content part"),
        ([{"type": "text"}], "content part"),
        ([None], "content part"),
        (["text"], "content part"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "content part.*image_url"),
        ([{"type": "input_audio"}], "content part.*input_audio"),
        ([{"type": None, "text": "a"}], "content part"),
    ],
)
def test_text_parts_are_read_and_others_are_refused_by_name(llm: LLM, content: Any, words: str | None) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": content}]
    if words is None:
        text = "\n".join(part["text"] for part in content)
        whole = llm.chat([messages[0], {"role": "user", "content": text}], GREEDY)
        assert llm.chat(messages, GREEDY).prompt_token_ids == whole.prompt_token_ids
        return
    with pytest.raises(InvalidRequest, match=words):
        llm.chat(messages, GREEDY)


@pytest.fixture
def untied_in_an_index(tmp_path: Path) -> Iterator[Path]:
    """Embeddings tied by the flag, and a head of its own that the index names, in a file of its own."""
    folder = make_random_model(tmp_path / "tied", {**TINY_SHAPE, "tie_word_embeddings": True}, dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].roll(1, 0)}
    save_file(tensors, folder / "model-1.safetensors", {"format": "pt"})
    save_file(head, folder / "model-2.safetensors", {"format": "pt"})
    weight_map = {**dict.fromkeys(tensors, "model-1.safetensors"), "lm_head.weight": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_a_head_that_an_index_names_is_used_beside_tied_embeddings(untied_in_an_index: Path) -> None:
    folder, prompt = untied_in_an_index, [5, 6, 7, 8]
    with LLM(str(folder), **CONFIG) as llm:
        tokens = llm.generate([prompt], GREEDY)[0].outputs[0].token_ids
        assert any("lm_head" in line for line in llm.status().report)
    assert tokens == score(folder, [*prompt, *tokens][:-1]).logits[len(prompt) - 1 :].argmax(-1).tolist()


def test_a_head_that_is_missing_is_refused_unless_it_is_tied(tmp_path: Path) -> None:
    folder = make_random_model(tmp_path / "tied", {**TINY_SHAPE, "tie_word_embeddings": True}, dtype="float32")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"lack tensor lm_head\.weight"):
        LLM(str(folder), **CONFIG)


def test_a_float16_checkpoint_says_at_every_number_of_ranks_what_it_is_computed_in(
    run_ranks: Any, tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    report, _ = run_ranks(2, programs.report, str(folder), {**CONFIG, "dtype": "auto"})
    assert any("the checkpoint is in float16, but computed with in bfloat16" in line for line in report)


def test_tensors_without_a_place_and_adapters_are_left_out_and_said_to_be(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    extra = {"v_head.summary.weight": torch.ones(1, 64), "model.position_ids": torch.arange(8)}
    save_file(tensors | extra, folder / "model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with LLM(str(tiny), **CONFIG) as plain:
        expected = plain.generate([[5, 6, 7, 8]], GREEDY)[0].outputs[0].token_ids
    with LLM(str(folder), **CONFIG) as llm:
        assert llm.generate([[5, 6, 7, 8]], GREEDY)[0].outputs[0].token_ids == expected
        report = "\n".join(llm.status().report)
    assert "has no place for tensors of the checkpoint: model.position_ids (and 1 more) left out" in report
    assert "holds an adapter (adapter_config.json), which is left out" in report


def test_layers_beyond_those_of_the_config_are_left_out_and_said_to_be(tiny: Path, tmp_path: Path) -> None:
    folder, prompt = Path(shutil.copytree(tiny, tmp_path / "model")), [5, 6, 7, 8]
    config = json.loads((folder / "config.json").read_text())
    changes = {"num_hidden_layers": 1} | ({"layer_types": config["layer_types"][:1]} if "layer_types" in config else {})
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with LLM(str(folder), **CONFIG) as llm:
        tokens = llm.generate([prompt], GREEDY)[0].outputs[0].token_ids
        report = "\n".join(llm.status().report)
    assert "of 1 layers has no place for tensors of the checkpoint: model.layers.1." in report
    assert tokens == score(folder, [*prompt, *tokens][:-1]).logits[len(prompt) - 1 :].argmax(-1).tolist()


Tensors = dict[str, torch.Tensor]


def _head_alone(tensors: Tensors) -> Tensors:
    """As safetensors' save_model() leaves a tensor of two names."""
    return {"lm_head.weight" if name == "model.embed_tokens.weight" else name: each for name, each in tensors.items()}


def _base_alone(tensors: Tensors) -> Tensors:
    """As a base model without its head is saved."""
    return {name.removeprefix("model."): each for name, each in tensors.items()}


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize(
    ("tied", "saved"),
    [
        (True, _head_alone),
        (True, _base_alone),
        (False, _base_alone),
        (True, lambda tensors: _base_alone(_head_alone(tensors))),
    ],
)
def test_tensors_may_have_the_names_that_transformers_finds_them_by(
    tmp_path: Path, tied: bool, saved: Callable[[Tensors], Tensors], index: bool
) -> None:
    folder = make_random_model(tmp_path / "model", {**TINY_SHAPE, "tie_word_embeddings": tied}, dtype="float32")
    prompt = [5, 6, 7, 8]
    tensors = saved(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if index:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        weight_map = dict.fromkeys(tensors, "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    with LLM(str(folder), **CONFIG) as llm:
        tokens = llm.generate([prompt], GREEDY)[0].outputs[0].token_ids
        assert not any("left out" in line or "not its embeddings" in line for line in llm.status().report)
    assert tokens == score(folder, [*prompt, *tokens][:-1]).logits[len(prompt) - 1 :].argmax(-1).tolist()


def test_embeddings_that_are_missing_are_refused_unless_they_are_tied(tmp_path: Path) -> None:
    folder = make_random_model(tmp_path / "model", {**TINY_SHAPE, "tie_word_embeddings": False}, dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack tensor model\.embed_tokens\.weight"):
        LLM(str(folder), **CONFIG)
