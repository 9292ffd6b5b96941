"""Write the files of deploy/compose that say how the cluster is tuned, from the lab's own settings.

Usage: .venv/bin/python scripts/deploy.py [--check]

One source for both: src/llm_orchestrator/drill/lab/cluster.toml. What the drills exercise is what
is shipped; tests/test_deploy.py fails when a file differs. The tags of images are put in from
deploy/images.toml.
"""

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from llm_orchestrator.drill.lab.spec import settings

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "deploy" / "compose"
IMAGES = tomllib.loads((ROOT / "deploy" / "images.toml").read_text())["images"]
MEMBERS = ("postgres1", "postgres2", "postgres3")
ARBITERS = ("etcd1", "etcd2", "etcd3")
ORCHESTRATORS = ("orchestrator", "orchestrator2")
BUCKET = "backups"


def patroni() -> str:
    """Patroni's configuration of any member; its name and the passwords are in its environment.

    Barman's slot is of this cluster only: without its Barman the lab's log would grow for good.
    """
    ports, proof = settings()["ports"], "scram-sha-256"
    users = {"superuser": "postgres", "replication": "replicator", "rewind": "rewinder"}
    config: dict[str, Any] = {
        "scope": "orchestrator",
        "restapi": {"listen": f"0.0.0.0:{ports['patroni']}"},
        "etcd3": {"hosts": [f"{name}:{ports['etcd']}" for name in ARBITERS]},
        "bootstrap": {
            "dcs": settings()["patroni"] | {"slots": {"barman": {"type": "physical"}}},
            "initdb": [{"encoding": "UTF8"}, {"locale": "C.UTF-8"}, "data-checksums"],
        },
        "postgresql": {
            "listen": f"0.0.0.0:{ports['postgres']}",
            "data_dir": "/cluster/data",
            "pgpass": "/tmp/pgpass",
            "authentication": {kind: {"username": name} for kind, name in users.items()},
            "pg_hba": [
                "local all all trust",
                f"host all all 0.0.0.0/0 {proof}",
                f"host replication all 0.0.0.0/0 {proof}",
            ],
        },
        "watchdog": {"mode": "off"},
    }
    return json.dumps(config, indent=1) + "\n"


def haproxy() -> str:
    """The primary's address for whoever cannot look for it: backups, people."""
    ports, tuned = settings()["ports"], settings()["haproxy"]
    servers = "".join(
        f"  server {name} {name}:{ports['postgres']} check port {ports['patroni']} resolvers docker"
        " init-addr none\n"
        for name in MEMBERS
    )
    return f"""\
# Written by scripts/deploy.py from the lab's settings.
global
  maxconn 1000

defaults
  mode tcp
  timeout connect {tuned["connect_ms"]}ms
  timeout client {tuned["idle_s"]}s
  timeout server {tuned["idle_s"]}s
  timeout check {tuned["check_timeout_ms"]}ms

resolvers docker
  nameserver dns 127.0.0.11:53
  hold valid 2s

listen primary
  bind *:{ports["postgres"]}
  option httpchk GET /primary
  http-check expect status 200
  default-server inter {tuned["check_ms"]}ms fall {tuned["fall"]} rise {tuned["rise"]} \
on-marked-down shutdown-sessions
{servers}"""


def etcd() -> str:
    """The environment of every etcd member."""
    ports, tuned = settings()["ports"], settings()["etcd"]
    cluster = ",".join(f"{name}=http://{name}:{ports['etcd_peer']}" for name in ARBITERS)
    lines = {
        "ETCD_INITIAL_CLUSTER": cluster,
        "ETCD_INITIAL_CLUSTER_STATE": "new",
        "ETCD_INITIAL_CLUSTER_TOKEN": "orchestrator",
        "ETCD_DATA_DIR": "/cluster/etcd",
        "ETCD_HEARTBEAT_INTERVAL": tuned["heartbeat_ms"],
        "ETCD_ELECTION_TIMEOUT": tuned["election_ms"],
        "ETCD_LISTEN_PEER_URLS": f"http://0.0.0.0:{ports['etcd_peer']}",
        "ETCD_LISTEN_CLIENT_URLS": f"http://0.0.0.0:{ports['etcd']}",
    }
    head = "# Written by scripts/deploy.py from the lab's settings.\n"
    return head + "".join(f"{name}={value}\n" for name, value in lines.items())


def prometheus() -> str:
    """Who is asked for metrics, and by which rules."""
    ports = settings()["ports"]

    def job(name: str, hosts: tuple[str, ...], what: str) -> dict[str, Any]:
        targets = [f"{host}:{ports[what]}" for host in hosts]
        return {"job_name": name, "static_configs": [{"targets": targets}]}

    config = {
        "global": {"scrape_interval": "5s", "evaluation_interval": "5s"},
        "rule_files": ["/etc/prometheus/alerts.yml"],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": ["alertmanager:9093"]}]}]},
        "scrape_configs": [
            job("llm-orchestrator", ORCHESTRATORS, "node"),
            job("patroni", MEMBERS, "patroni"),
        ],
    }
    return json.dumps(config, indent=1) + "\n"


def node() -> str:
    """The settings file of the nodes: backups each hour, a copy of each in the object store."""
    return f"""\
# Written by scripts/deploy.py from the lab's settings.
backup_schedule = "@hourly"
backup_place = "s3://{BUCKET}/orchestrator"
s3_endpoint_url = "http://objects:{settings()["ports"]["s3"]}"
s3_region = "us-east-1"
s3_storage_class = ""
s3_access_key = "env:OBJECTS_KEY"
s3_secret_key = "env:OBJECTS_SECRET"
"""


def datasource() -> str:
    """Grafana's provisioning: where its numbers come from. JSON is YAML."""
    url = f"http://prometheus:{settings()['ports']['prometheus']}"
    source = {
        "name": "Prometheus",
        "uid": "prometheus",
        "type": "prometheus",
        "access": "proxy",
        "url": url,
        "isDefault": True,
        "editable": False,
    }
    return json.dumps({"apiVersion": 1, "datasources": [source]}, indent=1) + "\n"


def pinned(path: Path) -> str:
    """A file with every image that is not ours at the tag of deploy/images.toml."""

    def pin(found: re.Match[str]) -> str:
        head, name = found.groups()
        return f"{head}{name}:{IMAGES[name]}" if name in IMAGES else found[0]

    return re.sub(
        r"^( *(?:FROM|image:) )([a-z][\w./-]*)(?::\S+)?", pin, path.read_text(), flags=re.MULTILINE
    )


WRITTEN = {
    "patroni.json": patroni,
    "haproxy.cfg": haproxy,
    "etcd.env": etcd,
    "prometheus.json": prometheus,
    "llm-orchestrator.toml": node,
    "grafana/datasource.yaml": datasource,
}
PINNED = (
    ROOT / "Dockerfile",
    ROOT / "docker-compose.yml",
    PLACE / "ha.yml",
    PLACE / "cluster.Dockerfile",
)


def files() -> dict[Path, str]:
    """What each file should hold."""
    written = {PLACE / name: make() for name, make in WRITTEN.items()}
    return written | {path: pinned(path) for path in PINNED}


def main() -> int:
    wanted = files()
    stale = [p for p, text in wanted.items() if not p.exists() or p.read_text() != text]
    for path in stale:
        if "--check" not in sys.argv:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted[path])
        word = "stale" if "--check" in sys.argv else "written"
        print(f"{word}: {path.relative_to(ROOT)}")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
