"""What other code knows of the cache: when a run asks for it."""

from __future__ import annotations

import os

from merge_gate.records.config import Config
from merge_gate.records.options import RunOptions

SECRET = "MERGE_GATE_CACHE_KEY"  # noqa: S105 - the name of a variable


def is_requested(config: Config, options: RunOptions) -> bool:  # noqa: ARG001 - no key of the configuration asks for it
    """Whether a run has a cache, or a secret for one. A secret that is too short is refused in both cases."""
    return options.cache is not None or bool(os.environ.get(SECRET))
