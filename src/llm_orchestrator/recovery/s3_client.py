"""Requests to an object store, its errors in our words, and again when asking again helps.

boto3 is an extra, and slow to load: it is loaded in a thread when it is first needed. It repeats
nothing by itself; `Requests.ask` does, on our clock. No message holds a secret: what a server says
is passed on with our keys blotted out.
"""

from __future__ import annotations

import asyncio
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import (
    ConfigError,
    Denied,
    NotFound,
    OperatorError,
    Overtaken,
    StoreError,
    StoreUnavailable,
)

TRIES = 4
_PAUSE_S = 0.25
_SAID_MAX = 200
_BUCKET = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?")
_TAKEN = (412,)
_BUSY = (408, 409, 425, 429)
_BUSY_CODES = ("SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "BadDigest")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class S3Options:
    """Where an object store is, and how things are put there."""

    bucket: str
    prefix: str = ""
    """Without `/` at its ends."""
    endpoint_url: str = field(default="", repr=False)
    """"" is Amazon's own."""
    region: str = ""
    access_key: str = ""
    """"" leaves it to boto3: environment, files, the machine's role."""
    secret_key: str = field(default="", repr=False)
    storage_class: str = ""
    object_lock_days: int = 0
    """Until then nobody can change or remove what was put (mode COMPLIANCE); 0 is off."""
    bytes_per_s: int = 0
    """Bounds what is uploaded (0: no bound)."""
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 30.0
    """Of silence."""

    @property
    def shown(self) -> str:
        """`s3://bucket/prefix`."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


def parse_s3_url(url: str) -> tuple[str, str]:
    """Bucket and prefix of `s3://bucket/prefix`. Raises ConfigError."""
    found = _BUCKET.fullmatch(url)
    if found is None:
        raise ConfigError(f"{url!r} is no s3://bucket/prefix")
    return found[1], (found[2] or "").strip("/")


class Requests:
    """One object store's client. `ask` may be called from one event loop."""

    def __init__(self, options: S3Options, clock: Clock) -> None:
        self._options = options
        self._clock = clock
        self._client: Any = None
        self._opening = asyncio.Lock()

    async def ask(
        self,
        work: Callable[[Any], T],
        what: str,
        *,
        is_again: Callable[[], None] | None = None,
        tries: int = TRIES,
    ) -> T:
        """`work(client)` in a thread, up to `tries` times while the store does not answer.

        `is_again` is told before each repetition. `what` names the thing, for messages.
        Raises StoreUnavailable, Denied, NotFound, Overtaken, StoreError.
        """
        client = await self._connected()
        for number in range(1, tries + 1):
            try:
                return await asyncio.to_thread(self._once, work, client, what)
            except StoreUnavailable:
                if number == tries:
                    raise
            if is_again is not None:
                is_again()
            await self._clock.sleep(_PAUSE_S * 2**number * (0.5 + self._clock.chance()))
        raise AssertionError(what)

    def _once(self, work: Callable[[Any], T], client: Any, what: str) -> T:
        failures = importlib.import_module("botocore.exceptions")
        lower = importlib.import_module("urllib3.exceptions")
        try:
            return work(client)
        except failures.ClientError as error:
            raise self._refused(error.response, what) from error
        except (failures.NoCredentialsError, failures.PartialCredentialsError) as error:
            raise Denied(
                f"{self._options.shown}: there is no key to sign requests with",
                hint="set s3_access_key and s3_secret_key to env:NAME or file:PATH",
            ) from error
        except (
            failures.HTTPClientError,
            failures.ConnectionError,
            lower.HTTPError,
            TimeoutError,
        ) as error:
            raise StoreUnavailable(
                f"{what}: {self._options.shown} does not answer ({type(error).__name__})"
            ) from error
        except failures.BotoCoreError as error:
            said = self._clean(str(error))
            if type(error).__name__ in _TRANSPORT:
                raise StoreUnavailable(f"{what}: {self._options.shown}: {said}") from error
            raise StoreError(f"{what}: {self._options.shown}: {said}") from error

    async def _connected(self) -> Any:
        async with self._opening:
            if self._client is None:
                self._client = await asyncio.to_thread(self._connect)
        return self._client

    def _connect(self) -> Any:
        options = self._options
        try:
            boto3 = importlib.import_module("boto3")
            config = importlib.import_module("botocore.config").Config
        except ImportError as error:
            raise ConfigError(
                "an object store needs boto3", hint="pip install 'llm-orchestrator[s3]'"
            ) from error
        try:
            return boto3.session.Session().client(
                "s3",
                endpoint_url=options.endpoint_url or None,
                region_name=options.region or "us-east-1",
                aws_access_key_id=options.access_key or None,
                aws_secret_access_key=options.secret_key or None,
                config=config(
                    connect_timeout=options.connect_timeout_s,
                    read_timeout=options.read_timeout_s,
                    retries={"total_max_attempts": 1},
                    s3={"addressing_style": "path" if options.endpoint_url else "auto"},
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )
        except ValueError as error:
            raise ConfigError(f"s3_endpoint_url: {self._clean(str(error))}") from error

    def _refused(self, response: Any, what: str) -> OperatorError:
        """The server's answer, in our words."""
        shown = self._options.shown
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        code = str(response.get("Error", {}).get("Code", ""))
        said = self._clean(str(response.get("Error", {}).get("Message", "")))
        if status in _TAKEN:
            return Overtaken(f"{what} is in {shown} already", run_id="", epoch=0)
        if code == "NoSuchBucket":
            return NotFound(f"there is no bucket {self._options.bucket!r}", hint="make it first")
        if code == "RequestTimeTooSkewed":
            return Denied(f"{shown}: this machine's clock is wrong: {said}")
        if status >= 500 or status in _BUSY or code in _BUSY_CODES:
            return StoreUnavailable(f"{what}: {shown} answers {status} {code}: {said}")
        if status in (401, 403):
            return Denied(
                f"{what}: {shown} refuses us: {code} {said}",
                hint="check s3_access_key, s3_secret_key and the bucket's policy",
            )
        if status == 404:
            return NotFound(f"{what} is not in {shown}")
        if status in (301, 307, 400) and code in _REGION:
            return StoreError(f"{shown} is in another region: {said}", hint="set s3_region")
        return StoreError(f"{what}: {shown} answers {status} {code}: {said}")

    def _clean(self, said: str) -> str:
        for secret in (self._options.secret_key, self._options.access_key):
            if secret:
                said = said.replace(secret, "***")
        return " ".join(said.split())[:_SAID_MAX]


_REGION = ("PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "301")
_TRANSPORT = ("ResponseStreamingError", "IncompleteReadError", "ResponseParserError")
