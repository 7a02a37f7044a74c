"""The demo model as an agent, where tests look for what they share."""

from phalanx.benchmarks.lab.agent_model import make_agent_model

__all__ = ["make_agent_model"]
