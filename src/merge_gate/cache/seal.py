"""Seals: they show whether a stored verdict is what an earlier run wrote.

In: a document's kind, name, and bytes, and the secret that the environment may contain. Out: a seal of 64 hexadecimal
digits, an HMAC (SHA-256) under the secret. Without a secret it shows damage but not forgery: anyone can make it.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING

from merge_gate.errors import UsageError
from merge_gate.text import counted

if TYPE_CHECKING:
    from collections.abc import Mapping

SECRET = "MERGE_GATE_CACHE_KEY"  # noqa: S105 - the name of a variable
SHORTEST = 16
_NO_SECRET = b"merge-gate: no secret"


class Seal:
    """Makes and verifies seals."""

    def __init__(self, secret: str = "") -> None:
        if secret and len(secret.encode()) < SHORTEST:
            raise UsageError(
                f"{SECRET} has {counted(len(secret.encode()), 'byte')}, expected at least {SHORTEST}",
                hint="make one with `openssl rand -hex 32`, or unset it",
            )
        self._key = hashlib.sha256(b"merge-gate seal\0" + secret.encode()).digest() if secret else _NO_SECRET

    def of(self, kind: str, name: str, body: bytes) -> str:
        """The seal of a document. It does not fit if the document gets another name."""
        return hmac.new(self._key, f"{kind}/{name}\n".encode() + body, hashlib.sha256).hexdigest()

    def fits(self, seal: str, kind: str, name: str, body: bytes) -> bool:
        """Whether this is the seal of the document."""
        return hmac.compare_digest(self.of(kind, name, body).encode(), seal.encode("utf-8", "replace"))


def from_environment(environ: Mapping[str, str]) -> Seal:
    """The seal of this run.

    Raises:
        UsageError: the secret is too short.
    """
    return Seal(environ.get(SECRET, ""))
