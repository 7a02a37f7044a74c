"""A tokenizer that is kept is the one that transformers made, and any change of what it was made of makes it anew."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from phalanx.engine.coordinator.text import tokenizer_store
from phalanx.engine.coordinator.text.tokenizer_store import StoredTokenizer
from phalanx.engine.coordinator.tokenizer import Tokenizer
from phalanx.engine.protocol.messages import Prompt
from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Backend

TEXTS = (
    "",
    "Hello world",
    " two  spaces\n\tand a tab",
    "<|im_start|>user<|im_end|> ä🙂 你好",
    "<s>a b ab </s> abc",
    "def f(x):\n    return 12345 * x  # e\u0301",
)
CHAT = [{"role": "user", "content": "Hi <|im_end|> there"}, {"role": "assistant", "content": "Well, 你好"}]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A folder with a tokenizer as Llama 2's, which begins each text with <s>."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["▁", "a", "b", "c", "▁a", "▁b", "ab", "▁ab", "."]:
        vocab[piece] = len(vocab)
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b")]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    backend.enable_truncation(4)  # as some folders are saved; transformers leaves it out

    folder = tmp_path_factory.mktemp("sentencepiece")
    shutil.copy(tiny / "config.json", folder)
    backend.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A tokenizer's files that a test may change."""
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def _is_stored(tokenizer: Tokenizer) -> bool:
    return isinstance(tokenizer._tokenizer, StoredTokenizer)


@pytest.mark.parametrize("name", ["tiny", pytest.param("smollm2", marks=pytest.mark.slow), "sentencepiece"])
@pytest.mark.parametrize("options", [{}, {"split_special_tokens": True, "add_eos_token": True}], ids=["as is", "split"])
def test_what_is_stored_does_all_that_was_made(
    name: str, options: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(name), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | options))

    made, stored = (Tokenizer(folder, tmp_path / "store") for _ in range(2))
    assert not _is_stored(made)
    assert _is_stored(stored)
    for what in (
        "kind",
        "_template_texts",
        "eos_token_id",
        "size",
        "longest_token_bytes",
        "_special_ids",
        "_special",
    ):
        assert getattr(stored, what) == getattr(made, what), what
    assert stored._tokenizer.special_tokens_map == made._tokenizer.special_tokens_map
    backend = stored._tokenizer.backend_tokenizer
    assert backend.get_vocab() == made._tokenizer.backend_tokenizer.get_vocab()
    for token in range(stored.size):
        assert stored.token_bytes[token] == made.token_bytes[token]

    for text in TEXTS:
        for special in (True, False):
            expected = made._tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
            for tokenizer in (stored, made):
                [found] = tokenizer._backend.encode_batch([text], add_special_tokens=special)
                assert (found.ids, found.offsets) == (expected["input_ids"], expected["offset_mapping"])
                assert tokenizer.encode(text, special=special) == expected["input_ids"]
        assert stored.decode(made.encode(text)) == made.decode(made.encode(text))
    if made.chat_template is not None:
        assert stored.encode_conversation(Prompt(messages=CHAT)) == made.encode_conversation(Prompt(messages=CHAT))


@pytest.mark.parametrize("changed", ["tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"])
def test_a_change_of_any_file_makes_it_anew(folder: Path, tmp_path: Path, changed: str) -> None:
    store = tmp_path / "store"
    Tokenizer(folder, store)
    assert _is_stored(Tokenizer(folder, store))
    file = folder / changed
    file.write_text(f"{file.read_text() if file.exists() else '{{ messages }}'}\n")
    assert not _is_stored(Tokenizer(folder, store))
    assert _is_stored(Tokenizer(folder, store))


def test_another_version_of_its_reader_makes_it_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Tokenizer(folder, tmp_path / "store")
    monkeypatch.setattr(tokenizer_store, "_version", lambda package: "6.0")
    assert not _is_stored(Tokenizer(folder, tmp_path / "store"))


def test_without_a_store_nothing_is_kept(folder: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    Tokenizer(folder)
    assert not _is_stored(Tokenizer(folder))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("damage", [b"", b"\x97", b"{}", None])
def test_a_damaged_file_is_made_anew(
    folder: Path, tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    made = Tokenizer(folder, store)
    [file] = store.iterdir()
    file.write_bytes(file.read_bytes().replace(b'"BPE"', b'"XYZ"') if damage is None else damage)
    again = Tokenizer(folder, store)
    assert not _is_stored(again)
    assert again.encode("some text") == made.encode("some text")
    assert "a stored tokenizer is not used" in caplog.text
    assert _is_stored(Tokenizer(folder, store))


def test_a_store_that_others_may_write_is_not_read(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    Tokenizer(folder, store)
    store.chmod(0o777)
    assert not _is_stored(Tokenizer(folder, store))
    assert "writable for nobody else" in caplog.text


def test_a_store_that_cannot_be_written_is_none(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    for _ in range(2):
        assert Tokenizer(folder, tmp_path / "store").encode("some text")


def test_the_tokenizers_last_used_are_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_store, "_KEPT", 2)
    store = tmp_path / "store"
    names: list[str] = []
    for number in range(4):
        (folder / "config.json").write_text(f"{(folder / 'config.json').read_text()} ")
        Tokenizer(folder, store)
        [name] = {file.name for file in store.iterdir()} - set(names)
        names.append(name)
        os.utime(store / name, (number, number))
    assert {file.name for file in store.iterdir()} == set(names[-2:])
    assert oct(store.stat().st_mode)[-3:] == "700"


def test_a_stored_tokenizer_is_loaded_without_transformers(folder: Path, tmp_path: Path) -> None:
    Tokenizer(folder, tmp_path / "store")
    program = (
        "import sys; from pathlib import Path; from phalanx.engine.coordinator.tokenizer import Tokenizer; "
        "Tokenizer(Path(sys.argv[1]), Path(sys.argv[2])); print(*{'torch', 'transformers'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", program, str(folder), str(tmp_path / "store")]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert ended.stdout.split() == []
