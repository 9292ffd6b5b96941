"""Sealing segments: a key of the process life's own, wrapped for whoever may read them.

age (pyrage) wraps the key once per stream; AES-256-GCM (cryptography) seals each frame, with a
nonce that is never used twice under one key: the numbers of the segment and of the frame in it.
Both come with the extra `age`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from llm_orchestrator.errors import ConfigError, StoreDamaged, WrongKey

_HINT = "pip install 'llm-orchestrator[age]'"


class Seal:
    """Closes and opens frames under one key."""

    def __init__(self, key: bytes) -> None:
        self._cipher = _module("cryptography.hazmat.primitives.ciphers.aead").AESGCM(key)

    def close(self, nonce: bytes, content: bytes, context: bytes) -> bytes:
        """Seal; only `open` with the same nonce and context undoes it."""
        sealed: bytes = self._cipher.encrypt(nonce, content, context)
        return sealed

    def open(self, nonce: bytes, sealed: bytes, context: bytes) -> bytes:
        """The content. Raises StoreDamaged when anything of it was changed."""
        try:
            content: bytes = self._cipher.decrypt(nonce, sealed, context)
        except _module("cryptography.exceptions").InvalidTag as error:
            raise StoreDamaged("its seal is broken") from error
        return content


class SealedKey(NamedTuple):
    """A stream's key as it stands in the header."""

    wrapped: bytes

    @classmethod
    def wrap(cls, key: bytes, recipients: Sequence[Any]) -> SealedKey:
        """For `recipients` (age's public keys, see frames.read_recipients)."""
        return cls(_module("pyrage").encrypt(key, list(recipients)))

    def open(self, keys: Sequence[Any]) -> Seal:
        """With age's private keys. Raises WrongKey."""
        hint = "set backup_identity to file:PATH of one of its recipients' keys"
        if not keys:
            raise WrongKey("it is sealed, and there is no key to open it", hint=hint)
        try:
            return Seal(_module("pyrage").decrypt(self.wrapped, list(keys)))
        except _module("pyrage").DecryptError as error:
            raise WrongKey("no key that is here opens it", hint=hint) from error


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError("sealed segments need the extra age", hint=_HINT) from error
