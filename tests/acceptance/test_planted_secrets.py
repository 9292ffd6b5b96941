"""Secrets never leave: planted ones, sent back to us in every form, and a search of all we wrote.

The other side (`Gossip`) knows every secret and says all of them in each answer, in plain, in
base64 and percent-encoded: in bodies, in headers and in the words behind the status. What real
processes then leave is searched: the database, the decoded journal, what stands in folders, every
line printed, every answer of the API, every span.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.config import Config
from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.store.journal import decode
from llm_orchestrator.wire import make_store
from tests.acceptance.cli_support import Shell
from tests.acceptance.otlp_receiver import Receiver, receiving

pytestmark = [pytest.mark.timeout(180)]
SECRETS = {
    "HOUSE_KEY": "planted+key_A1&provider",
    "PLANTED_HEADER": "planted+header/B2&action",
    "PLANTED_HOOK": "planted+hook/C3&webhook",
    "LLM_ORCHESTRATOR_TOKEN": "planted+token/D4&api",
}
PASSWORD = "planted+password/E5&store"
SETTINGS = """\
outgoing_allow = ["127.0.0.1"]
[providers.house]
base_url = "URL/v1"
api_key_env = "HOUSE_KEY"
"""
TALK = """\
name: talk
secrets: {header: "env:PLANTED_HEADER", hook: "env:PLANTED_HOOK"}
steps:
  - {id: ask, type: action, action: http, url: "URL/fine",
     headers: {x-key: "{{ secrets.header }}"}}
  - {id: tell, type: action, action: webhook, url: "URL/fine", payload: {a: 1},
     secret: "{{ secrets.hook }}"}
  - {id: say, type: action, action: log, message: "said {{ secrets.header }}",
     note: "noted {{ secrets.hook }}", level: warning}
"""
BROKEN = """\
name: broken
secrets: {header: "env:PLANTED_HEADER", hook: "env:PLANTED_HOOK"}
steps:
  - {id: tell, type: action, action: webhook, url: "URL/broken", payload: {a: 1},
     secret: "{{ secrets.hook }}", headers: {x-key: "{{ secrets.header }}"}}
"""
SHARED = """\
name: shared
secrets: {header: "env:PLANTED_HEADER", hook: "env:PLANTED_HOOK"}
inputs: {word: {type: string}}
steps:
  - {id: wording, type: transform, function: template,
     template: "made of {{ secrets.header }} and {{ inputs.word }}"}
  - {id: leave, type: action, action: notify, text: "left {{ secrets.hook }}"}
  - {id: hear, type: llm, provider: house, model: leaky, prompt: go on, depends_on: [leave]}
outputs:
  wording: "{{ steps.wording.result }}"
  heard: "{{ steps.hear.text }}"
  last: "{{ secrets.hook|upper|lower }}{{ secrets.hook }}"
"""
DENIED = """\
name: denied
steps: [{id: ask, type: llm, provider: house, model: fake, prompt: one}]
"""
CODE = """\
import logging
import os
from base64 import b64encode

from llm_orchestrator import Context, step, workflow


@step
async def spill() -> str:
    key = os.environ["HOUSE_KEY"]
    logging.getLogger("author").warning("the key is %s", key)
    raise RuntimeError(f"no luck with {key}, that is {b64encode(key.encode()).decode()}")


@workflow
async def spilling(ctx: Context) -> str:
    return await ctx.step(spill)


@step
async def give(size: int) -> dict:
    key = os.environ["HOUSE_KEY"]
    basic = b64encode(f"me:{key}".encode()).decode()
    return {"key": key, key: "a name", "basic": basic, "raw": [f"x{key}".encode(), float("nan")],
            "filler": os.urandom(size).hex()}


@step
async def take(given: dict) -> str:
    return "got " + ("it" if os.environ["HOUSE_KEY"] in repr(given) else given["key"])


@workflow
async def giving(ctx: Context) -> list:
    given = [await ctx.step(give, size) for size in (0, 700_000)]
    took = [await ctx.step(take, each) for each in given]
    return [*given, *took, await ctx.wait_signal("go"), os.environ["HOUSE_KEY"]]
