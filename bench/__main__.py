"""The benchmark: all contestants in one session, in turns, round by round.

    python -m bench                      five rounds of all, peers included (about 15 minutes)
    python -m bench --quick              one round of ours and the ideal
    python -m bench W1 W2 --rounds 3     only these workloads
    python -m bench --profile W1         where our processor time goes
    python -m bench --table FILE         the table of an earlier session

The table goes to stdout and, when everything was measured, into docs/explanation/performance.md;
every single measurement goes to bench/results/latest.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from bench.contestants import CONTESTANTS, ROOT, Contestant
from bench.measure import canary
from bench.page import read_results, write_page
from bench.session import Failed, measure
from bench.table import WORKS, Result, table

RESULTS = ROOT / "bench" / "results" / "latest.jsonl"
SLOW = {"dbos W5", "langgraph W5"}
SLOW_ROUNDS_MAX = 2


def main() -> None:
    chosen = arguments()
    if chosen.profile:
        from bench.profile import profile  # noqa: PLC0415 - only then

        profile(chosen.profile)
        return
    if chosen.table:
        show(read_results(chosen.table), WORKS)
        return
    contestants = [one for one in CONTESTANTS if not (chosen.quick and one.is_peer)]
    if any(one.is_peer for one in contestants):
        subprocess.run([ROOT / "bench" / "peers" / "setup"], check=True)
    works = chosen.works or WORKS
    results = session(contestants, works, 1 if chosen.quick else chosen.rounds)
    show(results, works)


def show(results: list[Result], works: list[str]) -> None:
    """Print the table; a session of everything becomes the documented one."""
    print(table(results, [work for work in WORKS if work in works]))
    measured = {(result.contestant, result.work) for result in results}
    if all((one.name, work) in measured for one in CONTESTANTS for work in one.works):
        write_page(results)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("works", nargs="*", metavar="W1..W7", help="which workloads (all)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (5)")
    parser.add_argument("--quick", action="store_true", help="one round, no peers")
    parser.add_argument("--profile", metavar="W1", choices=["W1", "W2", "W3", "W4", "W6"])
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing, show FILE")
    chosen = parser.parse_args()
    unknown = sorted(set(chosen.works) - set(WORKS))
    if unknown:
        parser.error(f"there is no workload {unknown[0]}; there are {', '.join(WORKS)}")
    return chosen


def session(contestants: list[Contestant], works: list[str], rounds: int) -> list[Result]:
    """Every workload by every contestant that can do it, one after the other, `rounds` times."""
    data = ROOT / ".tools" / "bench-data"
    data.mkdir(parents=True, exist_ok=True)
    RESULTS.parent.mkdir(exist_ok=True)
    results: list[Result] = []
    with RESULTS.open("w") as file:
        for turn in range(1, rounds + 1):
            for work in works:
                for one in contestants:
                    is_slow = f"{one.name} {work}" in SLOW
                    if work not in one.works or (is_slow and turn > SLOW_ROUNDS_MAX):
                        continue
                    say(f"round {turn} of {rounds}: {work} {one.name}")
                    now = canary(data)
                    try:
                        fields = measure(one, work, data)
                    except Failed as error:
                        say(f"  failed: {error}")
                        continue
                    result = Result(one.name, work, turn, {**fields, **now, "load1": load()})
                    results.append(result)
                    file.write(json.dumps(result._asdict()) + "\n")
                    file.flush()
    return results


def load() -> float:
    """How many others wanted a processor in the last minute."""
    return os.getloadavg()[0]


def say(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    main()
