"""What the command line knows of signatures, which this version neither makes nor checks."""

from __future__ import annotations

COMMAND = "attest", "schema", "more commands"
_SIGN = (
    "merge-gate signs nothing and checks no signature; use `cosign attest-blob` and `cosign verify-blob-attestation`"
)
GONE = {"--key": _SIGN, "--attestation": _SIGN, "--max-age": _SIGN}
