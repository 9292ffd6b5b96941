"""What is shipped for running it: held to our own commands and settings, and to the real Compose.

No container is started here; `llmo lab up` starts the same topology from the same settings.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
from ruamel.yaml import YAML

from llm_orchestrator.cli.main import VERBS, command_of
from llm_orchestrator.drill.lab.spec import settings

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
COMPOSE = (ROOT / "docker-compose.yml", DEPLOY / "compose" / "ha.yml")
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
KUBERNETES = "1.31"
KUSTOMIZE = DEPLOY / "kubernetes"
SECRETS = {"POSTGRES_PASSWORD": "p", "CLUSTER_PASSWORD": "c", "LLM_ORCHESTRATOR_TOKEN": "t"}


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_command(words: list[str]) -> None:
    """Our own command line takes it."""
    assert words[0].rpartition("/")[2] == "llmo"
    assert words[1] in VERBS
    command, rest = command_of(words[1]), words[2:]
    while rest and not rest[0].startswith("-") and hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    assert [word for word in rest if word.startswith("-") and word not in known] == []


def known_variables() -> set[str]:
    page = (ROOT / "docs" / "reference" / "settings.md").read_text()
    source = (ROOT / "src" / "llm_orchestrator" / "config.py").read_text()
    return set(re.findall(r"`([A-Z][A-Z0-9_]+)`", page)) | set(re.findall(r'"([A-Z_]+)"', source))


# --- compose ---


def compose(file: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "docker-compose"
    assert program.exists(), "make setup"
    return subprocess.run(
        [str(program), "-f", str(file), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PATH": os.defpath, "HOME": str(file.parent), **environment},
    )


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
    services = YAML(typ="safe").load(COMPOSE[0].read_text())["services"]
    assert set(services) == {"orchestrator", "postgres"}
    assert all(service["restart"] == "unless-stopped" for service in services.values())
    assert "healthcheck" in services["postgres"]


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: file.name)
def test_a_node_is_told_nothing_that_it_does_not_know(file: Path) -> None:
    found = compose(file, "config", "--format", "json", **SECRETS)
    services = json.loads(found.stdout)["services"]
    told = {
        name
        for service in services.values()
        if service.get("image") == "llm-orchestrator"
        for name in service["environment"]
    }
    assert told
    assert told - known_variables() - {"OPENAI_API_KEY", "ANTHROPIC_API_KEY"} == set()


def test_the_cluster_has_everything_that_was_promised() -> None:
    found = compose(COMPOSE[1], "config", "--format", "json", **SECRETS)
    services = set(json.loads(found.stdout)["services"])
    assert services >= {"etcd1", "etcd2", "etcd3", "postgres1", "postgres2", "postgres3", "haproxy"}
    assert services >= {"orchestrator", "orchestrator2", "barman", "objects"}
    assert services >= {"prometheus", "alertmanager", "grafana"}


def test_what_is_shipped_is_tuned_as_what_is_drilled() -> None:
    deploy = script("deploy")
    for name, make in deploy.FILES.items():
        assert (deploy.PLACE / name).read_text() == make(), "scripts/deploy.py"
    patroni = json.loads((deploy.PLACE / "patroni.json").read_text())
    assert patroni["bootstrap"]["dcs"] == settings()["patroni"]


def test_every_file_that_a_service_is_given_is_there() -> None:
    for file in COMPOSE:
        found = json.loads(compose(file, "config", "--format", "json", **SECRETS).stdout)
        sources = [
            Path(volume["source"])
            for service in found["services"].values()
            for volume in service.get("volumes", ())
            if volume["type"] == "bind"
        ]
        assert [str(path) for path in sources if not path.exists()] == []


def test_the_image_starts_what_there_is() -> None:
    text = (ROOT / "Dockerfile").read_text()
    (words,) = re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)
    check_command(json.loads(words))
    assert "/health/live" in text
    assert "USER 10001" in text
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


def test_systemd_itself_takes_the_units(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not on this machine")
    for unit in (DEPLOY / "systemd").iterdir():
        text = unit.read_text().replace("/opt/llm-orchestrator/bin/llmo", "/bin/true")
        (tmp_path / unit.name).write_text(text)
    done = subprocess.run(
        [program, "verify", "--man=no", *map(str, tmp_path.iterdir())],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    wrong = [line for line in done.stderr.splitlines() if str(tmp_path) in line]
    assert wrong == []


# --- Kubernetes ---


def manifests() -> list[dict[str, Any]]:
    names = YAML(typ="safe").load((KUSTOMIZE / "kustomization.yaml").read_text())["resources"]
    return [
        dict(found)
        for name in names
        for found in YAML(typ="safe").load_all((KUSTOMIZE / name).read_text())
    ]


def test_the_base_is_whole() -> None:
    names = YAML(typ="safe").load((KUSTOMIZE / "kustomization.yaml").read_text())["resources"]
    there = {path.name for path in KUSTOMIZE.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(names) == there
    kinds = [(each["kind"], each["metadata"]["name"]) for each in manifests()]
    assert len(kinds) == len(set(kinds))


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
