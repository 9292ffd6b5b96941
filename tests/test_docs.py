"""The documents are true: pages are current, workflows load, commands exist, links lead somewhere.

What a document shows as a command must be one that `llmo` knows, with options that it has; what it
shows as a workflow must validate; what it shows as a program, and the README's first workflow, run.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llm_orchestrator.cli.main import VERBS, command_of
from llm_orchestrator.config import Config, load_config
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
GENERATED = "<!-- Written by scripts/docs.py."
GLOBAL_OPTIONS = {"--store", "--data", "--debug", "--quiet", "--help", "-h"}
STEP = "steps: [{id: only, type: transform, expression: '1'}]\n"


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    @property
    def label(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(language: str = "") -> list[Block]:
    return [
        block for page in PAGES for block in blocks_of(page) if language in ("", block.language)
    ]


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text[: match.start()].count("\n") + 2
        yield Block(str(page.relative_to(ROOT)), line, match[1], match[2])


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
    config = load_config(file=file, environ={})
    assert config.providers or config.queues or config.archive_place or config.barman_server


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
    for block in blocks("sh"):
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
