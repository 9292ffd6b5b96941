"""`llmo doctor`: what this machine, the store and the configuration are like, and what to mend.

Reads only. Each check is a function of its own and says ok, warning or error, with the command that
mends it. The exit code is 1 only when there is an error. It tells which keys are there, never one.
"""

from __future__ import annotations

import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_orchestrator.cli.backup_findings import place_findings, record_findings
from llm_orchestrator.cli.backup_given import backups_of
from llm_orchestrator.cli.doctor_postgres import Finding, check_nodes, server_findings
from llm_orchestrator.cli.options import ObjectFormat, make_app
from llm_orchestrator.cli.output import count, print_object, print_table
from llm_orchestrator.cli.session import Session, session_of
from llm_orchestrator.errors import OrchestratorError, StoreAbsent, StoreError
from llm_orchestrator.model import Json, RunState

if TYPE_CHECKING:
    from llm_orchestrator.store.base import Database

app = make_app("Check this machine, the store and the providers' keys.")
COLUMNS = ("check", "state", "finding", "hint")
PYTHON_MIN = (3, 11)
WAL_RESET_FIXED = (3, 51, 3)
DISK_WARNING, DISK_ERROR = 1 << 30, 64 << 20
CHECKED_RUNS_MAX = 200
NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "lustre"})
KEYS = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "COHERE_API_KEY", "PINECONE_API_KEY")


@app.command()
def doctor(
    context: typer.Context,
    *,
    output: Annotated[
        ObjectFormat, typer.Option("--output", "-o", help="How to print.")
    ] = ObjectFormat.TABLE,
    is_production: Annotated[
        bool, typer.Option("--production", help="Check docs/production_readiness.md item by item.")
    ] = False,
    prometheus: Annotated[
        str, typer.Option(metavar="URL", help="With --production: whose alert rules to look at.")
    ] = "",
    objectives: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --production: dr-objectives.yaml."),
    ] = None,
) -> int:
    """Check everything that a run stands on; exit code 1 when something is broken."""
    session = session_of(context)
    if is_production:
        from llm_orchestrator.cli.doctor_production import findings as look

        wanted = look(
            session,
            prometheus=prometheus,
            objectives=objectives,
            kind_of=lambda path: file_system(path, _mounts())[0],
            integrity=_integrity,
        )
        findings = session.run(wanted)
    else:
        findings = [_python(), _sqlite(library()), *_configured(session)]
    rows: list[dict[str, Json]] = [finding._asdict() for finding in findings]
    if output is ObjectFormat.TABLE:
        print_table(rows, COLUMNS)
    else:
        print_object(rows, output)
    if is_production:
        session.note(_summary(findings))
    return 1 if any(finding.state in ("error", "not ok") for finding in findings) else 0


def _summary(findings: list[Finding]) -> str:
    """It certifies nothing that was not checked."""
    states = [finding.state for finding in findings]
    parts = [f"{states.count(state)} {state}" for state in ("ok", "not ok", "not checked")]
    return ", ".join(parts) + "; what is not checked is not vouched for"


def library() -> str:
    """The version of the SQLite library."""
    from llm_orchestrator.store.sqlite_file import library_version

    return library_version()


def _python() -> Finding:
    found = platform.python_version()
    if sys.version_info[:2] < PYTHON_MIN:
        return Finding("python", "error", f"{found} is too old", "install Python 3.11 or later")
    return Finding("python", "ok", f"{found} on {platform.system()} {platform.machine()}")


def _sqlite(found: str) -> Finding:
    """Law 12: a reset of the write-ahead log could lose a commit before 3.51.3."""
    parts = tuple(int(part) for part in found.split("."))
    if parts < WAL_RESET_FIXED:
        return Finding(
            "sqlite",
            "warning",
            f"{found} has the WAL-reset bug (mended in 3.51.3); we stay clear of it: one process "
            "writes and checkpoints",
            "let no other program write to the store's file",
        )
    return Finding("sqlite", "ok", found)


def _configured(session: Session) -> list[Finding]:
    """Everything that needs the configuration; a wrong one is a finding as well."""
    try:
        config = session.config
        store = session.make_store()
    except OrchestratorError as error:
        return [Finding("configuration", "error", error.message, error.hint or "")]
    findings = [Finding("configuration", "ok", f"data in {config.data_dir}")]
    path = _file(config.store_url)
    if path is not None:
        findings.append(_disk(path))
        findings.append(_file_system(path, _mounts()))
    findings += session.run(_store(session, store))
    findings += session.run(place_findings(backups_of(session, {})))
    findings.append(_keys(session))
    findings.append(_local(session))
    return findings


def _existing(path: Path) -> Path:
    """The nearest folder above `path` that is there."""
    place = path.absolute().parent
    while not place.is_dir() and place != place.parent:
        place = place.parent
    return place


