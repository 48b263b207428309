"""What the command line knows of exports: their command."""

from __future__ import annotations

COMMAND = "export", "init", ""
