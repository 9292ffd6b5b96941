"""The one configuration, frozen, and where each value came from.

Order: flag, environment, `llm-orchestrator.toml`, default. This module and security/secrets.py are
the only ones that read the environment.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import platformdirs

from llm_orchestrator.errors import ConfigError
from llm_orchestrator.telemetry.redact import passwords_in, remember

FILE_NAME = "llm-orchestrator.toml"
_PREFIX = "LLM_ORCHESTRATOR_"


def default_data_dir() -> Path:
    """Where data lives by the platform's convention (XDG on Linux)."""
    return platformdirs.user_data_path("llm-orchestrator", appauthor=False)


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting's value and its origin: flag, environment, file or default."""

    name: str
    value: object
    origin: str


@dataclass(frozen=True, slots=True)
class Config:
    """Every setting. Secrets are references to the environment, resolved when they are used."""

    data_dir: Path = field(default_factory=default_data_dir)
    store: str = ""
    region: str = "local"
    region_failover_s: float = 0.0
    """How long no node of an active region lives before a standby region takes over: at least
    lease_ms. inf: never without a person."""
    patroni_urls: Sequence[str] = ()
    """Patroni's REST addresses (http://HOST:8008), of every region: for `llmo region`, and for
    nodes whose primary has damaged pages (damaged_primary)."""
    damaged_primary: str = "leave"
    """When a page of the primary is damaged and `patroni_urls` is set: leave moves the primary to a
    standby and has Patroni make the old one anew; stay does neither."""
    node_name: str = ""
    host: str = "127.0.0.1"
    """Where the server listens."""
    port: int = 8080
    token: str = field(default="", repr=False)
    """What requests must carry. In the file only by reference: env:NAME or file:PATH."""
    drain_timeout_s: float = 10.0
    """What steps in flight get when the process is told to stop."""
    memory_limit_mb: int = 0
    """What this process may use, in MiB; at 80 % it takes no more. 0: its control group's limit,
    else the machine's memory."""
    maintenance_poll_s: float = 2.0
    """How often maintenance mode is looked at when no news of it comes."""
    runs_max: int = 1_000
    steps_max: int = 1_000
    retention_days: float = 0.0
    """Finished runs older than this are removed; 0 keeps them."""
    retention_runs: int = 0
    """At most this many finished runs are kept; 0 keeps all."""
    verify_entries_per_s: float = 2_000.0
    """How fast one node reads all journals again, round after round, to find damage. 0: never."""
    audit_retention_days: float = 0.0
    """Chains of the audit log that ended longer ago are removed; 0 keeps them."""
    direct_url: str = ""
    """PostgreSQL without the pooler: for heartbeats and wake-ups. Empty: the store's own URL."""
    pool_size: int = 10
    """Connections that read, at most, per process."""
    heartbeat_ms: int = 500
    lease_ms: int = 3_000
    queues: Mapping[str, Any] = field(default_factory=dict)
    """What a queue allows over all nodes: {name: runs at a time}, or {name: {concurrency, rate,
    period_s, tokens_per_minute}}."""
    providers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Named OpenAI-compatible servers and limits: {name: {base_url, api_key_env, rpm, tpm}}."""
    local_url: str = ""
    """A llama.cpp server that is already there; empty: one is found or started when needed."""
    outgoing_allow: Sequence[str] = ()
    """What workflows may reach besides public addresses: host names, addresses, networks."""
    log_format: str = ""
    """`text` or `json`. Empty: `llmo serve` logs JSON when stderr is no terminal."""
    log_level: str = ""
    """`debug`, `info`, `warning` or `error`. Empty: warnings, and what a server has to say."""
    otel_endpoint: str = ""
    """Where spans go, OTLP over HTTP: http://HOST:4318. Empty: nowhere."""
    otel_genai: str = "latest"
    """Which names of OpenTelemetry's GenAI conventions spans have: `latest`, `v1.36` or `both`."""
    backup_dir: Path | None = None
    """Where backup files are made and kept. Empty: `backups` in the data folder."""
    backup_place: str = ""
    """Where each backup file is copied to: s3://BUCKET/PREFIX, or a folder. Empty: nowhere."""
    backup_recipients: Sequence[str] = ()
    """Who can open backup files: age public keys, or files of them. None: they are not sealed."""
    backup_identity: str = ""
    """The age key that opens them, by reference only: file:PATH or env:NAME."""
    backup_compression: str = "gzip"
    """`gzip` or `zstd`."""
    backup_bytes_per_s: int = 0
    """What making a backup may read in a second; 0: no bound."""
    backup_schedule: str = ""
    """When an engine makes backups, prunes and proves them: a cron line (UTC), or @hourly. Empty:
    it makes none."""
    backup_keep_days: int = 30
    """Backup files younger than this are kept."""
    backup_keep_last: int = 3
    """So many of the newest are kept, however old."""
    backup_keep_daily: int = 0
    """And the last one of each of so many days,"""
    backup_keep_weekly: int = 0
    """of so many weeks,"""
    backup_keep_monthly: int = 0
    """of so many months."""
    s3_endpoint_url: str = ""
    """An object store that is not Amazon's: https://HOST:PORT."""
    s3_region: str = ""
    s3_storage_class: str = "STANDARD_IA"
    """Of backup files. Empty: the bucket's own."""
    s3_object_lock_days: int = 0
    """So long nobody can change or remove a backup file there (compliance mode); 0: no lock."""
    s3_access_key: str = ""
    """Only by reference: env:NAME or file:PATH. Empty: as the AWS tools find it."""
    s3_secret_key: str = ""
    """Only by reference: env:NAME or file:PATH."""
    archive_place: str = ""
    """The stream archive, where every committed batch goes as well: a folder on another disk, or
    s3://BUCKET/PREFIX. The same for every node and every command that writes to the store."""
    archive_mode: str = "sync"
    """`sync`: acknowledged means durable there too. `async`: it may lag."""
    archive_on_failure: str = "stall"
    """When the archive is away: `stall` commits nothing, `degrade` goes on and says so."""
    archive_lag_s: float = 5.0
    """How far an `async` archive may be behind before commits wait for it."""
    archive_recipients: Sequence[str] = ()
    """Who can open its segments: as backup_recipients."""
    barman_server: str = ""
    """The server's name in Barman's configuration: point in time on PostgreSQL."""
    barman_config: str = ""
    """Barman's configuration file. Empty: where Barman looks by itself."""
    restore_hold: bool = False
    """After a restore, hold every unfinished run of which nothing says what it did since."""
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Provider keys and addresses found in the environment, by variable name."""
    origins: Mapping[str, str] = field(default_factory=dict, repr=False)
    file: Path | None = field(default=None, repr=False)
    """The settings file that was read."""

    @property
    def store_url(self) -> str:
        """The store's address; by default a file in the data folder."""
        return self.store or f"sqlite:///{self.data_dir / 'runs.db'}"

    @property
    def backup_folder(self) -> Path:
        """Where backup files are made and kept."""
        return self.backup_dir or self.data_dir / "backups"

    def settings(self) -> list[Setting]:
        """All settings with their origins, secrets left out."""
        shown = [item.name for item in fields(self) if item.name not in _NO_SETTINGS]
        found = []
        for name in shown:
            value = getattr(self, name)
            if name in _URLS:
                value = without_password(value)
            if name == "token":
                value = "***" if value else ""
            if name == "backup_dir":
                value = self.backup_folder
            found.append(Setting(name, value, self.origins.get(name, "default")))
        return found


