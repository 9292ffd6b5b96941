"""The documents are true: pages are current, workflows load, commands exist, links lead somewhere.

What a document shows as a command must be one that `llmo` knows, with options that it has; what it
shows as a workflow must validate; what it shows as a program, and the README's first workflow, run.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llm_orchestrator.cli.dr import OBJECTIVE_MISSED
from llm_orchestrator.cli.main import VERBS, command_of
from llm_orchestrator.config import Config, load_config
from llm_orchestrator.drill.scenario import load_all
from llm_orchestrator.drill.staging_file import read as read_staging
from llm_orchestrator.language.load import load_text
from llm_orchestrator.wire import Orchestrator

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
NOT_OURS = {
    *("max_connections", "synchronous_commit"),  # PostgreSQL's
    *("invalid_request", "rate_limit", "unknown_outcome"),  # kinds of errors, reasons of pauses
    *("requests_per_minute", "tokens_per_minute"),  # keys of a provider
}
"""What the pages for the night name that is neither a setting nor a scenario."""
GENERATED = "<!-- Written by scripts/docs.py."
GLOBAL_OPTIONS = {"--store", "--data", "--debug", "--quiet", "--help", "-h"}
STEP = "steps: [{id: only, type: transform, expression: '1'}]\n"


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    mark: str = ""
    """What stands behind the language: `run`, or `not run: REASON`."""

    @property
    def is_run(self) -> bool:
        return self.mark == "run"

    @property
    def label(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(language: str = "") -> list[Block]:
    return [
        block for page in PAGES for block in blocks_of(page) if language in ("", block.language)
    ]


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    mark = r"(?: (run|not run: [^\n]+))?"
    fence = rf"^```(\w*){mark}\n(.*?)^```$"
    for match in re.finditer(fence, text, re.MULTILINE | re.DOTALL):
        line = text[: match.start()].count("\n") + 2
        yield Block(str(page.relative_to(ROOT)), line, match[1], match[3], match[2] or "")


def docs_script() -> Any:
    spec = importlib.util.spec_from_file_location("docs", ROOT / "scripts" / "docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- generated pages ------------------------------------------------------------------------------

DOCS = docs_script()


@pytest.mark.parametrize("name", sorted(DOCS.PAGES))
def test_a_generated_page_is_what_the_code_says_now(name: str) -> None:
    written = (DOCS.PLACE / name).read_text()
    assert written.startswith(GENERATED)
    assert written == DOCS.PAGES[name](), "run `make docs`"


@pytest.mark.parametrize("name", sorted(DOCS.DOCUMENTS))
def test_a_generated_document_is_what_the_code_says_now(name: str) -> None:
    assert (DOCS.PLACE / name).read_text() == DOCS.DOCUMENTS[name](), "run `make docs`"


def test_every_page_of_the_reference_is_generated() -> None:
    found = {page.name for page in DOCS.PLACE.glob("*.md")}
    assert found == set(DOCS.PAGES)


# -- workflows, settings, programs ----------------------------------------------------------------


def as_workflow(text: str) -> str:
    """A fragment (some steps, or some keys of the top level) as a whole file."""
    if text.startswith("- "):
        text = "steps:\n" + "".join(f"  {line}\n" for line in text.splitlines())
    if not re.search(r"^steps:", text, re.MULTILINE):
        text += STEP
    return text if re.search(r"^name:", text, re.MULTILINE) else f"name: fragment\n{text}"


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.label)
def test_a_workflow_in_a_document_is_valid(block: Block) -> None:
    definition = load_text(as_workflow(block.text), f"{block.label}.yaml")
    assert not definition.warnings


@pytest.mark.parametrize("block", blocks("toml"), ids=lambda block: block.label)
def test_settings_in_a_document_are_settings(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "llm-orchestrator.toml"
    file.write_text(block.text)
    if "may_be_broken" in block.text:
        assert read_staging(file).faults
    else:
        assert load_config(file=file, environ={}).origins


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.label)
def test_a_program_in_a_document_runs(block: Block, tmp_path: Path) -> None:
    ast.parse(block.text)
    file = tmp_path / "program.py"
    file.write_text(block.text)
    done = subprocess.run(
        [sys.executable, str(file)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


async def test_the_workflow_with_which_the_readme_begins_runs(tmp_path: Path) -> None:
    first = next(block for block in blocks("yaml") if block.page == "README.md")
    file = tmp_path / "hello.yaml"
    file.write_text(first.text)
    url = f"sqlite:///{tmp_path / 'runs.db'}"
    async with Orchestrator(url, config=Config(data_dir=tmp_path)) as orchestrator:
        result = await orchestrator.run(file, {"topic": "terns"})
    assert result == {"story": "echo: A story with these facts: echo: Two facts about terns"}


# -- commands -------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every `llmo` command in a block of a shell or in the head of an example, as words."""
    for block in (*blocks("sh"), *blocks("bash")):
        for line in block.text.splitlines():
            yield from pieces(block.label, line)
    for file in sorted((ROOT / "examples").rglob("*.yaml")):
        head = re.match(r"(#.*\n)+", file.read_text())
        for line in (head[0] if head else "").splitlines():
            yield from pieces(str(file.relative_to(ROOT)), line.lstrip("# "))
    for page in PAGES:
        if page.read_text().startswith(GENERATED):
            continue
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for match in re.finditer(r"`(llmo\s[^`]+)`", text):
            yield from pieces(str(page.relative_to(ROOT)), " ".join(match[1].split()))


