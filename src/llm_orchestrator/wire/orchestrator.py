"""An engine in this process, put together from its parts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import unquote, urlsplit

from llm_orchestrator.clock import Clock, RealClock, new_run_id
from llm_orchestrator.config import Config
from llm_orchestrator.engine.control import Operator
from llm_orchestrator.engine.driver import End, NodeOptions
from llm_orchestrator.engine.execution import Publish
from llm_orchestrator.engine.flows import Flow, Flows, is_code
from llm_orchestrator.engine.lease import LeaseOptions
from llm_orchestrator.engine.memory import Memory
from llm_orchestrator.engine.node import Node, registration
from llm_orchestrator.engine.retention import Retention
from llm_orchestrator.engine.second_copy import SecondCopy
from llm_orchestrator.errors import (
    ConfigError,
    NotFound,
    Refused,
    RunFailed,
    RunPaused,
)
from llm_orchestrator.language.code import CodeWorkflow
from llm_orchestrator.model import MICROSECONDS, Json, NewRun, RunState, Workflow
from llm_orchestrator.store.base import Batch, Database, QueueLimit, Register
from llm_orchestrator.store.sqlite import SQLiteStore
from llm_orchestrator.telemetry.metrics import Metrics
from llm_orchestrator.wire.archive import make_archive, start_archive
from llm_orchestrator.wire.housekeeping import chores
from llm_orchestrator.wire.region import audit_of
from llm_orchestrator.wire.telemetry import Telemetry, set_up

if TYPE_CHECKING:
    from llm_orchestrator.engine.interpreter import Tools
    from llm_orchestrator.store.spool import Spool

_FILE_ENDINGS = (".yaml", ".yml", ".json")
logger = logging.getLogger(__name__)
LOOK_S = 0.5
"""How often a run that another node may drive is looked at."""


def store_path(url: str) -> Path:
    """The file of a `sqlite:///relative.db` or `sqlite:////absolute.db` URL."""
    parts = urlsplit(url)
    if parts.scheme != "sqlite" or parts.netloc or len(parts.path) < 2:
        raise ConfigError(
            f"{url!r} is no store URL this version can open",
            hint="llmo --store sqlite:///runs.db or postgresql://HOST/DATABASE",
        )
    return Path(unquote(parts.path[1:]))


def make_store(
    config: Config, clock: Clock, *, url: str = "", name: str = "", metrics: Metrics | None = None
) -> Database:
    """A store, not opened yet. Each process life is a node of its own. Raises ConfigError."""
    address = url or config.store_url
    node_id = f"{config.node_name or name or 'node'}-{clock.random_bytes(6).hex()}"
    if not is_postgres(address):
        file = SQLiteStore(store_path(address), node_id=node_id, clock=clock, metrics=metrics)
        file.archive = make_archive(config, file, kind="sqlite", metrics=metrics)
        return file
    from llm_orchestrator.store.postgres import PostgresStore  # noqa: PLC0415 (its driver is slow)

    direct_url, size = config.direct_url, config.pool_size
    store = PostgresStore(
        address,
        node_id=node_id,
        clock=clock,
        direct_url=direct_url,
        pool_size=size,
        metrics=metrics,
    )
    store.archive = make_archive(config, store, kind="postgresql", metrics=metrics)
    return store


def second_copies(config: Config, store: Database, *, url: str = "") -> list[SecondCopy]:
    """Where a damaged journal may be whole: the stream archive, the standbys of the store's URL."""
    found: list[SecondCopy] = []
    if config.archive_place:
        from llm_orchestrator.wire.archive import archive_copy  # noqa: PLC0415 (rarely needed)

        found.append(archive_copy(config, store))
    address = config.direct_url or url or config.store_url
    if is_postgres(address):
        from llm_orchestrator.store.postgres_replica import Replica  # noqa: PLC0415 (slow driver)

        found.append(Replica(address, store.clock))
    return found


def is_postgres(url: str) -> bool:
    """True for the URL of a PostgreSQL store."""
    return urlsplit(url).scheme in ("postgresql", "postgres")


def node_options(
    config: Config, *, url: str = "", runs_max: int | None = None, steps_max: int | None = None
) -> NodeOptions:
    """A node's bounds as the configuration says. On a file with a lock nobody needs to beat."""
    heartbeat_s, lease_s = config.heartbeat_ms / 1_000, config.lease_ms / 1_000
    if not 0 < heartbeat_s * 3 <= lease_s:
        raise ConfigError(
            f"lease_ms ({config.lease_ms}) must be at least three times heartbeat_ms "
            f"({config.heartbeat_ms})"
        )
    return NodeOptions(
        runs_max=runs_max or config.runs_max,
        steps_max=steps_max or config.steps_max,
        queues={name: _limit(name, value) for name, value in config.queues.items()},
        retention=Retention(config.retention_days, config.retention_runs),
        heart="thread" if is_postgres(url or config.store_url) else "none",
        lease=LeaseOptions(heartbeat_s, lease_s, margin_s=lease_s / 6),
        region=config.region,
        region_failover_s=config.region_failover_s,
        memory=Memory(config.memory_limit_mb << 20),
        poll_s=config.maintenance_poll_s,
        verify_entries_per_s=config.verify_entries_per_s,
        archive=config.archive_place,
    )


