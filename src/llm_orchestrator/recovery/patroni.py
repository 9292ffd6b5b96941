"""Patroni's REST API: where the primary is, who follows it, and moving it to another server.

Any member answers for the cluster, so each address is asked and the first answer counts. Which
server leads is asked of the servers themselves (`/primary`): only the holder of the arbiter's lock
says yes, while the cluster's list still names a server that has just been lost.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import Refused, StoreUnavailable

ASK_S = 3.0
MOVE_S = 60.0
"""Patroni ends a switchover within its ttl and some seconds, or gives it up."""
LEADER_S = 45.0
"""How long an election may take: a lost host's lock lasts for Patroni's ttl (20 s and more)."""
_POLL_S = 0.2
_LEADERS = ("leader", "master", "primary")
_SYNC = ("sync_standby", "quorum_standby")
_WELL = ("running", "streaming", "in archive recovery")


class Server(NamedTuple):
    """A member of the cluster."""

    name: str
    region: str
    role: str
    state: str
    lag_bytes: int | None
    """None: unknown."""
    api_url: str = ""
    """Where its own Patroni answers."""

    @property
    def is_sync(self) -> bool:
        """Commits wait for it."""
        return self.role in _SYNC

    @property
    def is_well(self) -> bool:
        """It runs, and follows if it is no leader."""
        return self.state in _WELL


@dataclass(frozen=True, slots=True)
class Cluster:
    """One look. `leader` is empty while no server says that it leads."""

    servers: Sequence[Server]
    leader: str
    sync: str
    """`strict`: no commit without a second copy; `degrade`: with none left it goes on alone;
    `off`: commits wait for nobody."""

    @property
    def region(self) -> str:
        """Where the primary is; empty when nobody leads."""
        return next((each.region for each in self.servers if each.name == self.leader), "")

    def candidate(self, region: str) -> Server | None:
        """Who may become the primary there: a synchronous standby, where commits wait for one."""
        return self._best(each for each in self.servers if each.region == region)

    def heir(self, besides: Collection[str]) -> Server | None:
        """Who may become the primary anywhere, but those of `besides`; near the old one first."""
        there = [each for each in self.servers if each.name not in besides]
        near = self._best(each for each in there if each.region == self.region)
        return near or self._best(there)

    def _best(self, servers: Iterable[Server]) -> Server | None:
        found = [each for each in servers if each.name != self.leader and each.is_well]
        if self.sync != "off" and self.leader:
            found = [each for each in found if each.is_sync]
        return min(found, key=lambda each: (not each.is_sync, each.lag_bytes or 0), default=None)


def cluster_of(
    members: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], leader: str
) -> Cluster:
    """What Patroni's answers mean: `/cluster`'s members, `/config`, and who says that it leads."""
    if not settings.get("synchronous_mode"):
        sync = "off"
    else:
        sync = "strict" if settings.get("synchronous_mode_strict") else "degrade"
    return Cluster([_server(member) for member in members], leader, sync)


def _server(member: Mapping[str, Any]) -> Server:
    """Its region is its tag `region`, else its name before the first hyphen (a-db1: a)."""
    name, lag = str(member["name"]), member.get("lag", 0)
    region = (member.get("tags") or {}).get("region") or name.partition("-")[0]
    return Server(
        name,
        str(region),
        str(member.get("role", "")),
        str(member.get("state", "")),
        lag if isinstance(lag, int) else None,
        str(member.get("api_url", "")).removesuffix("/patroni"),
    )


class Patroni:
    """See the module's docstring. Use as `async with`."""

    def __init__(self, urls: Sequence[str], clock: Clock) -> None:
        self._urls = [url.rstrip("/") for url in urls]
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Patroni:
        self._session = aiohttp.ClientSession()
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def look(self) -> Cluster | None:
        """The cluster as it is; None when no address answers."""
        whole, settings, *claims = await asyncio.gather(
            self._first("/cluster"),
            self._first("/config"),
            *(self._ask("GET", f"{url}/primary") for url in self._urls),
        )
        if whole is None:
            return None
        names = [_name(text) for status, text in claims if status == 200]
        return cluster_of(whole.get("members", []), settings or {}, names[0] if names else "")

    async def await_leader(self, name: str = "", *, limit_s: float = LEADER_S) -> Cluster:
        """Until somebody (`name`) leads. Raises StoreUnavailable when nobody does in time."""
        end = self._clock.monotonic() + limit_s
        while True:
            found = await self.look()
            if found is not None and found.leader and found.leader == (name or found.leader):
                return found
            if self._clock.monotonic() >= end:
                who = f"{name} does not lead" if name else "nobody leads"
                raise StoreUnavailable(f"{who} after {limit_s:g} s", hint="llmo region status")
            await self._clock.sleep(_POLL_S)

    async def switch(self, leader: str, candidate: str) -> Cluster:
        """Move the primary, in order: nothing is lost. Raises Refused, StoreUnavailable."""
        return await self._move("/switchover", {"leader": leader, "candidate": candidate})

    async def promote(self, candidate: str) -> Cluster:
        """Make `candidate` the primary although nobody leads. Raises as `switch` does."""
        return await self._move("/failover", {"candidate": candidate})

    async def make_anew(self, server: Server) -> None:
        """Have a server throw its data away and copy the leader's.

        Raises Refused for the leader, and while there is none; StoreUnavailable.
        """
        status, said = await self._ask("POST", f"{server.api_url}/reinitialize", {})
        if status == 0:
            raise StoreUnavailable(f"Patroni of {server.name} does not answer: {said[:200]}")
        if status != 200:
            raise Refused(f"Patroni does not make {server.name} anew: {said[:200]}")

    async def set_strict(self, *, is_strict: bool) -> None:
        """Whether commits stall when no synchronous standby is left. Raises StoreUnavailable."""
        change = {"synchronous_mode": True, "synchronous_mode_strict": is_strict}
        said = "no address answers"
        for url in self._urls:
            status, said = await self._ask("PATCH", f"{url}/config", change)
            if status == 200:
                return
        raise StoreUnavailable(f"Patroni does not take the policy: {said[:200]}")

    async def _move(self, path: str, wish: Mapping[str, str]) -> Cluster:
        status, said = 0, "no address answers"
        for url in self._urls:
            status, said = await self._ask("POST", url + path, wish, limit_s=MOVE_S)
            if status:
                break
        if status in (400, 409, 412):
            raise Refused(f"Patroni does not move the primary: {said[:200]}")
        # anything else may have been done all the same: who leads in the end decides
        return await self.await_leader(wish["candidate"])

    async def _first(self, path: str) -> dict[str, Any] | None:
        for url in self._urls:
            status, text = await self._ask("GET", url + path)
            if status == 200:
                found: dict[str, Any] = json.loads(text)
                return found
        return None

    async def _ask(
        self,
        method: str,
        url: str,
        body: Mapping[str, Any] | None = None,
        *,
        limit_s: float = ASK_S,
    ) -> tuple[int, str]:
        """Status and text; status 0 when nothing answers."""
        assert self._session is not None
        limit = aiohttp.ClientTimeout(total=limit_s)
        try:
            async with self._session.request(method, url, json=body, timeout=limit) as answer:
                return answer.status, await answer.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            return 0, str(error) or type(error).__name__


def _name(text: str) -> str:
    """Whose answer this is: Patroni names itself in every state that it tells."""
    try:
        told = json.loads(text)["patroni"]
    except (ValueError, KeyError, TypeError):
        return ""
    return str(told.get("name", ""))
