"""Requests under way: let in, handed to the engines, their events brought to the event loop."""
