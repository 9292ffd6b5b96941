"""Loaded by schemathesis (schemathesis.toml): nobody waits long for a run that does not end."""

from __future__ import annotations

from typing import Any

import schemathesis

WAIT_S = 0.1


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """A `wait` that the document allows becomes a short one; all that it would cost is time."""
    wait = (case.query or {}).get("wait")
    if isinstance(wait, int | float) and not isinstance(wait, bool) and WAIT_S < wait <= 300:
        case.query["wait"] = WAIT_S
