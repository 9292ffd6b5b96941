"""The items of docs/production_readiness.md: what was seen in, ok / not ok / not checked out.

Every item is a pure function of `Facts`. `not checked` is an answer of its own: it says why, and
what a person has to look at; nothing is ever taken for good because it could not be seen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from llm_orchestrator.cli.backup_findings import AGE_H, PROOF_AGE_H
from llm_orchestrator.cli.doctor_postgres import (
    VERSION_MIN,
    Finding,
    check_clock,
    check_pool,
    check_sessions,
)
from llm_orchestrator.cli.output import count
from llm_orchestrator.store.base import Member, lives

if TYPE_CHECKING:
    from llm_orchestrator.config import Config
    from llm_orchestrator.recovery.patroni import Cluster
    from llm_orchestrator.recovery.readiness import Backups, Exposure, Objective
    from llm_orchestrator.security.audit_check import Checked
    from llm_orchestrator.store.postgres_report import Report, Way

OK, NOT_OK, NOT_CHECKED = "ok", "not ok", "not checked"
PYTHON_MIN = (3, 11)
SQLITE_MIN = (3, 51, 3)
TOKEN_MIN = 16
FREE_MIN = 1 << 30
FILES_MIN = 4_096
MEMORY_MIN = 512 << 20
FLEETING = frozenset({"tmpfs", "ramfs", "overlay"})
"""File systems that go with the machine's memory or with the container."""
DURABLE = frozenset({"on", "remote_apply"})
PAID = frozenset({"llm", "embed"})
DRILL_AGE = timedelta(days=92)
"""A quarter: the documents ask for a drill in each."""
ALERTS = frozenset(
    {
        "OrchestratorDown",
        "NoNodeAlive",
        "NoRegionActive",
        "StoreUnreachable",
        "StoreReadOnly",
        "GenerationsDiffer",
        "JournalNotMended",
        "ArchiveDegraded",
    }
)
"""Without these rules nobody is told that nothing advances, or that data may be lost."""


@dataclass(frozen=True, slots=True)
class Folder:
    """The data folder, where the spool is and, on SQLite, the store."""

    path: str
    flaw: str
    """Why a file could not be written, synced and removed there; empty: it could."""
    free: int
    """Bytes."""
    kind: str
    """Its file system; empty: unknown."""
    is_archive_here: bool = False
    """The archive's folder is on the same device."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What the store told. `server` and `way` are None on SQLite."""

    now_us: int
    nodes: Sequence[Member]
    backups: Backups
    archive: Exposure
    definitions: Mapping[str, Any]
    """The newest of each workflow, by name."""
    audit: Checked
    integrity: Finding
    server: Report | None = None
    way: Way | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that was seen. Texts named `..._flaw`: empty is well, None is not tried."""

    config: Config
    is_server: bool
    is_loopback: bool
    """`host` is reached from this machine only."""
    sqlite: str
    folder: Folder
    files_max: int
    memory: tuple[int, str]
    """The bound on memory in bytes (0: unknown), and whose it is."""
    goal: Objective
    """For backups and restores."""
    keys: int
    keys_flaw: str
    place_flaw: str | None
    archive_flaw: str | None
    alerts: frozenset[str] | None
    """Names of the rules that Prometheus has loaded; None: it was not asked."""
    alerts_flaw: str
    stored: Stored | None
    now: datetime
    store_flaw: str = ""
    cluster: Cluster | None = None
    """What Patroni tells; None: it was not asked (`patroni_urls`), or does not answer."""
    drills: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Results of the drills that were carried out from here, by scenario."""
    python: tuple[int, int] = sys.version_info[:2]


Answer = tuple[str, str, str]
"""State, what was found, what to do."""


def judge(facts: Facts) -> list[Finding]:
    """Every item, in the order of the document."""
    found = []
    for name, check in OF_MACHINE.items():
        found.append(_finding(name, check(facts)))
    for name, look in OF_STORE.items():
        if facts.stored is None:
            answer = (NOT_CHECKED, "the store was not read", "mend the item store first")
        else:
            answer = look(facts, facts.stored)
        found.append(_finding(name, answer))
    return found


