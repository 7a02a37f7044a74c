"""A rank that does what a plan says. Knows no requests."""
