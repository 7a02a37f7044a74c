"""Processes of a group: how they start, what they tell, how they end."""
