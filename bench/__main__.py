"""The benchmark: all contestants in one session, in turns, round by round.

    python -m bench                      both tables, five rounds, peers included (half an hour)
    python -m bench --store postgres     only the one on PostgreSQL (about 13 minutes)
    python -m bench --quick              one round of ours and the ideal
    python -m bench W1 W2 --rounds 3     only these workloads (W1 means W1.500 and W1.long, too)
    python -m bench --resume             go on with an interrupted session
    python -m bench --profile W1         where our processor time goes
    python -m bench --table              measure nothing, show the last session again

The table goes to stdout and, when everything was measured or with --write, into
docs/explanation/performance.md; every single measurement goes to bench/results/STORE.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from bench.contestants import CONTESTANTS, ROOT, SLOW, WORKS, Contestant, StoreKind, is_able
from bench.database import Database
from bench.measure import canary
from bench.page import ROUNDS_MIN, read_results, write_page
from bench.session import Failed, measure
from bench.table import Result, table

RESULTS = ROOT / "bench" / "results"
DATA = ROOT / ".tools" / "bench-data"


class Turn(NamedTuple):
    """One measurement to make."""

    round: int
    work: str
    one: Contestant

    @property
    def key(self) -> tuple[int, str, str]:
        return self.round, self.work, self.one.name


def main() -> None:
    chosen = arguments()
    kinds: list[StoreKind] = [chosen.store] if chosen.store else ["sqlite", "postgres"]
    if chosen.profile:
        from bench.profile import profile  # noqa: PLC0415 - only then

        for kind in kinds:
            profile(chosen.profile, kind)
        return
    if not chosen.quick and not chosen.table:
        subprocess.run([ROOT / "bench" / "peers" / "setup"], check=True)
    for kind in kinds:
        one_store(kind, chosen)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("works", nargs="*", metavar="W1..W9", help="which workloads (all)")
    parser.add_argument("--store", choices=list(WORKS), help="which table (both)")
    parser.add_argument("--rounds", type=int, default=ROUNDS_MIN, help="how often each (5)")
    parser.add_argument("--quick", action="store_true", help="one round, no peers")
    parser.add_argument("--short", action="store_true", help="without what takes peers minutes")
    parser.add_argument("--resume", action="store_true", help="keep what was measured before")
    parser.add_argument("--table", action="store_true", help="show the last session again")
    parser.add_argument("--write", action="store_true", help="into the page, complete or not")
    parser.add_argument("--note", default="", help="a sentence for the page")
    parser.add_argument("--profile", metavar="W1", choices=["W1", "W2", "W3", "W4", "W6"])
    chosen = parser.parse_args()
    known = {name for works in WORKS.values() for name in works}
    known |= {name.partition(".")[0] for name in known}
    unknown = sorted(set(chosen.works) - known)
    if unknown:
        parser.error(f"there is no workload {unknown[0]}; there are {', '.join(sorted(known))}")
    return chosen


def one_store(kind: StoreKind, chosen: argparse.Namespace) -> None:
    """Measure, or read, one table; print it; a complete one becomes the documented one."""
    file = RESULTS / f"{kind}.jsonl"
    results = read_results(file) if chosen.resume or chosen.table else []
    contestants = [one for one in CONTESTANTS[kind] if not (chosen.quick and one.is_peer)]
    for one in [one for one in contestants if not is_able(one)]:
        say(f"{one.name} could not be installed: it does not take part")
        contestants.remove(one)
    works = [work for work in WORKS[kind] if is_chosen(work, chosen.works)]
    turns = plan(kind, contestants, works, rounds=1 if chosen.quick else chosen.rounds)
    if chosen.short:
        turns = (turn for turn in turns if f"{kind} {turn.one.name} {turn.work}" not in SLOW)
    server = ""
    if not chosen.table:
        with ExitStack() as stack:
            database = None
            if kind == "postgres":
                database = Database()
                stack.callback(database.server.stop)
                database.start()
                server = database.version()
                (RESULTS / "server").write_text(server)
            results = session(turns, results, file, database=database)
    elif kind == "postgres" and (RESULTS / "server").exists():
        server = (RESULTS / "server").read_text()
    print(table(results, kind), flush=True)
    done = {(result.contestant, result.work) for result in results}
    is_complete = done >= {(one.name, work) for one in CONTESTANTS[kind] for work in one.works}
    if results and (chosen.write or (is_complete and not chosen.table)):
        write_page(results, kind, server=server, note=chosen.note)


def is_chosen(work: str, chosen: Sequence[str]) -> bool:
    """`W1` means W1.500, too."""
    return not chosen or work in chosen or work.partition(".")[0] in chosen


def plan(
    kind: StoreKind, contestants: Sequence[Contestant], works: Sequence[str], *, rounds: int
) -> Iterator[Turn]:
    """Every workload by everyone who can do it, round by round; what takes minutes comes last."""
    slow: list[Turn] = []
    for turn in range(1, rounds + 1):
        for work in works:
            for one in contestants:
                rounds_max = SLOW.get(f"{kind} {one.name} {work}")
                if work not in one.works or (rounds_max is not None and turn > rounds_max):
                    continue
                if rounds_max is None:
                    yield Turn(turn, work, one)
                else:
                    slow.append(Turn(turn, work, one))
    yield from slow


def session(
    turns: Iterator[Turn], results: list[Result], file: Path, *, database: Database | None
) -> list[Result]:
    """Measure what is not among `results` yet; those measured, all of them."""
    DATA.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(result._asdict()) + "\n" for result in results))
    known = {(result.round, result.work, result.contestant) for result in results}
    left = [turn for turn in turns if turn.key not in known]
    start = time.monotonic()
    with file.open("a") as output:
        for number, turn in enumerate(left, 1):
            say(
                f"{time.monotonic() - start:4.0f} s, {number} of {len(left)}: "
                f"round {turn.round} {turn.work} {turn.one.name}"
            )
            now = canary(DATA)
            try:
                fields = measure(turn.one, turn.work, DATA, database)
            except Failed as error:
                say(f"  failed: {error}")
                continue
            except KeyboardInterrupt:
                say("interrupted; --resume goes on from here")
                break
            facts = {**fields, **now, "load1": os.getloadavg()[0]}
            results.append(Result(turn.one.name, turn.work, turn.round, facts))
            output.write(json.dumps(results[-1]._asdict()) + "\n")
            output.flush()
    return results


def say(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    main()
