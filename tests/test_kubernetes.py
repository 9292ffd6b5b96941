"""The manifests say what the command line takes, and hold to what a cluster expects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from llm_orchestrator.cli.main import command_of
from llm_orchestrator.language.schedule import check_cron

FILE = Path(__file__).resolve().parents[1] / "deploy/kubernetes/backup-cronjob.yaml"
JOBS = [dict(job) for job in YAML(typ="safe").load_all(FILE.read_text())]


def container(job: Any) -> Any:
    [found] = pod(job)["containers"]
    return found


def pod(job: Any) -> Any:
    return job["spec"]["jobTemplate"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job["metadata"]["name"])
def test_a_job_calls_what_there_is_and_has_what_it_needs(job: Any) -> None:
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "CronJob")
    assert check_cron(job["spec"]["schedule"]) is None
    assert job["spec"]["concurrencyPolicy"] == "Forbid"
    program, verb, name, *words = container(job)["command"]
    assert (program, verb) == ("llmo", "backup")
    known = [option for item in command_of(verb).commands[name].params for option in item.opts]
    assert [word for word in words if word.startswith("--") and word not in known] == []
    mounted = {mount["name"]: mount["mountPath"] for mount in container(job)["volumeMounts"]}
    assert set(mounted) == {volume["name"] for volume in pod(job)["volumes"]}
    assert words[words.index("--dir") + 1] == mounted["backups"]
    assert container(job)["securityContext"]["readOnlyRootFilesystem"]
    data = {one["name"]: one.get("value", "") for one in container(job)["env"]}
    assert data["LLM_ORCHESTRATOR_DATA"].startswith(mounted["scratch"])


def test_one_makes_them_each_hour_and_one_proves() -> None:
    assert [container(job)["command"][2] for job in JOBS] == ["create", "prove"]
    assert JOBS[0]["spec"]["schedule"] == "0 * * * *"