_NO_SETTINGS = frozenset({"secrets", "origins", "file"})
_URLS = ("store", "direct_url", "otel_endpoint", "s3_endpoint_url")
_ENVIRONMENT = {
    "store": "URL",
    "data_dir": "DATA",
    "region": "REGION",
    "node_name": "NODE_NAME",
    "direct_url": "DIRECT_URL",
    "token": "TOKEN",
    "log_format": "LOG_FORMAT",
    "log_level": "LOG_LEVEL",
    "otel_genai": "OTEL_GENAI",
}
_POOL_SIZE = "DB_POOL_SIZE"
_PASSWORD = "PGPASSWORD"  # noqa: S105 - its name; the store's driver reads it by itself
_OTLP, _OTLP_TRACES = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
_TRACES_PATH = "/v1/traces"
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "log_format": ("", "text", "json"),
    "log_level": ("", "debug", "info", "warning", "error"),
    "otel_genai": ("latest", "v1.36", "both"),
    "backup_compression": ("gzip", "zstd"),
    "archive_mode": ("sync", "async"),
    "archive_on_failure": ("stall", "degrade"),
    "damaged_primary": ("leave", "stay"),
}
_WHOLE = (
    "backup_bytes_per_s",
    "backup_keep_days",
    "backup_keep_last",
    "backup_keep_daily",
    "backup_keep_weekly",
    "backup_keep_monthly",
    "s3_object_lock_days",
)
_REFERENCES = ("backup_identity", "s3_access_key", "s3_secret_key")
_LISTS = ("backup_recipients", "archive_recipients")
_PLACES = ("backup_place", "archive_place")
_SECRETS = (
    "OPENAI_API_KEY",
    "OPENAI_BASE_URL",
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_BASE_URL",
    "COHERE_API_KEY",
    "COHERE_BASE_URL",
    "PINECONE_API_KEY",
    "PINECONE_HOST",
    "QDRANT_URL",
)
_ADDRESSES = frozenset(name for name in _SECRETS if not name.endswith("_KEY"))
"""These may be said."""


