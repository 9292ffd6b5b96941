"""Write the files of deploy/compose that say how the cluster is tuned, from the lab's own settings.

Usage: .venv/bin/python scripts/deploy.py [--check]

One source for both: src/llm_orchestrator/drill/lab/cluster.toml. What the drills exercise is what
is shipped; tests/test_deploy.py fails when a file differs.
"""

import json
import sys
from pathlib import Path
from typing import Any

from llm_orchestrator.drill.lab.spec import settings

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "deploy" / "compose"
MEMBERS = ("postgres1", "postgres2", "postgres3")
ARBITERS = ("etcd1", "etcd2", "etcd3")
ORCHESTRATORS = ("orchestrator", "orchestrator2")


def patroni() -> str:
    """Patroni's configuration of any member; @NAME@ and @PASSWORD@ are put in at its start."""
    ports, proof = settings()["ports"], "scram-sha-256"
    users = {"superuser": "postgres", "replication": "replicator", "rewind": "rewinder"}
    config: dict[str, Any] = {
        "scope": "orchestrator",
        "name": "@NAME@",
        "restapi": {
            "listen": f"0.0.0.0:{ports['patroni']}",
            "connect_address": f"@NAME@:{ports['patroni']}",
        },
        "etcd3": {"hosts": [f"{name}:{ports['etcd']}" for name in ARBITERS]},
        "bootstrap": {
            "dcs": settings()["patroni"],
            "initdb": [{"encoding": "UTF8"}, {"locale": "C.UTF-8"}, "data-checksums"],
        },
        "postgresql": {
            "listen": f"0.0.0.0:{ports['postgres']}",
            "connect_address": f"@NAME@:{ports['postgres']}",
            "data_dir": "/cluster/data",
            "pgpass": "/tmp/pgpass",
            "authentication": {
                kind: {"username": name, "password": "@PASSWORD@"} for kind, name in users.items()
            },
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
    ports = settings()["ports"]
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
  timeout connect 2s
  timeout client 1h
  timeout server 1h
  timeout check 2s

resolvers docker
  nameserver dns 127.0.0.11:53
  hold valid 2s

listen primary
  bind *:{ports["postgres"]}
  option httpchk GET /primary
  http-check expect status 200
  default-server inter 1s fall 2 rise 1 on-marked-down shutdown-sessions
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


FILES = {
    "patroni.json": patroni,
    "haproxy.cfg": haproxy,
    "etcd.env": etcd,
    "prometheus.json": prometheus,
}


def main() -> int:
    stale = [
        n
        for n, make in FILES.items()
        if not (PLACE / n).exists() or (PLACE / n).read_text() != make()
    ]
    if "--check" in sys.argv:
        for name in stale:
            print(f"stale: deploy/compose/{name}")
        return 1 if stale else 0
    for name in stale:
        (PLACE / name).write_text(FILES[name]())
        print(f"written: deploy/compose/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
