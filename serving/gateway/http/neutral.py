"""What a request may hold that changes nothing: nulls, and defaults of fields that this server does not have.

Clients write out all of what they know, such as a dump of vLLM's parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import inspect

from .errors import UNSUPPORTED, invalid

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "kv_transfer_params": ({},),
    "vllm_xargs": ({},),
    "truncation_side": ("left",),
    "best_of": (1,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "documents": ([],),
    "separate_reasoning": (True,),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "prompt_cache_options": ({},),
    "suffix": ("",),
    "context_management": ([],),
    "n": (1,),
    "stop": ([],),
    "mcp_servers": ([],),
    "speed": ("standard",),
    "fallbacks": ([],),
    "features": ([], {}),
    "sampling_params.detokenize": (False, True),
    "sampling_params.spaces_between_special_tokens": (False, True),
    "sampling_params.output_kind": (0, 1, 2),
    "sampling_params.flat_logprobs": (False,),
    "sampling_params.best_of": (1,),
    "sampling_params.logits_processors": ([],),
    "sampling_params.extra_args": ({},),
    "sampling_params.skip_reading_prefix_cache": (False,),
    "structured_outputs.disable_any_whitespace": (False,),
    "structured_outputs.disable_additional_properties": (False,),
    "structured_outputs.disable_fallback": (False,),
}
"""Values of refused fields with which an answer is what it is without them, by the field's name or path."""


def without_neutral(values: dict[str, Any], refused: Mapping[str, str]) -> dict[str, Any]:
    """The values without nulls, and without refused fields that change nothing. `refused` says why, by name or path.

    Raises ApiError (400) for any other value of a refused field.
    """
    kept = {name: value for name, value in values.items() if value is not None}
    for path, why in refused.items():
        outer, _, name = path.rpartition(".")
        holder = kept.get(outer) if outer else kept
        if not isinstance(holder, dict) or name not in holder:
            continue
        value = holder[name]
        if value is not None and not any(_same(value, neutral) for neutral in NEUTRAL.get(path, ())):
            raise invalid(f"{path} is not supported: {why}", path, UNSUPPORTED)
        rest = {each: value for each, value in holder.items() if each != name}
        kept = {**kept, outer: rest} if outer else rest
    return kept


def _same(value: Any, neutral: Any) -> bool:
    """Whether two values are the same in JSON, where false is no 0."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def without_nulls(value: Any, kind: type[msgspec.Struct]) -> Any:
    """What is to become a struct, without nulls in place of its fields and of those of the structs within it.

    Values that the struct leaves open, such as a JSON Schema, stay as they are.
    """
    return _pruned(value, _type_of(kind))


@functools.cache
def _type_of(kind: type[msgspec.Struct]) -> inspect.Type:
    return inspect.type_info(kind)


def _pruned(value: Any, form: inspect.Type) -> Any:
    if isinstance(form, inspect.Metadata):
        return _pruned(value, form.type)
    if isinstance(form, inspect.UnionType):
        wanted = inspect.StructType if isinstance(value, dict) else inspect.ListType
        fitting = [each for each in map(_bare, form.types) if isinstance(each, wanted)]
        return _pruned(value, fitting[0]) if fitting else value
    if isinstance(form, inspect.ListType) and isinstance(value, list):
        return [_pruned(item, form.item_type) for item in value]
    if isinstance(form, inspect.StructType) and isinstance(value, dict):
        forms = {field.encode_name: field.type for field in form.fields}
        return {
            name: _pruned(item, forms[name]) if name in forms else item
            for name, item in value.items()
            if item is not None
        }
    return value


def _bare(form: inspect.Type) -> inspect.Type:
    return form.type if isinstance(form, inspect.Metadata) else form
