"""What /v1/messages takes and answers, in Anthropic's shapes."""