def _limit(queue: str, value: Any) -> QueueLimit:
    """`4`, or a table with concurrency, rate, period_s, tokens_per_minute."""
    table = {"concurrency": value} if isinstance(value, int) else value
    if not isinstance(table, Mapping) or set(table) - set(QueueLimit._fields):
        raise ConfigError(
            f"queue {queue!r}: {value!r} is no limit; there is: {', '.join(QueueLimit._fields)}",
            hint="[queues.NAME] concurrency = 4, or [queues] NAME = 4",
        )
    if any(not isinstance(each, int | float) or each < 0 for each in table.values()):
        raise ConfigError(f"queue {queue!r}: a limit is a number, 0 for none")
    return QueueLimit(**table)


class Orchestrator:
    """An engine in this process: opens the store, drives its runs, closes it.

        async with Orchestrator("sqlite:///runs.db") as orchestrator:
            result = await orchestrator.run(my_workflow, {"topic": "whales"})

    `workflows` are Python workflows whose unfinished runs go on as soon as the engine opens;
    others do when they are first used. Opening raises StoreError's subclasses (StoreLocked when
    another engine serves the store).
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        workflows: Sequence[CodeWorkflow[Any]] = (),
        config: Config | None = None,
        options: NodeOptions | None = None,
        publish: Publish | None = None,
        clock: Clock | None = None,
        store: Database | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.config = config or Config()
        address = self._address = url or self.config.store_url
        self.metrics = metrics or Metrics()
        self.store = store or make_store(
            self.config, clock or RealClock(), url=address, metrics=self.metrics
        )
        self.clock = self.store.clock
        self.operator = Operator(self.store, self.clock, metrics=self.metrics)
        self._workflows = workflows
        self._options = options or node_options(self.config, url=address)
        self._publish = publish
        self._tools: Tools | None = None
        self._node: Node | None = None
        self._spool: Spool | None = None
        self._telemetry = Telemetry()

    @property
    def node(self) -> Node:
        """The running node. Raises ConfigError before the engine is open."""
        if self._node is None:
            raise ConfigError("the engine is not open", hint="async with Orchestrator(url) as o:")
        return self._node

    async def __aenter__(self) -> Self:
        await self.store.open_as_engine()
        flows = Flows(self.store.shelf, self._make_tools)
        for workflow in self._workflows:
            flows.add_code(workflow)
        try:
            await start_archive(self.store)
            self._spool = await self._open_spool()
            self._telemetry = set_up(self.config, self.store.node_id)
            self._node = Node(
                self.store,
                self.clock,
                flows,
                options=self._options,
                publish=self._publish,
                spool=self._spool,
                tracing=self._telemetry.tracing,
                metrics=self.metrics,
                copies=second_copies(self.config, self.store, url=self._address),
                chores=chores(self.config, self.store, metrics=self.metrics),
            )
            self._node.upkeep.heir.told = audit_of(
                self.store, self.clock, region=self._options.region, metrics=self.metrics
            )
            await self._node.start()
        except BaseException:
            await self.close(grace_s=0.0)
            raise
        return self

    async def _open_spool(self) -> Spool | None:
        """A second place for results that were paid for. A file's own disk would be no second."""
        if self._options.heart == "none":
            return None
        from llm_orchestrator.store.spool import ANCESTOR, Spool  # noqa: PLC0415 (on PostgreSQL)

        return Spool.open(
            self.config.data_dir / "spool",
            self.store.node_id,
            store_id=self.store.incarnation,
            ancestors=list(await self.store.shelf.records(ANCESTOR)),
            clock=self.clock,
        )

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close(grace_s=0.0 if kind else 5.0)

    async def close(self, *, grace_s: float = 5.0) -> None:
        """Release what runs (steps in flight get `grace_s`), commit, free the store."""
        if self._node is not None:
            await self._node.stop(grace_s=grace_s)
            self._node = None
        if self._spool is not None:
            await self._spool.close()
            self._spool = None
        if self._tools is not None:
            await self._tools.close()
        await self.store.close()
        await self._telemetry.close()

    def reconfigure(self, config: Config) -> None:
        """Other settings from now on: providers' limits, and what workflows may reach."""
        self.config = config
        if self._tools is not None:
            _tools_module().reconfigure(self._tools, config)

    async def run(
        self, workflow: CodeWorkflow[Any] | str | Path, inputs: Json = None, **options: Any
    ) -> Json:
        """Start a run and wait for its result. Options as in `start`.

        Raises RunFailed when it ends failed or cancelled, RunPaused when it waits for a person.
        """
        run_id = await self.start(workflow, inputs, **options)
        return await self.result(run_id)

    async def start(
        self,
        workflow: CodeWorkflow[Any] | str | Path,
        inputs: Json = None,
        *,
        idempotency_key: str | None = None,
        priority: int | None = None,
        queue: str | None = None,
        labels: Mapping[str, str] | None = None,
        delay_s: float = 0.0,
    ) -> str:
        """Accept a run durably and return its id.

        `workflow` is a Python workflow, a file (a Path, or text that ends in .yaml, .yml or .json)
        or the name of a registered one. The same `idempotency_key` gives the same run. Raises
        Maintenance while no new runs are taken.
        """
        await self.node.admission.check()
        flow, register, checked = await self._resolve(workflow, inputs)
        new = NewRun(
            new_run_id(self.clock),
            flow.name,
            flow.version,
            flow.digest,
            priority=flow.priority if priority is None else priority,
            queue=queue or flow.queue,
            idempotency_key=idempotency_key,
            wake_at=self.clock.now_us() + int(delay_s * MICROSECONDS) if delay_s else 0,
            labels={**(flow.labels or {}), **(labels or {})},
            input=checked,
        )
        try:
            return await self.node.accept(new, register=register)
        except Refused:
            earlier = await self.operator.earlier(new)
            if earlier is None:
                raise
            return earlier

    async def result(self, run_id: str) -> Json:
        """Wait for a run of this engine to end, and give its output."""
        waiting = self.node.driver.wait_end(run_id)
        while True:
            end = await self._ended(run_id)
            if end is not None:
                return output_of(end)
            await asyncio.wait([waiting], timeout=LOOK_S)  # another node may drive it
            if waiting.done():
                return output_of(waiting.result())

    def run_sync(
        self, workflow: CodeWorkflow[Any] | str | Path, inputs: Json = None, **options: Any
    ) -> Json:
        """Open, run one workflow, close: for scripts that have no event loop."""

        async def main() -> Json:
            async with self:
                return await self.run(workflow, inputs, **options)

        return asyncio.run(main())

    # -- how ----------------------------------------------------------------------------------

    async def _resolve(
        self, workflow: CodeWorkflow[Any] | str | Path, inputs: Json
    ) -> tuple[Flow, Workflow | None, Json]:
        if isinstance(workflow, CodeWorkflow):
            flow = self.node.add_code(workflow)
            return flow, registration(workflow), {} if inputs is None else inputs
        name = str(workflow)
        if name.endswith(_FILE_ENDINGS):
            return await self._resolve_file(Path(workflow), inputs)
        found = await self.node.flows.find(name, None)
        stored = await self.store.shelf.workflow(name)
        if found is None or stored is None:
            raise NotFound(f"the code of workflow {name} is not in this process")
        if is_code(stored):
            return found, None, {} if inputs is None else inputs
        tools = _tools_module()
        definition = tools.Definition.from_canonical(stored.definition)
        return found, None, tools.checked_inputs(definition, inputs)

    async def _resolve_file(self, file: Path, inputs: Json) -> tuple[Flow, Workflow, Json]:
        tools = _tools_module()
        loaded = await asyncio.to_thread(tools.load_workflow, file, self.config)
        for warning in loaded.definition.warnings:
            logger.warning("%s", warning)
        checked = tools.checked_inputs(loaded.definition, inputs)
        if loaded.children:
            changes = tuple(Register(child) for child in loaded.children)
            await self.store.commit(Batch(changes=changes))
        return self.node.flows.add_definition(loaded.workflow), loaded.workflow, checked

    async def _ended(self, run_id: str) -> End | None:
        """How a run ended before anybody waited; None while it may still move."""
        if run_id in self.node.driver.driven:
            return None
        state = await self.operator.state(run_id)
        if not state.state.is_final and state.state is not RunState.PAUSED:
            return None
        return End(run_id, state.state, state.reason, state.output, state.error)

    def _make_tools(self) -> Tools:
        self._tools = _tools_module().make_tools(
            self.config, self.store, self.clock, metrics=self.metrics
        )
        return self._tools


def _tools_module() -> Any:
    """Loaded when the first workflow file is: it is slow, and Python workflows need none of it."""
    from llm_orchestrator.wire import tools  # noqa: PLC0415

    return tools


def output_of(end: End) -> Json:
    """A completed run's output; the others as the exceptions that say what to do."""
    if end.state is RunState.COMPLETED:
        return end.output
    message = end.error.get("message") if isinstance(end.error, dict) else end.reason
    if end.state is RunState.PAUSED:
        raise RunPaused(
            f"run {end.run_id} is paused ({end.reason}): {message}",
            reason=end.reason,
            hint=f"llmo runs explain {end.run_id}",
        )
    raise RunFailed(
        f"run {end.run_id} ended {end.state}: {message}",
        state=end.state,
        error=end.error,
        hint=f"llmo runs explain {end.run_id}",
    )
