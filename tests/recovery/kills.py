"""How often processes are killed: a few times in `make test`, more often in `make drill`."""

from __future__ import annotations

import os

KILLS = int(os.environ.get("KILLS", "5"))
"""Random moments for each scenario."""
