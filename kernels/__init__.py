"""Arithmetic of one rank."""

ATTENTION_BACKENDS = ("auto", "cpu", "torch", "triton", "flash_attn_2", "flash_attn_3")
"""The values of the setting attention, where nothing imports torch; backend_selector has the classes."""
