"""What a plain run loads: one tiny LoRA, `--forward off`, in fresh processes.

    python -m tests.tools.plain_run [CHECKOUT]

Prints our modules in `sys.modules` of the parent and of the confined worker at their ends, with their lines, and how
many of their functions ran; and the lines and record-like classes of `src`. CHECKOUT may be an older checkout (default:
the current directory). Both processes have a `sitecustomize`, which counts, and report through a pipe.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.bases import ADAPTERS, llama

NOT_GATE = re.compile(
    r"(features|action|cache|publish|verify|export|exporting|attest|shards|on_ray|sources|engine/forward)/.*"
    r"|run/verify_flow.*|engine/(finished_|expected_differences|merge/(exact_merge|publication_sink)).*"
)
"""Features, also in their places in older checkouts, and the action."""
RECORD = re.compile(r"(\w+\.)*(record|dataclass|NamedTuple|Protocol|TypedDict|\w*Enum)\b")
PROBE = """
import atexit, json, os, subprocess, sys, threading
ran, leave, init = set(), os._exit, subprocess.Popen.__init__
def count(frame, event, argument):
    code = frame.f_code  # below: neither the body of a class (it has no flag 1) nor a lambda
    if event == "call" and "/merge_gate/" in code.co_filename and code.co_flags & 1 and code.co_name[0] != "<":
        ran.add(code)
def report(code=None):
    files = [module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "merge_gate"]
    if files:
        os.write(PIPE, json.dumps([files, len(ran)]).encode() + b"\\n")
    code is None or leave(code)
def start(self, *arguments, pass_fds=(), **options):
    init(self, *arguments, pass_fds=(*pass_fds, PIPE), **options)
atexit.register(report)
os._exit, subprocess.Popen.__init__ = report, start
sys.setprofile(count), threading.setprofile(count)
"""


def main() -> None:
    package, both = Path(*sys.argv[1:]).resolve() / "src/merge_gate", set[Path]()
    for title, (names, functions) in zip(("worker", "parent"), run(package.parent), strict=True):
        files = set(map(Path, names))
        assert all(file.is_relative_to(package) for file in files), files
        print(f"{title}: {sized(files)}, {functions} functions ran")
        for file in sorted(files):
            print(f"    {file.relative_to(package)} {len(file.read_bytes().splitlines())}")
        both |= files
    every = set(package.rglob("*.py"))
    gate = {file for file in every if not NOT_GATE.fullmatch(str(file.relative_to(package)))}
    nodes = [node for file in every for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef)]
    records = [node for node in nodes if any(map(RECORD.match, map(ast.unparse, node.decorator_list + node.bases)))]
    print(f"both: {sized(both)}\nsrc: {sized(every)}; without features and action: {sized(gate)}")
    print(f"record-like classes: {len(records)} of {len(nodes)}")


def run(source: Path) -> list[tuple[list[str], int]]:
    """What the worker and the parent of a run report, which ends last."""
    with tempfile.TemporaryDirectory(prefix="plain-run-") as directory:
        probe, here = Path(directory, "probe"), Path(directory, "run")  # the worker imports nothing from below `here`
        llama().write(here / "base")
        ADAPTERS["llama"](here / "adapter")
        read, write = os.pipe()
        probe.mkdir()
        Path(probe, "sitecustomize.py").write_text(f"PIPE = {write}\n{PROBE}")
        words = [sys.executable, "-m", "merge_gate", "run", "adapter", "--base", "base", "--forward", "off"]
        env = os.environ | {"PYTHONPATH": f"{source}:{probe}"}
        with subprocess.Popen(words, cwd=here, env=env, pass_fds=[write], stdout=subprocess.DEVNULL) as gate:
            os.close(write)
            reports = [json.loads(line) for line in os.fdopen(read)]
            assert gate.wait() == 0
        return reports


def sized(files: set[Path]) -> str:
    counts = [len(file.read_bytes().splitlines()) for file in files]
    return f"{len(counts)} modules, {sum(counts):,} lines"


if __name__ == "__main__":
    main()