def load_config(
    flags: Mapping[str, object] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> Config:
    """Put the configuration together. Raises ConfigError naming the file or variable at fault."""
    environment = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    chosen = file or _file(environment)
    if chosen is not None:
        for name, value in _read(chosen).items():
            values[name], origins[name] = value, str(chosen)
    if values.get("token"):
        values["token"] = resolve_secret(str(values["token"]))
    for name, suffix in _ENVIRONMENT.items():
        if environment.get(_PREFIX + suffix):
            values[name], origins[name] = environment[_PREFIX + suffix], _PREFIX + suffix
    if environment.get(_POOL_SIZE):
        values["pool_size"], origins["pool_size"] = _number(environment[_POOL_SIZE]), _POOL_SIZE
    _find_otel(environment, values, origins)
    for name, value in (flags or {}).items():
        if value is not None:
            values[name], origins[name] = value, "flag"
    _check_choices(values, origins)
    _check_recovery(values, origins)
    _make_paths(values)
    wanted = set(_SECRETS)
    for provider in values.get("providers", {}).values():
        wanted |= {str(provider[key]) for key in provider if key.endswith("_env")}
    secrets = {name: environment[name] for name in sorted(wanted) if environment.get(name)}
    try:
        config = Config(**values, secrets=secrets, origins=origins, file=chosen)
    except TypeError as error:
        raise ConfigError(f"configuration: {error}", hint="llmo config show --origin") from error
    _remember(config)
    remember(environment.get(_PASSWORD, ""))
    return config


def _make_paths(values: dict[str, Any]) -> None:
    for name in ("data_dir", "backup_dir"):
        if name in values:
            values[name] = Path(values[name]).expanduser()


def _remember(config: Config) -> None:
    """From now on no text that this process writes holds a secret of the configuration."""
    remember(str(config.token))
    urls = [config.store, config.direct_url, config.otel_endpoint, config.local_url]
    urls.append(config.s3_endpoint_url)
    for provider in config.providers.values():
        urls += [provider.get("base_url", ""), *provider.get("fallback_urls", ())]
    for name, value in config.secrets.items():
        if "://" in value:
            urls.append(value)
        elif name not in _ADDRESSES:
            remember(value)
    for url in urls:
        for password in passwords_in(str(url)):
            remember(password)


def _check_choices(values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    for name, words in _CHOICES.items():
        if values.get(name, words[0]) not in words:
            known = ", ".join(filter(None, words))
            raise ConfigError(f"{name} is {values[name]!r} ({origins[name]}); it takes {known}")


def _check_recovery(values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Raises ConfigError for a setting of backups or of the archive that cannot be meant."""
    for name in (name for name in values if name in _TAKES):
        is_good, what = _TAKES[name]
        if not is_good(values[name]):
            shown = "" if name in _REFERENCES else f" is {values[name]!r}"
            raise ConfigError(f"{name}{shown} ({origins[name]}); it takes {what}")
    has_both = bool(values.get("s3_access_key")) == bool(values.get("s3_secret_key"))
    if not has_both:
        raise ConfigError("s3_access_key and s3_secret_key go together, or neither is set")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_reference(value: object) -> bool:
    return value == "" or (isinstance(value, str) and value.startswith(("env:", "file:")))


def _is_list(value: object) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return False
    return all(isinstance(each, str) and each for each in value)


def _is_place(value: object) -> bool:
    if not isinstance(value, str):
        return False
    scheme, separator, rest = value.partition("://")
    return not separator or (scheme == "s3" and bool(rest.partition("/")[0]))


def _is_cron(value: object) -> bool:
    from llm_orchestrator.language.schedule import check_cron  # noqa: PLC0415 - most have none

    return value == "" or (isinstance(value, str) and check_cron(value) is None)


def _is_lag(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_duration(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _is_url_list(value: object) -> bool:
    return _is_list(value) and all(
        str(each).startswith(("http://", "https://")) for each in cast("Sequence[str]", value)
    )


_TAKES: Mapping[str, tuple[Callable[[object], bool], str]] = {
    **dict.fromkeys(_WHOLE, (_is_whole, "a whole number, 0 or more")),
    **dict.fromkeys(_REFERENCES, (_is_reference, "a reference: env:NAME or file:PATH")),
    **dict.fromkeys(_LISTS, (_is_list, "a list of age public keys, or of files of them")),
    **dict.fromkeys(_PLACES, (_is_place, "a folder, or s3://BUCKET/PREFIX")),
    "backup_schedule": (_is_cron, 'five fields (minute hour day month weekday), or "@hourly"'),
    "region_failover_s": (_is_duration, "a number of seconds, 0 or more"),
    "patroni_urls": (_is_url_list, "a list of addresses: http://HOST:8008"),
    "archive_lag_s": (_is_lag, "a number of seconds above 0"),
    "restore_hold": (lambda value: isinstance(value, bool), "true or false"),
}


def _find_otel(
    environment: Mapping[str, str], values: dict[str, Any], origins: dict[str, str]
) -> None:
    """Where spans go, by OpenTelemetry's own variables; `none` and `disabled` are respected."""
    for name in (_OTLP_TRACES, _OTLP):
        if environment.get(name):
            values["otel_endpoint"], origins["otel_endpoint"] = environment[name], name
            break
    if environment.get("OTEL_TRACES_EXPORTER") == "none":
        values["otel_endpoint"], origins["otel_endpoint"] = "", "OTEL_TRACES_EXPORTER"
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        values["otel_endpoint"], origins["otel_endpoint"] = "", "OTEL_SDK_DISABLED"
    if values.get("otel_endpoint") and origins["otel_endpoint"] != _OTLP_TRACES:
        base = str(values["otel_endpoint"]).rstrip("/").removesuffix(_TRACES_PATH)
        values["otel_endpoint"] = base + _TRACES_PATH


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 1_000:
        raise ConfigError(f"{_POOL_SIZE} is {text!r}; it takes a number from 1 to 1000")
    return int(text)


@dataclass(frozen=True, slots=True)
class Supervisor:
    """How systemd wants to hear of us: a socket's address, and its watchdog's time (0: none)."""

    socket: str = ""
    watchdog_s: float = 0.0


def supervisor(environ: Mapping[str, str] | None = None, *, pid: int | None = None) -> Supervisor:
    """Who started this process, as its environment says (sd_notify(3), sd_watchdog_enabled(3))."""
    environment = os.environ if environ is None else environ
    own = str(os.getpid() if pid is None else pid)
    usec = environment.get("WATCHDOG_USEC", "")
    is_meant = environment.get("WATCHDOG_PID", own) == own
    watchdog_s = int(usec) / 1_000_000 if usec.isdecimal() and is_meant else 0.0
    return Supervisor(environment.get("NOTIFY_SOCKET", ""), watchdog_s)


def without_password(url: str) -> str:
    """A URL as it may be shown."""
    head, separator, rest = url.partition("://")
    user, at, tail = rest.rpartition("@")
    name, colon, _ = user.partition(":")
    return f"{head}{separator}{name}{':***' if colon else ''}{at}{tail}" if at else url


def _file(environment: Mapping[str, str]) -> Path | None:
    named = environment.get(_PREFIX + "CONFIG")
    if named:
        return Path(named)
    here = Path(FILE_NAME)
    return here if here.exists() else None


def _read(path: Path) -> dict[str, Any]:
    import tomllib  # noqa: PLC0415 - most processes read no file

    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}", hint="llmo config show --origin") from error
    known = {item.name for item in fields(Config)} - _NO_SETTINGS
    unknown = sorted(set(data) - known)
    if unknown:
        raise ConfigError(
            f"{path}: unknown setting {unknown[0]!r}; there is: {', '.join(sorted(known))}"
        )
    return data


def resolve_secret(reference: str) -> str:
    """The secret behind `env:NAME` or `file:PATH`. Raises ConfigError; never says the value.

    From then on the process takes it out of what it writes (telemetry/redact.py).
    """
    value = _resolve(reference)
    remember(value)
    return value


def _resolve(reference: str) -> str:
    kind, _, place = reference.partition(":")
    if kind == "env":
        value = os.environ.get(place)
        if value is None:
            raise ConfigError(f"secret {reference} is not set", hint=f"export {place}=...")
        return value
    if kind == "file":
        try:
            return Path(place).read_text().strip()
        except OSError as error:
            raise ConfigError(f"secret {reference} cannot be read: {error.strerror}") from error
    raise ConfigError(f"{reference!r} is no secret reference", hint="write env:NAME or file:PATH")
