"""The nodes of a store in memory."""

from __future__ import annotations

from llm_orchestrator.clock import Clock
from llm_orchestrator.model import Json
from llm_orchestrator.store import base


class MemoryMembers:
    """See store.base.Members for every method's contract."""

    def __init__(self, nodes: dict[str, base.Member], clock: Clock) -> None:
        self._nodes = nodes
        self._clock = clock

    async def join(self, node_id: str, region: str, info: Json) -> None:
        now = self._clock.now_us()
        alive = base.NodeState.ALIVE.value
        self._nodes[node_id] = base.Member(node_id, region, alive, 0, True, now, now, info)

    async def beat(self, node_id: str, info: Json) -> base.Pulse:
        now, own = self._clock.now_us(), self._nodes.get(node_id)
        if own is not None and base.lives(own):
            own = own._replace(beat=own.beat + 1, heartbeat_at=now, info=info, is_connected=True)
            self._nodes[node_id] = own
        return await self.watch(node_id)

    async def watch(self, node_id: str) -> base.Pulse:
        now, own = self._clock.now_us(), self._nodes.get(node_id)
        seen = [node for node in self._nodes.values() if base.lives(node) or node is own]
        return base.Pulse("memory", now, sorted(seen))

    async def bury(self, node_id: str, beat: int) -> bool:
        node = self._nodes.get(node_id)
        if node is None or not base.lives(node) or node.beat != beat:
            return False
        is_leaving = node.state == base.NodeState.LEAVING
        state = base.NodeState.LEFT if is_leaving else base.NodeState.DEAD
        self._nodes[node_id] = node._replace(state=state.value, is_connected=False)
        return True

    async def leave(self, node_id: str, state: base.NodeState) -> None:
        node = self._nodes.get(node_id)
        if node is not None and base.lives(node):
            self._nodes[node_id] = node._replace(state=state.value)

    async def close(self) -> None: ...
