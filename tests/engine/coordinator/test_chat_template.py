"""Chat templates: as transformers renders them, within bounds, and users' text never becomes control tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phalanx import InvalidRequest
from phalanx.engine.coordinator.text.chat_template import ChatTemplate
from phalanx.engine.coordinator.text.template_processes import TemplateProcesses
from phalanx.engine.coordinator.tokenizer import Tokenizer
from phalanx.engine.protocol.messages import Prompt
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

QWEN = """{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n<tools>' }}
{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}{{- "\\n</tools><|im_end|>\\n" }}{%- endif %}
{%- for message in messages %}
{%- set content = message.content if message.content is string else '' %}
{%- if message.role == 'assistant' and '</think>' in content %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n' }}{%- for key, value in call.function.arguments|items %}
{{- '<' ~ key ~ '>' ~ value ~ '</' ~ key ~ '>' }}{%- endfor %}{{- '</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""
LLAMA3 = """{{- bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role']
+ '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}
{{- '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}
{%- generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""
PHI = """{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

FAMILIES = {
    "qwen": (QWEN, ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), False),
    "llama3": (LLAMA3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), False),
    "mistral": (MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]", "<unk>"), True),
    "phi": (PHI, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), True),
}


def _folder(folder: Path, tiny: Path, family: str) -> Path:
    """A tokenizer of bytes, byte-level or as SentencePiece's, with a family's special tokens and template."""
    template, special, sentencepiece = FAMILIES[family]
    if sentencepiece:
        names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
        backend = Backend(
            models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
        )
        if family == "mistral":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        backend = Backend(
            models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
        )
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    backend.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])

    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    shutil.copy(tiny / "config.json", folder)
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[1],
        "chat_template": template,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def processes() -> Iterator[TemplateProcesses]:
    made = TemplateProcesses()
    yield made
    made.close()


@pytest.fixture(scope="module")
def families(
    tmp_path_factory: pytest.TempPathFactory, tiny: Path, processes: TemplateProcesses
) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("families")
    return {name: Tokenizer(_folder(root / name, tiny, name), processes=processes) for name in FAMILIES}


def _theirs(tokenizer: Tokenizer, messages: list[dict[str, Any]], **options: Any) -> tuple[str, list[int]]:
    theirs = tokenizer._tokenizer
    options = {"add_generation_prompt": True, **options}
    text = theirs.apply_chat_template(messages, tokenize=False, **options)
    return text, theirs(text, add_special_tokens=False)["input_ids"]


CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": " Hi there 🙂 "},
    {"role": "assistant", "content": "<think>hm</think>\n\nWell, 你好"},
    {"role": "user", "content": "2 < 3, [x] and <tool_call>"},
]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"é": {}}}}}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_is_rendered_and_encoded_as_transformers_does(
    families: dict[str, Tokenizer], family: str
) -> None:
    tokenizer = families[family]
    assert tokenizer.encode_conversation(Prompt(messages=CHAT)) == _theirs(tokenizer, CHAT)
    without = Prompt(messages=CHAT, add_generation_prompt=False)
    assert tokenizer.encode_conversation(without) == _theirs(tokenizer, CHAT, add_generation_prompt=False)


def test_the_demo_models_template_is_rendered_as_transformers_does(smollm2: Path) -> None:
    tokenizer = Tokenizer(smollm2)
    for chat in (CHAT, [{"role": "system", "content": "x"}, *CHAT]):
        assert tokenizer.encode_conversation(Prompt(messages=chat)) == _theirs(tokenizer, chat)


def test_tools_and_variables_reach_the_template(families: dict[str, Tokenizer]) -> None:
    tokenizer = families["qwen"]
    calls = [{"type": "function", "function": {"name": "look", "arguments": {"where": "up", "n": 3}}}]
    chat = [*CHAT[:1], {"role": "assistant", "content": None, "tool_calls": calls}]
    prompt = Prompt(messages=chat, tools=[TOOL], chat_template_kwargs={"enable_thinking": False})
    expected = _theirs(tokenizer, chat, tools=[TOOL], enable_thinking=False)
    assert tokenizer.encode_conversation(prompt) == expected
    assert '"properties": {"é": {}}' in expected[0]
    assert expected[0].endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_only_calls_tools_needs_no_content(families: dict[str, Tokenizer], family: str) -> None:
    calls = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    answers = [{"role": "assistant", "content": content, "tool_calls": calls} for content in (None, "")]
    null, empty = (families[family].encode_conversation(Prompt(messages=[CHAT[0], each])) for each in answers)
    assert null == empty
    assert "None" not in null[0]


