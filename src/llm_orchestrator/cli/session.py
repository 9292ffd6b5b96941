"""What every verb starts from: the flags, the configuration, the store, and how to talk beside.

One `Session` is made per process call and handed to the verb as typer's context object. It opens a
store only for the length of a `with`; it holds nothing that outlives the command.
"""

from __future__ import annotations

import asyncio
import getpass
import logging
import sys
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from llm_orchestrator.cli.report import printable, say
from llm_orchestrator.telemetry.redact import redact

if TYPE_CHECKING:
    import typer

    from llm_orchestrator.cli.main import Flags
    from llm_orchestrator.clock import RealClock
    from llm_orchestrator.config import Config
    from llm_orchestrator.errors import StoreDamaged
    from llm_orchestrator.model import Json
    from llm_orchestrator.security.audit import AuditLog
    from llm_orchestrator.store.base import Database

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass
class Session:
    """One call of the command line."""

    flags: Flags
    log_facts: dict[str, str] = field(default_factory=dict)
    """What stands in each line of a JSON log: a server's name."""
    audit_logs: dict[str, AuditLog] = field(default_factory=dict)
    """By the store's client: a chain of the audit log each."""
    is_json: bool = False
    """True while the log is JSON: then notes are lines of it, too."""

    @cached_property
    def clock(self) -> RealClock:
        """The world's time."""
        from llm_orchestrator.clock import RealClock

        return RealClock()

    @cached_property
    def config(self) -> Config:
        """Flags, environment, file, defaults. Raises ConfigError."""
        return self.config_with({})

    def config_with(self, flags: Mapping[str, object]) -> Config:
        """The same with more flags; None is none. Raises ConfigError."""
        from llm_orchestrator.config import load_config

        return load_config({"store": self.flags.store, "data_dir": self.flags.data, **flags})

    @property
    def store_url(self) -> str:
        """Where the store is, fit for messages."""
        from llm_orchestrator.config import without_password

        return without_password(self.config.store_url)

    def note(self, text: str) -> None:
        """Something worth knowing, on stderr; silenced by --quiet."""
        if self.is_json:
            logger.info("%s", text)
        elif not self.flags.is_quiet:
            say(text)

    def warn(self, text: str) -> None:
        """A warning, on stderr; silenced by --quiet."""
        if self.is_json:
            logger.warning("%s", text)
        else:
            self.note(f"warning: {text}")

    def make_store(self) -> Database:
        """The store, not opened yet."""
        from llm_orchestrator.wire import make_store

        return make_store(self.config, self.clock, name="llmo")

    @asynccontextmanager
    async def client(self, *, may_create: bool = False) -> AsyncIterator[Database]:
        """The store as a client: reads now, writes through the engine if there is one."""
        store = self.make_store()
        try:
            await store.open_as_client(may_create=may_create)
            yield store
        finally:
            await store.close()

    @asynccontextmanager
    async def audited(
        self,
        store: Database,
        action: str,
        *,
        target: str = "",
        detail: Mapping[str, Json] | None = None,
        is_announced: bool = True,
    ) -> AsyncIterator[dict[str, Json]]:
        """What the block changes stands in the audit log, in the name of whoever runs this command.

        See security/audit.py, `AuditLog.action`.
        """
        async with self.audit_log(store).action(
            actor=whoami(), action=action, target=target, detail=detail, is_announced=is_announced
        ) as facts:
            yield facts

    def audit_log(self, store: Database) -> AuditLog:
        """The chain of a store's audit log to which only this command writes."""
        from llm_orchestrator.security.audit import AuditLog

        log = self.audit_logs.get(store.node_id)
        if log is None:
            log = AuditLog(store, store.clock, store.node_id, on_damage=self._unaudited)
            self.audit_logs[store.node_id] = log
        return log

    def _unaudited(self, error: StoreDamaged) -> None:
        self.warn(f"this does not get into the audit log: {error.message}")

    def run(self, work: Coroutine[Any, Any, T], *, serving: Config | None = None) -> T:
        """Run a verb's coroutine on a loop of its own, with the log on stderr.

        A server (`serving`) logs JSON when nobody reads along, if its configuration says nothing.
        """
        set_up_logging(self, serving)
        return asyncio.run(work)


def session_of(context: typer.Context) -> Session:
    """The session of a verb's context."""
    session = context.obj
    assert isinstance(session, Session)
    return session


def whoami() -> str:
    """The name under which a decision is recorded when no other is given."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in slim containers
        return "operator"


class _Short(logging.Formatter):
    """`warning: message`, and an exception in one line."""

    def format(self, record: logging.LogRecord) -> str:
        text = f"{record.levelname.lower()}: {record.getMessage()}"
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            text += f": {type(error).__name__}: {error}"
        return printable(redact(text))


class _Long(logging.Formatter):
    """Everything, tracebacks too, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def set_up_logging(session: Session, serving: Config | None = None) -> None:
    """The engine's log on stderr: warnings and errors in one line each, everything with --debug.

    As JSON where the configuration says so, and for a server whose stderr is no terminal. The other
    verbs do not ask the configuration: what they say is for people, and it may be what is broken.
    """
    from llm_orchestrator.telemetry import logs

    flags = session.flags
    chosen = serving.log_format if serving else ""
    session.is_json = chosen == "json" or (
        serving is not None and not chosen and not sys.stderr.isatty()
    )
    handler = logging.StreamHandler(sys.stderr)
    if session.is_json:
        handler.setFormatter(logs.json_formatter(session.log_facts, redact=redact))
        logging.captureWarnings(capture=True)  # on stderr they would be no JSON
    elif flags.is_debug:
        handler.setFormatter(_Long("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    else:
        handler.setFormatter(_Short())
    level = serving.log_level if serving else ""
    if flags.is_quiet:
        level = "error"
    ours = "info" if session.is_json else "warning"
    logs.set_up(handler, level=level, ours=ours, debug=flags.is_debug)
