"""Our own client library as the load's way to the API: what a user's program would see.

The library passes endpoints by, waits and asks again by itself; here only what it gives up counts
as trouble. It is the system's part, not the witness's: what it says is checked like everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llm_orchestrator.client.asynchronous import AsyncTransport
from llm_orchestrator.client.endpoints import ApiError, NoEndpoint
from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.load import RETRY_S_MAX, Refused

Json = Any


class LibraryAsker:
    """The same calls as load.Asker's, by `llm_orchestrator.client`."""

    def __init__(
        self,
        endpoints: Sequence[str],
        clock: RealClock,
        on_trouble: Callable[[str], None],
        *,
        token: str = "",
    ) -> None:
        self._library = AsyncTransport(endpoints, token=token, clock=clock)
        self._clock = clock
        self._on_trouble = on_trouble

    async def close(self) -> None:
        """Close the connections."""
        await self._library.aclose()

    async def ask(
        self, method: str, path: str, *, pause_s_max: float = RETRY_S_MAX, **more: Json
    ) -> Json:
        """The answer, however long it takes. Raises Refused where asking again is of no use."""
        parameters = more.get("params")
        while True:
            try:
                return await self._library.request(
                    method,
                    path,
                    body=more.get("json"),
                    content=more.get("data"),
                    parameters=parameters,
                    headers=more.get("headers"),
                    patience_s=float((parameters or {}).get("wait", 0.0)),
                )
            except ApiError as error:
                if error.status < 500 and error.status != 429:
                    raise Refused(error.status, str(error)) from error
                self._on_trouble(str(error))
            except NoEndpoint as error:
                self._on_trouble(str(error))
            await self._clock.sleep(pause_s_max)
