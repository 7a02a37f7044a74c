"""What /v1/responses takes and answers, in OpenAI's shapes."""
