"""Every metric that a process shows: its name, kind, labels and meaning.

The one list: instruments, the page `/metrics` and docs/reference/metrics.md are made from it. Names
follow Prometheus: base units last, `_total` for what only grows. A label never holds a run's id;
labels that users can name freely are bounded (metrics.py: Bounded). `OLD` are names of the earlier
system, kept so that dashboards made for it still draw: the same values under other words.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

PREFIX = "llm_orchestrator_"
Kind = Literal["counter", "gauge", "histogram"]

_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_STEP = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_RUN = (0.01, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 21600.0, 86400.0)
_LLM = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)
_RECOVERY = (0.5, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 120.0, 300.0, 600.0)
_BATCH = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)


class Metric(NamedTuple):
    """One metric. `name` is whole; `buckets` (upper bounds) only for histograms."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    meaning: str
    buckets: tuple[float, ...] = ()

    @property
    def word(self) -> str:
        """The name without our prefix, as instruments are asked for it."""
        return self.name.removeprefix(PREFIX)


def _counter(name: str, labels: str, meaning: str) -> Metric:
    return Metric(f"{PREFIX}{name}_total", "counter", tuple(labels.split()), meaning)


def _gauge(name: str, labels: str, meaning: str) -> Metric:
    return Metric(PREFIX + name, "gauge", tuple(labels.split()), meaning)


def _histogram(name: str, labels: str, meaning: str, *, buckets: tuple[float, ...]) -> Metric:
    return Metric(PREFIX + name, "histogram", tuple(labels.split()), meaning, buckets)


