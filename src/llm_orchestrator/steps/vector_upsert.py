"""Step type `vector_upsert`: keep vectors in an index, each under its id.

The same ids with the same vectors change nothing, so that a repeat after a crash is harmless.
"""

from __future__ import annotations

from typing import Any, ClassVar

from llm_orchestrator.errors import AuthorError
from llm_orchestrator.model import Effect
from llm_orchestrator.providers.base import VectorItem
from llm_orchestrator.steps.base import Outputs, StepContext
from llm_orchestrator.steps.vector_search import check_vector


class VectorUpsert:
    """Keeps `items`, or `ids` with `vectors` (and `metadatas`); binds count, metadata."""

    type: ClassVar[str] = "vector_upsert"
    outputs: ClassVar[tuple[str, ...]] = ("count", "metadata")
    is_paid: ClassVar[bool] = False

    def effect(self, config: Any) -> Effect:
        """Each item replaces what stood under its id."""
        return Effect.REPEATABLE

    async def execute(self, context: StepContext, config: Any) -> Outputs:
        """Raises AuthorError for columns that do not fit and for ids given twice."""
        items = _items(config)
        _check(items)
        count = 0
        if items:
            store = context.providers.vectors(config.database)
            count = await store.upsert(config.index, items, namespace=config.namespace)
        metadata = {
            "database": config.database,
            "index": config.index,
            "namespace": config.namespace,
            "dimensions": len(items[0].vector) if items else 0,
        }
        return {"count": count, "metadata": metadata}


def _items(config: Any) -> list[VectorItem]:
    if config.items is not None:
        return [
            VectorItem(
                item.id,
                check_vector(item.vector, what=f"the vector of {item.id!r}"),
                dict(item.metadata),
            )
            for item in config.items
        ]
    count = len(config.ids)
    metadatas = config.metadatas if config.metadatas is not None else ({},) * count
    for name, column in (("vectors", config.vectors), ("metadatas", metadatas)):
        if len(column) != count:
            raise AuthorError(f"there are {count} ids and {len(column)} {name}")
    return [
        VectorItem(key, check_vector(vector, what=f"the vector of {key!r}"), dict(metadata))
        for key, vector, metadata in zip(config.ids, config.vectors, metadatas, strict=True)
    ]


def _check(items: list[VectorItem]) -> None:
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise AuthorError(f"the id {item.id!r} is given twice")
        seen.add(item.id)
        if len(item.vector) != len(items[0].vector):
            raise AuthorError(
                f"the vector of {item.id!r} has {len(item.vector)} numbers,"
                f" that of {items[0].id!r} has {len(items[0].vector)}"
            )
