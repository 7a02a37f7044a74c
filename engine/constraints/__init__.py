"""What an answer must match: grammars, and each sequence's place in its own. No torch."""
