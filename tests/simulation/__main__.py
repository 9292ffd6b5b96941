"""Play seeds: `python -m tests.simulation --seed N` prints one's trace, `--seeds N` plays many.

The order of sets of strings depends on the interpreter's hash seed, so that is fixed first.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

_CHUNK = 50


def play(seed: int, *, is_verbose: bool = False, is_logged: bool = False) -> Any:
    """One seed: its world, after the end, and what it violated."""
    from tests.simulation.seeds import shape_of
    from tests.simulation.world import World

    logging.disable(logging.NOTSET if is_logged else logging.CRITICAL)
    world = World(shape_of(seed), is_verbose=is_verbose)
    return world, world.run()


def many(first: int, count: int) -> list[tuple[int, str, list[str]]]:
    """Seed, digest and violations of each."""
    found = []
    gc.freeze()
    for seed in range(first, first + count):
        world, violations = play(seed)
        found.append((seed, world.digest, violations))
        del world
    return found


def main(arguments: list[str]) -> int:
    """The command; 1 when something was violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="play this one and print its trace")
    parser.add_argument("--seeds", type=int, default=0, help="play so many")
    parser.add_argument("--from", type=int, default=0, dest="first", help="beginning with this one")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--digests", action="store_true", help="print each seed's trace digest")
    chosen = parser.parse_args(arguments)
    if chosen.seed is not None:
        world, violations = play(chosen.seed, is_verbose=True)
        print(world.shape)
        print("\n".join(world.trace))
        print(
            f"digest {world.digest}, {world.loop.turns} turns, violations: {violations or 'none'}"
        )
        return 1 if violations else 0
    starts = range(chosen.first, chosen.first + chosen.seeds, _CHUNK)
    jobs = [(start, min(_CHUNK, chosen.first + chosen.seeds - start)) for start in starts]
    failed = 0
    with ProcessPoolExecutor(max(1, min(chosen.processes, len(jobs)))) as pool:
        for future in as_completed([pool.submit(many, *job) for job in jobs]):
            for seed, digest, violations in future.result():
                if chosen.digests:
                    print(seed, digest)
                if violations:
                    failed += 1
                    print(f"seed {seed}: {violations[0]} ({len(violations)} in all)", flush=True)
    print(f"{chosen.seeds} seeds from {chosen.first}: {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])
    sys.exit(main(sys.argv[1:]))
