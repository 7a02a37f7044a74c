"""What a checkpoint's headers say of a model, read before memory is taken for what config.json says."""

from __future__ import annotations

from pathlib import Path

from ...parallel.loading.json_files import LoadError
from ...parallel.loading.safetensors_files import StoredTensor, hold_the_same, locate_tensors
from ..errors import CheckpointError
from .spec import ModelSpec

_EMBEDDINGS = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_LAYER = "model.layers.{}.{}.weight"


def read_stored(spec: ModelSpec, folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a model folder by name, from their headers.

    Raises CheckpointError if they cannot be read, or if config.json gives the model sizes that its tensors do not have:
    a size made up would take memory that no host has.
    """
    try:
        stored = locate_tensors(folder)
    except LoadError as error:
        raise CheckpointError(str(error)) from error

    hidden = spec.hidden_size
    query = spec.num_query_heads * spec.head_dim
    expected = {_EMBEDDINGS: ((spec.vocab_size, hidden), "vocab_size and hidden_size")}
    for layer in {0, spec.num_layers - 1}:
        shapes = {
            "self_attn.q_proj": ((query, hidden), "num_attention_heads, head_dim and hidden_size"),
            "self_attn.k_proj": (
                (spec.num_kv_heads * spec.head_dim, hidden),
                "num_key_value_heads, head_dim and hidden_size",
            ),
            "mlp.down_proj": ((hidden, spec.intermediate_size), "hidden_size and intermediate_size"),
        }
        expected |= {_LAYER.format(layer, part): shape for part, shape in shapes.items()}

    for name, (shape, fields) in expected.items():
        if name in stored and stored[name].shape != shape:
            raise CheckpointError(
                f"{folder / 'config.json'}: {fields} make {name} {shape}, but {stored[name].file} holds it as "
                f"{stored[name].shape}; use the config.json that belongs to the weights"
            )

    # Layers that are missing are found while loading, but a number of them that was made up is not built first.
    last = _LAYER.format(spec.num_layers - 1, "mlp.down_proj")
    if last not in stored and _LAYER.format(0, "mlp.down_proj") in stored:
        raise CheckpointError(
            f"{folder / 'config.json'}: num_hidden_layers={spec.num_layers}, but the weights hold no {last}; "
            f"use the config.json that belongs to the weights, or copy the files that are missing"
        )
    return stored


def has_own_head(spec: ModelSpec, stored: dict[str, StoredTensor]) -> bool:
    """Whether a model whose embeddings are tied to its head stores another head, which transformers then uses too."""
    if not spec.tied_embeddings:
        return False
    embeddings, head = stored.get(_EMBEDDINGS), stored.get(_HEAD)
    return embeddings is not None and head is not None and not hold_the_same(embeddings, head)
