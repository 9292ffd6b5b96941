"""Actions `http` and `webhook`: one HTTP request, and the truth about what became of it.

The invariant: a request is issued at most once per call. The client library would send idempotent
methods again when a connection breaks; that is switched off, for the engine owns every attempt.

What an error says:
- nothing was sent (no address, no connection): transient, try again;
- sent, and no whole answer came: unknown outcome, unless a repeat is harmless (GET, HEAD, or a step
  that declares itself `repeatable`): then transient;
- an answer is an answer: 429 is a rate limit, 408 and 5xx are transient (the status is noted),
  everything else that was not expected can never succeed as it is.

Messages name the method and the host only: paths and queries hold keys too often. Cookies are
neither kept nor given out. A receiver that sends one of our secrets back (a header that it echoes,
say) does not get it into the journal: wherever the answer's body or headers hold a secret that this
process has resolved, in plain or encoded, the outputs hold `***` instead.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn
from urllib.parse import quote

import aiohttp
from yarl import URL

from llm_orchestrator.errors import (
    AuthorError,
    ProviderError,
    ProviderInvalidRequest,
    ProviderRateLimited,
    ProviderTimeout,
    ProviderTransient,
    ProviderUnknownOutcome,
)
from llm_orchestrator.model import MICROSECONDS, Effect, Json
from llm_orchestrator.steps.action import check_parameters
from llm_orchestrator.steps.base import Outputs, StepContext
from llm_orchestrator.steps.outgoing import CheckedConnector, Outgoing
from llm_orchestrator.steps.values import describe, is_number, to_json
from llm_orchestrator.telemetry.propagation import outgoing
from llm_orchestrator.telemetry.redact import redact_json

REPEATABLE_METHODS = frozenset({"GET", "HEAD"})
METHODS = REPEATABLE_METHODS | {"POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
TIMEOUT_S = 30.0
REDIRECTS_MAX = 5
ANSWER_BYTES_MAX = 64 * 1024 * 1024
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")
_HIDDEN_HEADERS = frozenset({"set-cookie", "set-cookie2"})


@dataclass(frozen=True, slots=True)
class Request:
    """What goes out. Only GET and HEAD follow redirects: another method would turn into GET."""

    method: str
    url: URL
    headers: Mapping[str, str]
    body: bytes | None
    timeout_s: float
    expect_status: frozenset[int]
    is_repeatable: bool

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"{self.method} {self.url.host}"


class Http:
    """`method` (default GET), `url`, `headers`, `json` or `body`, `timeout`, `expect_status`."""

    known = ("url", "method", "headers", "json", "body", "timeout", "expect_status")

    def __init__(self, outgoing_allow: Sequence[str] = ()) -> None:
        self._outgoing = Outgoing(outgoing_allow)

    def effect(self, parameters: Mapping[str, Json]) -> Effect:
        """GET and HEAD change nothing."""
        method = str(parameters.get("method", "GET")).upper()
        return Effect.REPEATABLE if method in REPEATABLE_METHODS else Effect.ONCE

    async def execute(
        self, context: StepContext, parameters: Mapping[str, Json], *, effect: Effect
    ) -> Outputs:
        """Send it once; body (parsed when it is JSON), status, headers (lower-case names)."""
        check_parameters("http", parameters, self.known, required=["url"])
        method = str(parameters.get("method", "GET")).upper()
        if method not in METHODS:
            raise AuthorError(f"action http has no method {method!r}")
        headers = _headers(parameters.get("headers"))
        body = _body(parameters, headers)
        if method not in REPEATABLE_METHODS:
            headers.setdefault("idempotency-key", _header_key(context))
        request = _request(method, parameters, headers=headers, body=body, effect=effect)
        return await send(context, request, self._outgoing)


class Webhook:
    """POSTs `payload` as JSON to `url`, signed by `secret` as Standard Webhooks 1.0 says.

    The message's id is the idempotency key: a receiver that remembers ids sees each message once.
    """

    known = ("url", "payload", "secret", "headers", "timeout", "expect_status")

    def __init__(self, outgoing_allow: Sequence[str] = ()) -> None:
        self._outgoing = Outgoing(outgoing_allow)

    def effect(self, parameters: Mapping[str, Json]) -> Effect:
        """A receiver need not remember ids."""
        return Effect.ONCE

    async def execute(
        self, context: StepContext, parameters: Mapping[str, Json], *, effect: Effect
    ) -> Outputs:
        """Send it once; the outputs are those of `http`."""
        check_parameters("webhook", parameters, self.known, required=["url"])
        body = to_json(parameters.get("payload", {})).encode("utf-8", "surrogatepass")
        timestamp = str(context.clock.now_us() // MICROSECONDS)
        headers = _headers(parameters.get("headers"))
        headers["content-type"] = "application/json"
        headers["webhook-id"] = _header_key(context)
        headers["webhook-timestamp"] = timestamp
        if secret := parameters.get("secret"):
            signed = f"{headers['webhook-id']}.{timestamp}.".encode() + body
            headers["webhook-signature"] = sign(str(secret), signed)
        request = _request("POST", parameters, headers=headers, body=body, effect=effect)
        return await send(context, request, self._outgoing)


def sign(secret: str, message: bytes) -> str:
    """`v1,` and the base64 HMAC-SHA256. A secret `whsec_...` is base64, any other is taken as is.

    Source: Standard Webhooks specification, "Signature scheme" (symmetric).
    """
    key = secret.encode()
    if secret.startswith("whsec_"):
        try:
            key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        except binascii.Error as error:
            raise AuthorError("the webhook's secret starts with whsec_ but is no base64") from error
    digest = hmac.new(key, message, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


async def send(context: StepContext, request: Request, policy: Outgoing) -> Outputs:
    """Issue one request. Raises ProviderError's subclasses, as the module's docstring says."""
    progress, connector = _Progress(), policy.connector()
    try:
        async with (
            _open_session(request, progress, connector) as session,
            session.request(
                request.method,
                request.url,
                headers={**outgoing(), **request.headers},
                data=request.body,
                allow_redirects=request.method in REPEATABLE_METHODS,
                max_redirects=REDIRECTS_MAX,
            ) as response,
        ):
            content = await _read(response, request)
            _check_status(context, request, response)
            return {
                "body": redact_json(_parse(content, response)),
                "status": response.status,
                "headers": redact_json(_shown_headers(response)),
            }
    except ProviderError:
        raise
    except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError, aiohttp.TooManyRedirects) as error:
        raise ProviderInvalidRequest(f"{request.label}: {type(error).__name__}") from error
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        if connector.refusal is not None:
            raise connector.refusal from error
        _explain(request, error, is_sent=progress.is_sent)


@dataclass(slots=True)
class _Progress:
    """Has a byte of the request gone out? Said before it goes, never after."""

    is_sent: bool = False

    def trace(self) -> aiohttp.TraceConfig:
        config = aiohttp.TraceConfig()
        config.on_request_headers_sent.append(self._mark)
        return config

    async def _mark(self, *_: Any) -> None:
        self.is_sent = True


class _Broken(aiohttp.ClientConnectionError):
    """A connection that broke, in a kind after which the client library does not send again."""


async def _never_send_again(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    try:
        return await handler(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise _Broken(type(error).__name__) from error


def _open_session(
    request: Request, progress: _Progress, connector: CheckedConnector
) -> aiohttp.ClientSession:
    """A session for one request: no cookies, no proxies or passwords out of the environment."""

    async def name_host(
        hop: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        connector.begin(hop.url.host or "")
        return await handler(hop)

    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=request.timeout_s),
        cookie_jar=aiohttp.DummyCookieJar(),
        trace_configs=[progress.trace()],
        middlewares=(name_host, _never_send_again),
        trust_env=False,
    )


def _explain(request: Request, error: Exception, *, is_sent: bool) -> NoReturn:
    is_late = isinstance(error, TimeoutError)
    what = f"no answer within {request.timeout_s:g} s" if is_late else _name(error)
    if not is_sent:
        kind = ProviderTimeout if is_late else ProviderTransient
        raise kind(f"{request.label}: nothing was sent: {what}") from error
    if request.is_repeatable:
        kind = ProviderTimeout if is_late else ProviderTransient
        raise kind(f"{request.label}: the answer was lost: {what}") from error
    raise ProviderUnknownOutcome(
        f"{request.label} was sent and no whole answer came back ({what}):"
        " it may or may not have been done",
        hint="look at the receiver, then decide: llmo runs explain",
    ) from error


def _name(error: Exception) -> str:
    """An error without its text, which may hold the address."""
    cause = error.__cause__ if isinstance(error, _Broken) else error
    reason = getattr(cause, "os_error", cause)
    return getattr(reason, "strerror", None) or type(cause).__name__


def _check_status(context: StepContext, request: Request, response: aiohttp.ClientResponse) -> None:
    status = response.status
    if status in request.expect_status or (not request.expect_status and 200 <= status < 300):
        return
    context.note("http_status", status)
    said = f"{request.label} answered {status} {response.reason or ''}".rstrip()
    retry_after_s = _retry_after_s(context, response.headers.get("retry-after", ""))
    if status == 429:
        raise ProviderRateLimited(said, status=status, retry_after_s=retry_after_s)
    if status == 408 or status >= 500:
        raise ProviderTransient(said, status=status, retry_after_s=retry_after_s)
    hint = "only GET and HEAD follow redirects: give the final url" if 300 <= status < 400 else None
    raise ProviderInvalidRequest(said, status=status, hint=hint)


def _retry_after_s(context: StepContext, text: str) -> float | None:
    """Seconds or an HTTP date (RFC 9110, 10.2.3); None when the header says neither."""
    if text.strip().isdecimal():
        return float(text)
    try:
        moment = parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None
    return max(0.0, moment - context.clock.now_us() / MICROSECONDS)


async def _read(response: aiohttp.ClientResponse, request: Request) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > ANSWER_BYTES_MAX:
            raise ProviderInvalidRequest(f"{request.label}: the answer is larger than 64 MiB")
        chunks.append(chunk)
    return b"".join(chunks)


def _parse(content: bytes, response: aiohttp.ClientResponse) -> Json:
    """JSON when it says so and is, else text, else {"base64": ...}: an answer is never lost."""
    if not content:
        return None
    try:
        text = content.decode(response.charset or "utf-8")
    except (UnicodeDecodeError, LookupError):
        return {"base64": base64.b64encode(content).decode()}
    subtype = response.content_type.rpartition("/")[2]
    if subtype == "json" or subtype.endswith("+json"):
        try:
            return json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return text
    return text


def _refuse(name: str) -> NoReturn:
    raise ValueError(name)


def _shown_headers(response: aiohttp.ClientResponse) -> dict[str, Json]:
    names = {name.lower() for name in response.headers} - _HIDDEN_HEADERS
    return {name: ", ".join(response.headers.getall(name)) for name in sorted(names)}


def _request(
    method: str,
    parameters: Mapping[str, Json],
    *,
    headers: Mapping[str, str],
    body: bytes | None,
    effect: Effect,
) -> Request:
    return Request(
        method=method,
        url=_url(parameters["url"]),
        headers=headers,
        body=body,
        timeout_s=_timeout_s(parameters.get("timeout", TIMEOUT_S)),
        expect_status=_statuses(parameters.get("expect_status")),
        is_repeatable=effect is Effect.REPEATABLE,
    )


def _url(value: Json) -> URL:
    try:
        url = URL(value)
    except (ValueError, TypeError) as error:
        raise AuthorError(f"the url is {describe(value)} and no address") from error
    if url.scheme not in {"http", "https"} or not url.host:
        raise AuthorError("the url must begin with http:// or https:// and name a host")
    return url


def _headers(value: Json) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise AuthorError(f"headers are {describe(value)}; they must be an object")
    headers = {str(name).lower(): str(item) for name, item in value.items()}
    for name, item in headers.items():
        if not _HEADER_NAME.fullmatch(name) or not item.replace("\t", " ").isprintable():
            raise AuthorError(f"the header {name!r} holds characters that no header may hold")
    return headers


def _header_key(context: StepContext) -> str:
    """The idempotency key in characters that a header may hold; an ordinary one stays as it is."""
    return quote(context.idempotency_key, safe="!#$&'()*+,/:;=?@[]|~")


def _body(parameters: Mapping[str, Json], headers: dict[str, str]) -> bytes | None:
    body = parameters.get("body")
    if "json" in parameters:
        if body is not None:
            raise AuthorError("action http takes either 'json' or 'body', not both")
        headers.setdefault("content-type", "application/json")
        return to_json(parameters["json"]).encode("utf-8", "surrogatepass")
    if body is None:
        return None
    if not isinstance(body, str):
        raise AuthorError(f"the body is {describe(body)}; use 'json' for what is no text")
    headers.setdefault("content-type", "text/plain; charset=utf-8")
    return body.encode("utf-8", "surrogatepass")


def _timeout_s(value: Json) -> float:
    if not is_number(value) or not 0 < value <= 86_400:
        raise AuthorError(f"the timeout is {describe(value)}; it must be seconds, above 0")
    return float(value)


def _statuses(value: Json) -> frozenset[int]:
    items = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(type(item) is int and 100 <= item <= 599 for item in items):
        raise AuthorError("expect_status must be a status like 201, or a list of them")
    return frozenset(items)
