"""The messages between a client and an engine, and how they travel: plain data and bytes."""
