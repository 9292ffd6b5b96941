"""The one HTTP client of all adapters: one POST, one answer or one stream, typed errors.

Built on aiohttp because of what a call costs here: 0.10 ms of CPU, against 0.55 (httpx2), 3.15
(httpx), 1.4 (openai's SDK) and 2.8 (litellm). It never retries, never follows a redirect (a key
must not travel to another host) and never reads the environment. A key is in a header and nowhere
else: error messages are shortened and scrubbed. Every failure is one of errors.ProviderError; a
request that was cut off counts as transient, because asking a model again is always allowed.

A target may name further addresses. The next one is tried only when a connection could not be made,
and a kept connection that proves dead before the request is written is replaced by another: no
request is ever sent twice. llama.cpp closes the connection after every stream though it promises to
keep it, so a stream over plain HTTP gets one of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

import aiohttp

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import (
    ProviderError,
    ProviderInvalidRequest,
    ProviderTimeout,
    ProviderTransient,
)
from llm_orchestrator.model import Json
from llm_orchestrator.providers.failures import Failure, error_of, excerpt, scrub
from llm_orchestrator.providers.sse import Event, SseParser
from llm_orchestrator.telemetry.propagation import outgoing

_CONNECT_S_MAX = 10.0
_IDLE_S_MAX = 4.0  # uvicorn and llama.cpp close theirs after 5 s; be the first
_STALE_MAX = 2
_ANSWER_BYTES_MAX = 256 << 20
_ERROR_BYTES_MAX = 64 << 10


@dataclass(frozen=True, slots=True)
class Target:
    """Who is called. `variable` is the setting that holds the key, named in hints."""

    provider: str
    base_urls: tuple[str, ...]
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    key: str = field(default="", repr=False)
    variable: str = ""
    timeout_s: float = 300.0
    """Longest silence: until the answer begins, and between two pieces of it."""


class HttpClient:
    """Connections of one process, made when they are first used, closed by `close`."""

    def __init__(
        self, *, clock: Clock, connections_max: int = 512, proxy: str | None = None
    ) -> None:
        self.clock = clock
        self._connections_max = connections_max
        self._proxy = proxy
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def post(
        self, target: Target, path: str, body: Json, *, headers: Mapping[str, str] | None = None
    ) -> Json:
        """Send `body` as JSON and return the answer's JSON."""
        async with self._open(target, "POST", path, body=body, headers=headers) as response:
            return await _read_json(target, response)

    @contextlib.asynccontextmanager
    async def stream(
        self,
        target: Target,
        path: str,
        *,
        body: Json = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Stream]:
        """POST `body` (GET without one) and hand out the answer as it comes.

        A server that answers with plain JSON though a stream was asked for is understood too.
        """
        method = "GET" if body is None else "POST"
        accept = {"Accept": "text/event-stream", **(headers or {})}
        if any(url.startswith("http:") for url in target.base_urls):
            accept["Connection"] = "close"
        async with self._open(target, method, path, body=body, headers=accept) as response:
            if response.content_type == "application/json":
                yield Stream(target, None, await _read_json(target, response))
            else:
                yield Stream(target, response, None)

    async def close(self) -> None:
        """Close every connection. The client can be used again afterwards."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    @contextlib.asynccontextmanager
    async def _open(
        self,
        target: Target,
        method: str,
        path: str,
        *,
        body: Json,
        headers: Mapping[str, str] | None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        data = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        sent = {**outgoing(), **target.headers, **(headers or {})}
        if data is not None:
            sent["Content-Type"] = "application/json"
        with _typed_errors(target):
            response = await self._connect(target, method, path, data=data, headers=sent)
        try:
            if response.status >= 300:
                await self._refuse(target, response)
            yield response
        finally:
            response.release() if response.content.at_eof() else response.close()

    async def _connect(
        self,
        target: Target,
        method: str,
        path: str,
        *,
        data: bytes | None,
        headers: Mapping[str, str],
    ) -> aiohttp.ClientResponse:
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=_CONNECT_S_MAX, sock_read=target.timeout_s
        )
        session = self._ready()
        stale = 0
        addresses = list(reversed(target.base_urls))
        while addresses:
            try:
                return await session.request(
                    method,
                    addresses[-1] + path,
                    data=data,
                    headers=headers,
                    timeout=timeout,
                    proxy=self._proxy,
                    allow_redirects=False,
                )
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
                addresses.pop()
                if not addresses:
                    raise
            except aiohttp.ClientOSError as error:
                stale += 1
                if stale > _STALE_MAX or not _is_unsent(error):
                    raise
        raise ProviderInvalidRequest(f"{target.provider} has no address", provider=target.provider)

    def _ready(self) -> aiohttp.ClientSession:
        """Return the session of the running loop; another loop's is of no use here."""
        loop = asyncio.get_running_loop()
        if self._session is None or self._session.closed or self._loop is not loop:
            self._loop = loop
            connector = aiohttp.TCPConnector(
                limit=self._connections_max, keepalive_timeout=_IDLE_S_MAX
            )
            self._session = aiohttp.ClientSession(connector=connector, trust_env=False)
        return self._session

    async def _refuse(self, target: Target, response: aiohttp.ClientResponse) -> NoReturn:
        raw = b""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            raw = await response.content.read(_ERROR_BYTES_MAX)
        failure = Failure(target.provider, target.variable, (target.key,), self.clock.now_us())
        raise error_of(failure, response.status, raw, headers=response.headers)


