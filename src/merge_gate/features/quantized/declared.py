"""What every run knows of quantized releases: the kinds of answers that only they have."""

from __future__ import annotations

from pathlib import Path

KINDS = Path(__file__).with_name("kinds.csv")
