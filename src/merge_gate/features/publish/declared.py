"""What every run knows of publications: the kinds of findings on models."""

from __future__ import annotations

from pathlib import Path

KINDS = Path(__file__).with_name("kinds.csv")
NOT_PUBLISHED, EARLIER_MODEL, PUBLISHED_FILES = "not-published", "earlier-model", "published-files"
STOP_TOKENS, TOKENIZER_SIZE = "stop-tokens", "tokenizer-size"