class Stream:
    """An answer under way. Exactly one of `events` and `whole` has something to say."""

    def __init__(
        self, target: Target, response: aiohttp.ClientResponse | None, whole: Json
    ) -> None:
        self._target = target
        self._response = response
        self.whole = whole

    async def events(self) -> AsyncGenerator[Event, None]:
        """Events as they come. A connection that breaks raises; one that just ends does not."""
        if self._response is None:
            return
        parser = SseParser()
        with _typed_errors(self._target):
            async for chunk in self._response.content.iter_any():
                for event in parser.feed(chunk):
                    yield event


def parse(target: Target, text: str | bytes) -> Json:
    """JSON of a provider. Bad JSON is the provider's trouble, and it passes."""
    try:
        return json.loads(text)
    except ValueError as error:
        shown = excerpt(text, (target.key,))
        raise ProviderTransient(
            f"{target.provider} answered with something that is not JSON: {shown}",
            provider=target.provider,
        ) from error


def _is_unsent(error: aiohttp.ClientOSError) -> bool:
    """True when the connection was found closed before all of the request was written to it."""
    return isinstance(error.__cause__, aiohttp.ClientConnectionResetError)


async def _read_json(target: Target, response: aiohttp.ClientResponse) -> Json:
    parts, size = [], 0
    with _typed_errors(target):
        async for part in response.content.iter_any():
            parts.append(part)
            size += len(part)
            if size > _ANSWER_BYTES_MAX:
                raise ProviderInvalidRequest(
                    f"{target.provider} answered with more than {_ANSWER_BYTES_MAX} bytes",
                    provider=target.provider,
                )
    return parse(target, b"".join(parts))


@contextlib.contextmanager
def _typed_errors(target: Target) -> Iterator[None]:
    """Translate aiohttp's errors. Nothing of aiohttp's leaves this module.

    Put only around waiting for the network: what a reader of the stream raises is not ours.
    """
    name = target.provider
    where = target.base_urls[0] if target.base_urls else "nowhere"
    try:
        yield
    except ProviderError:
        raise
    except TimeoutError as error:
        raise ProviderTimeout(
            f"{name} was silent for {target.timeout_s:g} s ({where})", provider=name
        ) from error
    except aiohttp.InvalidURL as error:
        raise ProviderInvalidRequest(
            f"{name} has no usable address: {where}", provider=name, hint="set its base URL"
        ) from error
    except aiohttp.ClientConnectorError as error:
        cause = getattr(error, "os_error", error)
        reason = scrub(getattr(cause, "strerror", None) or str(cause), (target.key,))
        raise ProviderTransient(
            f"{name} cannot be reached at {where}: {reason}", provider=name
        ) from error
    except (aiohttp.ClientError, OSError) as error:
        reason = scrub(str(error) or type(error).__name__, (target.key,))
        raise ProviderTransient(
            f"{name} broke off the connection ({where}): {reason}", provider=name
        ) from error
