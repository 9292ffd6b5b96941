"""Hunt planted bugs: `python -m tests.simulation.hunts NAME` exits 0 when it is caught.

`--unplanted` plays the same seeds without the bug: nothing may be caught then.
"""

from __future__ import annotations

import logging
import sys

from tests.simulation.plants import PLANTS, hunt


def main(arguments: list[str]) -> int:
    """The command."""
    logging.disable(logging.CRITICAL)
    is_planted = "--unplanted" not in arguments
    names = [name for name in arguments if not name.startswith("-")]
    code = 0
    for plant in PLANTS:
        if names and plant.name not in names:
            continue
        found = hunt(plant, is_planted=is_planted)
        print(plant.name, found or "nothing caught", flush=True)
        code |= (found is None) == is_planted
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
