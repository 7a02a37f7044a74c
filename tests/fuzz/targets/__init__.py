"""What is fuzzed: each module has one function `fuzz_one(data)`, which raises for anything that must not happen."""

from __future__ import annotations

from pathlib import Path

CORPUS = Path(__file__).resolve().parent.parent / "corpus"
"""A folder for each target with inputs that are worth trying again."""

TARGETS = {
    "answers": "answers",
    "chat_templates": "chat_templates",
    "gguf": "gguf_files",
    "grammars": "grammars",
    "http": "http_bodies",
    "jsonl": "jsonl",
    "model_folder": "model_folder",
    "safetensors": "safetensors_headers",
    "special_tokens": "special_tokens",
    "wire": "wire",
}
"""The module of each target."""
