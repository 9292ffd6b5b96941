"""A serving process: the API, a node, or both, on one event loop.

`--serve api,worker` is one process that answers and executes; `api` alone answers and lets other
nodes execute; `worker` alone executes, and answers only for its health and its metrics.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from llm_orchestrator import __version__
from llm_orchestrator.clock import Clock
from llm_orchestrator.config import Config
from llm_orchestrator.engine.control import Operator
from llm_orchestrator.engine.driver import NodeOptions
from llm_orchestrator.engine.execution import Publish
from llm_orchestrator.engine.maintenance import Admission, Watch
from llm_orchestrator.engine.measure import store_gauges
from llm_orchestrator.engine.node import Node, registration
from llm_orchestrator.engine.store_breaker import StoreBreaker, gated
from llm_orchestrator.errors import ConfigError
from llm_orchestrator.language.code import CodeWorkflow
from llm_orchestrator.model import MICROSECONDS
from llm_orchestrator.server.feed import Feed
from llm_orchestrator.server.listen import HttpServer, make_server
from llm_orchestrator.server.principal import Guard, OpenGuard, TokenGuard
from llm_orchestrator.server.surface import Setting, Surface
from llm_orchestrator.store.base import Database
from llm_orchestrator.telemetry.metrics import Metrics
from llm_orchestrator.wire.catalogue import Definitions
from llm_orchestrator.wire.orchestrator import Orchestrator, make_store
from llm_orchestrator.wire.reload import reload

PARTS = frozenset({"api", "worker"})
BACKLOG = 2048
PATIENCE_S = 5.0
"""What the store gets, beside the steps' grace, to take the last entries."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What `llmo serve` was told."""

    parts: frozenset[str] = PARTS
    workflows: Sequence[CodeWorkflow[Any]] = ()
    node: NodeOptions | None = None
    publish: Publish | None = None
    is_insecure: bool = False


def bind(config: Config, *, is_insecure: bool = False) -> socket.socket:
    """The listening socket. Raises ConfigError: taken, not ours, or open to others without a token.

    Port 0 takes a free one.
    """
    if not (config.token or is_insecure or is_loopback(config.host)):
        raise ConfigError(
            f"{config.host} can be reached from other machines, and no token is set",
            hint="export LLM_ORCHESTRATOR_TOKEN=..., or --host 127.0.0.1, or --insecure",
        )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror or error}",
            hint="llmo serve --port PORT (0 takes a free one)",
        ) from error
    listening.listen(BACKLOG)
    return listening


def is_loopback(host: str) -> bool:
    """True for addresses that only this machine reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Serving:
    """An open process: `async with Serving(config, clock, options) as serving`.

    Opening raises ConfigError (address), StoreError's subclasses.
    """

    def __init__(self, config: Config, clock: Clock, options: ServeOptions) -> None:
        self._config = config
        self._clock = clock
        self._options = options
        self._is_stopping = False
        self._metrics = Metrics(started_at=clock.now_us() / MICROSECONDS, version=__version__)
        self._feed = Feed()
        self._orchestrator: Orchestrator | None = None
        self._store: Database | None = None
        self._server: HttpServer | None = None
        self.url = ""

    async def __aenter__(self) -> Self:
        listening = bind(self._config, is_insecure=self._options.is_insecure)
        try:
            store, node = await self._open()
            self.surface = self._make_surface(store, node)
        except BaseException:
            listening.close()
            await self._close(0.0)
            raise
        host, port = listening.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._server = make_server(self.surface, has_api="api" in self._options.parts)
        self.answering = asyncio.create_task(self._server.serve(sockets=[listening]))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._close(0.0)

    async def drain(self, grace_s: float) -> bool:
        """Stop in order: nothing new, steps in flight get `grace_s`, then the API goes.

        False when the store did not take the last entries in time.
        """
        self._is_stopping = True
        try:
            async with asyncio.timeout(grace_s + PATIENCE_S):
                await self._close(grace_s)
        except TimeoutError:
            return False
        return True

    async def register(self, workflow: CodeWorkflow[Any]) -> None:
        """Keep the definition of Python code that this process executes."""
        await self.surface.operator.register(registration(workflow))

    @property
    def name(self) -> str:
        """The node's or the client's id."""
        return self.surface.node.node_id if self.surface.node else self.surface.store.node_id

    @property
    def driven(self) -> int:
        """How many runs are in this process."""
        return len(list(self.surface.node.driver.driven)) if self.surface.node else 0

    def reload(self, config: Config) -> Config:
        """Put into force what can change; the configuration that is in force then.

        Raises ConfigError for values that make no sense: then nothing has changed.
        """
        self._config = reload(self._config, config, self._orchestrator).config
        self.surface.settings = _shown(self._config)
        return self._config

    def is_alive(self) -> bool:
        """False when the node stands still; that the event loop turns shows in the asking."""
        return self.surface.node is None or self.surface.node.is_alive()

    # -- how ----------------------------------------------------------------------------------

    async def _open(self) -> tuple[Database, Node | None]:
        if "worker" not in self._options.parts:
            self._store = make_store(self._config, self._clock, name="api", metrics=self._metrics)
            await self._store.open_as_client(may_create=True)
            return self._store, None
        orchestrator = Orchestrator(
            workflows=self._options.workflows,
            config=self._config,
            options=self._options.node,
            publish=_both(self._feed.publish, self._options.publish),
            clock=self._clock,
            metrics=self._metrics,
        )
        await orchestrator.__aenter__()
        self._orchestrator = orchestrator
        return orchestrator.store, orchestrator.node

    async def _close(self, grace_s: float) -> None:
        orchestrator, self._orchestrator = self._orchestrator, None
        if orchestrator is not None:
            await orchestrator.close(grace_s=grace_s)
        if self._server is not None:
            self._server.should_exit = True
            await self.answering
            self._server = None
        store, self._store = self._store, None
        if store is not None:
            await store.close()

    def _make_surface(self, store: Database, node: Node | None) -> Surface:
        config = self._config
        guard: Guard = TokenGuard(config.token) if config.token else OpenGuard()
        gate = node.store_gate if node else StoreBreaker(store.clock)
        door = node.admission if node else self._make_admission(store, gate)
        guarded = gated(store, gate)
        return Surface(
            store=guarded,
            gate=gate,
            clock=store.clock,
            operator=Operator(guarded, store.clock, metrics=self._metrics),
            catalogue=Definitions(config),
            feed=self._feed,
            guard=guard,
            admission=door,
            node=node,
            settings=_shown(config),
            version=__version__,
            region=config.region,
            metrics=self._metrics,
            is_stopping=lambda: self._is_stopping,
        )

    def _make_admission(self, store: Database, gate: StoreBreaker) -> Admission:
        """For a process without a node, which tells metrics how its breaker stands."""
        self._metrics.watch(lambda: store_gauges(gate))
        watch = Watch(store, store.clock, poll_s=self._config.maintenance_poll_s, gate=gate)
        return Admission(watch, gate=gate)


def _both(first: Publish, second: Publish | None) -> Publish:
    if second is None:
        return first
    other = second

    def publish(*told: Any) -> None:
        first(*told)
        other(*told)

    return publish


def _shown(config: Config) -> list[Setting]:
    return [Setting(each.name, _plain(each.value), each.origin) for each in config.settings()]


def _plain(value: object) -> Any:
    return value if isinstance(value, int | float | bool | dict) or value is None else str(value)
