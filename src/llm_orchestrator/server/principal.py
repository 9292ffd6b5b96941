"""Who asks, and what they may: the one seam for users, roles and keys.

Every route names the permission that it needs; a `Guard` turns a request's credentials into a
`Principal`. Today's guard knows one token, whose holder may do everything.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from llm_orchestrator.errors import Denied, Unauthenticated

NAME_MAX = 64


class Permission(StrEnum):
    """What a route may ask for."""

    WORKFLOW_READ = "workflow:read"
    WORKFLOW_WRITE = "workflow:write"
    WORKFLOW_DELETE = "workflow:delete"
    RUN_READ = "run:read"
    RUN_EXECUTE = "run:execute"
    RUN_CONTROL = "run:control"
    """Cancel, pause, resume, retry, rewind."""
    RUN_ANSWER = "run:answer"
    """Signals and approvals."""
    AUDIT_READ = "audit:read"
    ADMIN_READ = "admin:read"
    ADMIN_WRITE = "admin:write"


EVERYTHING = frozenset(Permission)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks. `name` stands in the audit log."""

    name: str
    permissions: frozenset[Permission] = EVERYTHING

    def demand(self, permission: Permission) -> None:
        """Raises Denied."""
        if permission not in self.permissions:
            raise Denied(f"{self.name} may not do this: it needs {permission}")


class Guard(Protocol):
    """From credentials to a principal."""

    def principal(self, authorization: str | None) -> Principal:
        """`authorization` is the header's value. Raises Unauthenticated."""
        ...


class OpenGuard:
    """No token is configured: whoever reaches the address may do everything."""

    def principal(self, authorization: str | None) -> Principal:
        """Everybody is the same."""
        return Principal("anonymous")


class TokenGuard:
    """One static token: `Authorization: Bearer TOKEN` (or `ApiKey TOKEN`)."""

    def __init__(self, token: str, *, name: str = "token") -> None:
        self._token = token.encode()
        self._name = name

    def principal(self, authorization: str | None) -> Principal:
        """Compares in constant time."""
        scheme, _, given = (authorization or "").partition(" ")
        is_known = scheme.lower() in ("bearer", "apikey")
        if not hmac.compare_digest(given.strip().encode(), self._token) or not is_known:
            raise Unauthenticated("the request has no valid token")
        return Principal(self._name)
