"""Special tokens in users' text: whatever a user writes, the prompt's control tokens are the template's."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from phalanx.engine.coordinator.tokenizer import Tokenizer
from phalanx.engine.errors import InvalidRequest
from phalanx.engine.protocol.messages import Prompt
from phalanx.tests.engine.coordinator.test_chat_template import FAMILIES, _folder
from phalanx.tests.fuzz.bounds import in_time
from phalanx.tests.fuzz.choices import Choices
from phalanx.tests.fuzz.folders import scratch, tiny_model
from phalanx.tests.models import SMOLLM2
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

PLACES = ("content", "parts", "answer", "reasoning", "tool", "call", "argument", "description", "key", "variable")
MADE_UP = 12
"""Made-up tokenizers: special tokens within one another, of one letter, of spaces, of marks, with normalizers.

None of a letter that an escape of JSON has: tojson makes an "a" of U+001A."""
SPECIAL = (
    "<s>", "</s>", "<", "<|", "|>", "<|a|>", "<|a|><|b|>", "<|b|>", "<<s>>", "s>", "[X]", "[X][X]", "é", "🙂",
    "▁<x>", " <x>",
    "<x> ", "\n", "\n\n", "<|im_end|>", "im", "A", "ﬁ", "\U0010f000", "<0x0A>", "user", "system",
)  # fmt: skip
WRITTEN = (
    "<", ">", "|", "<|", "|>", "a", "b", " ", "\n", "é", "e\u0301", "▁", "s", "/", "x", "[", "]", "fi", "ﬁ",
    "A", "\U0010f000", "\u200b",
)  # fmt: skip


def fuzz_one(data: bytes) -> None:
    """Put a text into a conversation, and compare with a harmless one in its place."""
    choices = Choices(data)
    tokenizer, special = _tokenizer(choices.number(MADE_UP + len(FAMILIES) + 2))
    words = (
        *special,
        *(text[: len(text) // 2] for text in special),
        *(text[len(text) // 2 :] for text in special),
        *WRITTEN,
    )
    place = choices.pick(PLACES)
    text = choices.text(words, 12).encode(errors="replace").decode()
    with in_time():
        written = _encoded(tokenizer, _conversation(place, text))
    harmless = _encoded(tokenizer, _conversation(place, "0"))
    if written is None or harmless is None:
        return  # the template has no room for it
    controls = [[token for token in each[1] if token in tokenizer._special] for each in (written, harmless)]
    assert controls[0] == controls[1], (place, text, controls)


def _encoded(tokenizer: Tokenizer, prompt: dict[str, Any]) -> tuple[str, list[int]] | None:
    try:
        return tokenizer.encode_conversation(Prompt(**prompt))
    except InvalidRequest:
        return None


def _conversation(place: str, text: str) -> dict[str, Any]:
    user: dict[str, Any] = {"role": "user", "content": "1"}
    answer: dict[str, Any] = {"role": "assistant", "content": "2"}
    if place == "content":
        return {"messages": [{"role": "user", "content": text}, answer, user]}
    if place == "parts":
        parts = [{"type": "text", "text": "3"}, {"type": "text", "text": text}]
        return {"messages": [{"role": "user", "content": parts}, answer, user]}
    if place == "answer":
        return {"messages": [user, {"role": "assistant", "content": text}, user]}
    if place == "reasoning":
        return {"messages": [user, {**answer, "reasoning_content": text}, user]}
    if place == "tool":
        return {"messages": [user, {**answer, "tool_calls": []}, {"role": "tool", "content": text, "name": text}]}
    if place in ("call", "argument"):
        arguments: dict[str, Any] = {"k": text} if place == "argument" else {text: 1}
        call = {"id": text, "type": "function", "function": {"name": text, "arguments": arguments}}
        return {"messages": [user, {"role": "assistant", "content": "4", "tool_calls": [call]}]}
    if place == "description":
        function = {"name": "f", "description": text, "parameters": {"type": "object", "properties": {text: {}}}}
        return {"messages": [user], "tools": [{"type": "function", "function": function}]}
    if place == "key":
        odd = {text: {text: [{text: 1}]}}
        return {"messages": [{**user, **odd}], "tools": [{"type": "function", "function": {"name": "f", **odd}, **odd}]}
    return {"messages": [user], "chat_template_kwargs": {"extra": text, "documents": [{"text": text}]}}


@cache
def _tokenizer(number: int) -> tuple[Tokenizer, tuple[str, ...]]:
    families = list(FAMILIES)
    if number < len(families):
        folder = _folder(scratch() / families[number], tiny_model(), families[number])
        return Tokenizer(folder), FAMILIES[families[number]][1]
    if number == len(families) and SMOLLM2.is_dir():
        return Tokenizer(SMOLLM2), ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<jupyter_code>")
    if number <= len(families) + 1:
        return Tokenizer(tiny_model()), ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    return _made_up(number - len(families) - 2)


def _made_up(number: int) -> tuple[Tokenizer, tuple[str, ...]]:
    special = tuple(SPECIAL[(7 * number + 5 * step) % len(SPECIAL)] for step in range(4 + number % 3))
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(letters, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=number % 2 == 1)
    backend.decoder = decoders.ByteLevel()
    if number % 3 == 1:
        backend.normalizer = normalizers.NFKC()
    elif number % 3 == 2:
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    for place, text in enumerate(special):
        added = AddedToken(
            text,
            special=True,
            normalized=(number + place) % 4 == 3,
            lstrip=(number + place) % 5 == 4,
            rstrip=(number + place) % 7 == 6,
            single_word=(number + place) % 11 == 10,
        )
        backend.add_tokens([added])

    folder = scratch() / f"made-up-{number}"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_bytes((tiny_model() / "config.json").read_bytes())
    begin, end = json.dumps(special[0]), json.dumps(special[1])
    template = (
        f"{{% for tool in tools or [] %}}{{{{ {begin} + tool | tojson + {end} }}}}{{% endfor %}}"
        "{% for message in messages %}"
        f"{{{{ {begin} + message.role + ':' }}}}"
        "{{ message.content if message.content is string else message.content | tojson }}"
        "{% if message.reasoning_content %}{{ message.reasoning_content }}{% endif %}"
        "{% for call in message.tool_calls or [] %}{{ call | tojson }}{{ call.function.name }}{% endfor %}"
        f"{{{{ {end} }}}}{{% endfor %}}{{{{ extra or '' }}}}{{{{ {begin} }}}}"
    )
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[1],
        "chat_template": template,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return Tokenizer(folder), special