def pieces(where: str, line: str) -> Iterator[tuple[str, list[str]]]:
    line = re.sub(r"\s{3,}\(.*\)$", "", line)  # a remark behind a command
    for part in re.split(r"\s(?:\||&&)\s", line):
        words = re.sub(r"^(\w+=\S+\s+)*", "", part)
        if words.startswith("llmo "):
            yield where, shlex.split(words, comments=True)[1:]


def complaint(words: list[str]) -> str:
    """What `llmo` would not understand of these words, or nothing."""
    rest = [word for word in words if word.split("=")[0] not in GLOBAL_OPTIONS]
    if not rest:
        return ""
    if rest[0] not in VERBS:
        return f"no verb {rest[0]}"
    command, at = command_of(rest[0]), 1
    while hasattr(command, "commands") and at < len(rest):
        if rest[at] not in command.commands:
            return f"no verb {rest[at]} of {' '.join(rest[:at])}"
        command, at = command.commands[rest[at]], at + 1
    known = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
    options = [word.split("=")[0] for word in rest[at:] if re.match(r"--?[a-z]", word)]
    unknown = [option for option in options if option not in known]
    return f"no option {unknown[0]} of {' '.join(rest[:at])}" if unknown else ""


@pytest.mark.parametrize(
    ("where", "words"), [*commands()], ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_command_in_a_document_is_one_that_there_is(where: str, words: list[str]) -> None:
    assert complaint(words) == "", f"{where}: llmo {shlex.join(words)}"


def test_a_command_that_there_is_not_is_noticed() -> None:
    assert complaint(["rnu", "a.yaml"]) == "no verb rnu"
    assert complaint(["runs", "undo", "RUN"]) == "no verb undo of runs"
    assert complaint(["run", "a.yaml", "--turbo"]) == "no option --turbo of run"
    assert complaint(["--store", "runs", "list", "-o", "ids"]) == ""
    assert len({tuple(words) for _, words in commands()}) > 40


# -- what is marked `run` is run ------------------------------------------------------------------

WITH_A_NODE = (
    "docs/disaster_recovery/DR_RUNBOOK.md",
    "docs/disaster_recovery/README.md",
    "README.md",
)
"""Pages whose `run` blocks need more than an empty folder: tests/test_docs_run.py."""
RUNNABLE = sorted(
    {block.page for block in blocks("bash") if block.is_run and block.page not in WITH_A_NODE}
)
RUN_S = 60
_TIDY = "trap 'kill -9 $(jobs -p) 2> /dev/null || true' EXIT\n"


def run_page(page: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """All `run` blocks of a page as one script, in an empty folder; nothing of it stays behind."""
    script = "".join(block.text for block in blocks_of(ROOT / page) if block.is_run)
    return run_bash(_TIDY + script, folder, limit_s=RUN_S)


def run_bash(
    script: str, folder: Path, *, limit_s: float, flags: str = "-euo", **more: str
) -> subprocess.CompletedProcess[str]:
    """A script that stops at the first failure. `more` is for its environment."""
    kept = {name: os.environ[name] for name in ("HOME", "TMPDIR", "LANG") if name in os.environ}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    process = subprocess.Popen(
        ["bash", flags, "pipefail", "-c", script],
        cwd=folder,
        env={**kept, "PATH": path, "LLM_ORCHESTRATOR_DATA": str(folder / "data"), **more},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(script, process.returncode, out, err)


@pytest.mark.timeout(RUN_S + 20)
@pytest.mark.parametrize("page", RUNNABLE)
def test_the_commands_that_a_page_marks_as_run_do_what_it_says(page: str, tmp_path: Path) -> None:
    done = run_page(page, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    if page == "docs/tutorial.md":
        story = "echo: A story with these facts: echo: Two facts about terns"
        assert done.stdout.count(story) == 2  # before the store was lost, and after
        entries = re.findall(r"^\d+ +\d+ +(\w+) +(\S+)", done.stdout, re.MULTILINE)
        assert entries.count(("step_finished", "facts")) == 1
        assert entries.count(("claimed", "-")) == 2


def test_the_tutorial_is_run() -> None:
    assert "docs/tutorial.md" in RUNNABLE


def undecided(found: list[Block]) -> list[str]:
    """Shell blocks that are neither run nor say why not."""
    return [b.label for b in found if b.language in ("sh", "bash") and not b.mark]


def test_every_block_for_a_shell_is_run_or_says_why_not() -> None:
    assert undecided(blocks()) == [], "mark it `run`, or `not run: REASON`"
    fences = sum(
        len(re.findall(r"^```(?:sh|bash|console)", page.read_text(), re.MULTILINE))
        for page in PAGES
    )
    assert fences == len(blocks("sh")) + len(blocks("bash")), "a mark is misspelt"
    assert not [b.label for b in blocks("sh") if b.is_run], "what is run is `bash`"


def test_a_block_that_is_undecided_is_noticed() -> None:
    assert undecided([Block("a.md", 3, "sh", "llmo status\n")]) == ["a.md:3"]
    assert undecided([Block("a.md", 3, "sh", "make test\n", "not run: itself")]) == []


# -- names ----------------------------------------------------------------------------------------


def written() -> Iterator[tuple[str, str]]:
    """Every page that a person wrote, but for what has changed long ago."""
    for page in PAGES:
        text = page.read_text()
        if not text.startswith(GENERATED) and page.name != "CHANGELOG.md":
            yield str(page.relative_to(ROOT)), text


def named(pattern: str) -> set[tuple[str, str]]:
    return {(page, name) for page, text in written() for name in re.findall(pattern, text)}


def test_a_metric_in_a_document_is_exported() -> None:
    known = (DOCS.PLACE / "metrics.md").read_text()
    found = named(r"`(llm_orchestrator_[a-z_]*[a-z])\b")
    assert found
    assert {pair for pair in found if f"`{pair[1]}`" not in known} == set()


def test_a_variable_in_a_document_is_read() -> None:
    known = (DOCS.PLACE / "settings.md").read_text()
    found = named(r"\b(LLM_ORCHESTRATOR_[A-Z_]*[A-Z])\b")
    assert found
    assert {pair for pair in found if f"`{pair[1]}`" not in known} == set()


def test_an_exit_code_in_a_document_is_one_that_there_is() -> None:
    rows = re.findall(r"^\| `\w+` \| `\w+` \| (\d+) \|", DOCS.error_page(), re.MULTILINE)
    known = {*rows, "0", str(OBJECTIVE_MISSED)}
    found = named(r"(?:\bexit|exit code|`llmo [^`]+`\)? ends with) `?(\d+)\b")
    assert found
    assert {pair for pair in found if pair[1] not in known and int(pair[1]) <= 128} == set()


def test_a_route_in_a_document_is_served() -> None:
    document = json.loads((DOCS.PLACE / "openapi.json").read_text())
    known = ["/metrics", "/openapi.json", *document["paths"]]
    shapes = [re.sub(r"\{\w+\}", "*", path).removeprefix("/api/v1") for path in known]
    areas = {shape.split("/")[1] for shape in shapes} | {"api"}
    found = {
        pair for pair in named(r"`(?:[A-Z]+ )?(/[\w/.{}-]+)`") if pair[1].split("/")[1] in areas
    }
    assert found
    unknown = set()
    for page, path in found:
        shape = re.sub(r"\{\w+\}|(?<=/)[A-Z_]+(?=/|$)", "*", path.rstrip("/"))
        if not any(each.startswith(shape.removeprefix("/api/v1")) for each in shapes):
            unknown.add((page, path))
    assert unknown == set()


def test_an_alert_in_a_document_is_a_rule() -> None:
    rules = re.findall(r"- alert: (\w+)", (ROOT / "deploy/prometheus/alerts.yml").read_text())
    known = {*rules, *re.findall(r"^\| `(\w+)` \|", DOCS.error_page(), re.MULTILINE)}
    place = "docs/how-to/monitor.md", "docs/observability.md", "docs/production_readiness.md"
    found = {pair for pair in named(r"`([A-Z][a-z]+(?:[A-Z][a-z]+)+)`") if pair[0] in place}
    assert found
    assert {pair for pair in found if pair[1] not in known} == set()


def test_an_alert_in_the_pages_for_the_night_is_a_rule() -> None:
    rules = re.findall(r"- alert: (\w+)", (ROOT / "deploy/prometheus/alerts.yml").read_text())
    errors = re.findall(r"^\| `(\w+)` \|", DOCS.error_page(), re.MULTILINE)
    known = {*rules, *errors, *vars(builtins)}
    found = {
        pair
        for pair in named(r"\b([A-Z][a-z]+(?:[A-Z][a-z]+)+)\b")
        if pair[0].startswith("docs/disaster_recovery/")
    }
    assert {name for _, name in found} >= set(rules), "no procedure names it"
    assert {pair for pair in found if pair[1] not in known} == set()


def test_a_setting_in_the_pages_for_the_night_is_one() -> None:
    pages = [(DOCS.PLACE / name).read_text() for name in ("settings.md", "workflow-files.md")]
    known = {*re.findall(r"`(\w+)`", "".join(pages)), *load_all(), *NOT_OURS}
    page = (ROOT / "docs/disaster_recovery/DR_PROCEDURES.md").read_text()
    known |= set(re.findall(r"^- `(\w+)`$", page.partition("## Not drilled yet")[2], re.MULTILINE))
    found = {
        pair
        for pair in named(r"`([a-z]+(?:_[a-z]+)+)(?:`| =)")
        if pair[0].startswith("docs/disaster_recovery/")
    }
    assert len(found) > 40
    assert {pair for pair in found if pair[1] not in known} == set()


# -- links and the first screen -------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_every_test_that_the_readme_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)`", (ROOT / "README.md").read_text())
    assert len(named) >= 7
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_first_screen_has_two_commands_and_what_a_slim_image_lacks() -> None:
    text = (ROOT / "README.md").read_text()
    assert "make git python3-venv" in text.partition("```sh")[0]
    first = next(blocks_of(ROOT / "README.md"))
    assert [line.split("#")[0].strip() for line in first.text.splitlines()] == [
        "make demo",
        "make test",
    ]
    assert first.line < 10
