"""What is shipped holds values that make sense where they are read: durations, sizes, settings.

Names and options are test_deploy.py's matter. Here each value goes to whoever takes it apart: our
own configuration and command line, systemd, and for Kubernetes its own notation.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llm_orchestrator.config import Config, load_config
from llm_orchestrator.errors import ConfigError
from llm_orchestrator.language.schedule import check_cron
from llm_orchestrator.store.postgres_address import parse_address
from llm_orchestrator.telemetry.redact import redact
from tests.deploying import (
    CLUSTER,
    DEPLOY,
    KUSTOMIZE,
    ROOT,
    SMALL,
    UNITS,
    check_command,
    manifests,
    of_ours,
    pods,
)

DRAIN_S = Config().drain_timeout_s
ROOM_S = 5.0
"""What an end takes besides the drain."""
SIZES = {"Mi": 1 << 20, "Gi": 1 << 30}
IN_A_POD = {"LLM_ORCHESTRATOR_URL": "postgresql://a:b@c:5432/d"}


def configuration(environment: Mapping[str, str], file: Path | None = None) -> Config:
    """What our own code makes of an environment. Raises ConfigError."""
    return load_config({}, environ=environment, file=file)


def nodes() -> list[tuple[str, Mapping[str, str], Path | None]]:
    """Every node that is shipped: its name, its environment, its settings file."""
    found: list[tuple[str, Mapping[str, str], Path | None]] = []
    for file in (SMALL, CLUSTER):
        for service in of_ours(file):
            told = service["environment"]
            named = "LLM_ORCHESTRATOR_CONFIG" in told
            own = CLUSTER.parent / "llm-orchestrator.toml" if named else None
            found.append((f"{file.name}:{service.get('hostname', len(found))}", told, own))
    data = next(each["data"] for each in manifests() if each["kind"] == "ConfigMap")
    return [*found, ("kubernetes", data | IN_A_POD, None)]


# --- our own settings and commands ---


@pytest.mark.parametrize("node", nodes(), ids=lambda node: node[0])
def test_our_configuration_takes_what_a_node_is_told(
    node: tuple[str, Mapping[str, str], Path | None],
) -> None:
    _, told, file = node
    config = configuration(told, file)
    assert len(parse_address(config.store_url).hosts) in (1, 3)
    assert config.pool_size == 10
    with pytest.raises(ConfigError):
        configuration({**told, "DB_POOL_SIZE": "many"}, file)


def test_the_password_beside_the_url_is_in_no_text() -> None:
    configuration({"PGPASSWORD": "kept-beside-the-url-7"})
    assert redact("FATAL: kept-beside-the-url-7") == "FATAL: ***"


def test_the_cluster_s_nodes_back_up_into_its_object_store() -> None:
    told = next(of_ours(CLUSTER))["environment"]
    config = configuration(told, CLUSTER.parent / "llm-orchestrator.toml")
    assert check_cron(config.backup_schedule) is None
    assert config.backup_place.startswith("s3://backups/")
    for reference in (config.s3_access_key, config.s3_secret_key):
        assert reference.removeprefix("env:") in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serve", "--port", "http"], "valid integer"),
        (["serve", "--prot", "1"], "(?i)no such option"),
        (["backup", "prove", "a", "b"], "unexpected extra argument"),
    ],
)
def test_what_no_command_takes_is_noticed(words: list[str], said: str) -> None:
    check_command(["llmo", "serve", "--port", "8080"])
    with pytest.raises(Exception, match=said):
        check_command(["llmo", *words])


def test_the_pods_commands_are_taken_with_their_values() -> None:
    words = [
        box["command"] for each in manifests() for pod in pods(each) for box in pod["containers"]
    ]
    assert len(words) == 3
    for command in words:
        check_command([str(word) for word in command])


# --- how long an end may take ---


def go_duration_s(text: str) -> float:
    """As Compose writes one: 1m0s."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0}
    parts = re.findall(r"([\d.]+)(h|ms|m|s)", text)
    assert "".join(number + unit for number, unit in parts) == text
    return sum(float(number) * units.get(unit, 0.001) for number, unit in parts)


def test_a_node_gets_the_time_to_drain() -> None:
    given = [
        go_duration_s(each["stop_grace_period"]) for f in (SMALL, CLUSTER) for each in of_ours(f)
    ]
    given += [
        float(pod["terminationGracePeriodSeconds"])
        for each in manifests()
        if each["kind"] == "StatefulSet"
        for pod in pods(each)
    ]
    given.append(span_s(setting("llm-orchestrator.service", "TimeoutStopSec")))
    assert len(given) == 5
    assert min(given) >= DRAIN_S + ROOM_S


