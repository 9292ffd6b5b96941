"""Every other statement of queries.sql that a node or an operator sends, by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llm_orchestrator.store import queries
from llm_orchestrator.store.queries import Query
from tests.simulation.append import FINAL, Append, empty
from tests.simulation.mvcc import Row, Steps, Tables, Transaction

if TYPE_CHECKING:
    from tests.simulation.server import Server, Session

Values = Mapping[str, Any]
ALIVE = ("alive", "leaving")
_PARTS = ("accepted", "changed", "mailed", "consumed", "recorded", "kept", "dropped")
_RUN = (
    *("run_id", "workflow", "version", "digest", "state", "reason", "owner", "epoch", "priority"),
    *("queue", "idempotency_key", "parent_run_id", "wake_at", "inbox_seq", "labels"),
    *("created_at", "started_at", "finished_at"),
)
_ROW = (
    *("workflow", "version", "digest", "priority", "queue", "idempotency_key", "parent_run_id"),
    *("wake_first", "origin", "labels", "input", "state", "reason", "owner", "wake_at"),
    *("inbox_seq", "output", "error", "epoch", "head_seq", "head_digest", "created_at"),
    *("started_at", "finished_at", "run_id"),
)
_CLASHES = {"run": "one_run"}
_made: dict[str, Query] = {}
"""Every statement that was put together, by its text."""
_number = queries._number


def _remember(name: str, body: str, dialect: queries.Dialect) -> Query:
    query = _number(name, body, dialect)
    _made[query.sql] = query
    return query


queries._number = _remember
queries.load_queries.cache_clear()
queries.compose.cache_clear()


def recognise(sql: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """A statement's name, its parts if it is an append, and its parameters in order."""
    if sql not in _made:
        queries.load_queries("postgres")
    query = _made.get(sql)
    if query is None:
        raise NotImplementedError(sql)
    parts = tuple(filter(None, query.name.split("+")))
    if sql.startswith("WITH head AS") and set(parts) <= set(_PARTS):
        return "append", parts, query.parameters
    return query.name, (), query.parameters


def listed(values: Values) -> dict[str, Any]:
    """The values of a statement for one entry, as if it were for many."""
    alone = ("lane", "number", "entries", "batch", "incarnation", "now")
    many = {
        name: value if isinstance(value, list | tuple) or name in alone else [value]
        for name, value in values.items()
    }
    return {"head_run": many["run_id"], **many}


