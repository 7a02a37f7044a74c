"""Fields that OpenAI's or vLLM's server takes and this one refuses, with what to use instead."""

from __future__ import annotations

from collections.abc import Mapping

_STRUCTURED = "use structured_outputs, which has one backend"
_ONE_BACKEND = "there is one backend"
_WHITESPACE = "JSON has a space or a new line with its indentation between its parts"
_NO_ADAPTERS = "adapters are not loaded by this server"

_BOTH: dict[str, str] = {
    "use_beam_search": "answers are sampled or greedy; use n for several",
    "length_penalty": "it belongs to beam search, which there is not",
    "early_stopping": "it belongs to beam search, which there is not",
    "guided_json": "use structured_outputs.json",
    "guided_regex": "use structured_outputs.regex",
    "guided_choice": "use structured_outputs.choice",
    "guided_grammar": "use structured_outputs.grammar",
    "guided_decoding_backend": _STRUCTURED,
    "guided_whitespace_pattern": _WHITESPACE,
    "structural_tag": "use structured_outputs.structural_tag",
    "spaces_between_special_tokens": "special tokens are joined as the tokenizer joins them",
    "detokenize": "use /inference/v1/generate for token ids without text",
    "logits_processors": "code is not taken from requests; use logit_bias, bad_words or allowed_token_ids",
    "mm_processor_kwargs": "the models of this server read text",
    "media_io_kwargs": "the models of this server read text",
    "truncation_side": "truncate_prompt_tokens keeps the last tokens",
    "kv_transfer_params": "KV is not moved between servers",
    "vllm_xargs": "arguments of plug-ins are not taken",
    "thinking_token_budget": "use max_tokens",
    "repetition_detection": "use repetition_penalty or frequency_penalty",
    "lora_request": _NO_ADAPTERS,
    "timeout_s": "its name is timeout",
    "structured_outputs.disable_any_whitespace": _WHITESPACE,
    "structured_outputs.whitespace_pattern": _WHITESPACE,
    "structured_outputs.disable_additional_properties": 'give the schema "additionalProperties": false',
    "structured_outputs.disable_fallback": _ONE_BACKEND,
}

REFUSED_CHAT: Mapping[str, str] = {
    **_BOTH,
    "best_of": "use n and choose among the answers",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "prediction": "predicted outputs are not used",
    "audio": "the models of this server answer with text",
    "web_search_options": "this server searches nothing",
    "moderation": "this server moderates nothing",
    "documents": "put them into the messages, or into chat_template_kwargs if the model's template has them",
    "chat_template": "the model's own template is used; chat_template_kwargs sets its variables",
    "separate_reasoning": "reasoning is split off if the model writes any; include_reasoning=false leaves it out",
    "prompt": "use messages, or /v1/completions",
    "prompt_cache_retention": "cached prefixes stay while there is room",
    "prompt_cache_options": "cached prefixes stay while there is room",
}

REFUSED_COMPLETION: Mapping[str, str] = {
    **_BOTH,
    "suffix": "put the text after the hole into the prompt, as the model expects it",
    "prompt_embeds": "prompts are text or token ids",
    "messages": "use prompt, or /v1/chat/completions",
    "max_completion_tokens": "its name is max_tokens here",
    "top_logprobs": "logprobs is a number here: logprobs=5 gives the five likeliest tokens",
}

REFUSED_TOKENIZE: Mapping[str, str] = {
    "chat_template": REFUSED_CHAT["chat_template"],
    "mm_processor_kwargs": _BOTH["mm_processor_kwargs"],
}

REFUSED_GENERATE: Mapping[str, str] = {
    "sampling_params.detokenize": "the answer is token ids in any case",
    "sampling_params.spaces_between_special_tokens": "the answer is token ids in any case",
    "sampling_params.output_kind": "stream says whether the answer comes in pieces",
    "sampling_params.flat_logprobs": "log-probabilities have one form",
    "sampling_params.structured_outputs": "use /v1/completions, which takes token ids, too",
    "sampling_params.best_of": "use n and choose among the answers",
    "sampling_params.logits_processors": _BOTH["logits_processors"],
    "sampling_params.extra_args": _BOTH["vllm_xargs"],
    "sampling_params.thinking_token_budget": _BOTH["thinking_token_budget"],
    "sampling_params.repetition_detection": _BOTH["repetition_detection"],
    "sampling_params.skip_reading_prefix_cache": "give the request a cache_salt of its own",
    "features": "the models of this server read text",
    "kv_transfer_params": _BOTH["kv_transfer_params"],
}