def _finding(name: str, answer: Answer) -> Finding:
    state, text, hint = answer
    return Finding(name, state, text, "" if state == OK else hint)


def _version(facts: Facts) -> Answer:
    text = ".".join(map(str, facts.python))
    return _is(facts.python >= PYTHON_MIN, text, "install Python 3.11 or later")


def _is(is_good: bool, text: str, hint: str) -> Answer:
    return OK if is_good else NOT_OK, text, hint


def _token(facts: Facts) -> Answer:
    hint = "export LLM_ORCHESTRATOR_TOKEN=$(openssl rand -hex 32)"
    if not facts.config.token:
        return NOT_OK, "no token is set: whoever reaches the port may do everything", hint
    size = len(facts.config.token)
    return _is(size >= TOKEN_MIN, f"set, {count(size, 'character')}", hint)


def _transport(facts: Facts) -> Answer:
    host = facts.config.host
    if facts.is_loopback:
        return OK, f"host is {host}: only this machine reaches it", ""
    hint = 'host = "127.0.0.1" behind a proxy of this machine that speaks TLS'
    return NOT_OK, f"host is {host}: tokens and prompts go over the network as plain HTTP", hint


def _files(facts: Facts) -> Answer:
    text = f"this process may open {facts.files_max} files (the service's own limit may differ)"
    return _is(facts.files_max >= FILES_MIN, text, "LimitNOFILE=65536, or ulimit -n 65536")


def _memory(facts: Facts) -> Answer:
    bound, source = facts.memory
    if not bound:
        return NOT_CHECKED, "no bound can be read here", "memory_limit_mb in the settings"
    text = f"{bound >> 20} MiB ({source}); at 80 % nothing more is claimed"
    return _is(bound >= MEMORY_MIN, text, "give a node 512 MiB or more")


def _folder(facts: Facts) -> Answer:
    folder = facts.folder
    if folder.flaw:
        return NOT_OK, f"{folder.path}: {folder.flaw}", f"ls -ld '{folder.path}'"
    text = f"{folder.path}: a file was synced; {folder.free / (1 << 30):.1f} GiB free"
    if folder.kind in FLEETING:
        text += f"; {folder.kind} goes with the machine or the container"
        return NOT_OK, text, "llmo --data /ON/A/DISK"
    return _is(folder.free >= FREE_MIN, text, f"df -h '{folder.path}'")


def _schedule(facts: Facts) -> Answer:
    cron = facts.config.backup_schedule
    if cron:
        return OK, f"backup_schedule is {cron}", ""
    last = facts.stored.backups.age_s(facts.stored.now_us) if facts.stored else None
    if last is not None and last <= AGE_H * 3_600:
        text = "backup_schedule is not set; somebody made one in the last day"
        return NOT_CHECKED, text, "llmo backup schedule show"
    return (
        NOT_OK,
        "backup_schedule is not set, and no timer has made one lately",
        ('backup_schedule = "0 * * * *", or llmo backup schedule install'),
    )


def _place(facts: Facts) -> Answer:
    place = facts.config.backup_place
    if facts.place_flaw is None:
        return (
            NOT_OK,
            "backup files are on this machine only",
            'backup_place = "s3://BUCKET/PREFIX"',
        )
    return _is(not facts.place_flaw, facts.place_flaw or place, "llmo backup check")


def _sealing(facts: Facts) -> Answer:
    recipients = len(facts.config.backup_recipients)
    hint = 'backup_recipients = ["age1...", "age1..."], backup_identity = "file:PATH"'
    if recipients < 2:
        return NOT_OK, f"backups are sealed for {count(recipients, 'key')}; two, one offline", hint
    if facts.keys_flaw:
        return NOT_OK, facts.keys_flaw, hint
    text = f"sealed for {count(recipients, 'key')}; {count(facts.keys, 'key')} to open them here"
    return _is(facts.keys > 0, text, hint)


