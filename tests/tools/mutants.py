"""Checks with mutmut whether some test fails for each small change of the code that judges.

    python tests/tools/mutants.py judging|preflight|config [--only NAME …] [--show] [--work DIR] [--record]

1. Copy the tree into a directory.
2. Replace decorators in the copy, because mutmut skips functions that have one, and every check has one:
   `@Check(…).on_merge` above a function becomes the equivalent assignment below it.
3. Let mutmut change one place at a time and run the tests that compare all messages with a golden. They take a fraction
   of a second and kill most mutants.
4. Run all tests of the part against the mutants that survived.
5. Print the number of survivors, and with --show the change of each.
6. Print the functions of which a larger share survives than in mutants.json. With --record, replace its figures.
"""

import argparse
import ast
import contextlib
import json
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
REFERENCE = Path(__file__).with_suffix(".json")
"""By part and function: the number of its mutants, and of the survivors."""

PREFLIGHT = ("preflight", "adapter_config", "json_object", "headers")
PARTS = {
    "judging": (
        ["src/merge_gate/judging/*.py", "src/merge_gate/judging/checks/*.py"],
        ["tests/judging/checks"],
        ["tests/judging"],
    ),
    "preflight": (
        ["src/merge_gate/_internal/strict_json.py", *(f"src/merge_gate/files/{name}.py" for name in PREFLIGHT)],
        ["tests/files/test_messages.py", "tests/files/test_adapter_config.py"],
        [f"tests/files/test_{name}.py" for name in ("messages", "preflight", "adapter_config")],
    ),
    "config": (
        ["src/merge_gate/config/*.py"],
        [f"tests/config/test_{name}.py" for name in ("messages", "from_arguments")],
        ["tests/config"],
    ),
}
"""For each part: the files that are changed, the tests of the first pass, and the tests of the second pass."""

SLOW = (
    "tests/judging/test_verdict.py::test_what_is_not_finite_never_passes",
    "tests/judging/test_verdict.py::test_what_is_not_finite_is_an_error_by_default",
    "tests/files/test_adapter_config.py::test_any_object_is_a_record_or_a_finding",
    "tests/files/test_adapter_config.py::test_any_bytes_are_a_record_or_a_finding",
    "tests/files/test_adapter_config.py::test_what_is_recorded_is_what_peft_reads",
    "tests/files/test_preflight.py::test_what_torch_pickles_is_read_as_safetensors_are",
    "tests/files/test_preflight.py::test_what_the_library_refuses_is_refused",
    "tests/files/test_preflight.py::test_a_damaged_file_is_never_accepted_if_the_library_refuses",
    "tests/files/test_preflight.py::test_sound_files_are_accepted_as_the_library_does",
    "tests/config/test_load_config.py::test_any_text_is_read_or_refused",
    "tests/config/test_load_config.py::test_any_bytes_are_read_or_refused",
    "tests/config/test_load_config.py::test_any_yaml_punctuation_is_read_or_refused",
    "tests/config/test_load_config.py::test_any_values_are_read_or_refused",
    "tests/config/test_bounds.py::test_both_parsers_read_the_same",
    "tests/config/test_bounds.py::test_a_file_may_list_ten_thousand_adapters_and_no_more",
)
"""Left out, because they take seconds for each mutant. A mutant that only these tests kill counts as a survivor."""

SAME_FILES = tuple(
    f"tests/config/test_{name}"
    for name in (
        "load_config.py::test_one_mistake_is_one_problem",
        "load_config.py::test_a_problem_names_its_place",
        "load_config.py::test_the_schema_refuses_what_the_loader_refuses",
        "bounds.py::test_without_libyaml_all_is_the_same",
    )
)
"""Left out, because each reads hundreds of files. `test_messages.py` reads the same files and compares each message."""

NOT_FIRST = ("tests/config/test_messages.py::test_a_fresh_import_makes_the_same_models",)
"""Left out of the first pass: it takes ten times as long as all other tests of that pass. It tests imports."""

