"""What every run knows of comparisons: the kinds of answers."""

from __future__ import annotations

from pathlib import Path

KINDS = Path(__file__).with_name("kinds.csv")
BROKEN_FILES, OTHER_ARCHITECTURE = "broken-files", "other-architecture"
COMMAND = "verify", "schema", "published models"
GONE = {"rebuild": "use `merge-gate verify`, which merges again and compares"}