"""
FLOWS = ("talk.yaml", "broken.yaml", "denied.yaml", "spills.py:spilling", "shared.yaml")
GIVING = "spills.py:giving"
HEARD = "I heard *** and ***, and *** again."


def forms(secret: str) -> list[str]:
    """As it is, in base64 (at each place among three bytes: what is always the same), and in %."""
    inside = [b64encode(b"\0" * n + secret.encode()).decode()[n + (n > 0) : -4] for n in range(3)]
    return [secret, *inside, quote(secret, safe="")]


class Gossip:
    """Answers everything with all secrets that it knows; `heard` are the paths, and the keys."""

    def __init__(self, secrets: list[str]) -> None:
        said = [[each, b64encode(each.encode()).decode(), quote(each)] for each in secrets]
        basic = [b64encode(f"me:{each}".encode()).decode() for each in secrets]
        self.words = [*basic, *(form for each in said for form in each)]
        self.heard: list[str] = []
        self.url = ""

    def pieces(self) -> list[str]:
        """An answer as a model streams it: a secret in one piece, others cut by many."""
        hook, header = SECRETS["PLANTED_HOOK"], SECRETS["PLANTED_HEADER"]
        rest = f"and {b64encode(header.encode()).decode()}, and {header} again."
        return [f"I heard {hook} ", *(rest[at : at + 5] for at in range(0, len(rest), 5))]

    def answer(self, path: str, key: str) -> tuple[int, str, bytes]:
        """Status, the words behind it, and the body."""
        self.heard += [path, key]
        if path.startswith("/v1/"):
            message = f"wrong key {SECRETS['HOUSE_KEY']} {quote(SECRETS['HOUSE_KEY'])}"
            return 401, "No", json.dumps({"error": {"message": message}}).encode()
        body = json.dumps({"said": self.words, SECRETS["PLANTED_HEADER"]: key}).encode()
        return (200, "Fine", body) if path == "/fine" else (400, " ".join(self.words), body)


@contextmanager
def gossiping(secrets: list[str]) -> Iterator[Gossip]:
    gossip = Gossip(secrets)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if b'"leaky"' in asked:
                self.stream()
                return
            key = self.headers.get("x-key") or self.headers.get("Authorization") or ""
            status, words, body = gossip.answer(self.path, key)
            self.send_response(status, words)
            self.send_header("Content-Type", "application/json")
            self.send_header("X-Said", " ".join(gossip.words))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.do_GET()

        def stream(self) -> None:
            gossip.heard.append("leaky")
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for piece in (*gossip.pieces(), ""):
                choice = {"index": 0, "delta": {"content": piece}}
                if not piece:
                    choice["finish_reason"] = "stop"
                told = json.dumps({"id": "1", "model": "leaky", "choices": [choice]})
                self.wfile.write(f"data: {told}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    gossip.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield gossip
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def get(url: str, token: str) -> str:
    """An answer, whatever it is."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request) as answer:
            text: str = answer.read().decode()
            return text
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.headers} {error.read().decode()}"


