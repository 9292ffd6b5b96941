"""What deploy/ ships, read for its tests: by the real Compose, by our own command line, by YAML."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from llm_orchestrator.cli.main import VERBS, command_of

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
SMALL, CLUSTER = ROOT / "docker-compose.yml", DEPLOY / "compose" / "ha.yml"
KUSTOMIZE = DEPLOY / "kubernetes"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
SECRETS = {"POSTGRES_PASSWORD": "p", "CLUSTER_PASSWORD": "c", "LLM_ORCHESTRATOR_TOKEN": "t"}
AWKWARD = """a/b@c&d'e"f$g\\h i:j%k#l?m|n`o${p}!q"""
"""A password that breaks whatever pastes it into a URL, a shell's words, sed, SQL or JSON."""


def script(name: str) -> Any:
    """A module of scripts/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_command(words: Sequence[str]) -> None:
    """Our own command line takes it: the verb, its options and their values, its arguments."""
    assert words[0].rpartition("/")[2] == "llmo"
    assert words[1] in VERBS
    command, rest = command_of(words[1]), list(words[2:])
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        command = command.commands[rest.pop(0)]
    command.make_context(words[1], rest)


def known_variables() -> set[str]:
    """Every variable of the environment that the settings know."""
    page = (ROOT / "docs" / "reference" / "settings.md").read_text()
    source = (ROOT / "src" / "llm_orchestrator" / "config.py").read_text()
    return set(re.findall(r"`([A-Z][A-Z0-9_]+)`", page)) | set(re.findall(r'"([A-Z_]+)"', source))


def compose(file: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real Compose, told of nothing but `environment`."""
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


@cache
def services(file: Path, password: str = "secret") -> dict[str, Any]:
    """What Compose makes of a file. Its answer writes a dollar as two; here it is one again."""
    names = {"POSTGRES_PASSWORD": password, "CLUSTER_PASSWORD": password}
    done = compose(file, "config", "--format", "json", LLM_ORCHESTRATOR_TOKEN="t", **names)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.replace("$$", "$"))["services"]
    return found


def of_ours(file: Path) -> Iterator[dict[str, Any]]:
    """The services that run our image."""
    yield from (each for each in services(file).values() if each["image"] == "llm-orchestrator")


def manifests() -> list[dict[str, Any]]:
    """Every object of the kustomize base."""
    names = YAML(typ="safe").load((KUSTOMIZE / "kustomization.yaml").read_text())["resources"]
    return [
        dict(found)
        for name in names
        for found in YAML(typ="safe").load_all((KUSTOMIZE / name).read_text())
    ]


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods that an object starts, as their specs."""
    spec = manifest.get("spec", {})
    if "jobTemplate" in spec:
        spec = spec["jobTemplate"]["spec"]
    return [spec["template"]["spec"]] if "template" in spec else []
