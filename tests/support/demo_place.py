"""A place with the demo's base and adapters, and what a test of the command does there."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tests.support.command import Answer


def configure(place: Path, *adapters: Any, **top: Any) -> Path:
    """JSON is YAML. A bare word names one of the demo's adapters."""
    entries = [f"./adapters/{one}" if isinstance(one, str) and "/" not in one else one for one in adapters]
    config = {"version": 1, "base": {"model": "./base"}, "adapters": entries} | top
    path = place / "gate.yml"
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return path


def readable(answer: Answer) -> None:
    assert "Traceback" not in answer.err + answer.out, answer.said
    assert "unexpected" not in answer.err, answer.said


def tree(*roots: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        for root in roots
        for path in sorted(root.rglob("*"))
        if "merge-gate-report" not in path.parts
    }