class Place(NamedTuple):
    """Where it all happens, and what was written: by name."""

    shell: Shell
    url: str
    spans: Receiver
    written: dict[str, str]

    def llmo(self, *words: str, code: int | None = None, **more: str) -> str:
        """A command, and what it prints."""
        done = subprocess.run(
            [sys.executable, "-m", "llm_orchestrator", *words],
            cwd=self.shell.folder,
            env={**self.shell.environment, **more},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        self.written[f"llmo {' '.join(words)}"] = done.stdout + done.stderr
        assert code is None or done.returncode == code, done.stderr
        return done.stdout

    def all(self, commands: list[tuple[str, ...]]) -> None:
        """Commands that do not wait for each other; every one must succeed."""
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda words: self.llmo(*words, code=0), commands))

    def serve(self, ends: int) -> None:
        """A server until so many runs have ended; it is asked this and that, too."""
        process = self.shell.start("--debug", "serve", "--port", "0", "--import", "spills.py")
        assert process.stderr is not None
        lines: list[str] = []
        try:
            base, left = "", ends
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"ready: .* on (http://[^ \"]+)", line):
                    base = found[1]
                left -= bool(re.search(r"run [0-9a-zA-Z_-]+ (completed|failed)\"", line))
                if base and not left:
                    break
            assert base, "".join(lines)
            assert not left, "".join(lines)
            rest = threading.Thread(target=lines.extend, args=(process.stderr,))
            rest.start()
            self._ask(base)
            self.written["folders while it runs"] = self._folders()
            process.send_signal(signal.SIGTERM)
            rest.join(60)
        finally:
            process.kill()
            process.wait()
            process.stderr.close()
            assert process.stdout is not None
            self.written["serve's stdout"] = process.stdout.read()
            process.stdout.close()
        assert all(line.startswith("{") for line in lines), "the log is no JSON"
        self.written["serve's log"] = "".join(lines)

    def _ask(self, base: str) -> None:
        token = SECRETS["LLM_ORCHESTRATOR_TOKEN"]
        wrong = quote(SECRETS["HOUSE_KEY"], safe="")
        for path in ("/metrics", "/health", "/api/v1/runs", f"/api/v1/runs/{wrong}"):
            for key in (token, token + "x"):
                self.written[f"{path} {key == token}"] = get(base + path, key)
        for run in json.loads(self.written["/api/v1/runs True"])["items"]:
            about = f"/api/v1/runs/{run['run_id']}"
            for part in ("", "/result", "/journal", "/steps", "/explain", "/events"):
                if part != "/events" or run["state"] in ("completed", "failed"):
                    name = f"{run['workflow']}{part} over HTTP"
                    self.written[name] = get(base + about + part, token)
        self.written["/api/v1/audit/events"] = get(base + "/api/v1/audit/events", token)

    def _folders(self) -> str:
        kept = [path for path in self.shell.folder.rglob("data/**/*") if path.is_file()]
        return "\n".join(path.read_bytes().decode("latin-1") for path in kept)

    def collect(self) -> None:
        """What is there when all is over."""
        self.written["folders"] = self._folders()
        self.written["journal"] = asyncio.run(self._journal())
        self.written["spans"] = repr(self.spans.spans)
        listed = json.loads(self.llmo("runs", "list", "-o", "json", code=0))
        ids = {run["workflow"]: run["run_id"] for run in listed}
        shown: list[tuple[str, ...]]
        shown = [("runs", "show", ids[name], "-o", "json") for name in ("talk", "broken")]
        shown += [("runs", "explain", ids[name]) for name in ("denied", "spilling")]
        shown += [("runs", "show", ids["shared"]), ("runs", "journal", ids["giving"])]
        self.all([*shown, ("config", "show", "--origin"), ("audit", "list")])

    async def _journal(self) -> str:
        store = make_store(Config(store=self.url), RealClock(), name="test")
        await store.open_as_client()
        try:
            found = await store.look.load(await store.look.run_ids())
            return "\n".join(
                repr(decode(entry.payload)) for each in found.values() for entry in each.entries
            )
        finally:
            await store.close()

    def leaks(self, secrets: list[str]) -> list[str]:
        """Where which secret stands, with what is around it."""
        return [
            f"{name}: ...{text[max(0, at - 60) : at + 60]}..."
            for name, text in self.written.items()
            for secret in secrets
            for form in forms(secret)
            if (at := text.find(form)) >= 0
        ]


@contextmanager
def place_at(folder: Path, url: str, gossip: Gossip) -> Iterator[Place]:
    shell = Shell(folder)
    files = {"talk.yaml": TALK, "broken.yaml": BROKEN, "denied.yaml": DENIED, "spills.py": CODE}
    files["shared.yaml"] = SHARED
    files["llm-orchestrator.toml"] = SETTINGS
    for name, text in files.items():
        (folder / name).write_text(text.replace("URL", gossip.url))
    with receiving() as spans:
        shell.environment |= SECRETS | {
            "LLM_ORCHESTRATOR_URL": url,
            "OTEL_EXPORTER_OTLP_ENDPOINT": spans.url,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        }
        yield Place(shell, url, spans, {})


def act(place: Place, *, alone: tuple[str, ...], served: tuple[str, ...]) -> None:
    """Run flows in the command's own process (its log is text), and in a server (JSON)."""
    for flow in alone:
        is_fine = flow in ("talk.yaml", "shared.yaml")
        place.llmo("--debug", *command(flow), code=0 if is_fine else 9)
    place.all([(*command(flow), "--detach") for flow in (*served, GIVING)])
    [waiting] = json.loads(place.llmo("runs", "list", "--workflow", "giving", "-o", "json"))
    place.llmo("runs", "signal", waiting["run_id"], "go", json.dumps(SECRETS["HOUSE_KEY"]), code=0)
    place.serve(len(served) + 1)
    place.llmo("--debug", "runs", "show", SECRETS["HOUSE_KEY"])
    place.collect()


