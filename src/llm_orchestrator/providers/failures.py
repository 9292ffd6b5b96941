"""From a provider's refusal to our typed error: pure, no I/O.

What decides is the status, then the error's own type or code. The message keeps a short excerpt of
the provider's words with every key removed; nothing else of the answer travels on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime

from llm_orchestrator.errors import (
    ProviderAuthentication,
    ProviderContentFiltered,
    ProviderError,
    ProviderInvalidRequest,
    ProviderRateLimited,
    ProviderTransient,
)
from llm_orchestrator.model import MICROSECONDS, Json
from llm_orchestrator.telemetry.redact import redact

EXCERPT_MAX = 300
RETRY_AFTER_S_MAX = 86_400.0

_KEYS = re.compile(r"\b(?:sk|pk|gsk|pcsk|xai|AIza)[-_][\w*.\-]{6,}|(?i:bearer)\s+[\w*.\-]+")
_FILTERED = ("content_filter", "content_policy_violation", "responsibleaipolicyviolation")
_TRANSIENT = frozenset({408, 409, 421, 425, 500, 502, 503, 504, 520, 522, 524, 529})
_BY_KIND: Mapping[str, int] = {
    "overloaded_error": 529,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "authentication_error": 401,
    "invalid_api_key": 401,
    "permission_error": 403,
    "invalid_request_error": 400,
    "not_found_error": 404,
    "timeout_error": 504,
}


@dataclass(frozen=True, slots=True)
class Failure:
    """Who failed: the provider, the setting that holds its key, and what must not be shown."""

    provider: str
    variable: str = ""
    secrets: tuple[str, ...] = field(default=(), repr=False)
    now_us: int = 0


def error_of(
    failure: Failure, status: int, body: bytes, *, headers: Mapping[str, str]
) -> ProviderError:
    """The error for an answer with `status`. `body` may be anything."""
    message, kind = _read(body)
    said = excerpt(message, failure.secrets) if message else "no reason given"
    text = f"{failure.provider} answered {status}: {said}"
    wait = retry_after_s(headers, failure.now_us)

    def made(
        kind: type[ProviderError], hint: str | None = None, wait: float | None = None
    ) -> ProviderError:
        return kind(text, provider=failure.provider, status=status, retry_after_s=wait, hint=hint)

    if any(word in kind for word in _FILTERED):
        return made(ProviderContentFiltered, "change the prompt")
    if status == 429:
        hint = "add credit or raise the limit" if "insufficient_quota" in kind else None
        return made(ProviderRateLimited, hint, wait)
    if status in (401, 402, 403, 407):
        hint = "check the account's credit" if status == 402 else key_hint(failure.variable)
        return made(ProviderAuthentication, hint)
    if status in _TRANSIENT or status >= 500:
        return made(ProviderTransient, None, wait)
    hint = "set the base URL to its final address" if status < 400 else None
    return made(ProviderInvalidRequest, hint)


def stream_error(failure: Failure, error: Json) -> ProviderError:
    """The error that a provider reports in the middle of a stream.

    `error` is its JSON, wrapped in `error` or not.
    """
    body = error if isinstance(error, Mapping) and "error" in error else {"error": error}
    _, kind = _read(json.dumps(body).encode())
    detail = body["error"] if isinstance(body["error"], Mapping) else {}
    code = detail.get("code")
    status = code if isinstance(code, int) and 400 <= code < 600 else 0
    status = status or next((s for name, s in _BY_KIND.items() if name in kind), 500)
    return error_of(failure, status, json.dumps(body).encode(), headers={})


def key_hint(variable: str) -> str:
    """What to do about a key that is missing or refused."""
    return f"set {variable}" if variable else "check the provider's key"


def retry_after_s(headers: Mapping[str, str], now_us: int) -> float | None:
    """Seconds to wait, as the provider says: retry-after-ms, or Retry-After (seconds or a date).

    A date is compared with the answer's own Date header, so that our clock need not be right.
    """
    if (precise := _number(headers.get("retry-after-ms"))) is not None:
        return min(max(precise / 1000, 0.0), RETRY_AFTER_S_MAX)
    text = headers.get("Retry-After")
    if (seconds := _number(text)) is not None:
        return min(max(seconds, 0.0), RETRY_AFTER_S_MAX)
    until = _date_s(text)
    if until is None:
        return None
    now = _date_s(headers.get("Date"))
    now = now_us / MICROSECONDS if now is None else now
    return min(max(until - now, 0.0), RETRY_AFTER_S_MAX)


def scrub(text: str, secrets: tuple[str, ...]) -> str:
    """Remove known keys and whatever looks like one."""
    for secret in secrets:
        if len(secret) >= 4:
            text = text.replace(secret, "***")
    return _KEYS.sub("***", redact(text))


def excerpt(text: str | bytes, secrets: tuple[str, ...] = ()) -> str:
    """One short line without keys."""
    if isinstance(text, bytes):
        text = text[: EXCERPT_MAX * 8].decode("utf-8", "replace")
    line = " ".join(scrub(text, secrets).split())
    return line if len(line) <= EXCERPT_MAX else line[: EXCERPT_MAX - 1] + "…"


def _read(body: bytes) -> tuple[str, str]:
    """Message and lower-case kind words of an error body, whichever provider's shape it has."""
    try:
        data = json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace"), ""
    if isinstance(data, list) and data:
        data = data[0]
    if not isinstance(data, Mapping):
        return str(data), ""
    detail = data.get("error", data)
    if not isinstance(detail, Mapping):
        return str(detail), ""
    inner = detail.get("innererror")
    code = inner.get("code", "") if isinstance(inner, Mapping) else ""
    kind = f"{detail.get('type', '')} {detail.get('code', '')} {code}".lower()
    return str(detail.get("message") or detail.get("detail") or data.get("detail") or ""), kind


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text else None
    except ValueError:
        return None
    return value if value is not None and value == value else None  # noqa: PLR0124  NaN


def _date_s(text: str | None) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp() if text else None
    except (TypeError, ValueError):
        return None