def _disk(path: Path) -> Finding:
    folder = _existing(path)
    free = shutil.disk_usage(folder).free
    text = f"{free / (1 << 30):.1f} GiB free under {folder}"
    if free < DISK_ERROR:
        return Finding("disk", "error", text, f"df -h '{folder}'")
    if free < DISK_WARNING:
        return Finding("disk", "warning", text, f"df -h '{folder}'")
    return Finding("disk", "ok", text)


def _mounts() -> str:
    try:
        return Path("/proc/self/mounts").read_text()
    except OSError:
        return ""


def file_system(place: Path, mounts: str) -> tuple[str, str]:
    """Kind and mount point of a folder's file system; empty where it cannot be told."""
    text, best, kind = str(place.resolve()), "", ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        mount = fields[1].replace("\\040", " ")
        is_inside = text == mount or text.startswith(mount.rstrip("/") + "/")
        if is_inside and len(mount) >= len(best):
            best, kind = mount, fields[2]
    return kind, best


def _file_system(path: Path, mounts: str) -> Finding:
    """SQLite's write-ahead log and our lock need a file system of this machine."""
    place = _existing(path).resolve()
    kind, best = file_system(place, mounts)
    if not kind:
        return Finding("file system", "ok", "unknown here; it must not be a network one")
    if kind in NETWORK or kind.startswith("fuse."):
        return Finding(
            "file system",
            "error" if kind in NETWORK else "warning",
            f"{place} is on {kind}, where locks and the write-ahead log cannot be trusted",
            "llmo --store sqlite:////LOCAL/DISK/runs.db",
        )
    return Finding("file system", "ok", f"{kind} on {best}")


async def _store(session: Session, store: Database) -> list[Finding]:
    findings: list[Finding] = []
    is_server = _file(session.config.store_url) is None
    try:
        if is_server:
            findings += await server_findings(session)
        await store.open_as_client()
        served = await store.is_served()
        who = f"served by {await _owner(session, store)}" if served else "no engine serves it"
        findings.append(Finding("store", "ok", f"{session.store_url}: {who}"))
        if is_server:
            findings.append(check_nodes(await store.shelf.nodes()))
        findings.append(await _integrity(store))
        findings += record_findings(await store.shelf.records("backup"), store.clock.now_us())
    except StoreAbsent as error:
        findings.append(Finding("store", "ok", f"{error.message} yet", error.hint or ""))
    except StoreError as error:
        findings.append(Finding("store", "error", error.message, error.hint or ""))
    finally:
        await store.close()
    return findings


def _file(url: str) -> Path | None:
    """The store's file; None when the store is no file."""
    from llm_orchestrator.wire import is_postgres, store_path

    return None if is_postgres(url) else store_path(url)


async def _owner(session: Session, store: Database) -> str:
    path = _file(session.config.store_url)
    if path is None:
        from llm_orchestrator.store.base import lives

        nodes = [node for node in await store.shelf.nodes() if lives(node) and node.is_connected]
        return ", ".join(node.node_id for node in nodes)
    from llm_orchestrator.store.sqlite_file import EngineLock

    return EngineLock(path).owner() or "an engine that is starting"


async def _integrity(store: Database) -> Finding:
    """The file's own check, and the chains of the newest runs."""
    from llm_orchestrator.store.base import RunFilter

    broken = await store.look.structure()
    newest = await store.look.runs(RunFilter(limit=CHECKED_RUNS_MAX))
    journals = await store.look.load([run.run_id for run in newest])
    damaged = [run_id for run_id, journal in journals.items() if journal.flaws]
    if broken or damaged:
        what = f"pages: {broken[0]}" if broken else f"run {damaged[0]} is damaged"
        return Finding("integrity", "error", what, "llmo journal verify --all")
    paused = sum(run.state is RunState.PAUSED for run in newest)
    text = f"pages whole; newest {count(len(newest), 'run')} whole"
    if paused:
        hint = "llmo runs list --state paused"
        return Finding("integrity", "ok", f"{text}; {paused} wait for a decision", hint)
    return Finding("integrity", "ok", text)


def _keys(session: Session) -> Finding:
    secrets = session.config.secrets
    wanted = dict.fromkeys(KEYS)
    for provider in session.config.providers.values():
        wanted |= dict.fromkeys(str(provider[key]) for key in provider if key.endswith("_env"))
    found = ", ".join(f"{name} {'yes' if secrets.get(name) else 'no'}" for name in wanted)
    hint = "" if secrets else "export OPENAI_API_KEY=...; provider echo needs none"
    return Finding("provider keys", "ok", found, hint)


def _local(session: Session) -> Finding:
    from llm_orchestrator.providers import local_model

    model = local_model.find(session.config.data_dir)
    has_extra = find_spec("xllamacpp") is not None
    if model is None:
        return Finding("local model", "ok", "not fetched", "llmo local pull")
    if not has_extra:
        return Finding(
            "local model",
            "warning",
            "the model is there, xllamacpp is not",
            "pip install 'llm-orchestrator[local]'",
        )
    try:
        number = version("xllamacpp")
    except PackageNotFoundError:
        number = "of unknown version"
    return Finding("local model", "ok", f"{model.name}, xllamacpp {number}")
