"""From a workflow's name to its definition, without asking the store for each run.

Why a kept answer is safe: a definition never changes under its digest, and a run names the digest.
Only which one is the newest of a name can change; whoever registers or removes one through any
process tells every other one (`News.is_workflow`), and an answer is forgotten after KEPT_S in any
case. So a request can meet the version before only while the news of the newer one is on its way,
as if it had come that much earlier. That there is no such workflow is never kept.
"""

from __future__ import annotations

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import NotFound
from llm_orchestrator.model import Workflow
from llm_orchestrator.store.base import News, Store

KEPT_S = 1.0
_KEPT_MAX = 1_000


class Known:
    """See the module's docstring."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._found: dict[tuple[str, str | None], tuple[Workflow, float]] = {}
        self._told = 0
        store.on_news(self._notice)

    async def find(self, name: str, version: str | None = None) -> Workflow:
        """The newest definition of that name (and version). Raises NotFound, StoreError."""
        now = self._clock.monotonic()
        kept = self._found.get((name, version))
        if kept is not None and now < kept[1]:
            return kept[0]
        told = self._told
        found = await self._store.shelf.workflow(name, version)
        if found is None:
            what = f"workflow {name!r}" + (f" version {version!r}" if version else "")
            raise NotFound(f"no {what} is registered", hint="llmo workflows list")
        if told == self._told:  # else it may be out of date already
            if len(self._found) >= _KEPT_MAX:
                self._found.clear()
            self._found[name, version] = (found, now + KEPT_S)
        return found

    def forget(self) -> None:
        """Something was registered or removed."""
        self._told += 1
        self._found.clear()

    def _notice(self, news: News) -> None:
        if news.is_workflow or news.is_gap or news.is_replaced:
            self.forget()
