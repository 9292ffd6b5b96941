"""Real nodes on either database, and what its journals and the fake server's ledger say of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from llm_orchestrator.cli import target as targets
from llm_orchestrator.clock import RealClock, new_run_id
from llm_orchestrator.config import Config, load_config
from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.engine.audit import verify_store
from llm_orchestrator.engine.replay import Fold, fold
from llm_orchestrator.model import Entry, Kind, Run, RunState
from llm_orchestrator.store.base import Database, Member, RunFilter
from llm_orchestrator.store.journal import decode
from llm_orchestrator.wire import make_store
from tests.acceptance.cluster.nodes import Cluster, until
from tests.acceptance.fake_server import FakeServer
from tests.postgres import fresh_database

T = TypeVar("T")
DATABASES = ("sqlite", "postgres")
_ALL = 10_000
_AT_ONCE = 20


class Site:
    """Nodes (`cluster`), their database, and the ledger from here on."""

    def __init__(self, folder: Path, url: str, fake: FakeServer) -> None:
        self.folder = folder
        self.url = url
        self.fake = fake
        self.cluster = Cluster(folder, url, fake)
        self.clock = RealClock()
        self._seen = len(fake.arrived(""))

    @property
    def is_shared(self) -> bool:
        """True when several nodes may serve it at a time."""
        return not self.url.startswith("sqlite")

    def configure(self, text: str = "") -> None:
        """Settings of everybody who is started from now on; the fake is the provider `house`."""
        self.cluster.configure(
            f'{text}\n[providers.house]\nbase_url = "{self.fake.url}/v1"\nresume = ["prefill"]\n'
        )

    @property
    def config(self) -> Config:
        """The same, for what the test itself does."""
        return load_config({"store": self.url}, file=self.folder / "settings.toml", environ={})

    def ask(self, work: Callable[[Database], Awaitable[T]]) -> T:
        """Do something as a client of the store."""

        async def main() -> T:
            store = make_store(Config(store=self.url), self.clock, name="test")
            await store.open_as_client(may_create=True)
            try:
                return await work(store)
            finally:
                await store.close()

        return asyncio.run(main())

    def submit(self, text: str, inputs: Iterable[Mapping[str, Any]]) -> list[str]:
        """Accept one run of a workflow file for each of `inputs`; their ids."""
        file = self.folder / "flow.yaml"
        file.write_text(text)
        target = targets.of_file(str(file), self.config)

        async def work(store: Database) -> list[str]:
            given = list(inputs)
            ids = [new_run_id(store.clock) for _ in given]
            news = [
                target.new_run(run_id, target.check(values))
                for run_id, values in zip(ids, given, strict=True)
            ]
            await target.accept(store, store.clock, news[0])
            known = targets.of_definition(_definition(target), is_registered=True)
            for start in range(1, len(news), _AT_ONCE):
                some = news[start : start + _AT_ONCE]
                await asyncio.gather(*(known.accept(store, store.clock, new) for new in some))
            return ids

        return self.ask(work)

    def runs(self) -> list[Run]:
        """Every row."""

        async def work(store: Database) -> list[Run]:
            return await store.look.runs(RunFilter(limit=_ALL))

        return self.ask(work)

    def states(self) -> Counter[str]:
        """How many runs are in each state."""
        return Counter(run.state.value for run in self.runs())

    def owned(self, node_id: str) -> int:
        """How many runs a node drives."""
        return sum(run.owner == node_id for run in self.runs())

    def members(self) -> dict[str, Member]:
        """The nodes, by id."""

        async def work(store: Database) -> list[Member]:
            return await store.shelf.nodes(100)

        return {member.node_id: member for member in self.ask(work)}

    def wait_completed(self, count: int) -> None:
        """Until so many runs are."""
        until(lambda: self.states()[RunState.COMPLETED] >= count, f"{count} runs that complete")

    def journals(self) -> dict[str, tuple[list[Entry], Fold]]:
        """Every run; fails for a journal that is not whole."""

        async def work(store: Database) -> dict[str, tuple[list[Entry], Fold]]:
            assert await verify_store(store) == []
            found = await store.look.load(await store.look.run_ids())
            return {
                key: (list(each.entries), fold(key, each.entries)) for key, each in found.items()
            }

        return self.ask(work)

    def calls(self) -> dict[str, list[dict[str, Any]]]:
        """What was asked of the fake server, by idempotency key, in order."""
        found: dict[str, list[dict[str, Any]]] = {}
        for line in self.fake.arrived("")[self._seen :]:
            found.setdefault(line["idempotency_key"], []).append(line)
        return found


def claims(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """What each claim of a run says."""
    return [decode(entry.payload) for entry in entries if entry.kind == Kind.CLAIMED]


def finished(entries: Iterable[Entry]) -> list[str]:
    """The steps that finished, as often as the journal says so."""
    return [entry.step for entry in entries if entry.kind == Kind.STEP_FINISHED]


@contextmanager
def site_on(database: str, folder: Path, fake: FakeServer) -> Iterator[Site]:
    """Everything is ended when the block is."""
    with ExitStack() as stack:
        url = f"sqlite:///{folder / 'runs.db'}"
        if database == "postgres":
            url = stack.enter_context(fresh_database(stack.enter_context(PostgresServer())))
        site = Site(folder, url, fake)
        site.configure()
        stack.callback(site.cluster.stop)
        yield site


def _definition(target: targets.Target) -> Any:
    assert target.definition is not None
    return target.definition
