"""Where workflows may send requests: public addresses, and what the operator has allowed.

A workflow's author must not reach what only this machine reaches: loopback, private networks, a
cloud's metadata service. What is checked is the address that the socket is about to be connected
to, after every look-up of names and at every hop of a redirect, so neither a name that changes its
mind nor an odd spelling of an address gets past. Addresses of providers are the operator's own and
not checked here.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Sequence
from typing import Any

import aiohttp

from llm_orchestrator.errors import ConfigError, ProviderInvalidRequest

_EMBEDDED = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48")))
"""NAT64: the last four bytes are an IPv4 address (RFC 6052, RFC 8215)."""
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Outgoing:
    """Which addresses may be reached. `allow`: host names, addresses, networks (CIDR).

    Raises ConfigError for an entry that is none of these.
    """

    def __init__(self, allow: Sequence[str] = ()) -> None:
        self._names: set[str] = set()
        self._networks: list[Network] = []
        for entry in allow:
            network = _network(entry)
            if network is not None:
                self._networks.append(network)
            else:
                self._names.add(_name(entry))

    def connector(self) -> CheckedConnector:
        """For one session: every connection of it is checked."""
        return CheckedConnector(self)

    def check(self, host: str, address: str) -> None:
        """Raises ProviderInvalidRequest (asking again never helps) for an address not to reach."""
        if host.lower().rstrip(".") in self._names:
            return
        try:
            found: Address | None = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            found = None
        if found is None or not (self._is_allowed(found) or is_public(found)):
            raise ProviderInvalidRequest(
                f"{host} leads to {address}, which workflows may not reach",
                hint='the operator can allow it: outgoing_allow = ["HOST or NETWORK"]',
            )

    def _is_allowed(self, address: Address) -> bool:
        plain = _unwrapped(address)
        return any(each in network for network in self._networks for each in (address, plain))


class CheckedConnector(aiohttp.TCPConnector):
    """Connects only to what its policy allows. Call `begin` before each hop.

    A name may have several addresses, tried side by side: one that is not to be reached is left
    out like one that does not answer (the client library takes nothing but an OSError for that).
    """

    def __init__(self, policy: Outgoing) -> None:
        self.refusal: ProviderInvalidRequest | None = None
        """Why this hop went nowhere: none of its addresses is to be reached."""
        self._host = ""
        self._has_tried = False
        self._policy = policy
        super().__init__(use_dns_cache=False, socket_factory=self._make, force_close=True)

    def begin(self, host: str) -> None:
        """A hop to this host."""
        self._host, self._has_tried, self.refusal = host, False, None

    def _make(self, info: Any) -> socket.socket:
        """A socket for the address that it will be connected to, and no other."""
        family, kind, protocol, _, address = info
        try:
            self._policy.check(self._host, str(address[0]))
        except ProviderInvalidRequest as error:
            if not self._has_tried:
                self.refusal = error
            raise PermissionError(errno.EACCES, error.message) from error
        self._has_tried, self.refusal = True, None
        made = socket.socket(family, kind, protocol)
        made.setblocking(False)
        return made


def is_public(address: Address) -> bool:
    """True for an address that anybody could reach, however it is wrapped."""
    plain = _unwrapped(address)
    if plain is not address:
        return is_public(plain)
    return address.is_global and not address.is_multicast and not address.is_reserved


def _unwrapped(address: Address) -> Address:
    """The IPv4 address inside an IPv6 one (mapped, 6to4, Teredo, NAT64); else the address."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if any(address in network for network in _EMBEDDED):
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def _network(entry: str) -> Network | None:
    try:
        return ipaddress.ip_network(entry.strip())
    except ValueError:
        if "/" in entry:
            raise ConfigError(f"outgoing_allow: {entry!r} is no network") from None
        return None


def _name(entry: str) -> str:
    name = entry.strip().lower().rstrip(".")
    if not name or not all(part and part.replace("-", "a").isalnum() for part in name.split(".")):
        raise ConfigError(f"outgoing_allow: {entry!r} is no host, address or network")
    return name
