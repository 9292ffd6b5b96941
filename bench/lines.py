"""What the tables show: one line per number, and what we want of it."""

from __future__ import annotations

from typing import NamedTuple

from bench.contestants import StoreKind


class Line(NamedTuple):
    """One line of a table: a field of a workload."""

    work: str
    field: str
    title: str
    goal: float | None = None
    more_is_better: bool = False


_SQLITE = (
    Line("W1", "steps_s", "W1 500 runs x 10 steps, steps/s", 10_000, more_is_better=True),
    Line("W1", "cpu_ms_step", "W1 processor ms per step", 0.08),
    Line("W1", "rows_commit", "W1 journal rows per commit"),
    Line("W2", "ms_step", "W2 200 steps in sequence, ms per step", 0.6),
    Line("W2", "cpu_ms_step", "W2 processor ms per step"),
    Line("W3", "wall_s", "W3 500 parallel steps and a join, s", 0.1),
    Line("W4", "steps_s", "W4 as W1 with 20 KB results, steps/s", 2_000, more_is_better=True),
    Line("W4", "cpu_ms_step", "W4 processor ms per step"),
    Line("W5", "s", "W5 1,000 runs, kill -9, all advanced, s", 2.0),
    Line("W6", "kb_run", "W6 10,000 waiting runs, KB per run", 0.2),
    Line("W6", "all_waiting_s", "W6 until all are waiting, s"),
    Line("W7", "import_s", "W7 import, s", 0.15),
    Line("W7", "hello_s", "W7 process start to finished run, s", 0.4),
)
_POSTGRES = (
    Line("W1", "steps_s", "W1 500 runs x 10 steps, steps/s", 12_000, more_is_better=True),
    Line("W1", "cpu_ms_step", "W1 processor ms per step, node", 0.08),
    Line("W1", "pg_ms_step", "W1 processor ms per step, PostgreSQL", 0.03),
    Line("W1", "rows_commit", "W1 journal rows per commit"),
    Line("W1", "wal_b_step", "W1 WAL bytes per step, its share of the run included"),
    Line("W1", "fpi_b_step", "W1 of these, images of whole pages"),
    Line(
        "W1.500", "steps_s", "W1.500 with 500 runs in flight, steps/s", 12_000, more_is_better=True
    ),
    Line("W1.500", "cpu_ms_step", "W1.500 processor ms per step, node", 0.08),
    Line("W1.500", "pg_ms_step", "W1.500 processor ms per step, PostgreSQL", 0.03),
    Line("W1.long", "steps_s", "W1.long 100 runs x 50 steps, steps/s"),
    Line("W2", "ms_step", "W2 200 steps in sequence, ms per step (ideal: the raw commit)"),
    Line("W2", "cpu_ms_step", "W2 processor ms per step, node"),
    Line("W2", "pg_ms_step", "W2 processor ms per step, PostgreSQL"),
    Line("W2", "wal_b_step", "W2 WAL bytes per step"),
    Line("W3", "wall_s", "W3 500 parallel steps and a join, s", 0.05),
    Line("W4", "steps_s", "W4 as W1 with 20 KB results, steps/s", 1_500, more_is_better=True),
    Line("W4", "cpu_ms_step", "W4 processor ms per step, node"),
    Line("W4", "pg_ms_step", "W4 processor ms per step, PostgreSQL"),
    Line("W4", "wal_b_step", "W4 WAL bytes per step"),
    Line("W5.second", "s", "W5.second 1,000 runs, kill -9, another node alive, s", 1.5),
    Line("W5", "s", "W5 the same, one node started again, s from its start", 1.0),
    Line("W6", "kb_run", "W6 10,000 waiting runs, KB per run", 0.1),
    Line("W6", "all_waiting_s", "W6 until all are waiting, s"),
    Line("W8.1", "steps_s", "W8 as W1, 1 node process, steps/s", more_is_better=True),
    Line("W8.2", "steps_s", "W8 2 node processes, steps/s", more_is_better=True),
    Line("W8.4", "steps_s", "W8 4 node processes, steps/s", more_is_better=True),
    Line("W8.1s", "steps_s", "W8 1, with a synchronous standby, steps/s", more_is_better=True),
    Line("W8.4s", "steps_s", "W8 4, with a synchronous standby, steps/s", more_is_better=True),
    Line("W9", "acked_p50_ms", "W9 accepted to first step, p50 ms", 10),
    Line("W9", "acked_p99_ms", "W9 accepted to first step, p99 ms"),
    Line("W9", "sent_p50_ms", "W9 the same from before it is accepted, p50 ms"),
)
LINES: dict[StoreKind, tuple[Line, ...]] = {"sqlite": _SQLITE, "postgres": _POSTGRES}
TIMES_BEST_PEER: dict[StoreKind, float] = {"sqlite": 20.0, "postgres": 10.0}
TIMES_RAW = 1.6
WAL_B_STEP, WAL_B_RUN = 480.0, 2_200.0
