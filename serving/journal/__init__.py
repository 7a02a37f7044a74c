"""A journal on disk: what was accepted is computed although the process that accepted it dies."""
