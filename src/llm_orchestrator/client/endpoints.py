"""Which endpoint is asked, what an answer means, and when to ask another one. No I/O.

An endpoint that cannot be reached, or that says 502, 503 or 504, is left for the next one; the one
that answered last is asked first. After a round without an answer there is a pause, longer each
time, until `patience_s` is spent. Asking again is safe: requests that start a run always carry an
idempotency key, and the other ones change nothing a second time, or say that they do not fit any
more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from llm_orchestrator.errors import OrchestratorError

PASSING = frozenset({502, 503, 504})
PAUSE_S_FIRST, PAUSE_S_MAX = 0.1, 2.0
Json = Any


class ApiError(OrchestratorError):
    """The server refused: RFC 9457's fields of its answer. `problem` holds all of them."""

    kind = "api"

    def __init__(self, status: int, problem: Mapping[str, Json]) -> None:
        detail = problem.get("detail") or problem.get("title") or f"HTTP {status}"
        super().__init__(str(detail), hint=problem.get("hint"))
        self.status = status
        self.code = str(problem.get("code", "http"))
        self.retryable = bool(problem.get("retryable", False))
        self.run_id = problem.get("run_id")
        self.problem = dict(problem)


class NoEndpoint(OrchestratorError):
    """No endpoint gave an answer in time. `troubles` says what each of them did."""

    kind = "no_endpoint"
    retryable = True

    def __init__(self, troubles: Mapping[str, str]) -> None:
        said = "; ".join(f"{url}: {what}" for url, what in troubles.items())
        super().__init__(f"no endpoint answers ({said})", hint="is `llmo serve` up there?")
        self.troubles = dict(troubles)


class Endpoints:
    """The order in which endpoints are asked. One that worked comes first from then on."""

    def __init__(self, urls: Sequence[str]) -> None:
        if not urls:
            raise ValueError("a client needs at least one endpoint")
        self._urls = [url.rstrip("/") for url in urls]
        self.troubles: dict[str, str] = {}

    @property
    def current(self) -> str:
        """Whom to ask now."""
        return self._urls[0]

    def __len__(self) -> int:
        return len(self._urls)

    def failed(self, url: str, what: str) -> None:
        """Ask the others before this one."""
        self.troubles[url] = what
        if url in self._urls:
            self._urls.remove(url)
            self._urls.append(url)

    def worked(self, url: str) -> None:
        """Forget what was wrong with it."""
        self.troubles.pop(url, None)


class Patience:
    """How long to wait after a round in which nobody answered."""

    def __init__(self, patience_s: float, now: float) -> None:
        self._until = now + patience_s
        self._pause_s = PAUSE_S_FIRST

    def pause_s(self, now: float, told_s: float | None = None) -> float | None:
        """Seconds to wait, or None when the patience is spent. `told_s`: the server's own word."""
        left = self._until - now
        if left <= 0:
            return None
        pause_s = min(max(self._pause_s, min(told_s or 0.0, PAUSE_S_MAX)), left)
        self._pause_s = min(self._pause_s * 2, PAUSE_S_MAX)
        return pause_s


def retry_after_s(response: httpx.Response) -> float | None:
    """The header's seconds, if it has any."""
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdigit() else None


def refusal_of(response: httpx.Response) -> str:
    """What an endpoint that cannot serve says of itself."""
    detail = _problem(response).get("detail")
    return f"HTTP {response.status_code}" + (f", {detail}" if detail else "")


def content_of(response: httpx.Response) -> Json:
    """The answer's JSON, or its text. Raises ApiError for anything but success."""
    if response.is_success:
        kind = response.headers.get("content-type", "")
        return response.json() if "json" in kind else response.text
    raise ApiError(response.status_code, _problem(response))


def _problem(response: httpx.Response) -> Mapping[str, Json]:
    try:
        problem = response.json()
    except (json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return problem if isinstance(problem, dict) else {}
