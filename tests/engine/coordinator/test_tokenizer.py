"""Tokenizers as people's folders have them: SentencePiece's spaces, and configurations that are not quite right."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phalanx import LLM, CheckpointError
from phalanx.engine.coordinator.text.token_text import IncrementalDetokenizer
from phalanx.engine.coordinator.tokenizer import Tokenizer
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

CHARACTERS = [[3 + byte for byte in character.encode()] for character in "ä🙂é"]  # in tokens of a byte each


@pytest.fixture(scope="module")
def sentencepiece() -> Backend:
    """As Llama 2's tokenizer.json: words begin with a space's mark, decoding strips the first one, bytes fall back."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["▁", "a", "b", "c", "▁a", "▁b", "ab", "▁ab", "."]:
        vocab[piece] = len(vocab)
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b")]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    return backend


def _answer(backend: Any, prompt: list[int], tokens: list[int]) -> str:
    stream = IncrementalDetokenizer(backend, frozenset({0, 1, 2}), prompt)
    return "".join([*(stream.step(token) for token in tokens), stream.flush()])


def test_the_space_before_an_answers_first_word_is_the_answers(sentencepiece: Backend) -> None:
    prompt = sentencepiece.encode("a b").ids
    word = sentencepiece.token_to_id("▁ab")
    assert _answer(sentencepiece, prompt, [word, word]) == " ab ab"
    assert _answer(sentencepiece, [], [word, word]) == "ab ab"  # the beginning of all text has none
    assert _answer(sentencepiece, [*prompt, 2], [word]) == " ab"  # a special token is no text


@settings(deadline=None, max_examples=200)
@given(
    prompt=st.lists(st.integers(259, 267), min_size=1, max_size=12),
    pieces=st.lists(
        st.one_of(st.integers(259, 267).map(lambda token: [token]), st.sampled_from(CHARACTERS)), max_size=9
    ),
)
def test_prompt_and_answer_are_the_text_of_all_their_tokens(
    sentencepiece: Backend, prompt: list[int], pieces: list[list[int]]
) -> None:
    tokens = [token for piece in pieces for token in piece]
    whole = sentencepiece.decode(prompt + tokens, skip_special_tokens=True)
    before = sentencepiece.decode(prompt, skip_special_tokens=True)
    assert _answer(sentencepiece, prompt, tokens) == whole[len(before) :]


@pytest.mark.parametrize(
    "odd", [{"initializer_range": 1}, {"use_cache": None}, {"max_window_layers": None}, {"model_type": "unheard_of"}]
)
def test_a_configuration_that_transformers_refuses_does_not_keep_its_tokenizer_from_being_read(
    tiny: Path, tmp_path: Path, odd: dict[str, Any]
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, tmp_path / name)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | odd))
    assert Tokenizer(tmp_path).encode("some text") == Tokenizer(tiny).encode("some text")


LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 12\n"
)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_pointer_that_git_left_in_a_files_place_is_named_as_one(tiny: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / name).write_text(LFS_POINTER)
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer, not the file itself: run `git lfs pull`"):
        LLM(str(folder), max_model_len=64)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize(
    "named",
    [
        {},
        {"tokenizer_class": None},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"tokenizer_class": "LlamaTokenizerFast"},
        {"tokenizer_class": "Qwen2TokenizerFast"},
        {"tokenizer_class": "NobodysTokenizer"},
    ],
)
def test_the_tokenizer_is_the_one_that_transformers_takes(
    tiny: Path, tmp_path: Path, model_type: str, named: dict[str, Any]
) -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    options = json.loads((folder / "tokenizer_config.json").read_text())
    options.pop("tokenizer_class", None)
    (folder / "tokenizer_config.json").write_text(json.dumps({**options, **named}))

    expected = AutoTokenizer.from_pretrained(
        str(folder), config=AutoConfig.for_model(model_type), local_files_only=True, trust_remote_code=False
    )
    tokenizer = Tokenizer(folder)
    assert type(tokenizer._tokenizer) is type(expected)
    assert tokenizer._tokenizer.init_kwargs.keys() == expected.init_kwargs.keys()
    assert tokenizer._tokenizer.special_tokens_map == expected.special_tokens_map
    assert tokenizer._tokenizer.chat_template == expected.chat_template
    for text in ("Hello world", " two  spaces\n", "<|im_start|>user<|im_end|> ä🙂"):
        assert tokenizer.encode(text) == expected(text)["input_ids"]


def test_a_tokenizer_is_read_without_what_computes_with_a_model(tiny: Path) -> None:
    # transformers' class of the model's configurations imports all of that, which took rank 0 a second.
    program = (
        "import sys; from pathlib import Path; from phalanx.engine.coordinator.tokenizer import Tokenizer; "
        "Tokenizer(Path(sys.argv[1])); print('transformers.core_model_loading' in sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tiny)], stdout=subprocess.PIPE, text=True, timeout=120, check=True
    )
    assert ended.stdout.split() == ["False"]


def test_the_longest_token_bounds_the_bytes_of_a_text(tiny: Path, smollm2: Path) -> None:
    for folder in (tiny, smollm2):
        tokenizer = Tokenizer(folder)
        most = tokenizer.longest_token_bytes
        assert most is not None
        for text in (" " * 500, "hello world " * 50, "é" * 300, "🙂" * 100, "=" * 400):
            assert len(text.encode()) <= most * len(tokenizer.encode(text))


def test_a_tokenizer_with_one_token_for_any_unknown_word_bounds_nothing() -> None:
    tokenizer = Tokenizer.__new__(Tokenizer)
    words = Backend(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer._tokenizer, tokenizer._backend = None, words
    assert tokenizer.longest_token_bytes is None