# --- systemd ---


def setting(unit: str, name: str) -> str:
    text = (DEPLOY / "systemd" / unit).read_text()
    (value,) = re.findall(rf"^{name}=(.*)$", text, re.MULTILINE)
    return str(value)


def span_s(text: str) -> float:
    """A time span of systemd's, of those units that we use."""
    found = re.fullmatch(r"(\d+)(ms|s|min)", text)
    assert found is not None, text
    return int(found[1]) * {"ms": 0.001, "s": 1.0, "min": 60.0}[found[2]]


def ask_systemd(verb: str, value: str) -> int:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not on this machine")
    done = subprocess.run([program, verb, value], capture_output=True, check=False, timeout=30)
    return done.returncode


def test_systemd_itself_takes_each_time() -> None:
    for timer in (DEPLOY / "systemd").glob("*.timer"):
        assert ask_systemd("calendar", setting(timer.name, "OnCalendar")) == 0
        assert ask_systemd("timespan", setting(timer.name, "RandomizedDelaySec")) == 0
    for name in ("RestartSec", "WatchdogSec", "TimeoutStartSec", "TimeoutStopSec"):
        assert ask_systemd("timespan", setting("llm-orchestrator.service", name)) == 0
    assert ask_systemd("calendar", "Sun 25:30") != 0


def test_a_unit_s_environment_is_one_that_we_take() -> None:
    for unit in UNITS:
        name, _, value = setting(unit.name, "Environment").partition("=")
        assert configuration({name: value}).data_dir == Path("/var/lib/llm-orchestrator")


# --- Kubernetes ---


def size(text: str) -> int:
    found = re.fullmatch(r"(\d+)(Mi|Gi)", text)
    assert found is not None, text
    return int(found[1]) * SIZES[found[2]]


def test_no_pod_asks_for_more_than_it_may_have() -> None:
    for manifest in manifests():
        for pod in pods(manifest):
            for box in pod["containers"]:
                asked, bound = box["resources"]["requests"], box["resources"]["limits"]
                assert size(asked["memory"]) <= size(bound["memory"])
                assert re.fullmatch(r"\d+m|\d+", asked["cpu"])


def probe_s(probe: Mapping[str, Any]) -> float:
    """For how long it may fail before something is done."""
    return float(probe["periodSeconds"] * probe["failureThreshold"])


def test_probes_are_patient_where_a_restart_would_cost_and_quick_where_it_does_not() -> None:
    (spec,) = (pods(each)[0] for each in manifests() if each["kind"] == "StatefulSet")
    (box,) = spec["containers"]
    assert probe_s(box["startupProbe"]) >= 30
    assert probe_s(box["readinessProbe"]) <= 5 < probe_s(box["livenessProbe"])
    for name in ("livenessProbe", "readinessProbe"):
        assert box[name]["timeoutSeconds"] <= box[name]["periodSeconds"] * 2


def test_a_schedule_is_one() -> None:
    lines = [each["spec"]["schedule"] for each in manifests() if each["kind"] == "CronJob"]
    assert len(lines) == 2
    assert [check_cron(line) for line in lines] == [None, None]
    assert all("jobTemplate" in each["spec"] for each in manifests() if each["kind"] == "CronJob")
    assert (KUSTOMIZE / "kustomization.yaml").exists()


# --- the image ---


def test_what_the_image_is_built_of_makes_a_package_that_starts(tmp_path: Path) -> None:
    """The build stage's own command, on nothing but what it has copied."""
    text = (ROOT / "Dockerfile").read_text()
    for sources, target in re.findall(r"^COPY (?!--from)(.+) (\S+)$", text, re.MULTILINE):
        for name in sources.split():
            place = tmp_path / target / (name if target == "./" else Path(name).name)
            if (ROOT / name).is_dir():
                place = tmp_path / target
                shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, place)
    (command,) = re.findall(r"^RUN (hatchling build .*?) &&", text, re.MULTILINE)
    words = [sys.executable, "-m", *command.split()]
    built = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (start,) = re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)
    verb = json.loads(start)[1]
    said = subprocess.run(
        [sys.executable, "-m", "llm_orchestrator", verb, "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path)},
    )
    assert said.returncode == 0, said.stderr


def test_the_image_holds_what_the_deployments_use() -> None:
    """An object store for backups, sealing, spans: what an extra would bring."""
    pinned = (ROOT / "requirements" / "image.txt").read_text()
    tested = (ROOT / "requirements" / "dev.txt").read_text()
    for name in ("boto3", "pyrage", "cryptography", "opentelemetry-sdk"):
        (line,) = re.findall(rf"^{name}==\S+", pinned, re.MULTILINE)
        assert line in tested
