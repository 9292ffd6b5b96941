"""Say what could not run: skipped tests, and tools that could not be had.

Usage: could_not_run.py RESULT.xml...     (JUnit files that pytest wrote)

The list is for the eye on a developer's machine; with CI=true in the environment a list that is
not empty is a failure, so that a guard cannot fall asleep unnoticed.
"""

import os
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

MISSING = Path(".tools/missing.txt")


def skipped_tests(result: Path) -> Iterator[str]:
    """One line for each skipped test in a JUnit file; an expected failure (xfail) did run."""
    for case in ET.parse(result).iter("testcase"):
        for skipped in case.iter("skipped"):
            if skipped.get("type") != "pytest.xfail":
                name = f"{case.get('classname')}::{case.get('name')}".removeprefix("::")
                yield f"{name}: {skipped.get('message')}"


def missing_tools() -> list[str]:
    """What scripts/tools could not fetch, with what does not work for lack of it."""
    return MISSING.read_text().splitlines() if MISSING.exists() else []


def main(results: list[str]) -> int:
    lines = missing_tools() + [line for path in results for line in skipped_tests(Path(path))]
    if not lines:
        print("could not run: nothing, all tests ran")
        return 0
    print(f"could not run ({len(lines)}):", *lines, sep="\n  ")
    if os.environ.get("CI", "").lower() not in {"1", "true"}:
        return 0
    print("error: on CI everything must run", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
