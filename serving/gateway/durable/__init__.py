"""Requests that outlive the gateway's process: accepted once, answered once, whoever dies meanwhile."""
