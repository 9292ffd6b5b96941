"""`llmo runs`: the verbs that look at runs, and those that change them."""

from __future__ import annotations

from llm_orchestrator.cli import runs_change, runs_look
from llm_orchestrator.cli.options import make_app

app = make_app("List, show, explain, change and follow runs. Without a verb: list.")
app.command("list")(runs_look.list_runs)
app.command("show")(runs_look.show)
app.command("explain")(runs_look.explain)
app.command("result")(runs_look.result)
app.command("journal")(runs_look.journal)
app.command("watch")(runs_look.watch)
app.command("cancel")(runs_change.cancel)
app.command("pause")(runs_change.pause)
app.command("resume")(runs_change.resume)
app.command("retry")(runs_change.retry)
app.command("fork")(runs_change.fork)
app.command("rewind")(runs_change.rewind)
app.command("restore", hidden=True)(runs_change.rewind)
app.command("signal")(runs_change.signal)
app.command("approve")(runs_change.approve)
