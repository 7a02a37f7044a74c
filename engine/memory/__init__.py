"""How many bytes a configuration takes, and what to change where it takes too many."""
