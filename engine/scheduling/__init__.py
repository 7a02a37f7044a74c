"""What each request computes in a step, and which blocks it has. Knows no torch."""
