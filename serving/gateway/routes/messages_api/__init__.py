"""Anthropic's /v1/messages over the core of chat completions: from blocks to messages, from parts to blocks."""
