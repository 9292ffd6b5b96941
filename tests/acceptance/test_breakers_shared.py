"""Breakers: what one node learnt all nodes know, and a person may close one for all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.cluster.nodes import until
from tests.acceptance.fake_server import FakeServer, fake_server
from tests.acceptance.site import Site, claims, site_on

pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]
FLOW = """\
name: ask
inputs: {number: {type: integer}}
steps:
  - {id: call, type: llm, provider: house, model: fake, max_tokens: 2, stream: false,
     prompt: "Ask {{ inputs.number }}"}
"""


@pytest.fixture
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    with fake_server(tmp_path_factory.mktemp("fake")) as made:
        yield made


def listed(site: Site) -> dict[str, dict[str, Any]]:
    """The breakers by name, as the command line shows them."""
    return {row["name"]: row for row in json.loads(site.cluster.ok("breakers", "-o", "json"))}


def test_a_breaker_is_everybodys_and_a_person_may_close_it(
    tmp_path: Path, fake: FakeServer
) -> None:
    with site_on("postgres", tmp_path, fake) as site:
        first, second = site.cluster.ready("a", "b")
        fake.control(default={"status": 503, "retry_after": "600"})
        site.submit(FLOW, [{"number": 0}])
        until(lambda: listed(site).get("house/fake", {}).get("state") == "open", "an open breaker")
        assert 500 < listed(site)["house/fake"]["retry_in_s"] <= 600
        fake.control(reset=True)
        asked = len(fake.arrived("Ask"))
        parked = site.submit(FLOW, [{"number": n} for n in range(1, 41)])
        until(lambda: site.states() == {"waiting": 41}, "runs that wait without having asked")
        assert len(fake.arrived("Ask")) == asked, "a node did not know of the other's breaker"
        journals = site.journals()
        drivers = {claim["node"] for run_id in parked for claim in claims(journals[run_id][0])}
        assert drivers == {first.node_id, second.node_id}
        assert not any(state.failures for _, state in journals.values()), "an attempt was burnt"
        done = site.cluster.llmo("breakers", "reset", "house/fake", "--by", "ada")
        assert "breaker house/fake is closed; 41 runs that waited for it go on" in done.err
        assert listed(site)["house/fake"]["state"] == "closed"
        until(lambda: site.states() == {"completed": 41}, "parked runs go through")
        journals = site.journals()
        assert {c["node"] for run_id in parked for c in claims(journals[run_id][0])} == drivers
        assert len(fake.arrived("Ask")) == asked + 41, "a run asked twice"
        again = site.cluster.llmo("breakers", "reset", "--all")
        assert "closed already" in again.err
        unknown = site.cluster.llmo("breakers", "reset", "house/fak")
        assert unknown.code == 4
        assert "house/fake" in unknown.err
