"""The main verbs of the command line, as processes: what they print where, and how they end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.cli_support import Shell, read_until


@pytest.fixture
def llmo(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_version_and_help_load_nothing_heavy() -> None:
    code = (
        "import sys, json; from llm_orchestrator.cli.main import main; main(['--version']);"
        "main(['--help']); print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout.splitlines()[-1])
    heavy = {"typer", "rich", "pydantic", "aiohttp", "sqlite3", "asyncio", "ruamel", "logging"}
    assert not heavy & {name.split(".")[0] for name in loaded}


def test_run_prints_the_result_on_stdout_and_everything_else_on_stderr(llmo: Shell) -> None:
    done = llmo("run", "hello.yaml", "--input", "who=you")
    assert (done.code, done.json) == (0, {"text": "echo: Hello you"})
    assert "step greet finished" in done.err
    assert "tokens" in done.err
    quiet = llmo("--quiet", "run", "hello.yaml", "-i", "-", stdin='{"who": "me"}')
    assert (quiet.json, quiet.err) == ({"text": "echo: Hello me"}, "")


def test_streamed_chunks_go_to_stdout_only_as_text(llmo: Shell) -> None:
    text = llmo("run", "hello.yaml", "--stream", "-o", "text")
    assert text.out == "echo: Hello world\n"
    both = llmo("run", "hello.yaml", "--stream")
    assert both.json == {"text": "echo: Hello world"}
    assert "echo: Hello world" in both.err


def test_a_python_workflow_runs_by_file_and_by_module(llmo: Shell) -> None:
    assert llmo("run", "code.py:total", "-i", '{"a": 1, "b": 2}').json == 4
    assert llmo("run", "code:total", "-i", '{"a": 2, "b": 2}').json == 5
    missing = llmo("run", "code.py:total", "-i", '{"a": 1}')
    assert missing.code == 2
    assert "'b'" in missing.err


def test_the_same_key_is_the_same_run_and_another_input_is_refused(llmo: Shell) -> None:
    words = ("run", "hello.yaml", "--idempotency-key", "k")
    assert llmo(*words).code == 0
    assert llmo(*words).json == {"text": "echo: Hello world"}
    assert len(llmo("runs", "list", "-o", "ids").out.split()) == 1
    other = llmo(*words, "--input", "who=other")
    assert other.code == 1
    assert "was used with another input" in other.err


def test_a_dry_run_accepts_nothing(llmo: Shell) -> None:
    done = llmo("run", "hello.yaml", "--dry-run")
    assert done.json["input"] == {"who": "world"}
    assert not llmo.store.exists()


def test_list_filters_pages_and_formats(llmo: Shell) -> None:
    for word in ("a", "b", "c"):
        llmo("run", "hello.yaml", "--label", f"team={word}", "--quiet")
    ids = llmo("runs", "-o", "ids").out.split()
    assert len(ids) == 3
    assert llmo("runs", "list", "--label", "team=b", "-o", "ids").out.split() == [ids[1]]
    assert llmo("runs", "list", "--before", ids[1], "-o", "ids").out.split() == [ids[2]]
    assert llmo("runs", "list", "--limit", "1", "-o", "ids").out.split() == [ids[0]]
    assert [row["run_id"] for row in llmo("runs", "list", "-o", "json").json] == ids
    assert llmo("runs", "list", "--state", "failed", "-o", "json").json == []
    table = llmo("runs", "list").out
    assert all(run_id in table for run_id in ids)


def test_show_result_journal_and_explain_tell_of_one_run(llmo: Shell) -> None:
    llmo("run", "hello.yaml")
    [run_id] = llmo("runs", "-o", "ids").out.split()
    shown = llmo("runs", "show", run_id, "-o", "json").json
    assert (shown["state"], shown["output"]) == ("completed", {"text": "echo: Hello world"})
    [step] = shown["steps"]
    assert (step["step"], step["state"], step["attempts"]) == ("greet", "completed", 1)
    assert step["output_tokens"] > 0
    assert llmo("runs", "result", run_id).json == {"text": "echo: Hello world"}
    assert llmo("runs", "result", run_id, "-o", "text").out == "echo: Hello world\n"
    kinds = [row["kind"] for row in llmo("runs", "journal", run_id, "-o", "json").json]
    assert kinds == ["accepted", "claimed", "intent", "step_finished", "state"]
    lines = llmo("runs", "journal", run_id, "--payload", "-o", "jsonl").out.splitlines()
    assert json.loads(lines[0])["payload"]["input"] == {"who": "world"}
    assert f"llmo runs result {run_id}" in llmo("runs", "explain", run_id).out


def test_a_failed_run_ends_with_9_and_retry_goes_on_from_the_step_that_failed(
    llmo: Shell, tmp_path: Path
) -> None:
    answer = tmp_path / "answer.txt"
    words = ("run", "code.py:reads", "--input", f"path={answer}", "--idempotency-key", "k")
    failed = llmo(*words)
    assert failed.code == 9
    assert "No such file" in failed.err
    [run_id] = llmo("runs", "-o", "ids").out.split()
    assert llmo("runs", "result", run_id).code == 9
    assert f"llmo runs retry {run_id}" in llmo("runs", "explain", run_id).out
    answer.write_text("here")
    assert llmo("runs", "retry", run_id, "--dry-run").code == 0
    assert llmo("runs", "explain", run_id, "-o", "json").json["state"] == "failed"
    assert llmo("runs", "retry", run_id).code == 0
    assert llmo(*words).json == "here"
    steps = llmo("runs", "show", run_id, "-o", "json").json["steps"]
    assert (steps[0]["step"], steps[0]["attempts"]) == ("add", 1)


def test_detach_prints_the_id_and_serve_executes_it(llmo: Shell) -> None:
    done = llmo("run", "hello.yaml", "--detach")
    run_id = done.out.strip()
    assert "llmo serve" in done.err
    assert "none serves the store" in llmo("runs", "explain", run_id).out
    with llmo.serving():
        assert llmo("runs", "watch", run_id).code == 0
    assert llmo("runs", "result", run_id).json == {"text": "echo: Hello world"}


def test_run_beside_a_serving_engine_submits_and_follows(llmo: Shell) -> None:
    with llmo.serving("--import", "code.py"):
        done = llmo("run", "hello.yaml")
        assert (done.code, done.json) == (0, {"text": "echo: Hello world"})
        assert "the engine that serves the store executes it" in done.err
        assert llmo("run", "code.py:total", "-i", '{"a": 1, "b": 1}').json == 3
        assert llmo("run", "total", "-i", '{"a": 1, "b": 2}').json == 4
        second = llmo("serve", "--port", "0")
        assert (second.code, "another engine" in second.err) == (11, True)


def test_approvals_and_signals_move_a_run_and_watch_tells_how_it_ended(llmo: Shell) -> None:
    with llmo.serving("--import", "code.py"):
        gate = llmo("run", "gate.yaml", "--detach").out.strip()
        watching = llmo.start("runs", "watch", gate)
        assert watching.stdout is not None
        while "approval" not in watching.stdout.readline():
            pass
        assert f"llmo runs approve {gate} review" in llmo("runs", "explain", gate).out
        assert llmo("runs", "approve", gate, "--by", "ada").code == 0
        watching.communicate(timeout=30)
        assert watching.returncode == 0
        assert llmo("runs", "result", gate).json == {"approved": True}

        waiting = llmo("run", "code.py:signalled", "--detach").out.strip()
        assert llmo("runs", "signal", waiting, "go", '"now"').code == 0
        assert llmo("runs", "watch", waiting, "-o", "jsonl").code == 0
        assert llmo("runs", "result", waiting).json == "now"


def test_pause_resume_and_cancel_several_ids_from_stdin(llmo: Shell) -> None:
    with llmo.serving("--import", "code.py"):
        ids = [llmo("run", "code.py:signalled", "--detach").out.strip() for _ in range(2)]
        paused = llmo("runs", "pause", "-", stdin="\n".join(ids))
        assert paused.code == 0
        assert llmo("runs", "watch", ids[0]).code == 3
        assert llmo("runs", "resume", ids[0]).code == 0
        some = llmo("runs", "cancel", ids[0], "01920000-0000-7000-8000-000000000000")
        assert (some.code, "there is no run" in some.err) == (3, True)
        assert llmo("runs", "watch", ids[0]).code == 9
        none = llmo("runs", "cancel", ids[0])
        assert (none.code, "takes no cancel" in none.err) == (1, True)


def test_fork_and_rewind_start_again_from_what_stands(llmo: Shell) -> None:
    llmo("run", "hello.yaml")
    [run_id] = llmo("runs", "-o", "ids").out.split()
    fork = llmo("runs", "fork", run_id, "--step", "greet", "--input", "who=fork").out.strip()
    [step] = llmo("runs", "show", run_id, "-o", "json").json["steps"]
    assert llmo("runs", "rewind", f"{run_id}:{step['seq']}", "--dry-run").code == 0
    assert llmo("runs", "rewind", f"{run_id}:{step['seq']}").code == 0
    assert llmo("runs", "restore", f"{run_id}:99").code == 4
    with llmo.serving():
        assert llmo("runs", "watch", fork).code == 0
        assert llmo("runs", "watch", run_id).code == 0
    assert llmo("runs", "result", fork).json == {"text": "echo: Hello fork"}
    assert llmo("runs", "result", run_id).json == {"text": "echo: Hello world"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_releases_the_run_and_the_next_engine_goes_on(
    llmo: Shell, number: signal.Signals, code: int
) -> None:
    process = llmo.start("run", "gate.yaml")
    read_until(process, "waits for approval")
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert "goes on with the next engine" in said
    [run_id] = llmo("runs", "-o", "ids").out.split()
    with llmo.serving() as engine:
        assert llmo("runs", "approve", run_id).code == 0
        assert llmo("runs", "watch", run_id).code == 0
        engine.send_signal(number)
        engine.communicate(timeout=30)
        assert engine.returncode == 0


def test_waiting_ends_with_124_and_loses_nothing(llmo: Shell) -> None:
    done = llmo("run", "gate.yaml", "--timeout", "0.5")
    assert done.code == 124
    [run_id] = llmo("runs", "-o", "ids").out.split()
    assert llmo("runs", "watch", run_id, "--timeout", "0.3").code == 124
    assert llmo("runs", "explain", run_id, "-o", "json").json["state"] in ("waiting", "pending")
    assert llmo("runs", "result", run_id).code == 1


def test_workflows_are_registered_shown_and_compared(llmo: Shell, tmp_path: Path) -> None:
    assert llmo("workflows", "register", "hello.yaml", "--dry-run").code == 0
    assert not llmo.store.exists()
    assert llmo("workflows", "register", "hello.yaml", "code.py:total").code == 0
    names = [row["name"] for row in llmo("workflows", "-o", "json").json]
    assert names == ["hello", "total"]
    assert "Hello {{ inputs.who }}" in llmo("workflows", "show", "hello").out
    changed = tmp_path / "changed.yaml"
    changed.write_text((tmp_path / "hello.yaml").read_text().replace("Hello", "Bye"))
    differ = llmo("workflows", "diff", "hello", "changed.yaml", "--exit-code")
    assert differ.code == 1
    assert "+    prompt: Bye" in differ.out.replace("  prompt", "    prompt")
    assert llmo("workflows", "diff", "hello@1.0", "hello.yaml", "--exit-code").code == 0
    again = llmo("workflows", "register", "changed.yaml")
    assert "raise its version" in again.err
    assert llmo("run", "hello", "--input", "who=name").json == {"text": "echo: Bye name"}


def test_settings_say_where_they_come_from_and_hide_secrets(llmo: Shell, tmp_path: Path) -> None:
    (tmp_path / "llm-orchestrator.toml").write_text(
        'region = "eu"\n[providers.mine]\nbase_url = "http://u:pw@h/v1"\napi_key = "sk-1"\n'
    )
    done = llmo("config", "show", "--origin", "-o", "json", "--store", "sqlite:///x.db")
    rows = {row["name"]: row for row in done.json}
    assert rows["store"] == {"name": "store", "value": "sqlite:///x.db", "origin": "flag"}
    assert rows["region"]["origin"] == "llm-orchestrator.toml"
    assert rows["data_dir"]["origin"] == "LLM_ORCHESTRATOR_DATA"
    assert "sk-1" not in done.out
    assert "pw" not in done.out


def test_doctor_tells_which_keys_are_there_and_never_one(llmo: Shell) -> None:
    llmo("run", "hello.yaml")
    done = llmo("doctor", "-o", "json", environment={"OPENAI_API_KEY": "sk-very-secret"})
    checks = {row["check"]: row for row in done.json}
    assert done.code == 0
    assert "OPENAI_API_KEY yes, ANTHROPIC_API_KEY no" in checks["provider keys"]["finding"]
    assert "secret" not in done.out + done.err
    assert checks["store"]["state"] == checks["integrity"]["state"] == "ok"
    with llmo.serving():
        assert "served by" in llmo("doctor").out


def test_the_schema_and_the_completions_are_printed(llmo: Shell) -> None:
    assert llmo("schema").json["$schema"].startswith("https://json-schema.org/")
    for shell in ("bash", "zsh", "fish"):
        assert "watch" in llmo("completions", shell).out
    script = llmo("completions", "bash").out
    checked = subprocess.run(
        ["bash", "-n"], input=script, text=True, capture_output=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


def test_bash_completes_verbs_options_and_run_ids(llmo: Shell) -> None:
    llmo("run", "hello.yaml")
    run_id = llmo("runs", "-o", "ids").out.strip()
    probe = """
llmo() { "$PYTHON" -m llm_orchestrator "$@"; }
complete_for() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _llmo; echo "${COMPREPLY[*]}"; }
complete_for llmo wor
complete_for llmo runs wat
complete_for llmo runs list --sta
complete_for llmo runs show ''
complete_for llmo run hel
"""
    done = subprocess.run(
        ["bash", "-c", llmo("completions", "bash").out + probe],
        cwd=llmo.folder,
        env={**llmo.environment, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["workflows", "watch", "--state", run_id, "hello.yaml"]


@pytest.mark.parametrize("word", ["--help", "schema"])
def test_a_reader_that_leaves_early_is_no_failure(llmo: Shell, word: str) -> None:
    with llmo.start(word) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=30) == 0