def _alerts(facts: Facts) -> Answer:
    hint = "llmo doctor --production --prometheus http://HOST:9090"
    if facts.alerts_flaw:
        return NOT_OK, facts.alerts_flaw, hint
    if facts.alerts is None:
        return NOT_CHECKED, "no Prometheus was named", hint
    missing = sorted(ALERTS - facts.alerts)
    text = f"{len(facts.alerts)} rules are loaded"
    if missing:
        text = f"Prometheus has no rule {', '.join(missing)}"
    return _is(not missing, text, "load deploy/prometheus/alerts.yml")


def _store(facts: Facts) -> Answer:
    if facts.stored is None:
        return NOT_OK, facts.store_flaw, "llmo doctor"
    if facts.is_server:
        return OK, "PostgreSQL", ""
    hint = 'archive_place = "/another/disk" or "s3://BUCKET/PREFIX", or PostgreSQL'
    has_archive = bool(facts.config.archive_place)
    text = "a SQLite file" + (", archived" if has_archive else ": the only copy between backups")
    return _is(has_archive, text, hint)


def _database(facts: Facts, stored: Stored) -> Answer:
    if stored.server is None:
        parts = tuple(int(part) for part in facts.sqlite.split("."))
        hint = "a Python with SQLite 3.51.3 or later (WAL-reset bug before), or PostgreSQL"
        return _is(parts >= SQLITE_MIN, f"SQLite {facts.sqlite}", hint)
    about = stored.server.about
    is_good = about.version_number >= VERSION_MIN * 10_000
    return _is(is_good, f"PostgreSQL {about.version}", "PostgreSQL 15 or later")


def _durability(facts: Facts, stored: Stored) -> Answer:
    if stored.server is None:
        return OK, "every commit is synced to the file (synchronous=FULL)", ""
    about = stored.server.about
    text = f"fsync is {'on' if about.is_durable else 'off'}"
    text += f", synchronous_commit is {about.synchronous_commit}"
    is_good = about.is_durable and about.synchronous_commit in DURABLE
    return _is(is_good, text, "ALTER SYSTEM SET fsync = on; ... SET synchronous_commit = on")


def _replication(facts: Facts, stored: Stored) -> Answer:
    if stored.server is None or stored.way is None:
        config = facts.config
        is_sync = bool(config.archive_place) and config.archive_mode == "sync"
        text = "no second place has a commit before it is acknowledged"
        if is_sync:
            text = f"commits wait for the archive; when it is away: {config.archive_on_failure}"
        return _is(is_sync, text, 'archive_place and archive_mode = "sync"')
    names = stored.server.about.standby_names
    if not names:
        return (
            NOT_OK,
            "synchronous_standby_names is empty: a failover may lose commits",
            ("ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (a, b)'"),
        )
    waits = _waits(stored.way)
    text = (
        f"synchronous_standby_names is {names!r}; commits wait for {', '.join(waits) or 'nobody'}"
    )
    text += "; without any standby they stall, unless a manager like Patroni empties the list"
    return _is(bool(waits), text, "SELECT * FROM pg_stat_replication")


def _waits(way: Way) -> list[str]:
    return [one.name for one in way.followers if one.sync_state in ("sync", "quorum")]


def _apart(facts: Facts, stored: Stored) -> Answer:
    """Only a copy on this very machine can be told; what shares power or a zone cannot."""
    ask = "look by hand: power, rack, zone; then kill one with llmo drill"
    if stored.way is None:
        place = facts.config.archive_place
        if not place:
            return NOT_OK, "there is no second copy", "archive_place"
        if facts.folder.is_archive_here:
            return NOT_OK, f"{place} is on the store's own device", "archive_place on another one"
        return NOT_CHECKED, f"what {place} shares with this machine cannot be seen", ask
    if not stored.way.followers:
        return NOT_OK, "no server follows this one", "llmo dr status"
    own = {"", stored.way.server}
    away = [
        one for one in stored.way.followers if one.address not in own and not _is_local(one.address)
    ]
    if not away:
        return NOT_OK, "every standby is on the primary's own machine", "a standby elsewhere"
    text = ", ".join(f"{one.name} at {one.address}" for one in away)
    return NOT_CHECKED, f"{text}: what they share with the primary cannot be seen", ask


