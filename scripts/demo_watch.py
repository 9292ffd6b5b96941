"""The demo's eyes: says when to kill, and judges afterwards whether the promise was kept.

    demo_watch.py DATABASE          wait until `facts` is finished and `story` is being streamed;
                                    prints the run's id
    demo_watch.py --judge JOURNAL   read a run's journal (JSON lines); exit 1 if a finished step was
                                    asked for again or the kept text was paid for twice
"""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from pathlib import Path

PATIENCE_S = 120
WATCH = """
SELECT run_id FROM progress WHERE step = 'story'
  AND EXISTS (SELECT 1 FROM journal
              WHERE journal.run_id = progress.run_id AND step = 'facts' AND kind = 'step_finished')
GROUP BY run_id HAVING sum(length(text)) > 60
"""


def wait(database: Path) -> int:
    """Look until the moment has come; looking is all this does."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        time.sleep(0.05)
        try:
            connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
            row = connection.execute(WATCH).fetchone()
            connection.close()
        except sqlite3.OperationalError:
            continue  # not made yet
        if row:
            print(row[0])
            return 0
    print("error: the second step did not begin", file=sys.stderr)
    return 1


def judge(journal: Path) -> int:
    """The promise in numbers."""
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    calls = {
        step: sum(1 for entry in entries if entry["kind"] == "intent" and entry["step"] == step)
        for step in ("facts", "story")
    }
    finished = {e["step"]: e["payload"] for e in entries if e["kind"] == "step_finished"}
    notes = finished["story"].get("notes", {})
    kept = notes.get("resumed_from_tokens", 0)
    tokens = finished["story"]["result"]["metadata"]["usage"]["output_tokens"]
    made = "in all, by one generation that the new process took up again"
    if notes.get("resume") != "attach":
        made = "made after it"
    print(f"\n  facts: asked {calls['facts']} time, before the kill; not asked again after it")
    print(f"  story: {kept} tokens had come before the kill and were kept; {tokens} tokens {made}")
    is_kept = calls["facts"] == 1 and kept > 0
    print("  promise kept" if is_kept else "  PROMISE BROKEN")
    return 0 if is_kept else 1


if __name__ == "__main__":
    if sys.argv[1] == "--judge":
        sys.exit(judge(Path(sys.argv[2])))
    sys.exit(wait(Path(sys.argv[1])))
