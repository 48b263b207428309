"""Where things are in tests/: tests in test modules, what they share in tests/support, programs in tests/tools."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import wording

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")))
NOT_TESTS = ("support", "tools")


def is_test(module: str) -> bool:
    """Whether pytest collects the module, or reads it for its fixtures."""
    parts = module.split(".")
    return parts[0] == "tests" and (parts[-1] == "conftest" or parts[-1].startswith("test_"))


def imports(source: str) -> Iterator[str]:
    """The dotted names that a module imports, anywhere in it; `from a import b` counts as `a` and as `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = "." * node.level + (node.module or "")
            yield from (parent, *(f"{parent}.{alias.name}" for alias in node.names))


def imported_tests(source: str) -> list[str]:
    """Test modules among the imports. A relative import is refused too: it can name one."""
    return [name for name in imports(source) if is_test(name) or name.startswith(".")]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from tests.engine.test_bits import merge", ["tests.engine.test_bits"]),
        ("from tests.engine import test_bits", ["tests.engine.test_bits"]),
        ("import tests.conftest", ["tests.conftest"]),
        ("def f():\n    from tests.test_cli import answer", ["tests.test_cli"]),
        ("from . import test_bits", [".", "..test_bits"]),
        ("from tests.support.models import BASES", []),
        ("from tests.support import models", []),
    ],
)
def test_an_import_of_a_test_module_is_seen(source: str, expected: list[str]) -> None:
    assert imported_tests(source) == expected


def test_no_module_imports_a_test_module() -> None:
    assert len(MODULES) > 200
    found = {str(path.relative_to(ROOT)): imported_tests(path.read_text(encoding="utf-8")) for path in MODULES}
    assert {name: names for name, names in found.items() if names} == {}, "move what they share into tests/support"


def test_every_sentence_of_a_golden_is_of_a_test() -> None:
    goldens = [*ROOT.glob("tests/**/wording/*.txt")]
    assert goldens
    for golden in goldens:
        module = golden.parent.parent / f"test_{golden.stem}.py"
        tests = {node.name for node in ast.walk(ast.parse(module.read_bytes())) if isinstance(node, ast.FunctionDef)}
        assert {name.partition("[")[0] for name in wording.read(golden)} <= tests, golden


def test_every_other_module_is_in_support_or_tools() -> None:
    modules = [path.relative_to(ROOT / "tests") for path in ROOT.glob("tests/**/*.py")]
    strays = {
        str(path)
        for path in modules
        if path.parts[0] not in NOT_TESTS
        and not path.stem.startswith("test_")
        and path.stem not in {"__init__", "conftest"}
    }
    assert strays == set(), "tests/support holds what tests share, tests/tools what people run"
    misplaced = {str(path) for path in modules if path.parts[0] in NOT_TESTS and path.stem.startswith("test_")}
    assert misplaced == set(), "a test there is easily overlooked"