RUNS = (
    _gauge("runs", "state workflow", "Runs in the store"),
    _counter("runs_accepted", "workflow", "Runs that this process made durable"),
    _counter("runs_finished", "workflow state", "Runs whose end this process wrote"),
    _histogram(
        "run_duration_seconds", "workflow", "From acceptance of a run to its end", buckets=_RUN
    ),
    _counter("steps", "type outcome", "Steps that ended here: completed, failed, skipped"),
    _histogram(
        "step_duration_seconds",
        "type",
        "One attempt of a step, from its beginning until its end is durable",
        buckets=_STEP,
    ),
    _counter(
        "step_attempts",
        "type outcome",
        "Attempts of steps that ended here: ok, or the error's kind",
    ),
)
QUEUES = (
    _gauge("queue_depth", "queue", "Runs that are due and that nobody drives"),
    _gauge("queue_oldest_age_seconds", "queue", "For how long the oldest of them has been due"),
    _gauge(
        "runs_accepted_minus_advanced",
        "",
        "Due runs that nobody drives, and driven ones without a new entry for 5 minutes",
    ),
    _histogram(
        "claim_latency_seconds",
        "",
        "From the moment a run was due to its claim here; runs that begin as they are accepted"
        " do not count",
        buckets=_FAST,
    ),
)
MODELS = (
    _counter(
        "llm_requests", "provider model outcome", "Questions to models: ok, or the error's kind"
    ),
    _histogram(
        "llm_request_duration_seconds",
        "provider model",
        "Time until the whole answer",
        buckets=_LLM,
    ),
    _counter("llm_tokens", "provider model direction", "Tokens: input, output"),
    _counter("llm_cost_usd", "provider model", "What answers cost, as far as their price is known"),
    _counter(
        "respent_usd",
        "provider model",
        "Cost (at most) of attempts made again because a crash left their outcome unknown",
    ),
    _counter("respent_tokens", "provider model", "Tokens of such attempts, at most"),
    _gauge(
        "breaker_state",
        "provider",
        "0 closed, 1 half open, 2 open; the worst of its models; `store` is the store's",
    ),
    _counter("breaker_openings", "provider", "How often this process opened a breaker"),
)
STORE = (
    _gauge("store_reachable", "", "1 if the store answered within 2 s"),
    _gauge("store_writable", "", "1 if it would take a commit"),
    _gauge("store_latency_seconds", "", "How long its last answer to a small question took"),
    _histogram("commit_batch_entries", "", "Journal entries in one commit", buckets=_BATCH),
    _histogram(
        "commit_duration_seconds",
        "",
        "From handing a commit over until it is durable",
        buckets=_FAST,
    ),
    _counter("commits", "outcome", "Commits: landed, refused (in part or whole), failed"),
    _counter("fenced_writes", "", "Writes that were refused because the run has another owner"),
    _gauge("epoch", "", "Generation of the store: grows with each restore"),
    _counter("journal_damaged", "", "Entries that were found damaged"),
    _counter("journal_mended", "", "Damaged entries after whose repair the run could go on"),
    _counter("journal_verified_entries", "", "Entries that were read again, to find damage early"),
    _gauge("journal_verify_progress_ratio", "", "How much of this round of verification is done"),
    _gauge(
        "journal_verify_last_round_timestamp_seconds",
        "",
        "When all journals had last been verified",
    ),
    _gauge("journal_damaged_runs", "", "Runs that the last round found damaged, mended or not"),
    _gauge("pool_connections", "state", "Reading connections: idle, busy"),
    _gauge("pool_size", "", "How many reading connections there may be"),
    _histogram("pool_wait_seconds", "", "Waiting for a reading connection", buckets=_FAST),
    _counter("pool_timeouts", "", "How often somebody waited for one in vain"),
    _gauge("replication_lag_seconds", "standby", "How far a standby's replay is behind"),
    _gauge("replication_lag_bytes", "standby", "The same in bytes of log"),
    _gauge(
        "replication_standbys",
        "sync",
        "Standbys that are connected, by whether commits wait for them",
    ),
    _gauge(
        "database_damaged_pages",
        "",
        "Pages whose checksum did not fit, as the primary has counted them on its disk",
    ),
    _counter("primaries_left", "", "How often this node has moved the primary off damaged pages"),
    _gauge(
        "recovery_point_exposure_seconds",
        "mechanism",
        "How much of the newest work each of replica, archive, wal, backup would not bring back;"
        " absent without such a copy",
    ),
    _gauge(
        "spool_results", "", "Paid results on this machine's disk that the store has not taken yet"
    ),
    _gauge("spool_bytes", "", "Their size on disk"),
)
NODES = (
    _gauge("nodes", "state", "Nodes that there are and lately were"),
    _gauge("node_lease_age_seconds", "node", "Since a living node beat last"),
    _gauge("node_info", "node version region", "1 for each living node"),
    _gauge("region_active", "region", "1 where nodes may claim runs, 0 where they stand by"),
    _counter("takeovers", "", "Runs that this node took over from one that does not live"),
    _histogram(
        "recovery_time_seconds",
        "",
        "From the moment a node's death was seen here until a run of its was driven again",
        buckets=_RECOVERY,
    ),
)
PROCESS = (
    _counter("http_requests", "method route status", "HTTP requests that were answered"),
    _histogram(
        "http_request_duration_seconds",
        "method route",
        "Until an answer was complete",
        buckets=_FAST,
    ),
    _gauge("streams_open", "", "Event streams that somebody listens to"),
    _gauge("memory_bytes", "", "Memory in use, of the bound that is nearest to full"),
    _gauge("memory_limit_bytes", "", "That bound; nothing is claimed above 80 % of it"),
    _gauge("memory_shedding", "", "1 while runs are let go for want of memory"),
    _gauge("maintenance", "", "1 while maintenance mode refuses new runs"),
    _gauge("draining", "", "1 while this node claims nothing and lets its runs go"),
    _gauge("process_start_time_seconds", "", "When this process began, Unix time"),
    _gauge("build_info", "version", "1"),
    _counter("audit_entries", "action", "Entries that were written to the audit log"),
)
BACKUPS = (
    _gauge(
        "backup_last_success_timestamp_seconds",
        "",
        "Until when the newest backup has everything, Unix time; 0 without one",
    ),
    _gauge(
        "backup_last_proved_timestamp_seconds",
        "",
        "When a backup was last restored aside and found good, Unix time; 0 if never",
    ),
    _gauge(
        "backup_last_failure_timestamp_seconds",
        "",
        "When making or copying a backup last failed, Unix time; 0 if never",
    ),
    _gauge("backup_proof_failed", "", "1 if the last proof of a backup found something wrong"),
    _gauge("backup_size_bytes", "", "Size of the newest backup file"),
    _gauge("backup_duration_seconds", "", "How long it took to make"),
    _counter(
        "backup_runs",
        "outcome",
        "Backups that were begun: ok, partial (not in the second place), failed. Counted in the"
        " store: the same number on every node",
    ),
)
ARCHIVE = (
    _gauge("archive_lag_batches", "", "Committed batches that are not in the stream archive yet"),
    _gauge(
        "archive_degraded",
        "",
        "1 while the stream archive is away, or misses something until the next backup",
    ),
    _gauge("archive_segments", "", "Segments that this process has written"),
    _gauge("archive_bytes", "", "Their size"),
)
GROUPS: dict[str, tuple[Metric, ...]] = {
    "Runs and steps": RUNS,
    "Queues": QUEUES,
    "Models": MODELS,
    "The store": STORE,
    "Backups": BACKUPS,
    "The stream archive": ARCHIVE,
    "Nodes": NODES,
    "The process": PROCESS,
}
METRICS = {metric.word: metric for group in GROUPS.values() for metric in group}


class Alias(NamedTuple):
    """A metric under its old name. `labels` of it, in the order of the labels of `of`."""

    name: str
    of: str
    """The word of the one whose values it shows."""
    labels: tuple[str, ...] = ()


ERRORS = Metric(
    "orchestrator_errors_total",
    "counter",
    ("error_type", "component"),
    "Failed attempts of steps, by kind of error and type of step",
)
"""The one old name whose values no new one has."""
ACTIVE = Metric("orchestrator_active_workflows", "gauge", (), "Runs that are in this process")
OLD = (
    Alias(
        "orchestrator_workflow_executions_total", "runs_finished_total", ("workflow_name", "status")
    ),
    Alias("orchestrator_workflow_duration_seconds", "run_duration_seconds", ("workflow_name",)),
    Alias("orchestrator_llm_requests_total", "llm_requests_total", ("provider", "model", "status")),
    Alias("orchestrator_llm_tokens_total", "llm_tokens_total", ("provider", "model", "type")),
    Alias(
        "orchestrator_llm_request_duration_seconds",
        "llm_request_duration_seconds",
        ("provider", "model"),
    ),
    Alias("orchestrator_step_executions_total", "steps_total", ("step_type", "status")),
    Alias("orchestrator_step_duration_seconds", "step_duration_seconds", ("step_type",)),
)
