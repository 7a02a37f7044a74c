"""The tokenizer inside a GGUF file, written as tokenizer.json with its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...engine.errors import CheckpointError, ConfigError
from ...parallel.loading.json_files import shown
from .model_folder import write_json

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
"""GGUF's token types that matter here."""

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = _WORDS.format(digits=r"\p{N}")
LLAMA3_SPLIT = _WORDS.format(digits=r"\p{N}{1,3}")
"""How the published tokenizer.json of these families splits text before merging."""

LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
QWEN2 = ("qwen2", "deepseek-r1-qwen")
PRE_TOKENIZERS = ("gpt-2", "smollm", *QWEN2, *LLAMA3)
"""Values of tokenizer.ggml.pre that are supported."""


def write_tokenizer(folder: Path, file: Path, metadata: Mapping[str, Any], max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json of a GGUF file's metadata.

    Byte-level BPE is built here; SentencePiece vocabularies are left to transformers. Raises ConfigError for others.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "llama":
        _write_sentencepiece(folder, file)
    elif kind == "gpt2":
        _write_byte_level(folder, file, metadata, max_length)
    else:
        raise ConfigError(f"{file}: a tokenizer of model {kind!r} is not supported; gpt2 (byte-level) and llama are")


def check_token_id(key: str, token: object, metadata: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless `token`, the value of `key`, is the id of one of the file's tokens."""
    size = len(metadata.get("tokenizer.ggml.tokens", ()))
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < size:
        raise CheckpointError(f"{key}={shown(token)} must be the id of a token: 0 to {size - 1}")


def _write_byte_level(folder: Path, file: Path, metadata: Mapping[str, Any], max_length: int) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in PRE_TOKENIZERS:
        raise ConfigError(f"{file}: tokenizer.ggml.pre={pre!r} is not supported; {', '.join(PRE_TOKENIZERS)} are")
    try:
        tokens = metadata["tokenizer.ggml.tokens"]
        types = metadata["tokenizer.ggml.token_type"]
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    except KeyError as error:
        raise CheckpointError(f"{file}: its metadata lack {error}") from error

    # Files fill the vocabulary up to the embedding's rows with unused tokens, which no text has.
    vocabulary = {token: i for i, (token, type_) in enumerate(zip(tokens, types, strict=True)) if type_ != UNUSED}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in LLAMA3))
    _set_pre_tokenizer(tokenizer, pre)
    tokenizer.decoder = decoders.ByteLevel()
    typed = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, kind in typed if kind == CONTROL]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, kind in typed if kind == USER_DEFINED])

    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    for name, i in ids.items():
        if i is not None:
            check_token_id(f"tokenizer.ggml.{names[name]}_token_id", i, metadata)
    special = {name: None if i is None else tokens[i] for name, i in ids.items()}

    # Where a file of Llama 3's does not say whether to add it, llama.cpp does.
    if metadata.get("tokenizer.ggml.add_bos_token", pre in LLAMA3) and special["bos_token"] is not None:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, ids["bos_token"])]
        )

    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    if template := metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    write_json(folder / "tokenizer_config.json", settings)


def _set_pre_tokenizer(tokenizer: Any, pre: str) -> None:
    from tokenizers import Regex, normalizers, pre_tokenizers

    if pre in QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    if pre in QWEN2 or pre in LLAMA3:
        split = Regex(QWEN2_SPLIT if pre in QWEN2 else LLAMA3_SPLIT)
        steps = [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
        steps = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)


def _write_sentencepiece(folder: Path, file: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(  # nosec B615 # a folder of this host: nothing is fetched
        str(file.parent), gguf_file=file.name, local_files_only=True, trust_remote_code=False
    )
    tokenizer.save_pretrained(str(folder))
