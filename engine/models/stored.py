"""What the weights' headers say of a model: compared with config.json before memory is taken for what that says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...parallel.loading.json_files import LoadError
from ...parallel.loading.safetensors_files import (
    EMBEDDINGS,
    HEAD,
    StoredTensor,
    check_readable,
    hold_the_same,
    lacks,
    locate_tensors,
    of_tied,
)
from ..errors import CheckpointError
from .spec import ModelSpec


def read_stored(spec: ModelSpec, folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a model folder by name, from their headers.

    Every size that config.json gives is compared with the tensors that have it, in every layer: a size that was made up
    would take memory that no host has. What else the tensors must be is checked when they are loaded
    (parallel/loading/checkpoint.py). Raises CheckpointError naming the file and the fields.
    """
    try:
        stored = locate_tensors(folder)
    except LoadError as error:
        raise CheckpointError(str(error)) from error

    if spec.tied_embeddings:
        stored = of_tied(stored)
    config = folder / "config.json"
    for name, shape, fields in _sized_tensors(spec):
        if name not in stored:
            raise CheckpointError(
                f"{lacks(folder, [name], stored)} by {config}: {fields}; copy the files that are missing, or use the "
                f"config.json that belongs to the weights"
            )
        if stored[name].shape != shape:
            _check_readable(name, stored[name])
            raise CheckpointError(
                f"{stored[name].file}: tensor {name} has shape {list(stored[name].shape)}, but by {config} it must "
                f"have {list(shape)}: {fields}; use the config.json that belongs to the weights"
            )
    return stored


def _check_readable(name: str, tensor: StoredTensor) -> None:
    """Raise CheckpointError for a tensor of a quantized checkpoint, whose elements hold several numbers each."""
    try:
        check_readable(name, tensor)
    except LoadError as error:
        raise CheckpointError(str(error)) from error


def has_own_head(spec: ModelSpec, stored: dict[str, StoredTensor]) -> bool:
    """Whether a model whose embeddings are tied to its head stores another head, which transformers then uses too."""
    if not spec.tied_embeddings:
        return False
    embeddings, head = stored.get(EMBEDDINGS), stored.get(HEAD)
    return embeddings is not None and head is not None and not hold_the_same(embeddings, head)


_Sized = tuple[str, tuple[int, ...], str]
"""A tensor's name, its shape, and the fields of config.json that make it so."""


def _sized_tensors(spec: ModelSpec) -> Iterator[_Sized]:
    """Yield the tensors that have the model's sizes: no more than are asked for, as there may be millions of layers."""
    vocabulary = (spec.vocab_size, spec.hidden_size)
    fields = f"vocab_size={spec.vocab_size}, hidden_size={spec.hidden_size}"
    yield EMBEDDINGS, vocabulary, fields
    if not spec.tied_embeddings:
        yield HEAD, vocabulary, f"{fields}, tie_word_embeddings=false"
    for layer in range(spec.num_layers):
        yield from _layer_tensors(spec, layer)


def _layer_tensors(spec: ModelSpec, layer: int) -> Iterator[_Sized]:
    hidden = spec.hidden_size
    prefix = f"model.layers.{layer}"
    common = f"num_hidden_layers={spec.num_layers}, hidden_size={hidden}"
    heads = f"{common}, num_attention_heads={spec.num_query_heads}, head_dim={spec.head_dim}"

    yield f"{prefix}.self_attn.q_proj.weight", (spec.num_query_heads * spec.head_dim, hidden), heads
    yield (
        f"{prefix}.self_attn.k_proj.weight",
        (spec.num_kv_heads * spec.head_dim, hidden),
        f"{heads}, num_key_value_heads={spec.num_kv_heads}",
    )
    yield (
        f"{prefix}.mlp.down_proj.weight",
        (hidden, spec.intermediate_size),
        f"{common}, intermediate_size={spec.intermediate_size}",
    )
