"""The composition root: the only place that names concrete parts and fits them together."""

from llm_orchestrator.wire.orchestrator import (
    Orchestrator,
    is_postgres,
    make_store,
    node_options,
    output_of,
    store_path,
)

__all__ = ["Orchestrator", "is_postgres", "make_store", "node_options", "output_of", "store_path"]
