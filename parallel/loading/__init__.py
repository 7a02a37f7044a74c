"""Weights of this rank, read from a checkpoint or made."""
