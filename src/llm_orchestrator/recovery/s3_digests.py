"""What an object store may say of a thing that it took, and whether it fits."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

_MD5 = re.compile(r"[0-9a-f]{32}(-\d+)?")


@dataclass(slots=True)
class Digests:
    """Of a thing, as a server may tell them."""

    size: int = 0
    etags: set[str] = field(default_factory=set)
    sha256: set[str] = field(default_factory=set)
    """Base64."""

    def differs(self, answer: Any) -> str:
        """What a server's answer about it contradicts, or ""."""
        etag = str(answer.get("ETag", "")).strip('"')
        if tells_md5(answer) and etag not in self.etags:
            return f"its digest is {etag}, not {min(self.etags)}"
        told = str(answer.get("ChecksumSHA256", "")).partition("-")[0]
        if told and told not in self.sha256:
            return "its checksum is another one"
        return ""

    def is_told(self, answer: Any) -> bool:
        """True when the answer has a digest that can be compared."""
        return tells_md5(answer) or bool(answer.get("ChecksumSHA256"))


def tells_md5(answer: Any) -> bool:
    """Whether an answer's ETag can be compared.

    An ETag is an MD5 unless the thing is encrypted with a key that the server does not own.
    """
    etag = str(answer.get("ETag", "")).strip('"')
    is_other = str(answer.get("ServerSideEncryption", "")).startswith("aws:kms")
    is_other = is_other or bool(answer.get("SSECustomerAlgorithm"))
    return bool(_MD5.fullmatch(etag)) and not is_other


def whole_md5(answer: Any) -> str:
    """The MD5 of all its bytes, hex, where an answer tells it (of what came in parts: rarely)."""
    etag = str(answer.get("ETag", "")).strip('"')
    return etag if tells_md5(answer) and "-" not in etag else ""


def md5(content: bytes) -> Any:
    """The digest that the protocol speaks of; it guards nothing against people."""
    return hashlib.md5(content, usedforsecurity=False)


def digests(content: bytes) -> Digests:
    """Of a thing that goes in one request."""
    return Digests(len(content), {md5(content).hexdigest()}, {sha256_base64(content)})


def sha256_base64(content: bytes) -> str:
    """As the protocol writes it."""
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


def md5_base64(content: bytes) -> str:
    """As the protocol writes it."""
    return base64.b64encode(md5(content).digest()).decode()
