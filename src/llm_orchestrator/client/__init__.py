"""The HTTP client: `Client` blocks, `AsyncClient` awaits; both take several endpoints.

    with Client(endpoints=["https://a:8080", "https://b:8080"], token="...") as client:
        run = client.execute("summarise", {"topic": "whales"}, wait=30)
        print(run["output"])

`sync.py` is written from `asynchronous.py` by `make docs`; only the latter is edited.
"""

from llm_orchestrator.client.asynchronous import AsyncClient
from llm_orchestrator.client.endpoints import ApiError, NoEndpoint
from llm_orchestrator.client.events import Event, Held
from llm_orchestrator.client.sync import Client

__all__ = ["ApiError", "AsyncClient", "Client", "Event", "Held", "NoEndpoint"]
