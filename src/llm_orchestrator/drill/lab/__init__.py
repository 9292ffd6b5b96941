"""A cluster of real servers on one machine: hosts, a network between them, and what runs there."""

from llm_orchestrator.drill.lab.clear import down
from llm_orchestrator.drill.lab.lab import Lab, status, up
from llm_orchestrator.drill.lab.spec import LabSpec

__all__ = ["Lab", "LabSpec", "down", "status", "up"]