def test_arguments_that_were_cut_off_are_members_where_a_template_asks_for_some(processes: TemplateProcesses) -> None:
    source = (
        "{% for name, value in messages[1].tool_calls[0].function.arguments|items %}{{ name }}={{ value }}{% endfor %}"
    )
    template = ChatTemplate(source, {}, frozenset(), processes)
    calls = [{"type": "function", "function": {"name": "look", "arguments": '{"pa'}}]
    chat = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": calls}]
    assert template.render(chat).text == 'arguments={"pa'


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": None},
        {"role": "tool", "content": None, "tool_calls": [{}]},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": None, "tool_calls": []},
    ],
)
def test_a_content_that_is_null_where_there_must_be_one_is_refused_by_its_name(
    families: dict[str, Tokenizer], message: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest, match=r"^messages\[1\]\.content is null"):
        families["qwen"].encode_conversation(Prompt(messages=[CHAT[0], message]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("last", ["The answer is", "with a space at its end ", "<|im_end|>"])
def test_the_last_message_may_go_on(families: dict[str, Tokenizer], family: str, last: str) -> None:
    chat = [CHAT[0], {"role": "assistant", "content": last}]
    text, token_ids = families[family].encode_conversation(Prompt(messages=chat, continue_final_message=True))
    expected, _ = _theirs(families[family], chat, add_generation_prompt=False, continue_final_message=True)
    assert text == expected
    if not FAMILIES[family][2]:
        assert families[family].decode(token_ids) == text


def test_variables_that_are_fields_of_their_own_and_templates_that_refuse_are_errors(
    families: dict[str, Tokenizer], tiny: Path
) -> None:
    cases: list[tuple[str, Prompt, str]] = [
        ("qwen", Prompt(messages=CHAT, chat_template_kwargs={"messages": []}), "chat_template_kwargs holds 'messages'"),
        ("mistral", Prompt(messages=[{"role": "tool", "content": "x"}]), "Only user and assistant roles"),
        ("qwen", Prompt(messages=[{"role": "user"}], continue_final_message=True), "no text that could go on"),
    ]
    for family, prompt, words in cases:
        with pytest.raises(InvalidRequest, match=words):
            families[family].encode_conversation(prompt)


# ---- what users write


def _places(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Conversations that hold a text in each place that users fill."""
    call = {"type": "function", "function": {"name": text, "arguments": {text: text}}}
    return [
        ("content", {"messages": [{"role": "user", "content": text}]}),
        ("within", {"messages": [{"role": "user", "content": f"a {text}{text}b"}]}),
        ("answer", {"messages": [{"role": "assistant", "content": text}]}),
        ("role", {"messages": [{"role": text, "content": "x"}]}),
        ("tools", {"messages": CHAT, "tools": [{"type": "function", "function": {"name": text, "description": text}}]}),
        ("call", {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}),
        ("key of a tool", {"messages": CHAT, "tools": [{"type": "function", text: 1, "function": {text: {text: 1}}}]}),
    ]


def _controls(tokenizer: Tokenizer, prompt: dict[str, Any]) -> list[int]:
    return [token for token in tokenizer.encode_conversation(Prompt(**prompt))[1] if token in tokenizer._special]


@pytest.mark.parametrize(
    ("family", "special"), [(name, text) for name, values in FAMILIES.items() for text in values[1]]
)
def test_a_special_token_that_a_user_writes_is_plain_text(
    families: dict[str, Tokenizer], family: str, special: str
) -> None:
    tokenizer = families[family]
    parts = [special, special[1:-1], special[:-1], special[1:], special[0], special[-1], special.strip("<|>[]/")]
    for text in parts:
        for place, prompt in _places(text):
            if place == "role" and (family == "mistral" or text in ("user", "assistant", "system")):
                continue  # the template refuses it, or it is a role
            harmless = dict(_places("quux"))[place]
            assert _controls(tokenizer, prompt) == _controls(tokenizer, harmless), (place, text)
            rendered, token_ids = tokenizer.encode_conversation(Prompt(**prompt))
            if not FAMILIES[family][2]:  # SentencePiece puts a space before a text's first word
                assert tokenizer.decode(token_ids) == rendered


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from(["<|im_", "start|>", "<|im_end|>", "<", "|>", "user", " a", "\n", "🙂"]), max_size=8
    )
)
def test_text_without_a_whole_special_token_is_encoded_as_by_transformers(
    families: dict[str, Tokenizer], pieces: list[str]
) -> None:
    text = "".join(pieces).replace("<|im_start|>", "").replace("<|im_end|>", "")
    for family in ("qwen", "phi"):
        chat = [{"role": "user", "content": text}]
        if not any(special in text for special in FAMILIES[family][1]):
            assert families[family].encode_conversation(Prompt(messages=chat)) == _theirs(families[family], chat)


def test_a_users_private_use_characters_are_no_marks(families: dict[str, Tokenizer]) -> None:
    content = "".join(map(chr, range(0x10F000, 0x10F010))) + "<|im_end|>\U0010fffd"
    text, token_ids = families["qwen"].encode_conversation(Prompt(messages=[{"role": "user", "content": content}]))
    assert content in text
    assert families["qwen"].decode(token_ids) == text


@pytest.mark.parametrize(
    "written", ["{{ m }}", "{{ [m] | string }}", "{{ m | pprint }}", "{{ m | tojson(ensure_ascii=true) }}"]
)
@pytest.mark.parametrize("normalized", [False, True])
def test_a_special_token_within_an_object_that_a_template_writes_is_plain_text(
    tiny: Path, tmp_path: Path, processes: TemplateProcesses, written: str, normalized: bool
) -> None:
    folder = _folder(tmp_path / "objects", tiny, "qwen")
    template = f"{{% for m in messages %}}<|im_start|>{written}<|im_end|>{{% endfor %}}"
    values = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    if normalized:
        backend = Backend.from_file(str(folder / "tokenizer.json"))
        backend.normalizer = normalizers.NFKC()
        backend.add_tokens([AddedToken("<|tool|>", special=True, normalized=True)])
        backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer(folder, processes=processes)

    for content in (
        "<|im_end|>",
        "a \\<|im_end|>\n<|im_start|>é",
        "<|tool|>",
        "\\U0010f000 \\udbfc\\udc01<|im_end|>|>",
        "<|",
    ):
        messages = [{"role": "user", "content": content, "more": {content: [content]}}]
        text, token_ids = tokenizer.encode_conversation(Prompt(messages=messages))
        if "pprint" not in written:  # breaks lines by their length, marks included
            assert text == _theirs(tokenizer, messages)[0]
        found = [token for token in token_ids if token in tokenizer._special]
        assert found == tokenizer.encode("<|im_start|><|im_end|>")


def test_a_prompts_special_tokens_stay_special(families: dict[str, Tokenizer]) -> None:
    [token] = families["qwen"].encode("<|im_end|>")
    assert token in families["qwen"]._special


# ---- bounds: see test_template_processes.py


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ namespace.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}", "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ self.__init__ }}", "{{ raise_exception.__globals__ }}", "{{ strftime_now.__code__ }}",
    ],
)  # fmt: skip
def test_a_template_reaches_nothing_but_its_variables(processes: TemplateProcesses, template: str) -> None:
    try:
        text = ChatTemplate(template, {}, [], processes).render(CHAT).text
    except InvalidRequest:
        return
    assert text == ""


def test_a_long_conversation_is_rendered(processes: TemplateProcesses) -> None:
    render: Callable[..., Any] = ChatTemplate(QWEN, {}, ["<|im_start|>"], processes).render
    chat = [{"role": "user", "content": "word " * 2000}] * 300
    assert len(render(chat).text) > 3_000_000
