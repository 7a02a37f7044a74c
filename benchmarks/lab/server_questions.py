"""The questions of parts/compare_servers.py: (name, path, body), all greedy, and the differences that are meant."""

from __future__ import annotations

from typing import Any

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

PARIS = [{"role": "user", "content": "What is the capital of France?"}]
TURNS = [
    {"role": "system", "content": "Answer in one short sentence."},
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Name another one."},
]
OPEN = [{"role": "user", "content": "Count to five."}, {"role": "assistant", "content": "One, two,"}]
CONTINUED = {"messages": OPEN, "continue_final_message": True, "add_generation_prompt": False}
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Say"}, {"type": "text", "text": "hello."}]}]
ONCE, FRANCE = "Once upon a time", "The capital of France is"
IDS, MORE_IDS = [504, 3575, 282, 4649, 314], [6403, 2326, 253, 655]
STREAM = {"stream": True, "stream_options": {"include_usage": True}}


def _chat(name: str, messages: Any = PARIS, max_tokens: int = 16, **body: Any) -> tuple[str, str, dict[str, Any]]:
    return f"chat: {name}", CHAT, {"messages": messages, "max_tokens": max_tokens, "temperature": 0, **body}


def _text(name: str, prompt: Any = ONCE, max_tokens: int = 16, **body: Any) -> tuple[str, str, dict[str, Any]]:
    return f"text: {name}", TEXT, {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **body}


QUESTIONS: list[tuple[str, str, dict[str, Any]]] = [
    _chat("short"),
    _chat("several turns", TURNS),
    _chat("parts", PARTS),
    _chat("long", max_tokens=100, ignore_eos=True),
    _chat("to its end", max_tokens=200),
    _chat("n", n=2),
    _chat("logprobs", logprobs=True),
    _chat("top_logprobs", logprobs=True, top_logprobs=3),
    _chat("tokens as ids", logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True),
    _chat("token ids", return_token_ids=True),
    _chat("stop", stop="France"),
    _chat("stops", stop=["zzz", " is"]),
    _chat("stop is returned", stop=[" is"], include_stop_str_in_output=True),
    _chat("stop token", stop_token_ids=[314]),
    _chat("min_tokens", min_tokens=20, max_tokens=24),
    _chat("penalties", max_tokens=40, ignore_eos=True, presence_penalty=1.5, frequency_penalty=0.5),
    _chat("repetition_penalty", max_tokens=40, ignore_eos=True, repetition_penalty=1.3),
    _chat("logit_bias", logit_bias={"314": -100}),
    _chat("allowed_token_ids", allowed_token_ids=[314, 260, 2]),
    _chat("bad_words", bad_words=["Paris"]),
    _chat("continued", OPEN, continue_final_message=True, add_generation_prompt=False),
    _chat("continued and echoed", OPEN, continue_final_message=True, add_generation_prompt=False, echo=True),
    _chat("prompt_logprobs", prompt_logprobs=1),
    _chat("streamed", **STREAM),
    _chat("streamed to its end", max_tokens=200, **STREAM),
    _chat("streamed with logprobs", logprobs=True, top_logprobs=2, **STREAM),
    _chat("streamed with stop", stop=[" is"], **STREAM),
    _chat("streamed, continued, echoed", echo=True, **{**CONTINUED, **STREAM}),
    _text("short"),
    _text("ids", IDS),
    _text("list", [ONCE, FRANCE]),
    _text("lists of ids", [IDS, MORE_IDS]),
    _text("n", n=2),
    _text("list and n", [ONCE, FRANCE], n=2),
    _text("default length", FRANCE),
    _text("logprobs=0", logprobs=0),
    _text("logprobs", logprobs=3),
    _text("tokens as ids", logprobs=2, return_tokens_as_token_ids=True),
    _text("echo", FRANCE, echo=True),
    _text("echo and logprobs", FRANCE, echo=True, logprobs=2),
    _text("echo alone", FRANCE, max_tokens=0, echo=True, logprobs=1),
    _text("echo of ids alone", IDS, max_tokens=0, echo=True, logprobs=1),
    _text("prompt_logprobs", FRANCE, prompt_logprobs=2),
    _text("token ids", return_token_ids=True),
    _text("stop", FRANCE, stop=["."]),
    _text("stop is returned", FRANCE, stop=["."], include_stop_str_in_output=True),
    _text("characters of several tokens", "漢字 é 😀", logprobs=1, echo=True),
    _text("long", max_tokens=100, ignore_eos=True),
    _text("streamed", **STREAM),
    _text("streamed with logprobs", logprobs=2, **STREAM),
    _text("streamed list", [ONCE, FRANCE], **STREAM),
    ("tokenize: text", "/tokenize", {"prompt": "Hello é 漢字"}),
    ("tokenize: messages", "/tokenize", {"messages": TURNS}),
    ("detokenize", "/detokenize", {"tokens": IDS}),
    _chat("bad: max_tokens above the context", max_tokens=100_000),
    _text("max_tokens beside a prompt that leaves less", [5] * 1000, max_tokens=1000, ignore_eos=True),
    _text("bad: prompt above the context", [5] * 3000),
    _text("bad: temperature", temperature=-1),
    _text("bad: top_p", top_p=3),
    _text("bad: n", n=0),
    _text("bad: logprobs", logprobs=1000),
    _text("bad: stream_options without stream", stream_options={"include_usage": True}),
    _chat("bad: top_logprobs without logprobs", top_logprobs=2),
    _chat("bad: no messages", []),
    _text("bad: model", model="nobody"),
    _text("max_tokens=0", max_tokens=0),
]

_EQUAL = (
    r"\.(choices|status|usage)$",
    "vLLM refuses n > 1 with temperature=0; here, as in OpenAI's API, the answers are then equal",
)
_NAMED = (
    r"\.(bytes(\[\d+\])?|text_offset\[\d+\])$",
    "vLLM's bytes and offsets are those of the names token_id:...; here they are those of the tokens",
)
_UNASKED = (r"\.prompt_logprobs$", "vLLM adds prompt_logprobs to an echo, although nobody asked for them")
_ALONE = (
    r"\.(prompt_logprobs|completion_tokens|total_tokens)$",
    f"vLLM counts the token that it samples and leaves out; and {_UNASKED[1]}",
)
_PIECES = (
    r"\.logprobs\.(tokens|text_offset|top_logprobs)\[\d+\]|\.prompt_logprobs$",
    "a token that ends within a character is U+FFFD here, with its bytes in a chat; vLLM gives it an empty text; and "
    f"{_UNASKED[1]}",
)

KNOWN: dict[str, tuple[str, str]] = {
    "chat: n": _EQUAL,
    "text: n": _EQUAL,
    "text: list and n": _EQUAL,
    "chat: tokens as ids": _NAMED,
    "text: tokens as ids": _NAMED,
    "chat: continued and echoed": _UNASKED,
    "text: echo and logprobs": _UNASKED,
    "text: echo alone": _ALONE,
    "text: echo of ids alone": _ALONE,
    "text: characters of several tokens": _PIECES,
}
"""By the question's name: (the paths that differ on purpose, a regular expression; why)."""
