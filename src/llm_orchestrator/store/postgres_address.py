"""A PostgreSQL URL, taken apart: one DSN for each host that it names.

It must never show a password, nor a piece of one: of a URL that makes no sense only the scheme is
repeated, because nobody knows which part of it is secret.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from llm_orchestrator.errors import ConfigError

_SHAPE = "llmo --store postgresql://user@host1:5432,host2/database (an @ in a password is %40)"
_PLACE = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\s:\[\]]+)(?::(?P<port>\d{1,5}))?")
_OTHERS = frozenset(
    {
        "channel_binding",
        "client_encoding",
        "connect_timeout",
        "fallback_application_name",
        "gssencmode",
        "hostaddr",
        "keepalives",
        "keepalives_count",
        "keepalives_idle",
        "keepalives_interval",
        "load_balance_hosts",
        "requirepeer",
        "sslcompression",
        "sslsni",
        "target_session_attrs",
        "tcp_user_timeout",
    }
)
"""Options of libpq that our driver does not know. What they ask for is done here by own means, or
is for drivers that do less."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where the servers are: one DSN a host. `shown` names them without the password."""

    hosts: tuple[str, ...]
    shown: str


def parse_address(url: str) -> Address:
    """Take `postgresql://user@host1:port,host2/database?options` apart. Raises ConfigError."""
    try:
        parts = urlsplit(url)
        pairs = parse_qsl(parts.query, strict_parsing=bool(parts.query))
    except ValueError as error:
        raise _wrong(url, "cannot be read") from error
    if parts.scheme not in ("postgresql", "postgres"):
        raise _wrong(url, "is not PostgreSQL's")
    database = unquote(parts.path.removeprefix("/"))
    if not database or "/" in parts.path[1:] or "@" in parts.path or parts.fragment:
        raise _wrong(url, "names no database")
    options = dict(pairs)
    who, places = _who_and_where(url, parts.netloc)
    own = {name: value for name, value in options.items() if name not in _OTHERS}
    if places:
        ends = [(place, own) for place in places]
    else:
        ends = [("", own | extra) for extra in _hosts_in_options(url, options)]
    names = places or options.get("host", "localhost").split(",")
    return Address(
        tuple(
            f"postgresql://{who}{place}/{quote(database, safe='')}"
            + (f"?{urlencode(values, quote_via=quote, safe='')}" if values else "")
            for place, values in ends
        ),
        f"{database} on {','.join(names)}",
    )


def _who_and_where(url: str, netloc: str) -> tuple[str, list[str]]:
    """`user:password@`, quoted as it should be, and each host with its port."""
    user, at, hosts = netloc.rpartition("@")
    name, colon, password = user.partition(":")
    who = quote(unquote(name), safe="") + colon + quote(unquote(password), safe="") + at
    places = hosts.split(",") if hosts else []
    for place in places:
        found = _PLACE.fullmatch(place)
        if found is None or not 0 < int(found["port"] or 5432) < 1 << 16:
            raise _wrong(url, "names no host, or a port that is none")
    return who, places


def _hosts_in_options(url: str, options: dict[str, str]) -> list[dict[str, str]]:
    """`?host=one,two&port=1,2`: the same for each host alone."""
    if "host" not in options:
        return [{}]
    hosts, ports = options["host"].split(","), options.get("port", "5432").split(",")
    if len(ports) == 1:
        ports *= len(hosts)
    if len(ports) != len(hosts) or not all(port.isascii() and port.isdigit() for port in ports):
        raise _wrong(url, "names no port for each host")
    return [{"host": host, "port": port} for host, port in zip(hosts, ports, strict=True)]


def _wrong(url: str, what: str) -> ConfigError:
    scheme, separator, _ = url.partition("://")
    shown = f" ({scheme}://...)" if separator and scheme.isalnum() else ""
    return ConfigError(f"the store's URL{shown} {what}", hint=_SHAPE)
