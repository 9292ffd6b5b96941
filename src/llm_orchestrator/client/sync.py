"""The client's calls, blocking. Written from asynchronous.py by `make docs`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from llm_orchestrator.client.endpoints import (
    PASSING,
    Endpoints,
    NoEndpoint,
    Patience,
    content_of,
    refusal_of,
    retry_after_s,
)
from llm_orchestrator.client.events import Event, Held, Parser
from llm_orchestrator.client.sockets import LIMITS, socket_options
from llm_orchestrator.clock import BlockingClock, new_run_id
from llm_orchestrator.model import Json

CONNECT_S = 1.0
"""A black-holed endpoint costs this much, once; `sockets.LOST_S` where it was connected before."""
ANSWER_S = 10.0
_ENDED = frozenset({"completed", "failed", "cancelled", "paused"})


class Transport:
    """Asks one endpoint after the other until one answers."""

    def __init__(
        self,
        endpoints: Sequence[str] = ("http://127.0.0.1:8080",),
        *,
        token: str = "",
        patience_s: float = 60.0,
        clock: BlockingClock | None = None,
    ) -> None:
        self._endpoints = Endpoints(endpoints)
        self._patience_s = patience_s
        self._clock = clock or BlockingClock()
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S),
            trust_env=False,
            transport=httpx.HTTPTransport(limits=LIMITS, socket_options=socket_options()),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        body: Json = None,
        content: bytes | None = None,
        parameters: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        patience_s: float = 0.0,
    ) -> Json:
        """One call of the API; its JSON. `patience_s` is how much longer than usual it may take."""
        shown = {key: value for key, value in (parameters or {}).items() if value is not None}
        patience = Patience(self._patience_s, self._clock.monotonic())
        while True:
            told_s = None
            for _ in range(len(self._endpoints)):
                url = self._endpoints.current
                try:
                    response = self._http.request(
                        method,
                        url + path,
                        json=body,
                        content=content,
                        params=shown,
                        headers=headers,
                        timeout=httpx.Timeout(ANSWER_S + patience_s, connect=CONNECT_S),
                    )
                except httpx.TransportError as error:
                    self._endpoints.failed(url, _name(error))
                    continue
                if response.status_code in PASSING:
                    told_s = retry_after_s(response)
                    self._endpoints.failed(url, refusal_of(response))
                    continue
                self._endpoints.worked(url)
                return content_of(response)
            self._pause(patience, told_s)

    def _pause(self, patience: Patience, told_s: float | None) -> None:
        pause_s = patience.pause_s(self._clock.monotonic(), told_s)
        if pause_s is None:
            raise NoEndpoint(self._endpoints.troubles)
        self._clock.pause(pause_s)


class Client(Transport):
    """One server, or several that serve the same store. Safe to share between threads.

    `patience_s`: how long a call goes on asking while nobody answers (a failover takes up to 30 s).
    Every call raises ApiError (the server's refusal) or NoEndpoint.
    """

    # -- workflows -----------------------------------------------------------------------------

    def register(self, text: str | bytes, *, is_json: bool = False) -> Json:
        """Keep a workflow, given as YAML or JSON text."""
        kind = "application/json" if is_json else "application/yaml"
        content = text.encode() if isinstance(text, str) else text
        headers = {"content-type": kind}
        return self.request("POST", "/api/v1/workflows", content=content, headers=headers)

    def workflows(self) -> Json:
        """The registered workflows."""
        return self.request("GET", "/api/v1/workflows")

    def execute(
        self,
        workflow: str,
        inputs: Json = None,
        *,
        version: str | None = None,
        idempotency_key: str | None = None,
        wait_s: float = 0.0,
        labels: Mapping[str, str] | None = None,
        priority: int | None = None,
        queue: str | None = None,
        delay_s: float | None = None,
    ) -> Json:
        """Start a run; with `wait_s` the answer comes when it ended, or when that time is over.

        Without an `idempotency_key` of yours the call gets one of its own, so that asking another
        endpoint never starts a second run.
        """
        given = {
            "inputs": inputs,
            "labels": dict(labels) if labels else None,
            "priority": priority,
            "queue": queue,
            "delay_s": delay_s,
        }
        parameters = {"version": version, "wait": f"{wait_s:g}" if wait_s else None}
        return self.request(
            "POST",
            f"/api/v1/workflows/{quote(workflow, safe='')}/execute",
            body={key: value for key, value in given.items() if value is not None},
            parameters=parameters,
            headers={"idempotency-key": idempotency_key or new_run_id(self._clock)},
            patience_s=wait_s,
        )

    # -- runs ----------------------------------------------------------------------------------

    def runs(self, **filters: Any) -> Iterator[Json]:
        """Runs, newest first, page by page. Filters: state, workflow, label, since, until."""
        parameters = dict(filters)
        while True:
            page = self.request("GET", "/api/v1/runs", parameters=parameters)
            for run in page["items"]:
                yield run
            if not page.get("next"):
                return
            parameters["cursor"] = page["next"]

    def run(self, run_id: str) -> Json:
        """Where a run stands."""
        return self._get(run_id, "")

    def result(self, run_id: str, *, wait_s: float = 0.0) -> Json:
        """State, output and error; waits up to `wait_s` for its end."""
        left_s = wait_s
        while True:
            part_s = min(left_s, 20.0)
            parameters = {"wait": f"{part_s:g}"} if part_s else {}
            found = self._get(run_id, "/result", parameters, patience_s=part_s)
            left_s -= part_s
            if found["state"] in _ENDED or left_s <= 0:
                return found

    def explain(self, run_id: str) -> Json:
        """Why it is not moving, and what would move it."""
        return self._get(run_id, "/explain")

    def cancel(self, run_id: str) -> Json:
        """End it for good."""
        return self._ask(run_id, "cancel")

    def pause(self, run_id: str) -> Json:
        """Let steps in flight end, then hold it."""
        return self._ask(run_id, "pause")

    def resume(self, run_id: str) -> Json:
        """Let a paused run go on."""
        return self._ask(run_id, "resume")

    def retry(self, run_id: str) -> Json:
        """Run a failed run again from the steps that failed."""
        return self._ask(run_id, "retry")

    def signal(
        self, run_id: str, name: str, payload: Json = None, *, key: str | None = None
    ) -> Json:
        """Hand it a message; asking again delivers it once."""
        headers = {"idempotency-key": key or new_run_id(self._clock)}
        body = {"name": name, "payload": payload}
        return self._ask(run_id, "signal", body, headers=headers)

    def approve(
        self, run_id: str, step: str | None = None, *, approved: bool = True, form: Json = None
    ) -> Json:
        """Answer an approval step."""
        given = {"step": step, "approved": approved, "form": form}
        body = {key: value for key, value in given.items() if value is not None}
        return self._ask(run_id, "approve", body)

    def events(self, run_id: str, *, after: str = "") -> Iterator[Event]:
        """Everything that happens to a run, until it ends; goes on at another endpoint by itself.

        `after` is the id of an event that was seen before. A `reset` event voids the text of its
        step from its offset on; `Held` applies that.
        """
        path = f"/api/v1/runs/{quote(run_id, safe='')}/events"
        last, patience = after, Patience(self._patience_s, self._clock.monotonic())
        while True:
            url, told_s, farewell = self._endpoints.current, None, ""
            try:
                with self._http.stream(
                    "GET",
                    url + path,
                    headers={"last-event-id": last} if last else {},
                    timeout=httpx.Timeout(45.0, connect=CONNECT_S),
                ) as response:
                    if response.status_code in PASSING or response.status_code == 429:
                        told_s = retry_after_s(response)
                        response.read()
                        self._endpoints.failed(url, refusal_of(response))
                    else:
                        if not response.is_success:
                            response.read()
                            content_of(response)
                        self._endpoints.worked(url)
                        parser = Parser(last)
                        for line in response.iter_lines():
                            for event in parser.feed(line):
                                if event.kind == "reconnect":
                                    farewell = str(event.data["message"])
                                    continue
                                patience = Patience(self._patience_s, self._clock.monotonic())
                                last = event.id or last
                                yield event
                                if event.kind == "end":
                                    return
                        self._endpoints.failed(url, farewell or "the stream broke off")
            except httpx.TransportError as error:
                self._endpoints.failed(url, _name(error))
            if not farewell:
                self._pause(patience, told_s)

    def text(self, run_id: str, step: str) -> str:
        """What a step has said once the run has ended."""
        held = Held()
        for event in self.events(run_id):
            held.apply(event)
        return held.text.get(step, "")

    # -- how -----------------------------------------------------------------------------------

    def _get(
        self,
        run_id: str,
        rest: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        patience_s: float = 0.0,
    ) -> Json:
        path = f"/api/v1/runs/{quote(run_id, safe='')}{rest}"
        return self.request("GET", path, parameters=parameters, patience_s=patience_s)

    def _ask(
        self,
        run_id: str,
        verb: str,
        body: Json = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> Json:
        path = f"/api/v1/runs/{quote(run_id, safe='')}/{verb}"
        return self.request("POST", path, body=body, headers=headers)


def _name(error: httpx.TransportError) -> str:
    return str(error) or type(error).__name__
