"""What a request may bring is bounded, whoever sends it and however it is cut into pieces."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import pytest

from llm_orchestrator.server import bounds
from llm_orchestrator.server.protocol import HEAD_BYTES_MAX
from tests.server.support import Site


async def raw(site: Site, *pieces: bytes) -> bytes:
    """What the server answers to these bytes until it closes, or has said all."""
    parts = urlsplit(site.serving.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        return await asyncio.wait_for(reader.read(4_096), 20)
    except ConnectionError:
        return b"closed"
    finally:
        writer.close()


async def test_a_head_without_an_end_is_cut_off(site: Site) -> None:
    line = b"x-filler: " + b"y" * 1_000 + b"\r\n"
    pieces = [line] * (2 * HEAD_BYTES_MAX // len(line))
    answer = await raw(site, b"GET /health/live HTTP/1.1\r\nhost: a\r\n", *pieces)
    assert answer.startswith(b"HTTP/1.1 431") or answer == b"closed"


async def test_the_bound_counts_each_request_of_a_connection_anew(site: Site) -> None:
    head = b"GET /health/live HTTP/1.1\r\nhost: a\r\nx-filler: " + b"y" * 9_000 + b"\r\n"
    parts = urlsplit(site.serving.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    for _ in range(2 * HEAD_BYTES_MAX // len(head)):
        writer.write(head + b"\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        await reader.readuntil(b"}")
    writer.close()


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_is_refused_when_it_grows_too_large(site: Site, is_chunked: bool) -> None:
    size = bounds.BODY_BYTES_MAX + 1
    head = b"POST /api/v1/workflows HTTP/1.1\r\nhost: a\r\ncontent-type: application/yaml\r\n"
    head += f"authorization: {site.http.headers['authorization']}\r\n".encode()
    if is_chunked:
        piece = b"100000\r\n" + b"a" * 0x100000 + b"\r\n"
        answer = await raw(site, head + b"transfer-encoding: chunked\r\n\r\n", *([piece] * 17))
    else:
        answer = await raw(site, head + f"content-length: {size}\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 413") or (is_chunked and answer == b"closed")


async def test_queries_and_headers_are_bounded(site: Site) -> None:
    long = "x" * (bounds.QUERY_BYTES_MAX + 1)
    assert (await site.http.get(f"/api/v1/runs?label={long}")).status_code == 431
    many = {f"x-{number}": "1" for number in range(bounds.HEADERS_MAX)}
    assert (await site.http.get("/health/live", headers=many)).status_code == 431
    wide = {"x-wide": "x" * bounds.HEADER_BYTES_MAX}
    assert (await site.http.get("/health/live", headers=wide)).status_code == 431
