"""A durable workflow engine for LLM applications whose disaster recovery is proved.

Importing this package is cheap: names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_orchestrator.engine.context import Context
    from llm_orchestrator.language.code import step, workflow
    from llm_orchestrator.wire import Orchestrator

__all__ = ["Context", "Orchestrator", "step", "workflow"]
__version__ = "0.1.0"

_HOMES = {
    "Context": "llm_orchestrator.engine.context",
    "Orchestrator": "llm_orchestrator.wire",
    "step": "llm_orchestrator.language.code",
    "workflow": "llm_orchestrator.language.code",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
