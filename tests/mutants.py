"""A mutation run: is there a test that fails for each small change of the code that judges?

    python tests/mutants.py judging|preflight|config [--only NAME] [--show] [--work DIR]

Lays a copy of the tree into a directory, and lets mutmut change it there, one place at a time, and run the tests of
that part. mutmut leaves functions alone that have a decorator, which here are the checks themselves; so in the copy
`@check(…)` above a function becomes the assignment that it stands for. Ends with the number of mutants that no test
has noticed, and with --show the change of each.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PREFLIGHT = ("preflight", "adapter_config", "strict_json", "headers")
PARTS = {
    "judging": (["src/merge_gate/judging/*.py"], ["tests/judging"]),
    "preflight": (
        [f"src/merge_gate/sources/{name}.py" for name in PREFLIGHT],
        [f"tests/sources/test_{name}.py" for name in ("said", "pickled", "preflight", "adapter_config")],
    ),
    "config": (["src/merge_gate/config/*.py"], ["tests/config"]),
}
"""What is changed, and the tests that must notice."""

SLOW = (
    "tests/judging/test_verdict.py::test_what_is_not_finite_never_passes",
    "tests/judging/test_verdict.py::test_what_is_not_finite_is_an_error_by_default",
    "tests/sources/test_pickled.py::test_no_damage_gets_past_as_another_file",
    "tests/sources/test_adapter_config.py::test_any_object_is_a_record_or_a_finding",
    "tests/sources/test_adapter_config.py::test_any_bytes_are_a_record_or_a_finding",
    "tests/sources/test_adapter_config.py::test_what_is_recorded_is_what_peft_reads",
    "tests/sources/test_preflight.py::test_what_torch_pickles_is_read_as_safetensors_are",
    "tests/sources/test_preflight.py::test_what_peft_saves_has_no_finding",
    "tests/sources/test_preflight.py::test_what_every_method_saves_has_no_finding",
    "tests/sources/test_preflight.py::test_what_the_library_refuses_is_refused",
    "tests/sources/test_preflight.py::test_a_damaged_file_is_never_accepted_where_the_library_refuses",
    "tests/sources/test_preflight.py::test_sound_files_are_accepted_as_the_library_does",
    "tests/sources/test_preflight.py::test_a_thousand_small_adapters_take_seconds",
    "tests/config/test_load.py::test_a_thousand_adapters_are_read_in_seconds",
    "tests/config/test_load.py::test_any_text_is_read_or_refused",
    "tests/config/test_load.py::test_any_bytes_are_read_or_refused",
    "tests/config/test_load.py::test_any_yaml_punctuation_is_read_or_refused",
    "tests/config/test_load.py::test_any_values_are_read_or_refused",
    "tests/config/test_load.py::test_importing_the_table_of_checks_costs_nothing",
    "tests/config/test_load.py::test_loading_does_not_import_torch",
    "tests/config/test_bounds.py::test_both_parsers_read_the_same",
    "tests/config/test_said.py::test_a_fresh_import_makes_the_same_models",
    "tests/config/test_bounds.py::test_a_file_may_list_ten_thousand_adapters_and_no_more",
)
"""Left out: seconds for each mutant. What only they notice counts as not noticed."""

COPIED = ("src", "tests", "docs", "examples", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml")
NOTICED = {"killed", "timeout"}


def main() -> int:
    words = argparse.ArgumentParser(description="change the code, one place at a time; does a test fail?")
    words.add_argument("part", choices=PARTS)
    words.add_argument("--only", default="", help="mutants of this name, as mutmut names them; may hold *")
    words.add_argument("--show", action="store_true", help="print the change of each survivor")
    words.add_argument("--work", type=Path, help="where the copy is laid, and found again by the next run")
    asked = words.parse_args()
    if asked.work:
        asked.work.mkdir(parents=True, exist_ok=True)
        return run(asked.work, asked.part, asked.only, show=asked.show)
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        return run(Path(directory), asked.part, asked.only, show=asked.show)


def run(work: Path, part: str, only: str, *, show: bool) -> int:
    lay_out(work, part)
    told = mutmut(work, "run", "--max-children", "1", *([only] if only else []), quiet=False)
    if told.returncode:
        return told.returncode
    listed = mutmut(work, "results", "--all", "true").stdout
    outcomes = dict(re.findall(r"^ +(\S+): (.+)$", listed, re.MULTILINE))
    of_part = {name: outcome for name, outcome in outcomes.items() if not only or fnmatch(name, only)}
    unnoticed = sorted(name for name, outcome in of_part.items() if outcome not in NOTICED)
    for name in unnoticed:
        print(f"{name}: {of_part[name]}")
        if show:
            print(mutmut(work, "show", name).stdout)
    counted = ", ".join(f"{count} {outcome}" for outcome, count in Counter(of_part.values()).most_common())
    print(f"{part}: {len(of_part)} mutants: {counted}; {len(unnoticed) / max(len(of_part), 1):.1%} not noticed")
    return 0


def lay_out(work: Path, part: str) -> None:
    for name in COPIED:
        there = work / name
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, there, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, there)
    changed, tests = PARTS[part]
    for pattern in changed:
        for path in work.glob(pattern):
            path.write_text(without_decorators(path.read_text(encoding="utf-8")), encoding="utf-8")
    settings = {
        "source_paths": ["src"],
        "only_mutate": changed,
        "pytest_add_cli_args_test_selection": tests,
        "pytest_add_cli_args": [f"--deselect={test}" for test in SLOW],
        "also_copy": [name for name in COPIED if name not in {"src", "tests", "pyproject.toml"}],
    }
    with (work / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("\n[tool.mutmut]\n" + "".join(f"{key} = {value!r}\n" for key, value in settings.items()))


def without_decorators(source: str) -> str:
    """`@a(…)` above a function `f` becomes `f = a(…)(f)` below it, which is what it means."""
    lines = source.split("\n")
    decorated = [one for one in ast.walk(ast.parse(source)) if isinstance(one, ast.FunctionDef) and one.decorator_list]
    for node in sorted(decorated, key=lambda one: one.lineno, reverse=True):
        made = node.name
        for one in reversed(node.decorator_list):
            made = f"({ast.get_source_segment(source, one)})({made})"
        assert node.end_lineno
        lines.insert(node.end_lineno, f"{' ' * node.col_offset}{node.name} = {made}")
        del lines[node.decorator_list[0].lineno - 1 : node.lineno - 1]
    return "\n".join(lines)


def mutmut(work: Path, *words: str, quiet: bool = True) -> subprocess.CompletedProcess[str]:
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"CI": "1"}
    out = subprocess.PIPE if quiet else None
    return subprocess.run(
        [sys.executable, "-m", "mutmut", *words], cwd=work, env=environ, check=False, stdout=out, text=True
    )


if __name__ == "__main__":
    sys.exit(main())
