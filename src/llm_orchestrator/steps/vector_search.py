"""Step type `vector_search`: the nearest vectors of an index. It only reads."""

from __future__ import annotations

from typing import Any, ClassVar

from llm_orchestrator.errors import AuthorError
from llm_orchestrator.model import Effect, Json
from llm_orchestrator.providers.base import Match
from llm_orchestrator.steps.base import Outputs, StepContext
from llm_orchestrator.steps.values import describe, is_finite


class VectorSearch:
    """Searches by `query`, a vector; `output` binds results, metadata."""

    type: ClassVar[str] = "vector_search"
    outputs: ClassVar[tuple[str, ...]] = ("results", "metadata")
    is_paid: ClassVar[bool] = False

    def effect(self, config: Any) -> Effect:
        """Reading."""
        return Effect.REPEATABLE

    async def execute(self, context: StepContext, config: Any) -> Outputs:
        """Results are objects {id, score, metadata, vector}, nearest first."""
        store = context.providers.vectors(config.database)
        matches = await store.search(
            config.index,
            check_vector(config.query, what="the query"),
            top_k=config.top_k,
            namespace=config.namespace,
            filter=config.filter,
            include_metadata=config.include_metadata,
            include_vectors=config.include_vectors,
        )
        metadata = {
            "count": len(matches),
            "top_k": config.top_k,
            "database": config.database,
            "index": config.index,
        }
        return {"results": [_result(match, config) for match in matches], "metadata": metadata}


def check_vector(value: Json, *, what: str) -> list[float]:
    """`value` as a vector. Raises AuthorError when it is no list of finite numbers."""
    if not isinstance(value, list | tuple) or not value:
        raise AuthorError(f"{what} is {describe(value)}; it must be a list of numbers")
    for place, number in enumerate(value):
        if not is_finite(number):
            raise AuthorError(f"{what} holds {describe(number)} at {place}; it must be a number")
    return [float(number) for number in value]


def _result(match: Match, config: Any) -> dict[str, Json]:
    result: dict[str, Json] = {"id": match.id, "score": match.score}
    if config.include_metadata:
        result["metadata"] = dict(match.metadata or {})
    if config.include_vectors:
        result["vector"] = list(match.vector or ())
    return result
