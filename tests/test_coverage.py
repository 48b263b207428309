"""What `make coverage` measures: every module but those that import torch."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "merge_gate"
TORCHS = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors.torch"}
OF_THE_WORKER = {"merge_gate.worker.child"}
"""They import torch, and run when the worker has given up what it does not need."""
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["coverage"]


def imported(path: Path) -> set[str]:
    """What a module imports when it is imported itself."""
    names: set[str] = set()
    for one in ast.parse(path.read_bytes()).body:
        if isinstance(one, ast.Import):
            names |= {alias.name for alias in one.names}
        elif isinstance(one, ast.ImportFrom):
            names |= {str(one.module), *(f"{one.module}.{alias.name}" for alias in one.names)}
    return names


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def test_what_is_left_out_is_what_imports_torch() -> None:
    imports = {name_of(path): imported(path) for path in PACKAGE.rglob("*.py")}
    assert "merge_gate.worker.supervisor" in imports["merge_gate.run.flow"], "imports are seen"
    heavy = {name for name, names in imports.items() if names & TORCHS or {one.split(".")[0] for one in names} & TORCHS}
    while more := {name for name, names in imports.items() if names & heavy} - heavy:
        heavy |= more
    patterns = [f"{one}/*.py" if one.endswith("**") else one for one in SETTINGS["run"]["omit"]]
    omitted = {name_of(path) for pattern in patterns for path in PACKAGE.glob(pattern)}
    assert heavy | OF_THE_WORKER <= omitted
    of_torch = ("merge_gate.engine.", "merge_gate.features.", "merge_gate.integrations.", "merge_gate.worker.merging.")
    assert {name for name in omitted if not name.startswith(of_torch)} == OF_THE_WORKER


def test_no_decision_is_excluded() -> None:
    assert SETTINGS["report"]["fail_under"] == 100
    assert SETTINGS["report"]["exclude_also"] == ["if TYPE_CHECKING:", r"assert_never\("]
    assert not [path for path in PACKAGE.rglob("*.py") if "pragma:" in path.read_text(encoding="utf-8")]
