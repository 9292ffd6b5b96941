"""Answers: JSON whatever a journal holds, times as people and programs read them.

Results of workflows may hold what JSON cannot say (NaN, bytes, half a surrogate pair): such a value
leaves as the journal writes it (store/escape.py), so that an answer never fails for its content.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from llm_orchestrator.model import Json
from llm_orchestrator.store.escape import escape

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class Reply(Response):
    """A JSON answer."""

    media_type = "application/json"

    def __init__(
        self, content: Any, status_code: int = 200, *, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(content, status_code, headers)

    def render(self, content: Any) -> bytes:
        """Never fails for the content."""
        return to_json(content)


def to_json(content: Json) -> bytes:
    """JSON in UTF-8; see the module's docstring."""
    try:
        return _encode(content).encode()
    except (TypeError, ValueError, RecursionError):
        return json.dumps(escape(content), allow_nan=False).encode()
