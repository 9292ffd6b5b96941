"""An HTTP server for a loop that belongs to somebody else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import uvicorn

from llm_orchestrator.server.app import make_app
from llm_orchestrator.server.protocol import BoundedHttp
from llm_orchestrator.server.surface import Surface

CLOSE_S = 3
"""What requests in flight get once the node has stopped."""


class HttpServer(uvicorn.Server):
    """Uvicorn without its signal handlers: the command line owns the signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield


def make_server(surface: Surface, *, has_api: bool) -> HttpServer:
    """It serves once its `serve(sockets=[...])` runs; `should_exit` ends it."""
    return HttpServer(
        uvicorn.Config(
            make_app(surface, has_api=has_api),
            http=BoundedHttp,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=CLOSE_S,
            timeout_keep_alive=65,
            server_header=False,
            ws="none",
        )
    )
