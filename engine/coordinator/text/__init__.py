"""Text that is not ours: chat templates and what they are given, and the bytes and characters of tokens."""
