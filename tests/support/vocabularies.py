"""The names of the vocabulary files of all tokenizers of transformers, read in its source.

Importing all tokenizers would take minutes.
"""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

_FILE = re.compile(r"[\w.-]+\.(json|txt|model|spm|codes|bpe|tiktoken)", re.ASCII)


def vocabulary_files() -> set[str]:
    """The values of each `VOCAB_FILES_NAMES` of transformers."""
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    names = set()
    for path in Path(spec.origin).parent.glob("models/*/tokenization_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == ["VOCAB_FILES_NAMES"]:
                names |= {
                    inner.value
                    for inner in ast.walk(node.value)
                    if isinstance(inner, ast.Constant) and isinstance(inner.value, str) and _FILE.fullmatch(inner.value)
                }
    return names
