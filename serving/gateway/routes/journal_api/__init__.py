"""The routes that a journal makes possible: what became of requests, files, and batches of requests."""
