"""Tokenizers as people's folders have them: SentencePiece's spaces, and configurations that are not quite right."""

from __future__ import annotations

import json
import shutil
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
