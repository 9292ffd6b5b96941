"""The document of the API holds together."""

from __future__ import annotations

from llm_orchestrator.server.openapi import TAGS
from tests.server.support import Site


async def test_every_tag_is_explained_and_used(site: Site) -> None:
    paths = (await site.get("/openapi.json")).json()["paths"]
    used = {tag for path in paths.values() for each in path.values() for tag in each["tags"]}
    assert used == {name for name, _ in TAGS}
