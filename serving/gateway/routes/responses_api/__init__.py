"""/v1/responses over the core of chat completions: from items to messages, and from parts to items and events."""