COPIED = ("src", "tests", "docs", "examples", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml")
KILLED = {"killed", "timeout"}
GOLDEN_TESTS = (
    "tests/judging/checks/",
    "tests/files/test_messages.py::test_messages_of_",
    "tests/config/test_messages.py::test_messages_of_",
)
"""The tests that kill most mutants. They stop at the first message that differs, so they run first."""
AS_MUTMUT = "as-mutmut"
MAX_MEMORY = 8 << 30
"""Bytes of address space, because a mutant can make a list grow without end."""


def main() -> int:
    parser = argparse.ArgumentParser(description="change the code in one place at a time, and run its tests")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--only", nargs="*", default=[], help="mutmut's names of the mutants to run; * is a wildcard")
    parser.add_argument("--show", action="store_true", help="print the change of each survivor")
    parser.add_argument("--work", type=Path, help="the directory of the copy; the next run continues there")
    parser.add_argument("--record", action="store_true", help="store the figures of this run as the reference")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mutants-")))
        work.mkdir(parents=True, exist_ok=True)
        outcomes = run(work, options.part, options.only, show=options.show)
    compare(options.part, outcomes, record=options.record)
    return 0


def compare(part: str, outcomes: dict[str, str], *, record: bool) -> None:
    """Print each function whose tests find a smaller share of its mutants than the reference has."""
    reference: dict[str, dict[str, list[int]]] = json.loads(REFERENCE.read_text(encoding="utf-8"))
    figures = by_function(outcomes)
    for name, (total, alive) in figures.items():
        before = reference.get(part, {}).get(name)
        if before is not None and alive * before[0] > before[1] * total:
            print(f"{name}: {alive} of {total} mutants survive, {before[1]} of {before[0]} before")
    if record:
        reference[part] = figures
        parts = ",\n".join(
            f'"{one}": {{\n' + ",\n".join(f"{json.dumps(key)}: {value}" for key, value in rows.items()) + "\n}"
            for one, rows in reference.items()
        )
        REFERENCE.write_text(f"{{\n{parts}\n}}\n", encoding="utf-8")


def by_function(outcomes: dict[str, str]) -> dict[str, list[int]]:
    """For each function: the number of its mutants, and the number of those that survived."""
    counts: dict[str, list[int]] = {}
    for name, outcome in sorted(outcomes.items()):
        function = re.sub(r"\bx_|\bxǁ", "", name.rpartition("__mutmut_")[0]).replace("ǁ", ".")
        total_and_alive = counts.setdefault(function.removeprefix("merge_gate."), [0, 0])
        total_and_alive[0] += 1
        total_and_alive[1] += outcome not in KILLED
    return counts


def run(work: Path, part: str, only: list[str], *, show: bool) -> dict[str, str]:
    """Run both passes of a part, and print the survivors."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    changed, first_tests, all_tests = PARTS[part]
    outcomes = run_pass(work / "first", changed, first_tests, only, without=NOT_FIRST)
    alive = survivors(outcomes)
    print(f"{part}: {len(outcomes)} mutants, {len(alive)} of them for the second pass")
    if alive:
        outcomes |= run_pass(work / "every", changed, all_tests, alive)
    alive = survivors(outcomes)
    for name in alive:
        print(f"{name}: {outcomes[name]}")
        if show:
            print(mutmut(work / "every", "show", name).stdout)
    counted = ", ".join(f"{count} {outcome}" for outcome, count in Counter(outcomes.values()).most_common())
    print(f"{part}: {len(outcomes)} mutants: {counted}; {len(alive) / max(len(outcomes), 1):.1%} survived")
    return outcomes


def survivors(outcomes: dict[str, str]) -> list[str]:
    return sorted(name for name, outcome in outcomes.items() if outcome not in KILLED)


def run_pass(
    work: Path, changed: list[str], tests: list[str], names: list[str], *, without: tuple[str, ...] = ()
) -> dict[str, str]:
    """The outcome of each of these mutants by name; of all mutants if `names` is empty."""
    make_copy(work, changed, tests, (*SLOW, *SAME_FILES, *without))
    done = mutmut(work, "run", "--max-children", os.environ.get("MUTANTS_AT_ONCE", "1"), *names, quiet=False)
    if done.returncode:
        sys.exit(done.returncode)
    listed = mutmut(work, "results", "--all", "true").stdout
    outcomes = dict(re.findall(r"^ +(\S+): (.+)$", listed, re.MULTILINE))
    if not names:
        return outcomes
    return {name: outcome for name, outcome in outcomes.items() if any(fnmatch(name, pattern) for pattern in names)}


def make_copy(work: Path, changed: list[str], tests: list[str], without: tuple[str, ...]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        target = work / name
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, target)
    for pattern in changed:
        for path in work.glob(pattern):
            path.write_text(without_decorators(path.read_text(encoding="utf-8")), encoding="utf-8")
            shutil.copystat(ROOT / path.relative_to(work), path)  # mutmut skips files that are not newer
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
    """Replace `@a(…)` above a function `f` by the equivalent `f = a(…)(f)` below it."""
    lines = source.split("\n")
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    decorated = [node for node in functions if node.decorator_list]
    for node in sorted(decorated, key=lambda node: node.lineno, reverse=True):
        value = node.name
        for decorator in reversed(node.decorator_list):
            value = f"({ast.get_source_segment(source, decorator)})({value})"
        assert node.end_lineno
        lines.insert(node.end_lineno, f"{' ' * node.col_offset}{node.name} = {value}")
        del lines[node.decorator_list[0].lineno - 1 : node.lineno - 1]
    return "\n".join(lines)


def mutmut(work: Path, *words: str, quiet: bool = True) -> subprocess.CompletedProcess[str]:
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environ |= {"CI": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # plugins would take longer than the tests
    out = subprocess.PIPE if quiet else None
    return subprocess.run(
        [sys.executable, __file__, AS_MUTMUT, *words], cwd=work, env=environ, check=False, stdout=out, text=True
    )


def as_mutmut(words: list[str]) -> None:
    """Run mutmut, but collect the tests once. Collecting them for each mutant takes longer than most tests."""
    from mutmut.__main__ import cli  # noqa: PLC0415 - it is installed for this tool only
    from mutmut.runners.harness import PytestRunner  # noqa: PLC0415

    sessions: list[pytest.Session] = []

    def run_tests(self: PytestRunner, *, mutant_name: str | None, tests: Iterable[str]) -> int:
        with contextlib.chdir("mutants"):
            if mutant_name is not None:  # mutmut has forked for this mutant
                return exit_code(sessions[0], tests)
            if not sessions:
                sessions.append(collect([*self._pytest_add_cli_args_test_selection, *self._pytest_add_cli_args]))
            return in_child_process(lambda: exit_code(sessions[0], tests))

    PytestRunner.run_tests = run_tests
    cli(words, standalone_mode=False)
    if sessions:
        with contextlib.chdir("mutants"):
            if in_child_process(lambda: exit_code(sessions[0], [])):
                sys.exit("the tests fail without a change too, so the outcomes mean nothing")


def collect(arguments: list[str]) -> pytest.Session:
    """A session of pytest with the tests that `arguments` select."""
    place = Path("..", "temporary").resolve()  # other runs of pytest on this machine do not clean up here
    bare = ["--rootdir=.", "--tb=no", "-q", "--capture=no", f"--basetemp={place}"]
    config = _prepareconfig([*bare, "-o", "tmp_path_retention_policy=failed", *arguments])
    session = pytest.Session.from_config(config)
    config._do_configure()
    hypothesis.settings.load_profile("fast")  # the plugin that loads it in `make test` is off here
    config.hook.pytest_sessionstart(session=session)
    config.hook.pytest_collection(session=session)
    config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    return session


def in_child_process(call: Callable[[], int]) -> int:
    """The result of `call` in a fork of this process."""
    child = os.fork()
    if not child:
        os._exit(call())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def exit_code(session: pytest.Session, tests: Iterable[str]) -> int:
    """1 after the first test that fails, else 0. Runs all tests of the session if `tests` is empty."""
    by_name = {item.nodeid: item for item in session.items}
    items = [by_name[name] for name in tests] or session.items
    items.sort(key=lambda item: not item.nodeid.startswith(GOLDEN_TESTS))  # mutmut sorted the others by time
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
