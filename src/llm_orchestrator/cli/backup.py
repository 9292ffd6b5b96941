"""`llmo backup`: make backup files, look at them, check them, prove them, let old ones go.

What dangerous verbs would do is said by --dry-run. Exit codes: 3 made but not copied to the second
place, 8 damaged, 11 another one is at it, 12 no key opens it.
"""

from __future__ import annotations

from llm_orchestrator.cli.backup_schedule import schedule
from llm_orchestrator.cli.options import make_app

app = make_app("Make, check, prove, list and prune backup files.")
app.command("schedule")(schedule)


@app.callback()
def backup() -> None:
    """Make, check, prove, list and prune backup files."""
