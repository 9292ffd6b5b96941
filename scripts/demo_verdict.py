"""What the demo proves, counted in the run's journal. Exit code 1 when the promise was not kept.

Usage: demo_verdict.py FOLDER MADE     FOLDER holds before.jsonl, after.jsonl (`llmo runs journal
-o jsonl --payload`, at the kill and at the end) and result.json; MADE is how many tokens the model
server made by its own count, or empty when that is not known.
"""

import json
import sys
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


def entries(file: Path) -> list[Entry]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def of(journal: list[Entry], kind: str, step: str = "") -> list[Entry]:
    return [one for one in journal if one["kind"] == kind and one["step"] == step]


def problems(before: list[Entry], after: list[Entry], result: dict[str, str]) -> list[str]:
    """Every way in which the promise was broken."""
    found = []
    if not of(before, "step_finished", "facts") or of(before, "step_finished", "story"):
        found.append("the kill came at the wrong moment: facts must be finished, story must not be")
    if after[: len(before)] != before:
        found.append("what was recorded before the kill has changed")
    if len(of(after, "claimed")) != 2:
        found.append("there were not two processes")
    if len(of(after, "intent", "facts")) != 1:
        found.append("facts was asked again")
    finished = {step: of(after, "step_finished", step) for step in ("facts", "story")}
    for step, entry in finished.items():
        if len(entry) != 1:
            found.append(f"{step} has {len(entry)} results")
        elif result.get(step) != entry[0]["payload"]["result"]["text"]:
            found.append(f"the run's output does not hold what was recorded of {step}")
    return found


def tokens(entry: Entry) -> int:
    return int(entry["payload"]["usage"]["output_tokens"])


def main(folder: Path, made: str) -> int:
    before, after = entries(folder / "before.jsonl"), entries(folder / "after.jsonl")
    broken = problems(before, after, json.loads((folder / "result.json").read_text()))
    if broken:
        print("\ndemo: THE PROMISE WAS NOT KEPT:", *broken, sep="\n  ", file=sys.stderr)
        return 1
    (facts,), (story,) = of(after, "step_finished", "facts"), of(after, "step_finished", "story")
    notes = story["payload"].get("notes", {})
    asked = len(of(after, "intent", "facts")) + len(of(after, "intent", "story"))
    booked = tokens(facts) + tokens(story)
    print(f"""
What was not paid twice:
    facts   asked once, before the kill; its {tokens(facts)} tokens were not made again
    story   was in flight, so it was asked again: it went on behind token \
{notes.get("resumed_from_tokens", 0)} of {tokens(story)} ({notes.get("resume", "restart")})
    calls   {asked} for 2 steps: {asked - 2} repeats what was in flight""")
    if made:
        twice = max(0, int(made) - booked)
        print(f"    tokens  {made} made by the model's server, {booked} booked: {twice} made twice")
    print("\nThe promise was kept: what was finished stayed finished.")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