def _is_local(address: str) -> bool:
    return address == "" or ip_address(address).is_loopback


def _encryption(facts: Facts, stored: Stored) -> Answer:
    way = stored.way
    if way is None:
        return OK, "a file: nothing goes over a network", ""
    if way.is_encrypted:
        return OK, "the connection to the database is encrypted", ""
    is_near = way.client == way.server or _is_local(way.client)
    text = "the database is on this machine" if is_near else "plain text to the database"
    return _is(is_near, text, "sslmode=verify-full in the store's URL")


def _sessions(facts: Facts, stored: Stored) -> Answer:
    if stored.server is None:
        return OK, "a file needs no connection for wake-ups", ""
    pool = check_pool(stored.server, facts.config.pool_size)
    found = check_sessions(stored.server, has_direct=bool(facts.config.direct_url))
    worse = found if found.state != "ok" else pool
    return _is(worse.state == "ok", worse.finding, worse.hint)


def _clock(facts: Facts, stored: Stored) -> Answer:
    if stored.server is None:
        return NOT_CHECKED, "a file's clock is this machine's; there is no other", "timedatectl"
    found = check_clock(stored.server)
    return _is(found.state == "ok", found.finding, found.hint)


def _nodes(facts: Facts, stored: Stored) -> Answer:
    if stored.server is None:
        return (
            NOT_OK,
            "a file has one node: runs wait until it is started again",
            ("PostgreSQL and two nodes, or accept it"),
        )
    alive = [node for node in stored.nodes if lives(node) and node.is_connected]
    hosts = {str(node.info.get("host")) for node in alive if isinstance(node.info, dict)}
    text = f"{count(len(alive), 'node')} on {count(len(hosts), 'machine')}"
    return _is(len(alive) > 1 and len(hosts) > 1, text, "llmo serve, on a second machine")


def _backup(facts: Facts, stored: Stored) -> Answer:
    age_s = stored.backups.age_s(stored.now_us)
    if age_s is None:
        return NOT_OK, "there is no backup", "llmo backup create"
    text = f"{age_s / 3_600:.1f} h old; the goal is {facts.goal.rpo_s / 3_600:g} h"
    return _is(age_s <= facts.goal.rpo_s, text, "llmo backup create, and a schedule for it")


def _proof(facts: Facts, stored: Stored) -> Answer:
    backups, hint = stored.backups, "llmo backup prove"
    proved, disproved = (int(one.get("at") or 0) for one in (backups.proved, backups.disproved))
    if disproved > proved:
        return NOT_OK, f"{backups.disproved.get('backup_id')} is no good", hint
    age_s = backups.proof_age_s(stored.now_us)
    if age_s is None:
        return NOT_OK, "none was ever proved", hint
    text = f"{backups.proved.get('backup_id')}, proved {age_s / 3_600:.1f} h ago"
    return _is(age_s <= PROOF_AGE_H * 3_600, text, hint)


def _archive(facts: Facts, stored: Stored) -> Answer:
    if not facts.config.archive_place:
        if stored.server is None:
            return NOT_OK, "archive_place is not set", 'archive_place = "s3://BUCKET/PREFIX"'
        return (
            NOT_CHECKED,
            "archive_place is not set: there is nothing to check",
            ("beside a synchronous standby it is a choice"),
        )
    if facts.archive_flaw:
        return NOT_OK, facts.archive_flaw, "llmo archive status"
    behind = stored.archive.seconds
    is_good = behind is not None and behind <= facts.config.archive_lag_s
    text = f"behind by {'an unknown time' if behind is None else f'{behind:.1f} s'}"
    return _is(is_good, f"{text}: {stored.archive.detail}", "llmo archive status")