def command(flow: str) -> tuple[str, ...]:
    """How to run it; what is streamed is shown, and an input is a secret that is known."""
    if flow == "shared.yaml":
        return ("run", flow, "--stream", "--input", f"word={SECRETS['HOUSE_KEY']}")
    return ("run", flow)


def check(place: Place, gossip: Gossip, secrets: list[str]) -> None:
    heard = " ".join(gossip.heard)
    for what in (SECRETS["HOUSE_KEY"], SECRETS["PLANTED_HEADER"], "/fine", "/broken"):
        assert what in heard, "it was not used: the test shows nothing"
    text_log = "llmo --debug run spills.py:spilling"
    for name in ("journal", "serve's log", "spans", text_log):
        assert "***" in place.written[name], name
    assert "/v1/chat" in heard
    assert "leaky" in heard
    streams = [text for name, text in place.written.items() if "shared.yaml" in name]
    assert any(HEARD in text for text in [*streams, place.written["shared over HTTP"]])
    for name in ("shared", "shared/events", "giving/result", "giving/journal"):
        assert "***" in place.written[f"{name} over HTTP"], name
    assert place.written["giving/result over HTTP"].count('"got ***"') == 2, "it went on without"
    assert "llm_orchestrator_runs" in place.written["/metrics True"]
    assert place.leaks(["llm-orchestrator"]), "the search finds nothing at all"
    assert place.leaks(secrets) == []


def test_in_sqlite(tmp_path: Path) -> None:
    secrets = list(SECRETS.values())
    url = f"sqlite:///{tmp_path / 'data' / 'runs.db'}"
    with gossiping(secrets) as gossip, place_at(tmp_path, url, gossip) as place:
        act(place, alone=FLOWS, served=("talk.yaml", "spills.py:spilling", "shared.yaml"))
        assert "***" in place.written["folders"]
        check(place, gossip, secrets)


def test_in_postgresql(tmp_path: Path, postgres_url: str, postgres_server: PostgresServer) -> None:
    secrets = [*SECRETS.values(), PASSWORD]
    database = postgres_url.rpartition("/")[2].partition("?")[0]
    role = f"planted_{database}"
    login = postgres_server.create_role(role, PASSWORD)
    postgres_server.psql('ALTER DATABASE :"name" OWNER TO :"role"', name=database, role=role)
    url = login.replace("/postgres", f"/{database}")
    with gossiping(secrets) as gossip, place_at(tmp_path, url, gossip) as place:
        act(place, alone=("spills.py:spilling",), served=FLOWS)
        wrong = url.replace("E5", "F6")
        place.llmo("--debug", "--store", wrong, "runs", "list")
        place.llmo("config", "show", LLM_ORCHESTRATOR_URL=wrong)
        place.written["database"] = rows(postgres_server, database)
        place.written["the server's files"] = server_files(postgres_server, database)
        assert "***" in place.written["database"]
        check(place, gossip, [*secrets, PASSWORD.replace("E5", "F6")])


def rows(server: PostgresServer, database: str) -> str:
    """Every row of every table, bytes as readable text."""
    listed = "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables"
    tables = server.psql(
        f"{listed} WHERE schemaname NOT IN ('pg_catalog', 'information_schema')",
        database=database,
    ).split()
    assert tables
    every = "".join(f"SELECT t::text FROM {table} t;\n" for table in tables)
    return server.psql(f"SET bytea_output = escape;\n{every}", database=database)


def server_files(server: PostgresServer, database: str) -> str:
    """What the server keeps of the database, and its write-ahead log."""
    number = server.psql("SELECT oid FROM pg_database WHERE datname = :'name'", name=database)
    server.psql("CHECKPOINT")
    data = server.folder / "data"
    kept = [*(data / "pg_wal").iterdir(), *(data / "base" / number.strip()).iterdir()]
    return "\n".join(path.read_bytes().decode("latin-1") for path in kept if path.is_file())
