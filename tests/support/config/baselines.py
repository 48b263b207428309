"""A baseline that is valid, and its parts."""

from __future__ import annotations

DIGEST = "a1" * 32
ENTRY = f'  - adapter: "{DIGEST}"\n    cause: no-effect\n    reason: a stub\n    owner: team-a\n    until: 2026-12-31\n'
GOOD = f"version: 1\naccept:\n{ENTRY}"
