"""What travels over HTTP: bodies that are checked and bounded, errors as OpenAI writes them, server-sent events."""
