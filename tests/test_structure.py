"""Where things are: small folders and one name for one thing in the package; tests, support and tools apart."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from merge_gate.judging.checks.table import CHECKS
from merge_gate.records.features import NEEDS
from tests.support import wording
from tests.tools import mutants

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")))
NOT_TESTS = ("support", "tools")


def is_test(module: str) -> bool:
    """Whether pytest collects the module, or reads it for its fixtures."""
    parts = module.split(".")
    return parts[0] == "tests" and (parts[-1] == "conftest" or parts[-1].startswith("test_"))


IMPORT = re.compile(r"\bfrom +(tests[\w.]*) +import +(\w+)|\bimport +(tests[\w.]*)")
"""An import in the text of a program that a test runs in a process of its own."""


def imports(source: str) -> Iterator[str]:
    """The dotted names that a module imports, anywhere in it; `from a import b` counts as `a` and as `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = "." * node.level + (node.module or "")
            yield from (parent, *(f"{parent}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            for parent, name, module in IMPORT.findall(node.value):
                yield from (module,) if module else (parent, f"{parent}.{name}")


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
        ("code = 'import os; from tests.test_cli import answer'", ["tests.test_cli"]),
        ("code = 'from tests import test_cli'", ["tests.test_cli"]),
        ("code = f'{here}; import tests.test_cli'", ["tests.test_cli"]),
        ("from tests.support.models import BASES", []),
        ("from tests.support import models", []),
    ],
)
def test_an_import_of_a_test_module_is_seen(source: str, expected: list[str]) -> None:
    assert imported_tests(source) == expected


def test_no_module_imports_a_test_module() -> None:
    assert len(MODULES) > 200
    found = {
        str(path.relative_to(ROOT)): imported_tests(path.read_text(encoding="utf-8"))
        for path in MODULES
        if path != Path(__file__)  # its examples are such imports
    }
    assert {name: names for name, names in found.items() if names} == {}, "move what they share into tests/support"


def test_every_sentence_of_a_golden_is_of_a_test() -> None:
    goldens = [*ROOT.glob("tests/**/wording/*.txt")]
    assert goldens
    for golden in goldens:
        module = golden.parent.parent / f"test_{golden.stem}.py"
        tests = {node.name for node in ast.walk(ast.parse(module.read_bytes())) if isinstance(node, ast.FunctionDef)}
        assert {name.partition("[")[0] for name in wording.read(golden)} <= tests, golden


def test_files_and_tests_that_the_mutants_tool_names_exist() -> None:
    """A renamed test that the tool leaves out under its old name costs seconds for each mutant."""
    for source, first, every in mutants.PARTS.values():
        assert all([*ROOT.glob(pattern)] for pattern in source), source
        assert all((ROOT / path).exists() for path in (*first, *every)), (first, every)
    named = (*mutants.SLOW, *mutants.SAME_FILES, *mutants.NOT_FIRST)
    assert [test for test in named if test.partition("::")[2] not in functions(test.partition("::")[0])] == []
    for start in mutants.GOLDEN_TESTS:
        path, _, name = start.partition("::")
        assert (ROOT / path).is_dir() or any(function.startswith(name) for function in functions(path)), start


def functions(path: str) -> set[str]:
    """The names of a module's functions; none if there is no such module."""
    if not (ROOT / path).is_file():
        return set()
    return {node.name for node in ast.walk(ast.parse((ROOT / path).read_bytes())) if isinstance(node, ast.FunctionDef)}


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


PACKAGE = ROOT / "src" / "merge_gate"
MOST_MODULES = 15
"""In one folder, without `__init__.py`."""
A_MODULE_FOR_EACH = PACKAGE / "judging" / "checks"
"""It has as many modules as there are checks, and few others."""
FILES = sorted(PACKAGE.rglob("*.py"))


def test_a_folder_can_be_taken_in_at_a_glance() -> None:
    modules = Counter(path.parent for path in FILES if path.name != "__init__.py")
    assert len(modules) > 20
    assert modules.pop(A_MODULE_FOR_EACH) - len(CHECKS) <= MOST_MODULES // 3
    assert not {str(folder): count for folder, count in modules.items() if count > MOST_MODULES}


def test_no_folder_is_empty_and_each_says_what_it_is_for() -> None:
    for folder in {path.parent for path in FILES}:
        inside = [path for path in folder.iterdir() if path.name not in {"__init__.py", "__pycache__"}]
        assert inside, folder
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_bytes())), folder


def test_no_two_modules_have_one_name() -> None:
    """The parts of each feature have the names of the places at which it acts."""
    roles = {"__init__", "__main__", "declared", "feature", "consumer"}
    names = Counter(path.stem for path in FILES if path.stem not in roles)
    assert not [name for name, count in names.items() if count > 1]


def test_no_two_public_classes_have_one_name() -> None:
    classes = Counter(
        node.name
        for path in FILES
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert len(classes) > 100
    assert not [name for name, count in classes.items() if count > 1]


def test_a_feature_imports_no_other_except_the_one_it_needs() -> None:
    for path in PACKAGE.glob("features/*/**/*.py"):
        feature = path.relative_to(PACKAGE).parts[1]
        others = {
            name.split(".")[2] for name in imports(path.read_text()) if re.match(r"merge_gate\.features\.\w", name)
        }
        assert others <= {feature, NEEDS.get(feature)}, path


def test_a_file_that_the_code_names_exists() -> None:
    """A comment or docstring that points to a moved file misleads its reader."""
    named = {
        (str(path.relative_to(PACKAGE)), name)
        for path in FILES
        for name in re.findall(r"(?<![\w/.-])((?:\w+/)+\w+\.py)\b", path.read_text(encoding="utf-8"))
    }
    folders = {path.name for path in PACKAGE.iterdir()}
    ours = [(path, name) for path, name in named if name.partition("/")[0] in folders]
    tests = [(path, name) for path, name in named if name.startswith("tests/")]
    assert len(ours) > 10
    assert len(tests) > 2
    assert not [(path, name) for path, name in ours if not (PACKAGE / name).is_file()]
    assert not [(path, name) for path, name in tests if not (PACKAGE.parents[1] / name).is_file()]
