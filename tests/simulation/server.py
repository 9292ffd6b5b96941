"""One simulated PostgreSQL server: sessions, statements, a log, and commits that wait.

A commit is durable once it is in the log, and visible once a standby has it, too (synchronous
replication): between the two it hangs, keeps its locks, and nobody sees it. A crash in that moment
reveals it. Beats (`synchronous_commit=local`) wait for nobody.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import asyncpg  # type: ignore[import-untyped]

from tests.simulation.loop import START_US, SimLoop
from tests.simulation.mvcc import Row, Steps, Tables, Transaction
from tests.simulation.statements import Statements

Record = list[tuple[str, Any, Row]]
Done = Callable[[Any, BaseException | None, bool], None]
"""(result, error, warned): what a statement came to."""


@dataclass(eq=False)
class Session:
    """A connection as the server sees it."""

    number: int
    server: Server
    is_local: bool = False
    is_open: bool = True
    """False once the server knows that the client is gone."""
    block: Transaction | None = None
    """The explicit transaction that it is in."""
    statements: int = 0
    is_busy: bool = False
    listens: Callable[[str], None] | None = None


@dataclass(eq=False)
class _Running:
    """A statement under way."""

    session: Session
    steps: Steps
    tx: Transaction
    done: Done
    warned: bool = False
    is_hanging: bool = field(default=False)


class Server:
    """See the module's docstring. `has_standby`: commits wait for one."""

    def __init__(
        self, name: str, loop: SimLoop, *, seed: int, timeline: int = 1, has_standby: bool = False
    ) -> None:
        self.name = name
        self.loop = loop
        self.random = random.Random(seed)
        self.timeline = timeline
        self.has_standby = has_standby
        self.is_linked = True
        """The standby answers."""
        self.start = 0
        """Which life of this server it is: restarts count."""
        self.is_up = True
        self.is_leader = True
        self.clock_us = 0
        """How far its clock is off."""
        self.log: list[Record] = []
        self.copied = 0
        """How many records of the log the standby has."""
        self.tables = Tables()
        self.sessions: dict[int, Session] = {}
        self.hanging: list[_Running] = []
        self.slowness = 0.0
        self.on_visible: Callable[[Server, Record], None] = lambda server, record: None
        self.on_defect: Callable[[str], None] = lambda what: None
        self._names = Statements(self)
        self._ships = False

    @property
    def identity(self) -> str:
        """Another one after each start."""
        return f"{self.name}:{self.start}"

    def now_us(self) -> int:
        return START_US + self.clock_us + int(self.loop.now * 1e6)

    # -- sessions ------------------------------------------------------------------------------

    def accept(self, number: int, *, is_local: bool) -> Session:
        """A client connects."""
        session = Session(number, self, is_local)
        self.sessions[number] = session
        return session

    def close(self, session: Session) -> None:
        """The client is gone: what is open is rolled back, a statement under way goes on."""
        session.is_open = False
        self.sessions.pop(session.number, None)
        if not session.is_busy:
            self._roll_back(session)

    def _roll_back(self, session: Session) -> None:
        block, session.block = session.block, None
        if block is not None and not block.lsn:
            block.end(None)

    def _ended(self, session: Session) -> None:
        """A statement is over; a transaction that then lies idle for a second is ended (law 5)."""
        session.is_busy = False
        session.statements += 1
        if session.block is None:
            return
        if not session.is_open:
            self._roll_back(session)
            return
        count, start = session.statements, self.start

        def expire() -> None:
            if session.statements == count and not session.is_busy and self.start == start:
                self.close(session)

        self.loop.in_world(1.0, expire)

    def execute(self, session: Session, sql: str, arguments: tuple[Any, ...], done: Done) -> None:
        """Run one statement; `done` hears of it unless the server dies first."""
        tx = session.block or Transaction()
        session.is_busy = True
        tx.snapshot = self.tables.number
        steps = self._perform(session, sql, arguments, tx)
        self._step(_Running(session, steps, tx, done))

    def _perform(
        self, session: Session, sql: str, arguments: tuple[Any, ...], tx: Transaction
    ) -> Steps:
        word = sql.split(None, 1)[0] if len(sql) < 10 else ""
        if word == "BEGIN":
            session.block = tx
            return ("BEGIN", 0)
        if word == "ROLLBACK":
            session.block = None
            tx.end(None)
            return ("ROLLBACK", 0)
        result = None
        if word != "COMMIT":
            result = yield from self._names.run(session, sql, arguments, tx)
        if session.block is None or word == "COMMIT":
            session.block = None
            yield from self._commit(session, tx)
        return result

    def notify(self, words: list[str]) -> None:
        """NOTIFY: every session that listens hears every word."""
        for session in list(self.sessions.values()):
            if session.listens is not None:
                for word in words:
                    session.listens(word)

    # -- driving a statement ---------------------------------------------------------------------

    def _step(self, running: _Running) -> None:
        if running.session.server is not self or not self.is_up:
            return
        start = self.start
        try:
            item = next(running.steps)
        except StopIteration as stop:
            self._ended(running.session)
            running.done(stop.value, None, running.warned)
            return
        except Exception as error:  # noqa: BLE001 (what it is, the client hears)
            session = running.session
            if not isinstance(error, asyncpg.PostgresError):
                self.on_defect(f"the model fails: {error!r}")
            if session.block is None and not running.tx.is_over:
                running.tx.end(None)
            self._ended(session)
            running.done(None, error, False)
            return

        def go_on() -> None:
            if self.start == start:
                self._step(running)

        if isinstance(item, Transaction):
            item.waiters.append(lambda: self.loop.in_world(0.0, go_on))
        elif item < 0:
            running.is_hanging = True
            self.hanging.append(running)
        else:
            self.loop.in_world(item, go_on)

    def pause(self) -> float:
        """How long a statement takes from one part to the next."""
        return self.random.random() * 0.0004 + (
            self.random.random() * self.slowness if self.random.random() < 0.2 else 0.0
        )

    # -- commit ----------------------------------------------------------------------------------

    def _commit(self, session: Session, tx: Transaction) -> Steps:
        if not tx.writes:
            tx.end(None)
            return
        if not self.is_leader:
            raise asyncpg.ReadOnlySQLTransactionError("read-only transaction")
        if self.slowness:
            yield self.pause()
        self.log.append(tx.writes)
        tx.lsn = len(self.log)
        if self.has_standby:
            self._ship()
            if not session.is_local:
                while self.copied < tx.lsn and not tx.is_over:
                    yield -1.0  # hangs until the standby has it, or somebody cancels the wait
        self._show(tx)

    def _show(self, tx: Transaction) -> None:
        if not tx.is_over:
            self.tables.number += 1
            tx.end(self.tables.number)
            self.on_visible(self, tx.writes)

    def _ship(self) -> None:
        if not self._ships and self.is_linked:
            self._ships = True
            end, start = len(self.log), self.start
            self.loop.in_world(0.0005 + self.pause(), self._arrive, end, start)

    def _arrive(self, end: int, start: int) -> None:
        self._ships = False
        if not self.is_up or not self.is_linked or start != self.start:
            return
        self.copied = max(self.copied, end)
        if self.copied < len(self.log):
            self._ship()
        waiting, self.hanging = self.hanging, []
        for running in waiting:
            if running.tx.lsn <= self.copied:
                self._step(running)
            else:
                self.hanging.append(running)

    def link(self, *, is_linked: bool) -> None:
        """The standby is lost, or comes back."""
        self.is_linked = is_linked
        if is_linked and self.has_standby and self.is_up:
            self._ship()

    def cancel_waits(self) -> int:
        """Commits that hang are reported as done, with a warning (C3); how many there were."""
        waiting, self.hanging = self.hanging, []
        for running in waiting:
            running.warned = True
            self._show(running.tx)
            self._step(running)
        return len(waiting)

    # -- death -----------------------------------------------------------------------------------

    def crash(self) -> None:
        """All connections break; what hangs is durable, what has not come that far is not."""
        self.is_up = False
        self.start += 1
        self.sessions.clear()
        self.hanging.clear()
        self._ships = False

    def restart(self) -> None:
        """Recovery: everything in the log is visible, acknowledged or not."""
        self.tables = recover(self.log)
        self.copied = min(self.copied, len(self.log))
        self.is_up = True
        if self.has_standby:
            self._ship()


def recover(log: list[Record]) -> Tables:
    """The tables that a log makes."""
    tables = Tables()
    for record in log:
        tables.replay(record)
    return tables
