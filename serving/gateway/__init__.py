"""The HTTP gateway: OpenAI's API over the client protocol, in a process that never imports torch."""
