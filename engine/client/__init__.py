"""What a caller holds: LLM, AsyncLLM and the handles of their requests, over the protocol."""
