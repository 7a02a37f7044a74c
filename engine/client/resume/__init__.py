"""What keeps a client's requests alive while its engine is replaced."""
