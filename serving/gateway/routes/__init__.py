"""The routes: from a checked request to the protocol, and from events to an answer."""
