"""Processes of a group: how they start, what they report, how they end."""
