"""Live progress of one run on stderr, and the chunks of its streamed answers.

Fed from two sides that look alike: the engine's own words while it runs here (`publish`), or the
entries of the journal while another process drives the run (`entry`). With a terminal and without
--stream it is a table that grows in place (rich), else one line for each thing that happened.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TextIO

from llm_orchestrator.cli.output import dollars, duration
from llm_orchestrator.cli.report import printable, say
from llm_orchestrator.engine.steps_view import StepView
from llm_orchestrator.model import Json, StepState, Usage

if TYPE_CHECKING:
    from rich.live import Live

LIVE_ROWS_MAX = 15


class Progress:
    """What is shown of one run. `run_id` is set before the run is accepted."""

    def __init__(
        self,
        *,
        is_quiet: bool,
        chunks_to: TextIO | None = None,
        lines_to_stdout: bool = False,
    ) -> None:
        self.run_id = ""
        self.rows: dict[str, StepView] = {}
        self._is_quiet = is_quiet
        self._chunks_to = chunks_to
        self._to_stdout = lines_to_stdout
        self._streaming = ""
        self.has_streamed = False
        """True once a chunk was shown."""
        self._live: Live | None = None
        if not is_quiet and chunks_to is None and not lines_to_stdout and sys.stderr.isatty():
            self._live = _start_live()

    # -- what happened -------------------------------------------------------------------------

    def publish(self, *told: Any) -> None:
        """The engine's word: (run_id, what, step, attempt, data), see engine.execution.Publish."""
        run_id, what, step, attempt, data = told
        if run_id != self.run_id:
            return
        if what == "chunk":
            self.chunk(step, str(data.get("text", "")))
        elif what == "reset":
            self.reset(step, int(data.get("offset", 0)))
        elif step:
            row = self.rows.setdefault(step, StepView(step))
            row.attempts = max(row.attempts, attempt)
            _apply(row, what, data)
            self.changed(row, what, data)

    def changed(self, row: StepView, what: str, data: dict[str, Json]) -> None:
        """Show a step that has just changed."""
        self.rows[row.step] = row
        if self._live is not None:
            self._live.update(_table(self.rows))
            return
        self._line(_sentence(row, what, data, run_id=self.run_id))

    def chunk(self, step: str, text: str) -> None:
        """A piece of a streamed answer."""
        if self._chunks_to is None:
            return
        if self._streaming not in ("", step):
            self._chunks_to.write("\n")
        self._streaming, self.has_streamed = step, True
        self._chunks_to.write(printable(text) if self._chunks_to.isatty() else text)
        self._chunks_to.flush()

    def reset(self, step: str, offset: int) -> None:
        """What was streamed after `offset` is void."""
        if self._chunks_to is None:
            return
        self.break_line()
        how = "starts again" if offset == 0 else f"goes on from character {offset}"
        self._line(f"step {step}: the answer {how}")

    def break_line(self) -> None:
        """End a line of chunks."""
        if self._streaming and self._chunks_to is not None:
            self._chunks_to.write("\n")
            self._chunks_to.flush()
        self._streaming = ""

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.break_line()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def total(self) -> Usage:
        """Tokens and dollars of the steps that were seen."""
        total = Usage()
        for row in self.rows.values():
            total = total + row.usage
        return total

    def _line(self, text: str) -> None:
        if self._chunks_to is not None:
            self.break_line()
        if self._to_stdout:
            sys.stdout.write(printable(text) + "\n")
            sys.stdout.flush()
        elif not self._is_quiet:
            say(text)


def _apply(row: StepView, what: str, data: dict[str, Json]) -> None:
    """The engine's word as a change of the row."""
    if "usage" in data:
        row.usage = row.usage + Usage.from_json(data["usage"])
    if "ms" in data:
        row.ms = float(data["ms"])
    if what in ("finished", "signal"):
        row.state, row.error = StepState.COMPLETED, ""
    elif what == "failed":
        error = data.get("error")
        row.error = str(error.get("message", "")) if isinstance(error, dict) else ""
        row.state = StepState.FAILED if data.get("final") else StepState.RUNNING
    elif what == "waiting":
        row.state, row.wait = StepState.WAITING, str(data.get("name") or "timer")
    elif what == "skipped":
        row.state, row.wait = StepState.SKIPPED, str(data.get("reason", ""))
    elif what == "unavailable":
        row.error = str(data.get("message", ""))


def _sentence(row: StepView, what: str, data: dict[str, Json], *, run_id: str) -> str:
    head = f"step {row.step}"
    if what == "unavailable":
        return f"{head} waits for its provider: {row.error}"
    if what == "refused":
        return f"{head} refused a message: {data.get('refused', '')}"
    if row.state is StepState.WAITING:
        if row.wait.startswith("approval:"):
            return f"{head} waits for approval: llmo runs approve {run_id} {row.step}"
        if row.wait.startswith("child:"):
            return f"{head} waits for its child: {row.wait.removeprefix('child:')}"
        if row.wait.startswith("timer"):
            return f"{head} waits for its time"
        return f"{head} waits for a signal: llmo runs signal {run_id} {row.wait.split(' ')[0]}"
    if row.state is StepState.SKIPPED:
        return f"{head} skipped: {row.wait}"
    facts = [f"attempt {row.attempts}"] if row.attempts > 1 else []
    if row.state is StepState.COMPLETED:
        facts += _facts(row)
        return f"{head} finished" + (f" ({', '.join(facts)})" if facts else "")
    if what == "intent":
        return f"{head} started, attempt {row.attempts}"
    end = "for good" if row.state is StepState.FAILED else "and will be tried again"
    return f"{head} failed {end}, attempt {row.attempts}: {row.error}"


def _facts(row: StepView) -> list[str]:
    used, facts = row.usage, []
    if used.input_tokens or used.output_tokens:
        facts.append(f"{used.input_tokens}+{used.output_tokens} tokens")
    if used.cost_usd:
        facts.append(dollars(used.cost_usd))
    if row.ms is not None:
        facts.append(duration(row.ms))
    return facts


def _start_live() -> Live:
    from rich.console import Console
    from rich.live import Live

    live = Live(console=Console(stderr=True, highlight=False), refresh_per_second=8)
    live.start()
    return live


def _table(rows: dict[str, StepView]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("STEP", "STATE", "ATTEMPTS", "TOKENS", "COST", "TIME", ""):
        table.add_column(name, justify="right" if name in ("TOKENS", "COST", "TIME") else "left")
    for row in list(rows.values())[-LIVE_ROWS_MAX:]:
        used = row.usage
        cells = (
            row.step,
            str(row.state),
            str(row.attempts or 1),
            f"{used.input_tokens}+{used.output_tokens}",
            dollars(used.cost_usd),
            duration(row.ms),
            row.error or (row.wait if row.state is StepState.WAITING else ""),
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))
    if len(rows) > LIVE_ROWS_MAX:
        table.caption = f"and {len(rows) - LIVE_ROWS_MAX} steps before"
    return table