def _budgets(facts: Facts, stored: Stored) -> Answer:
    paid = {name: what for name, what in stored.definitions.items() if _pays(what)}
    if not paid:
        return NOT_CHECKED, "no registered workflow file calls a model", "Python: bound it yourself"
    free = sorted(name for name, what in paid.items() if not what.get("budget"))
    text = f"{count(len(paid), 'workflow')} that call models have one"
    if free:
        text = f"without one: {', '.join(free[:5])}" + (" and others" if free[5:] else "")
    return _is(not free, text, "budget: {max_usd: ...} in each workflow")


def _pays(value: Any) -> bool:
    """True when a step of this definition, however deep, calls a model."""
    if isinstance(value, dict):
        return value.get("type") in PAID or any(_pays(each) for each in value.values())
    return isinstance(value, list) and any(_pays(each) for each in value)


def _audit(facts: Facts, stored: Stored) -> Answer:
    found = stored.audit
    if not found.entries:
        return NOT_CHECKED, "the audit log is empty", "llmo audit verify, once it is used"
    text = f"{count(found.chains, 'chain')}, {found.entries} entries"
    if found.flaws:
        text += f"; {found.flaws[0].what}"
    return _is(not found.flaws, text, "llmo audit verify")


def _journals(facts: Facts, stored: Stored) -> Answer:
    found = stored.integrity
    return _is(found.state == "ok", found.finding, found.hint or "llmo journal verify --all")


def _manager(facts: Facts) -> Answer:
    """What becomes of commits when the last standby is gone is a choice; it must be a known one."""
    if not facts.is_server:
        return OK, "SQLite: there is no cluster", ""
    if not facts.config.patroni_urls:
        return NOT_CHECKED, "patroni_urls is not set: nobody was asked", "llmo region status"
    found = facts.cluster
    if found is None:
        return NOT_OK, "no address in patroni_urls answers", "llmo region status"
    means = {
        "strict": "without a standby commits stall, and nothing is lost",
        "degrade": "without a standby it goes on alone: what only it has may be lost",
        "off": "commits wait for nobody",
    }
    text = f"{found.sync}: {means[found.sync]}; {found.leader or 'nobody'} leads"
    is_good = found.sync != "off" and bool(found.leader)
    return _is(is_good, text, "llmo region policy --sync strict")


def _drills(facts: Facts) -> Answer:
    hint = "llmo drill run --all --against STAGING.toml"
    good = {name: each for name, each in facts.drills.items() if not each["overrides"]}
    if not good:
        return NOT_CHECKED, "no drill was carried out from this machine", hint
    lost = sorted(name for name, each in good.items() if each["summary"]["status"] == "lost")
    newest = max(datetime.fromisoformat(str(each["finished_at"])) for each in good.values())
    text = f"{count(len(good), 'scenario')}, the last one on {newest:%Y-%m-%d}"
    if lost:
        return NOT_OK, f"{text}; work was lost or doubled in {', '.join(lost)}", hint
    return _is(facts.now - newest <= DRILL_AGE, text, hint)


OF_MACHINE: Mapping[str, Callable[[Facts], Answer]] = {
    "python": _version,
    "token": _token,
    "transport": _transport,
    "file descriptors": _files,
    "memory": _memory,
    "spool folder": _folder,
    "backup schedule": _schedule,
    "backup place": _place,
    "sealing keys": _sealing,
    "alert rules": _alerts,
    "cluster manager": _manager,
    "drills": _drills,
    "store": _store,
}
OF_STORE: Mapping[str, Callable[[Facts, Stored], Answer]] = {
    "database version": _database,
    "durability": _durability,
    "synchronous copy": _replication,
    "failure domain": _apart,
    "database transport": _encryption,
    "connections": _sessions,
    "clock": _clock,
    "nodes": _nodes,
    "backup age": _backup,
    "proved backup": _proof,
    "archive": _archive,
    "budgets": _budgets,
    "audit chain": _audit,
    "journals": _journals,
}
ITEMS = (*OF_MACHINE, *OF_STORE)
"""Names, in the order in which the document lists them."""