class Statements:
    """Carries out statements on one server."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.append = Append(server)

    @property
    def tables(self) -> Tables:
        return self.server.tables

    def run(self, session: Session, sql: str, arguments: tuple[Any, ...], tx: Transaction) -> Steps:
        """(rows, how many rows were touched). Raises what asyncpg raises."""
        if sql == "SELECT 1":
            return [(1,)], 1
        if "pg_notify" in sql:
            words = arguments[1] if isinstance(arguments[1], list) else [arguments[1]]
            self.server.notify(words)
            return [], 0
        name, parts, parameters = recognise(sql)
        values = dict(zip(parameters, arguments, strict=True))
        if name in ("append", "append_one"):
            rows = yield from self.append.run(tx, parts, listed(values))
            return rows, 1
        if name == "lock_queue":
            values = {"queue": arguments[0]}
        if name in ("join", "beat", "members", "nodes"):
            values["session"] = session
        if name == "server":
            return self.identity(), 1
        handler = getattr(self, _CLASHES.get(name, name))
        found = handler(tx, values)
        if not isinstance(found, list):
            found = yield from found
        if isinstance(found, int):
            return [], found
        return found, len(found)

    # -- reading ---------------------------------------------------------------------------------

    def _runs(self, tx: Transaction) -> list[Row]:
        return [row for _, row in self.tables.rows("runs", tx)]

    def identity(self) -> list[Row]:
        server = self.server
        line = f"{server.timeline:08X}"
        return [(not server.is_leader, server.identity, server.now_us(), line)]

    def incarnation(self, tx: Transaction, v: Values) -> list[Row]:
        return [self.tables.get("store", 1, tx)]

    def promises(self, tx: Transaction, v: Values) -> list[Row]:
        return [("on", "warning")]

    def digest_at(self, tx: Transaction, v: Values) -> list[Row]:
        row = self.tables.get("journal", (v["run_id"], v["seq"]), tx)
        return [] if row is None else [(row[7],)]

    def commit_at(self, tx: Transaction, v: Values) -> list[Row]:
        row = self.tables.get("commits", (v["lane"], v["number"]), tx)
        return [] if row is None else [(row[1],)]

    def found(self, tx: Transaction, v: Values) -> list[Row]:
        keys = zip(v["run_id"], v["seq"], strict=True)
        rows = [self.tables.get("journal", key, tx) for key in dict.fromkeys(keys)]
        return [(row[0], row[1], row[7]) for row in rows if row is not None]

    def journals(self, tx: Transaction, v: Values) -> list[Row]:
        return [row for run_id in sorted(v["runs"]) for row in self.tables.journal(run_id, tx)]

    def anchors(self, tx: Transaction, v: Values) -> list[Row]:
        rows = [self.tables.get("runs", run_id, tx) for run_id in v["runs"]]
        return [(row["run_id"], row["head_seq"], row["head_digest"]) for row in rows if row]

    def blob(self, tx: Transaction, v: Values) -> list[Row]:
        row = self.tables.get("blobs", (v["run_id"], v["digest"]), tx)
        return [] if row is None else [(row,)]

    def one_run(self, tx: Transaction, v: Values) -> list[Row]:
        row = self.tables.get("runs", v["run_id"], tx)
        return [] if row is None else [_columns(row)]

    def run_row(self, tx: Transaction, v: Values) -> list[Row]:
        row = self.tables.get("runs", v["run_id"], tx)
        return [] if row is None else [tuple(row[name] for name in _ROW)]

    def runs(self, tx: Transaction, v: Values) -> list[Row]:
        rows = [
            row
            for row in self._runs(tx)
            if (not v["states"] or f",{row['state']}," in v["states"])
            and v["workflow"] in (None, row["workflow"])
            and v["parent_run_id"] in (None, row["parent_run_id"])
            and v["queue"] in (None, row["queue"])
            and (v["before"] is None or row["run_id"] < v["before"])
        ]
        rows.sort(key=lambda row: str(row["run_id"]), reverse=True)
        return [_columns(row) for row in rows[: v["limit"]]]

    def ids_of_rows(self, tx: Transaction, v: Values) -> list[Row]:
        return sorted((row["run_id"],) for row in self._runs(tx))

    def ids_of_entries(self, tx: Transaction, v: Values) -> list[Row]:
        return sorted({(key[0],) for key, _ in self.tables.rows("journal", tx)})

    def states(self, tx: Transaction, v: Values) -> list[Row]:
        return [(row["run_id"], row["state"]) for row in self._runs(tx)]

    def next_wake(self, tx: Transaction, v: Values) -> list[Row]:
        return [(min((row["wake_at"] for row in self._runs(tx) if is_free(row)), default=None),)]

    def inbox(self, tx: Transaction, v: Values) -> list[Row]:
        run = self.tables.get("runs", v["run_id"], tx)
        keys = [(v["run_id"], n) for n in range(1, (run["inbox_seq"] if run else 0) + 1)]
        rows = [(key, self.tables.get("inbox", key, tx)) for key in keys]
        return [(*key, *row[:5]) for key, row in rows if row is not None and row[2] is not None]

    def inbox_seqs(self, tx: Transaction, v: Values) -> list[Row]:
        rows = [self.tables.get("runs", run_id, tx) for run_id in v["runs"]]
        return [(row["run_id"], row["inbox_seq"]) for row in rows if row is not None]

    def progress(self, tx: Transaction, v: Values) -> list[Row]:
        rows = self.tables.rows("progress", tx)
        where = (v["run_id"], v["step"])
        return sorted((*key[2:], *row) for key, row in rows if key[:2] == where)

    def workflow(self, tx: Transaction, v: Values) -> list[Row]:
        rows = [
            (*key, *row)
            for key, row in self.tables.rows("workflows", tx)
            if key[0] == v["name"]
            and v["version"] in (None, key[1])
            and v["digest"] in (None, key[2])
        ]
        return sorted(rows, key=lambda row: (row[4], row[1], row[2]))[-1:]

    def workflows(self, tx: Transaction, v: Values) -> list[Row]:
        return sorted((*key, *row) for key, row in self.tables.rows("workflows", tx))

    def record(self, tx: Transaction, v: Values) -> list[Row]:
        row = self.tables.get("records", (v["kind"], v["key"]), tx)
        return [] if row is None else [row]

    def records(self, tx: Transaction, v: Values) -> list[Row]:
        rows = self.tables.rows("records", tx)
        return sorted((key[1], *row) for key, row in rows if key[0] == v["kind"])

    def in_flight(self, tx: Transaction, v: Values) -> list[Row]:
        busy = [
            row
            for row in self._runs(tx)
            if row["queue"] == v["queue"]
            and (row["owner"] is not None or (is_free(row) and row["picked_until"] >= v["now"]))
        ]
        return [(len(busy),)]

    def expirable(self, tx: Transaction, v: Values) -> list[Row]:
        return []

    # -- claims ----------------------------------------------------------------------------------

    def lock_queue(self, tx: Transaction, v: Values) -> Steps:
        """An advisory lock: a row that nobody reads."""
        where = ("advisory", v["queue"])
        yield from self.tables.upsert(tx, where, lambda old: (old or 0) + 1)
        return 0

    def pick(self, tx: Transaction, v: Values) -> Steps:
        def is_due(row: Row) -> bool:
            return bool(
                is_free(row)
                and row["wake_at"] <= v["now"]
                and row["queue"] not in v["full_queues"]
                and row["digest"] not in v["strange"]
                and row["run_id"] not in v["except_runs"]
                and v["queue"] in (None, row["queue"])
            )

        order = lambda row: (-row["priority"], row["wake_at"], row["run_id"])  # noqa: E731
        chosen = yield from self._take(tx, v, is_due, order)
        return [_columns(row) for row in chosen]

    def put_back(self, tx: Transaction, v: Values) -> Steps:
        def back(old: Row) -> Row:
            return {**old, "picked_until": 0} if old["picked_by"] == v["node_id"] else None

        for run_id in v["runs"]:
            yield from self.tables.update(tx, ("runs", run_id), back)
        return len(v["runs"])

    def adopt(self, tx: Transaction, v: Values) -> Steps:
        def is_orphan(row: Row) -> bool:
            owner = row["owner"]
            is_ours = owner is None or self._lives(tx, owner)
            return not is_ours and row["run_id"] not in v["except_runs"]

        order = lambda row: (-row["priority"], row["run_id"])  # noqa: E731
        chosen = yield from self._take(tx, v, is_orphan, order)
        return [(row["run_id"],) for row in chosen]

    def _lives(self, tx: Transaction, node_id: str) -> bool:
        node = self.tables.get("nodes", node_id, tx)
        return node is not None and node["state"] in ALIVE

    def _take(self, tx: Transaction, v: Values, fits: Any, order: Any) -> Steps:
        """FOR UPDATE SKIP LOCKED: rows that somebody holds are passed over."""
        me, now = v["node_id"], v["now"]

        def is_open(row: Row) -> bool:
            by = row["picked_by"]
            is_taken = row["picked_until"] >= now and by != me and by and self._lives(tx, by)
            return fits(row) and not is_taken

        chosen: list[Row] = []
        for row in sorted(filter(is_open, self._runs(tx)), key=order):
            if len(chosen) >= v["limit"]:
                break
            where = ("runs", row["run_id"])
            cell = self.tables.cell(*where)
            if cell.holder not in (None, tx) or not is_open(cell.newest(tx)):
                continue
            new = {**cell.newest(tx), "picked_by": me, "picked_until": v["until"]}
            tx.take(where, cell, new)
            chosen.append(new)
        yield self.server.pause()
        return sorted(chosen, key=order)

    # -- nodes -----------------------------------------------------------------------------------

    def join(self, tx: Transaction, v: Values) -> Steps:
        node = {
            "region": v["region"],
            "state": "alive",
            "beat": 0,
            "started_at": v["now"],
            "heartbeat_at": v["now"],
            "info": v["info"],
            "session": (self.server.identity, v["session"].number),
        }
        yield from self.tables.insert(tx, ("nodes", v["node_id"]), node)
        return 1

    def beat(self, tx: Transaction, v: Values) -> Steps:
        now, session = self.server.now_us(), (self.server.identity, v["session"].number)

        def beaten(old: Row) -> Row:
            if old["state"] not in ALIVE:
                return None
            return {**old, "beat": old["beat"] + 1, "heartbeat_at": now, "session": session}

        done = yield from self.tables.update(tx, ("nodes", v["node_id"]), beaten)
        return int(done is not None)

    def members(self, tx: Transaction, v: Values) -> list[Row]:
        rows = self.tables.rows("nodes", tx)
        return sorted(
            self._member(*pair)
            for pair in rows
            if pair[1]["state"] in ALIVE or pair[0] == v["node_id"]
        )

    def nodes(self, tx: Transaction, v: Values) -> list[Row]:
        rows = sorted(self._member(*pair) for pair in self.tables.rows("nodes", tx))
        return sorted(rows, key=lambda row: row[5], reverse=True)[: v["limit"]]

    def _member(self, node_id: str, node: Row) -> Row:
        identity, number = node["session"]
        is_there = identity == self.server.identity and number in self.server.sessions
        times = (node["started_at"], node["heartbeat_at"], node["info"])
        return (node_id, node["region"], node["state"], node["beat"], is_there, *times)

    def bury(self, tx: Transaction, v: Values) -> Steps:
        def buried(old: Row) -> Row:
            fits = old["beat"] == v["beat"] and old["state"] in ALIVE
            gone = "left" if old["state"] == "leaving" else "dead"
            return {**old, "state": gone} if fits else None

        done = yield from self.tables.update(tx, ("nodes", v["node_id"]), buried)
        return int(done is not None)

    def leave(self, tx: Transaction, v: Values) -> Steps:
        def left(old: Row) -> Row:
            return {**old, "state": v["state"]} if old["state"] in ALIVE else None

        done = yield from self.tables.update(tx, ("nodes", v["node_id"]), left)
        return int(done is not None)

    def forget_nodes(self, tx: Transaction, v: Values) -> list[Row]:
        return []  # no seed lasts for a week

    # -- changes in turn -------------------------------------------------------------------------

    def barrier(self, tx: Transaction, v: Values) -> Steps:
        yield from self.tables.insert(tx, ("commits", (v["lane"], v["number"])), (0, b""))
        return 1

    def register(self, tx: Transaction, v: Values) -> Steps:
        where = ("workflows", (v["name"], v["version"], v["digest"]))

        def merged(old: Row) -> Row:
            return (v["definition"], old[1] if old else v["created_at"])

        yield from self.tables.upsert(tx, where, merged)
        return 1

    def next_message(self, tx: Transaction, v: Values) -> Steps:
        run_id, key = v["run_id"], v["sender_key"]
        if key is not None and self.tables.get("inbox_keys", (run_id, key), tx) is not None:
            return []
        done = yield from self.tables.update(
            tx, ("runs", run_id), lambda old: self.append.numbered(old, 1)
        )
        return [] if done is None else [(done["inbox_seq"],)]

    def post(self, tx: Transaction, v: Values) -> Steps:
        names = ("kind", "name", "payload", "sender_key", "digest", "created_at")
        message = tuple(v[name] for name in names)
        yield from self.append.insert_message(tx, (v["run_id"], v["number"]), message)
        return 1

    def consume(self, tx: Transaction, v: Values) -> Steps:
        yield from self.tables.update(tx, ("inbox", (v["run_id"], v["number"])), empty)
        return 1

    def insert_record(self, tx: Transaction, v: Values) -> Steps:
        row = (v["value"], 1, v["digest"])
        yield from self.tables.insert(tx, ("records", (v["kind"], v["key"])), row)
        return 1

    def update_record(self, tx: Transaction, v: Values) -> Steps:
        row = (v["value"], v["version"] + 1, v["digest"])
        where = ("records", (v["kind"], v["key"]))
        done = yield from self.tables.update(
            tx, where, lambda old: row if old[1] == v["version"] else None
        )
        return int(done is not None)

    def lock_row(self, tx: Transaction, v: Values) -> Steps:
        done = yield from self.tables.update(tx, ("runs", v["run_id"]), lambda old: old)
        return [] if done is None else [(v["run_id"],)]

    def accept(self, tx: Transaction, v: Values) -> Steps:
        yield from self.tables.insert(tx, ("runs", v["run_id"]), _fresh(v))
        return 1

    def accept_again(self, tx: Transaction, v: Values) -> Steps:
        done = yield from self.tables.update(
            tx, ("runs", v["run_id"]), lambda old: {**_fresh(v), "inbox_seq": old["inbox_seq"]}
        )
        return int(done is not None)

    def set_row(self, tx: Transaction, v: Values) -> Steps:
        numbers = [key[1] for key, _ in self.tables.rows("inbox", tx) if key[0] == v["run_id"]]
        moved = {name: v[name] for name in v if name != "run_id"}
        moved["inbox_seq"] = max(numbers, default=0)
        done = yield from self.tables.update(
            tx, ("runs", v["run_id"]), lambda old: {**old, **moved}
        )
        return int(done is not None)


def is_free(row: Row) -> bool:
    """A run that nobody drives and that somebody may."""
    return row["state"] in ("pending", "waiting") and row["owner"] is None


def _columns(row: Row) -> Row:
    return tuple(row[name] for name in _RUN)


def _fresh(v: Values) -> dict[str, Any]:
    names: tuple[str, ...]
    names = ("run_id", "workflow", "version", "digest", "priority", "queue", "idempotency_key")
    names += ("parent_run_id", "wake_at", "labels", "origin", "input", "created_at")
    empty_columns = ("owner", "output", "error", "head_digest", "started_at", "finished_at")
    return {
        **{name: v[name] for name in names},
        **dict.fromkeys((*empty_columns, "picked_by")),
        "state": "pending",
        "reason": "",
        "epoch": 0,
        "inbox_seq": 0,
        "head_seq": 0,
        "wake_first": v["wake_at"],
        "picked_until": 0,
    }


__all__ = ["ALIVE", "FINAL", "Statements", "is_free", "recognise"]
