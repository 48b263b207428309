"""A mutation run: is there a test that fails for each small change of the code that judges?

    python tests/tools/mutants.py judging|preflight|config [--only NAME …] [--show] [--work DIR]

Lays a copy of the tree into a directory, and lets mutmut change it there, one place at a time, and run the tests of
that part: first those that hold every word, which notice most in a fraction of a second, then all the others for what
is left. mutmut skips functions with a decorator, and every check has one. So in the copy `@Check(…).on_merge` above a
function becomes the assignment that it means. Ends with the number of mutants that no test has noticed, and with --show
the change of each.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path

import hypothesis
import pytest
from _pytest.config import _prepareconfig

ROOT = Path(__file__).resolve().parents[2]

PREFLIGHT = ("preflight", "adapter_config", "json_object", "headers")
PARTS = {
    "judging": (
        ["src/merge_gate/judging/*.py", "src/merge_gate/judging/checks/*.py"],
        ["tests/judging/test_messages.py"],
        ["tests/judging"],
    ),
    "preflight": (
        ["src/merge_gate/strict_json.py", *(f"src/merge_gate/files/{name}.py" for name in PREFLIGHT)],
        ["tests/files/test_messages.py", "tests/files/test_adapter_config.py"],
        [f"tests/files/test_{name}.py" for name in ("messages", "pickle_scan", "preflight", "adapter_config")],
    ),
    "config": (
        ["src/merge_gate/config/*.py"],
        [f"tests/config/test_{name}.py" for name in ("messages", "from_arguments", "baseline_file")],
        ["tests/config"],
    ),
}
"""What is changed, the tests that look first, and all that must notice."""

SLOW = (
    "tests/judging/test_verdict.py::test_what_is_not_finite_never_passes",
    "tests/judging/test_verdict.py::test_what_is_not_finite_is_an_error_by_default",
    "tests/files/test_pickle_scan.py::test_no_damage_gets_past_as_another_file",
    "tests/files/test_adapter_config.py::test_any_object_is_a_record_or_a_finding",
    "tests/files/test_adapter_config.py::test_any_bytes_are_a_record_or_a_finding",
    "tests/files/test_adapter_config.py::test_what_is_recorded_is_what_peft_reads",
    "tests/files/test_preflight.py::test_what_torch_pickles_is_read_as_safetensors_are",
    "tests/files/test_preflight.py::test_what_peft_saves_has_no_finding",
    "tests/files/test_preflight.py::test_what_every_method_saves_has_no_finding",
    "tests/files/test_preflight.py::test_what_the_library_refuses_is_refused",
    "tests/files/test_preflight.py::test_a_damaged_file_is_never_accepted_where_the_library_refuses",
    "tests/files/test_preflight.py::test_sound_files_are_accepted_as_the_library_does",
    "tests/files/test_preflight.py::test_a_thousand_small_adapters_take_seconds",
    "tests/config/test_load_config.py::test_a_thousand_adapters_are_read",
    "tests/config/test_load_config.py::test_any_text_is_read_or_refused",
    "tests/config/test_load_config.py::test_any_bytes_are_read_or_refused",
    "tests/config/test_load_config.py::test_any_yaml_punctuation_is_read_or_refused",
    "tests/config/test_load_config.py::test_any_values_are_read_or_refused",
    "tests/config/test_load_config.py::test_importing_the_table_of_checks_costs_nothing",
    "tests/config/test_load_config.py::test_loading_does_not_import_torch",
    "tests/config/test_bounds.py::test_both_parsers_read_the_same",
    "tests/config/test_bounds.py::test_a_file_may_list_ten_thousand_adapters_and_no_more",
)
"""Left out: seconds for each mutant. What only they notice counts as not noticed."""

SAME_FILES = tuple(
    f"tests/config/test_{name}"
    for name in (
        "load_config.py::test_one_mistake_is_one_problem",
        "load_config.py::test_a_problem_names_its_place",
        "load_config.py::test_the_schema_refuses_what_the_loader_refuses",
        "bounds.py::test_without_libyaml_all_is_the_same",
    )
)
"""Left out: hundreds of files each. `test_messages.py` reads them as well, and compares every word of the result."""

LAST = ("tests/config/test_messages.py::test_a_fresh_import_makes_the_same_models",)
"""Left out of the first pass: it takes ten times as long as all others there, and is for what runs on import."""

COPIED = ("src", "tests", "docs", "examples", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml")
NOTICED = {"killed", "timeout"}
HOLD_EVERY_WORD = tuple(f"tests/{part}/test_messages.py::test_messages_of_" for part in ("judging", "files", "config"))
"""These notice most, at the first case that differs."""
AS_MUTMUT = "as-mutmut"
MAX_MEMORY = 8 << 30
"""Bytes of addresses: a change can make a list grow without end."""


def main() -> int:
    words = argparse.ArgumentParser(description="change the code, one place at a time; does a test fail?")
    words.add_argument("part", choices=PARTS)
    words.add_argument("--only", nargs="*", default=[], help="mutants of these names, as mutmut has them; may hold *")
    words.add_argument("--show", action="store_true", help="print the change of each survivor")
    words.add_argument("--work", type=Path, help="where the copy is laid, and found again by the next run")
    asked = words.parse_args()
    if asked.work:
        asked.work.mkdir(parents=True, exist_ok=True)
        return run(asked.work, asked.part, asked.only, show=asked.show)
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        return run(Path(directory), asked.part, asked.only, show=asked.show)


def run(work: Path, part: str, only: list[str], *, show: bool) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    changed, first, every = PARTS[part]
    outcomes = tried(work / "first", changed, first, only, without=LAST)
    left = unnoticed(outcomes)
    print(f"{part}: {len(outcomes)} mutants, {len(left)} of them for the second pass")
    if left:
        outcomes |= tried(work / "every", changed, every, left)
    left = unnoticed(outcomes)
    for name in left:
        print(f"{name}: {outcomes[name]}")
        if show:
            print(mutmut(work / "every", "show", name).stdout)
    counted = ", ".join(f"{count} {outcome}" for outcome, count in Counter(outcomes.values()).most_common())
    print(f"{part}: {len(outcomes)} mutants: {counted}; {len(left) / max(len(outcomes), 1):.1%} not noticed")
    return 0


def unnoticed(outcomes: dict[str, str]) -> list[str]:
    return sorted(name for name, outcome in outcomes.items() if outcome not in NOTICED)


def tried(
    work: Path, changed: list[str], tests: list[str], names: list[str], *, without: tuple[str, ...] = ()
) -> dict[str, str]:
    """What came of the mutants of these names, or of all."""
    lay_out(work, changed, tests, (*SLOW, *SAME_FILES, *without))
    told = mutmut(work, "run", "--max-children", os.environ.get("MUTANTS_AT_ONCE", "1"), *names, quiet=False)
    if told.returncode:
        sys.exit(told.returncode)
    listed = mutmut(work, "results", "--all", "true").stdout
    outcomes = dict(re.findall(r"^ +(\S+): (.+)$", listed, re.MULTILINE))
    if not names:
        return outcomes
    return {one: outcome for one, outcome in outcomes.items() if any(fnmatch(one, name) for name in names)}


def lay_out(work: Path, changed: list[str], tests: list[str], without: tuple[str, ...]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        there = work / name
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, there, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, there)
    for pattern in changed:
        for path in work.glob(pattern):
            path.write_text(without_decorators(path.read_text(encoding="utf-8")), encoding="utf-8")
            shutil.copystat(ROOT / path.relative_to(work), path)  # what is as old as before is not changed again
    settings = {
        "source_paths": ["src"],
        "only_mutate": changed,
        "pytest_add_cli_args_test_selection": tests,
        "pytest_add_cli_args": [
            "--assert=plain",
            "-pno:unraisableexception",
            *(f"--deselect={test}" for test in without),
        ],
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
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environ |= {"CI": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # it would cost each mutant more than its tests
    out = subprocess.PIPE if quiet else None
    return subprocess.run(
        [sys.executable, __file__, AS_MUTMUT, *words], cwd=work, env=environ, check=False, stdout=out, text=True
    )


def as_mutmut(words: list[str]) -> None:
    """mutmut, but that it collects the tests once: to do it for each mutant takes longer than most tests."""
    from mutmut.__main__ import cli  # noqa: PLC0415 - it is an extra of the package
    from mutmut.runners.harness import PytestRunner  # noqa: PLC0415

    held: list[pytest.Session] = []

    def run_tests(self: PytestRunner, *, mutant_name: str | None, tests: Iterable[str]) -> int:
        with contextlib.chdir("mutants"):
            if mutant_name is not None:  # in a process of its own
                return outcome(held[0], tests)
            if not held:
                held.append(collected([*self._pytest_add_cli_args_test_selection, *self._pytest_add_cli_args]))
            return in_a_process_of_its_own(lambda: outcome(held[0], tests))

    PytestRunner.run_tests = run_tests
    cli(words, standalone_mode=False)
    if held:
        with contextlib.chdir("mutants"):
            if in_a_process_of_its_own(lambda: outcome(held[0], [])):
                sys.exit("the tests fail without a change as well: the outcomes mean nothing")


def collected(arguments: list[str]) -> pytest.Session:
    place = Path("..", "held").resolve()  # where no other run of pytest on this machine tidies up
    bare = ["--rootdir=.", "--tb=no", "-q", "--capture=no", f"--basetemp={place}"]
    config = _prepareconfig([*bare, "-o", "tmp_path_retention_policy=failed", *arguments])
    session = pytest.Session.from_config(config)
    config._do_configure()
    hypothesis.settings.load_profile("fast")  # the plugin that `make test` loads it with is switched off here
    config.hook.pytest_sessionstart(session=session)
    config.hook.pytest_collection(session=session)
    config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    return session


def in_a_process_of_its_own(asked: Callable[[], int]) -> int:
    child = os.fork()
    if not child:
        os._exit(asked())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(session: pytest.Session, tests: Iterable[str]) -> int:
    """1 where one of the tests (none: of all) fails, after which no other is run."""
    by_name = {item.nodeid: item for item in session.items}
    items = [by_name[name] for name in tests] or session.items
    items.sort(key=lambda item: not item.nodeid.startswith(HOLD_EVERY_WORD))  # within, mutmut has the quick ones first
    for item, following in zip(items, [*items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            return 1
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == [AS_MUTMUT]:
        as_mutmut(sys.argv[2:])
    else:
        sys.exit(main())
