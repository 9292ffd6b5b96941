"""The composition root: the only place that names concrete parts and fits them together."""

from llm_orchestrator.wire.orchestrator import Orchestrator, make_store, output_of, store_path

__all__ = ["Orchestrator", "make_store", "output_of", "store_path"]
