"""What becomes a special token only once a tokenizer has normalized it is a user's plain text too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from phalanx.engine.coordinator.tokenizer import Tokenizer
from phalanx.engine.protocol.messages import Prompt
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

NFC, NFKC = normalizers.NFC(), normalizers.NFKC()
LOWER = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
SPACES = normalizers.Replace(" ", "▁")
TEMPLATE = "{% for m in messages %}<s>e{{ m.content }}{{ m.content | upper }}</s>{% endfor %}"


def _tokenizer(folder: Path, tiny: Path, normalizer: Any, special: str, template: str = TEMPLATE) -> Tokenizer:
    """A tokenizer of bytes, with `<s>` and `</s>` as the template's tokens and another one that text may become."""
    backend = Backend(
        models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.normalizer = normalizer
    backend.add_tokens([AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>")])
    backend.add_tokens([AddedToken(special, special=True, normalized=True)])

    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    # The tokenizer of this family is read as it is stored; others get a normalizer of their own.
    config = {**json.loads((tiny / "config.json").read_text()), "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    made = Tokenizer(folder)
    assert type(made._backend.normalizer) is type(normalizer)
    return made


@pytest.mark.parametrize(
    ("normalizer", "special", "text"),
    [
        (NFC, "\xe9", "caf\xe9 cafe\u0301 e\u0301"),  # written as one character and as two
        (NFC, "\xe9", "\u0301 after what the template wrote"),
        (NFKC, "<|x|>", "\uff1c\uff5cx\uff5c\uff1e and <|x|>"),
        (NFKC, "fi", "\ufb01"),  # one character that is two tokens
        (LOWER, "<X>", "<X> <x>"),
        (SPACES, "▁<x>", "a <x> <x>"),
        (SPACES, "▁<x>", " <"),  # the beginning of one
    ],
)
def test_a_users_text_makes_no_special_token(
    tiny: Path, tmp_path: Path, normalizer: Any, special: str, text: str
) -> None:
    tokenizer = _tokenizer(tmp_path / "model", tiny, normalizer, special)
    try:
        messages = [{"role": "user", "content": text}, {"role": "user", "content": f"x{text}"}]
        token_ids = tokenizer.encode_conversation(Prompt(messages=messages))[1]
        begin, end = (tokenizer.special_token_id(token) for token in ("<s>", "</s>"))
        assert [token for token in token_ids if token in tokenizer._special] == [begin, end, begin, end]

        # Nothing is left out: the text is there as the tokenizer normalizes it.
        seen = normalizer.normalize_str("".join(f"<s>e{each}{each.upper()}</s>" for each in (text, f"x{text}")))
        written = tokenizer.decode(token_ids)
        assert normalizer.normalize_str(written) == seen
    finally:
        tokenizer.close()


def test_a_key_that_is_a_word_makes_none_either(tiny: Path, tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path / "model", tiny, NFC, "\xe9", "<s>{{ messages | tojson }}</s>")
    try:
        odd = {"role": "user", "content": "1", "cafe\u0301": {"e\u0301": 1}}
        token_ids = tokenizer.encode_conversation(Prompt(messages=[odd]))[1]
        begin, end = (tokenizer.special_token_id(token) for token in ("<s>", "</s>"))
        assert [token for token in token_ids if token in tokenizer._special] == [begin, end]
    finally:
        tokenizer.close()


def test_other_text_is_encoded_as_the_tokenizer_does(tiny: Path, tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path / "model", tiny, NFKC, "<|x|>")
    try:
        text, token_ids = tokenizer.encode_conversation(
            Prompt(messages=[{"role": "user", "content": "caf\xe9 <y> \ufb01"}])
        )
        assert token_ids == tokenizer.encode(text, special=False)
    finally:
        tokenizer.close()
