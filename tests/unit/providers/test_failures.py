from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_orchestrator import errors
from llm_orchestrator.providers.failures import (
    EXCERPT_MAX,
    Failure,
    error_of,
    excerpt,
    retry_after_s,
    scrub,
    stream_error,
)

KEY = "topsecret-0123456789"
WHO = Failure("openai", "OPENAI_API_KEY", (KEY,), now_us=1_000_000_000)


def body(message: str = "no", **more: object) -> bytes:
    return json.dumps({"error": {"message": message, **more}}).encode()


@pytest.mark.parametrize(
    ("status", "raw", "kind"),
    [
        (429, body(), errors.ProviderRateLimited),
        (429, body(code="insufficient_quota"), errors.ProviderRateLimited),
        (408, b"", errors.ProviderTransient),
        (409, b"", errors.ProviderTransient),
        (500, b"<html>oops", errors.ProviderTransient),
        (503, body(), errors.ProviderTransient),
        (529, body(type="overloaded_error"), errors.ProviderTransient),
        (599, b"", errors.ProviderTransient),
        (401, body(), errors.ProviderAuthentication),
        (402, body(), errors.ProviderAuthentication),
        (403, body(), errors.ProviderAuthentication),
        (400, body(), errors.ProviderInvalidRequest),
        (404, b'{"message": "no such model"}', errors.ProviderInvalidRequest),
        (422, b'{"detail": [{"loc": 1}]}', errors.ProviderInvalidRequest),
        (307, b"", errors.ProviderInvalidRequest),
        (400, body(code="content_filter"), errors.ProviderContentFiltered),
        (
            400,
            body(innererror={"code": "ResponsibleAIPolicyViolation"}),
            errors.ProviderContentFiltered,
        ),
    ],
)
def test_each_status_has_its_kind(
    status: int, raw: bytes, kind: type[errors.ProviderError]
) -> None:
    error = error_of(WHO, status, raw, headers={})
    assert type(error) is kind
    assert error.status == status
    assert error.provider == "openai"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("overloaded_error", errors.ProviderTransient),
        ("rate_limit_error", errors.ProviderRateLimited),
        ("authentication_error", errors.ProviderAuthentication),
        ("invalid_request_error", errors.ProviderInvalidRequest),
        ("server_error", errors.ProviderTransient),
    ],
)
def test_an_error_inside_a_stream_is_typed_as_well(
    kind: str, expected: type[errors.ProviderError]
) -> None:
    for shape in ({"error": {"type": kind, "message": "m"}}, {"type": kind, "message": "m"}):
        assert type(stream_error(WHO, shape)) is expected


def test_an_error_inside_a_stream_may_carry_its_status_as_code() -> None:
    error = stream_error(WHO, {"error": {"code": 429, "message": "slow"}})
    assert type(error) is errors.ProviderRateLimited


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "1.5"}, 1.5),
        ({"Retry-After": "9", "retry-after-ms": "250"}, 0.25),
        ({"Retry-After": "Thu, 01 Jan 1970 00:16:50 GMT"}, 10.0),
        (
            {
                "Retry-After": "Sun, 22 Nov 2026 10:00:30 GMT",
                "Date": "Sun, 22 Nov 2026 10:00:00 GMT",
            },
            30.0,
        ),
        ({"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
        ({"Retry-After": "-3"}, 0.0),
        ({"Retry-After": "1e12"}, 86_400.0),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "soon"}, None),
        ({}, None),
    ],
)
def test_the_providers_word_on_when_to_come_back_is_read(
    headers: dict[str, str], seconds: float | None
) -> None:
    assert retry_after_s(headers, WHO.now_us) == seconds


@given(st.integers(300, 599), st.binary(max_size=200), st.text(max_size=50))
def test_any_answer_gives_a_typed_short_error_without_the_key(
    status: int, junk: bytes, text: str
) -> None:
    for raw in (junk, junk + KEY.encode() + junk, body(f"{text}{KEY}{text}" * 20)):
        error = error_of(WHO, status, raw, headers={})
        assert isinstance(error, errors.ProviderError)
        assert KEY not in str(error)
        assert len(str(error)) < EXCERPT_MAX + 60


@pytest.mark.parametrize(
    "text",
    [
        "Incorrect API key provided: sk-proj-abc****************wxyz.",
        "Authorization: Bearer abcdef.ghijkl-mn",
        "key gsk_0123456789abcdef was refused",
    ],
)
def test_what_looks_like_a_key_is_removed_even_when_it_is_not_ours(text: str) -> None:
    shown = scrub(text, ())
    assert "***" in shown
    for word in ("abc**", "wxyz", "abcdef", "0123456789"):
        assert word not in shown


def test_an_excerpt_is_one_short_line() -> None:
    assert "\n" not in excerpt("a\n\nb" * 500)
    assert len(excerpt("word " * 500)) == EXCERPT_MAX
