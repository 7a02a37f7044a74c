"""Serving people over the network: processes beside the engine that speak its protocol and know no torch."""
