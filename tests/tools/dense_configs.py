"""Configurations just below the bounds of size, dense with values or with problems: what do they cost?

    python tests/tools/dense_configs.py

Prints the processor's time and the memory that each one takes, in a process of its own.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from merge_gate._internal.errors import ConfigError
from merge_gate.config.load_config import MAX_BYTES, load_config
from merge_gate.config.model import MAX_ADAPTERS
from merge_gate.config.yaml_document import MAX_VALUES

HEAD = "version: 1\nadapters:\n"
MANY = range(MAX_ADAPTERS)
VALUES = MAX_VALUES - 10
HALF = range(VALUES // 2 - 10)

DENSE = {
    "valid: 10,000 adapters": HEAD + "".join(f"- acme/a{n}\n" for n in MANY),
    "valid: 10,000 adapters with name and check": HEAD
    + "".join(f"- {{name: a{n}, path: acme/a, checks: {{headroom: off}}}}\n" for n in MANY[:-100]),
    "valid: 10,000 aliases": HEAD + "- &a {path: acme/a, name: a}\n" + "- {<<: *a}\n" * (MAX_ADAPTERS - 1),
    "too many adapters": HEAD + "- acme/a\n" * VALUES,
    "empty lists": "version: 1\nadapters: [" + "[]," * (MAX_BYTES // 3 - 10) + "]",
    "empty lists, within the bound": "version: 1\nadapters: [" + "[]," * VALUES + "]",
    "a list in lines": "a:\n" + "- a\n" * VALUES,
    "a list in a list": "- " * (MAX_BYTES // 2 - 10),
    "brackets": "[" * (MAX_BYTES - 10),
    "a flow mapping": "{" + ",".join(f"k{n}: {n}" for n in HALF) + "}",
    "anchors": "a:\n" + "".join(f"- &a{n}\n" for n in range(VALUES)),
    "aliases": "a: &a [x]\nb: [" + "*a," * (MAX_BYTES // 3 - 10) + "]",
    "digits": f"a: {'9' * (MAX_BYTES - 10)}",
    "comments": "a: 1\n" + "# x\n" * (MAX_BYTES // 4 - 10),
    "one comment": "#" * (MAX_BYTES - 1),
    "one text": f"a: {'x' * (MAX_BYTES - 10)}",
    "a quoted text": f'a: "{"x " * (MAX_BYTES // 2 - 10)}"',
    "a folded text": "a: >\n" + " x\n" * (MAX_BYTES // 3 - 10),
    "unknown keys": HEAD + "- acme/a\n" + "".join(f"k{n}: 1\n" for n in HALF),
    "unknown checks": HEAD + "- acme/a\nchecks:\n" + "".join(f"  no-effec{n}: 1\n" for n in HALF),
    "the same key": HEAD + "- acme/a\n" + "a: 1\n" * len(HALF),
    "control characters": "a:\n" + '- "\\a"\n' * VALUES,
    "wrong digests": HEAD + "- path: a/b\n  expect:\n    sha256:\n" + "".join(f"      k{n}: 1\n" for n in HALF),
    "no such directory, 10,000 times": HEAD + "".join(f"- ./a{n}\n" for n in MANY),
    "wrong mappings, 10,000 times": HEAD + "".join(f"- {{pat: {n}, exp: 1, nam: 2}}\n" for n in MANY),
    "one dtype, again and again": HEAD + "- acme/a\nbase: {dtype: [" + "auto," * VALUES + "]}",
    "no YAML at its end": HEAD + "- acme/a\n" * VALUES + "]",
}


def main() -> int:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "merge-gate.yml")
        for name, text in DENSE.items():
            file.write_text(text[:MAX_BYTES])
            if not (child := os.fork()):
                measure(name, file)
                os._exit(0)
            os.waitpid(child, 0)
    return 0


def measure(name: str, file: Path) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        said = f"{len(load_config(str(file)).adapters):,} adapters"
    except ConfigError as error:
        said = f"{len(error.problems) + error.more:,} problems; {error.problems[0].message[:60]}"
    took = time.process_time() - start
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{name:44} {file.stat().st_size:9,} bytes  {took:5.2f} s  {more:4.0f} MiB  {said}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
