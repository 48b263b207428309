"""What the documents say is held against the code: commands, options, links, checks, configs, exit codes, modules."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import importlib.util
import io
import json
import math
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from jsonschema import Draft202012Validator
from packaging.version import Version

from benchmarks import architectures, forward, servers
from merge_gate._internal.errors import ExitCode
from merge_gate.cli import dispatch
from merge_gate.cli.parser import commanded
from merge_gate.files.base_formats import JUDGED, JUDGED_WITH, KNOWN_NAMES
from merge_gate.judging.checks.check import Symptom
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.kinds import WITHOUT_SETTING
from merge_gate.judging.not_judged import NOT_JUDGED
from merge_gate.records.terms import Origin, Result
from merge_gate.report.wording.explanations import explanation
from tests.support.all_faults import FAULTS
from tests.support.cases import lay_out
from tests.support.engine.plain_merge import peft_merge
from tests.support.generated import CODE_BLOCK, blocks, held, without_numbers
from tests.support.judging.every_check import GOLDENS
from tests.support.models import VARIANTS
from tests.support.schemas import config_schema
from tests.tools.words import words
from website.build import ORDER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.cases import Judged
    from tests.support.models import Shelf

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHECKS_INDEX = ROOT / "docs" / "checks" / "index.md"
CHECK_PAGES = {path.stem: path for path in sorted(CHECKS_INDEX.parent.glob("*.md")) if path != CHECKS_INDEX}
ARCHITECTURE = (ROOT / "docs" / "project/architecture.md").read_text(encoding="utf-8")
DECISIONS = (ROOT / "docs" / "project/decisions.md").read_text(encoding="utf-8")
DEPENDENCIES = (ROOT / "docs" / "project/dependencies.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def explained(check: str) -> str:
    """The page of a check."""
    return CHECK_PAGES[check].read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """What stands between a heading and the next one of its level or above."""
    match = re.search(rf"^(#+) {re.escape(heading)}$", text, re.MULTILINE)
    assert match, heading
    return re.split(rf"^#{{1,{len(match[1])}}} ", text[match.end() :], maxsplit=1, flags=re.MULTILINE)[0]


# --- links -----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of the headings."""
    text = CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def local_links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        text = CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not re.match(r"[a-z]+:", target):
                yield page, target


@pytest.mark.parametrize(
    ("page", "target"), [pytest.param(*link, id=f"{link[0].name}-{link[1]}") for link in sorted(set(local_links()))]
)
def test_a_link_leads_to_a_file_and_a_heading(page: Path, target: str) -> None:
    name, _, anchor = target.partition("#")
    path = (page.parent / name).resolve() if name else page
    assert path.is_relative_to(ROOT)
    assert path.exists()
    assert not anchor or anchor in anchors(path)


# --- commands --------------------------------------------------------------------------------------------------------


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    commands = re.findall(r"(?:^|`|[A-Z]+=\S+ )make ([a-z0-9-]+)", text, re.MULTILINE)
    assert set(commands) <= make_targets()


def test_make_help_and_contributing_have_every_target() -> None:
    command = ["make", "--file", str(ROOT / "Makefile"), "help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    told = dict(re.findall(r"^\| `make ([\w-]+)` \|.*\| ([^|]*) ?\|$", CONTRIBUTING, re.MULTILINE))
    assert set(re.findall(r"^make ([\w-]+) ", shown, re.MULTILINE)) == told.keys() == make_targets() - {"help"}
    hours = dict(re.findall(r"^make ([\w-]+) .*\(([^()]*hours?)\)$", shown, re.MULTILINE))
    assert "mutants" in hours
    assert hours == {target: told[target].strip() for target in hours}


@pytest.mark.parametrize("target", sorted(make_targets() - {"help", "clean"}))
def test_every_make_target_works_first_in_a_fresh_clone(target: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").touch()
    command = ["make", "--dry-run", "--file", str(ROOT / "Makefile"), target]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert not shown.stderr, "make says so of a target that waits for itself"
    assert "-m venv .venv" in shown.stdout


def imported_tests() -> list[tuple[str, str, str]]:
    return [
        (path.name, str(one.module), alias.name)
        for path in sorted((ROOT / "benchmarks").glob("*.py"))
        for one in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(one, ast.ImportFrom) and str(one.module).split(".")[0] == "tests"
        for alias in one.names
    ]


@pytest.mark.parametrize(("benchmark", "module", "name"), imported_tests())
def test_what_a_benchmark_takes_of_the_tests_is_there(benchmark: str, module: str, name: str) -> None:
    found = importlib.import_module(module)
    assert hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), benchmark


def helped(*words: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as left:
        dispatch.main([*words, "--help"])
    assert left.value.code == 0
    return printed.getvalue()


def told_commands() -> set[str]:
    """Every `merge-gate …` of the pages that stands in code."""
    found = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        spans = [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", CODE_BLOCK.sub("", text))]
        spans += [body for _, body in CODE_BLOCK.findall(text)]
        for span in spans:
            for line in span.splitlines():
                match = re.match(r"(?:\$ |\.venv/bin/|.* && )?merge-gate ((?:[a-z]|-)[^#;&|>]*)", line)
                if match:
                    found.add(match[1].strip())
    return found


@pytest.mark.parametrize("command", sorted(told_commands()))
def test_every_command_and_option_exists(command: str) -> None:
    words = command.split()
    if words[0].startswith("-"):
        assert words[0] in helped()
        return
    text = helped(*commanded(words)[0].split())
    for option in re.findall(r"--[a-z-]+", command):
        assert option in text


def python_snippets() -> list[tuple[str, str]]:
    return [(page.name, body) for page in PAGES for body in blocks(page.read_text(encoding="utf-8"), "python")]


@pytest.mark.parametrize(("name", "snippet"), python_snippets(), ids=lambda value: value[:12])
def test_python_in_a_page_compiles_and_imports_what_there_is(name: str, snippet: str) -> None:
    for node in ast.walk(ast.parse(snippet, name)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("merge_gate"):
            module = importlib.import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


# --- the README's configs and tables ------------------------------------------------------------------------


def config_snippets() -> list[tuple[str, str]]:
    snippets = [(page.name, body) for page in PAGES for body in blocks(page.read_text(encoding="utf-8"), "yaml")]
    return [(name, body) for name, body in snippets if "adapters:" in body and "\njobs:" not in body]


@pytest.mark.parametrize(("name", "snippet"), config_snippets(), ids=lambda value: value[:12])
def test_a_config_follows_the_schema(name: str, snippet: str) -> None:
    errors = [error.message for error in Draft202012Validator(config_schema()).iter_errors(yaml.safe_load(snippet))]
    assert errors == [], name


def test_pages_have_commands_programs_and_configs() -> None:
    assert {"run", "check", "demo", "schema"} <= {command.split()[0] for command in told_commands()}
    assert {"python.md", "trainers.md"} <= {name for name, _ in python_snippets()}
    assert "README.md" in dict(config_snippets())


def test_the_workflow_uses_inputs_of_the_action() -> None:
    (workflow,) = [body for body in blocks(README, "yaml") if "uses:" in body]
    inputs = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))["inputs"]
    steps = yaml.safe_load(workflow)["jobs"]["merge-gate"]["steps"]
    (step,) = [step for step in steps if "merge-gate" in step["uses"]]
    given = set(step["with"])
    assert given <= set(inputs)
    assert {name for name, facts in inputs.items() if facts.get("required")} <= given


def test_the_exit_codes_are_the_tools() -> None:
    rows = re.findall(r"^\| (\d) \| (\S+) \| .+ \|$", section(README, "Exit codes"), re.MULTILINE)
    assert [int(code) for code, _ in rows] == sorted(ExitCode)
    results = {int(code): result.strip("`") for code, result in rows if result.startswith("`")}
    assert results == {ExitCode[result.name]: result.value for result in Result}


@pytest.mark.attempt("M13", "git status after the README's own environment", "git ignores it")
def test_git_ignores_the_environment_that_the_readme_makes() -> None:
    (name,) = re.findall(r"python3 -m venv (\S+)", README)
    assert f"{name}/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


# --- what the README says of PEFT's own check ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "raised"),
    [("nan-saved-head", None), ("nan-lora_B-first", "adapter default"), ("base-nan-in-target", "adapter default")],
)
def test_what_safe_merge_sees_and_whom_it_blames(name: str, raised: str | None, shelf: Shelf, tmp_path: Path) -> None:
    (case,) = [case for case in FAULTS if case.name == name]
    adapter, base = tmp_path / name, shelf.base(case.base or VARIANTS[case.variant].base)
    lay_out(case, shelf, adapter)
    if raised is not None:
        with pytest.raises(ValueError, match=raised):
            peft_merge(base, adapter, "float32", safe_merge=True)
        return
    merged = peft_merge(base, adapter, "float32", safe_merge=True)[1]
    assert not all(torch.isfinite(tensor).all() for tensor in merged.values())


# --- docs/checks ----------------------------------------------------------------------------------------------------


def test_every_check_has_a_page() -> None:
    assert set(CHECK_PAGES) == {*CHECKS, *WITHOUT_SETTING}


@pytest.mark.parametrize("check", CHECK_PAGES)
def test_a_page_of_a_check_has_one_heading(check: str) -> None:
    headings = re.findall(r"^#.*$", CODE_BLOCK.sub("", explained(check)), re.MULTILINE)
    assert headings == [f"# {check}"]


def test_the_table_of_checks_is_in_their_index() -> None:
    order = list(CHECKS)
    rows = ["| what is wrong | check | fires when | default | origin | blame |", "|---|---|---|---|---|---:|"]
    for symptom in Symptom:
        told = str(symptom)
        for row in (row for row in CHECKS.values() if row.symptom is symptom):
            golden = GOLDENS[row.id].read_text(encoding="utf-8")
            origins = re.findall(
                rf"^== fires \d+\n\n(?:error|warning|{row.severity}) {row.id}, (\w+)$", golden, re.MULTILINE
            )
            limit = "" if row.limit is None else f" above {row.limit:g}"
            cells = (
                told,
                f"[{row.id}]({row.id}.md)",
                row.summary,
                f"`{row.severity}`{limit}",
                ", ".join(f"`{origin}`" for origin in Origin if origin in origins),
                str(order.index(row.id) + 1),
            )
            rows.append(f"| {' | '.join(cells)} |")
            told = ""
    held(CHECKS_INDEX, "checks", "\n".join(rows))


@pytest.mark.parametrize("check", CHECKS)
def test_a_page_of_docs_checks_is_the_docstring_of_its_check(check: str) -> None:
    page = CHECKS_INDEX.with_name(f"{check}.md")
    made = f"# {check}\n\n{CHECKS[check].explanation}\n"
    if os.environ.get("UPDATE_GOLDENS"):
        page.write_text(made, encoding="utf-8")
    assert page.read_text(encoding="utf-8") == made, "run make schemas"


@pytest.mark.parametrize("check", [*CHECKS, NOT_JUDGED])
def test_a_check_is_explained_in_text_without_marks(check: str) -> None:
    width = 72
    text = explanation(check, width)
    (example,) = blocks(explained(check), "text")
    assert text.startswith(f"{check}\n\nDefault" if check != NOT_JUDGED else check)
    for part in ("Fires when", "Why it matters.", "What to do.", "It happened.", "https://github.com/"):
        assert part in text
    assert all(f"\n    {line}\n" in text for line in example.splitlines())
    wide = [line for line in text.splitlines() if len(line) > width]
    assert all(line.startswith("    ") for line in wide)
    assert not re.search(r"\*\*|```|\]\(|^Cases:", text, re.MULTILINE)


@pytest.mark.parametrize("check", CHECKS)
def test_a_section_states_the_default(check: str) -> None:
    row = CHECKS[check]
    limit = "no limit" if row.limit is None else f"limit {row.limit:g}"
    if row.error_limit is not None:
        limit += ", no `error-limit`" if row.error_limit == math.inf else f", `error-limit` {row.error_limit:,g}"
    can = "can" if row.can_be_off else "cannot"
    said = f"Default `{row.severity.value}`, {limit}, {can} be switched off."
    assert said in explained(check).splitlines()


@pytest.mark.parametrize("check", [*CHECKS, NOT_JUDGED])
def test_an_example_is_a_message_of_the_gate(check: str, judged: Judged) -> None:
    (example,) = blocks(explained(check), "text")
    messages = {
        shorn(f.message): f.message for one in judged.reports.values() for f in one.findings if f.check == check
    }
    (nearest,) = difflib.get_close_matches(shorn(example), messages, 1, 0)
    if os.environ.get("UPDATE_GOLDENS") and nearest != shorn(example):
        page = next(PACKAGE.rglob(f"checks/{check.replace('-', '_')}.py")) if check in CHECKS else CHECK_PAGES[check]
        text = page.read_text(encoding="utf-8")
        page.write_text(
            text.replace(example, DIRECTORY.sub(r"./models/\2", messages[nearest]) + "\n"), encoding="utf-8"
        )
        return
    assert shorn(example) == nearest, "look at the difference, then run with UPDATE_GOLDENS=1"


@pytest.mark.parametrize("check", [*CHECKS, NOT_JUDGED])
def test_a_section_links_what_happened_to_others(check: str) -> None:
    _, _, happened = explained(check).partition("\n**It happened.**\n")
    links = re.findall(r"\[([\w./-]+)#(\d+)\]\(https://github\.com/([\w.-]+/[\w.-]+)/(?:issues|pull)/(\d+)\)", happened)
    assert links, "no incident, and no word why there is none"
    for name, number, repository, linked in links:
        assert (f"huggingface/{name}" if "/" not in name else name, number) == (repository, linked)


def shorn(message: str) -> str:
    """Without figures, which may differ by machine, and without the test's own directories."""
    return without_numbers(DIRECTORY.sub(r"\2", message))


DIRECTORY = re.compile(r"(\./models|/[\w./-]+)/([\w-]+)")


# --- docs/evidence/truth.md ------------------------------------------------------------------------------------------


def test_the_page_of_architectures_is_made_from_their_data() -> None:
    answers = json.loads((ROOT / "benchmarks" / "architectures.json").read_text(encoding="utf-8"))
    assert sum("class" in facts for facts in answers["types"].values()) >= LEAST_ARCHITECTURES
    assert not [name for name, facts in answers["types"].items() if "wrong" in facts]
    held_by_data("truth", "architectures", architectures, answers)


def test_the_page_of_forward_passes_is_made_from_their_data() -> None:
    answers = json.loads((ROOT / "benchmarks" / "forward.json").read_text(encoding="utf-8"))
    built = [facts for facts in answers["types"].values() if "model_class" in facts]
    causal = [facts for facts in built if "is_causal" in facts]
    ran = [facts for facts in built if "inputs" in facts]
    assert len(built) >= LEAST_ARCHITECTURES
    assert len(ran) >= 0.65 * len(built)
    assert sum("inputs" in facts for facts in causal) >= 0.85 * len(causal)
    assert sum("lockstep" not in facts for facts in ran) >= 0.97 * len(ran)
    held_by_data("truth", "forward", forward, answers)


def held_by_data(page: str, name: str, tool: Any, answers: Any) -> None:
    """The stored answers are as the tool writes them, and the table is made from them."""
    stored = (ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8")
    assert (servers if tool is servers else architectures).stored(answers) == stored
    held(ROOT / "docs" / ("guides" if tool is servers else "evidence") / f"{page}.md", name, tool.document(answers))


LEAST_ARCHITECTURES = 400
"""Fewer, and the sweep was not run to its end."""


# --- docs/evidence/peers.md ------------------------------------------------------------------------------------------


def test_the_comparison_with_peers_is_what_they_said() -> None:
    from benchmarks import peers  # noqa: PLC0415 - imports the cases of all checks

    answers = peers.told()
    assert len(answers) > LEAST_PEER_CASES
    page = (ROOT / "docs" / "evidence/peers.md").read_text(encoding="utf-8")
    (made,) = re.findall(r"<!-- peers\b[^>]*-->\n(.*?)\n<!-- /peers -->", page, re.DOTALL)
    assert made == peers.tables(answers)
    kept = json.loads((ROOT / "benchmarks" / "peers.json").read_text(encoding="utf-8"))
    for name in ("deltalint", "adaptersentry", "transformers"):
        assert f"{name} {kept['versions'][name]}" in " ".join(page.split())


LEAST_PEER_CASES = 150
"""Fewer, and the comparison was not run to its end."""


# --- docs/guides/serve-adapters.md -----------------------------------------------------------------------------------


def test_the_page_of_servers_is_made_from_their_answers() -> None:
    answers = json.loads((ROOT / "benchmarks" / "servers.json").read_text(encoding="utf-8"))
    assert list(answers["kinds"]) == list(servers.KINDS)
    held_by_data("serve-adapters", "servers", servers, answers)


def test_every_export_that_a_server_got_is_exact() -> None:
    kinds = json.loads((ROOT / "benchmarks" / "servers.json").read_text(encoding="utf-8"))["kinds"]
    words = {
        (name, server): servers.cell(facts, server, "export")
        for name, facts in kinds.items()
        for server in servers.SERVERS
        if servers.exported(facts, server)
    }
    assert {name for name, _ in words} <= {*servers.PLAIN_FORM, *servers.BROKEN}
    assert set(words.values()) == {"exact"}
    assert (
        sum(any(servers.better(facts, server) for server in servers.SERVERS) for facts in kinds.values())
        >= LEAST_BETTER
    )


LEAST_BETTER = 12
"""Kinds whose export is exact on a server that refused the original, or applied something else."""


# --- docs/project/architecture.md ------------------------------------------------------------------------------------


PACKAGE = ROOT / "src" / "merge_gate"


def test_every_folder_is_in_the_architecture_with_its_modules() -> None:
    folders = {f"{path.parent.relative_to(PACKAGE)}/" for path in PACKAGE.rglob("*.py")} - {"./"}
    rows = dict(re.findall(r"^\| `([\w/]+/)` \| [^|]+ \| ([^|]+) \|$", ARCHITECTURE, re.MULTILINE))
    assert set(rows) | {"engine/", "features/", "report/"} == folders
    for folder, modules in rows.items():
        for name in re.findall(r"`(\w+)`", modules):
            assert (PACKAGE / folder / f"{name}.py").is_file(), f"{folder}{name}.py"


def test_every_module_that_the_architecture_names_is_there() -> None:
    named = set(re.findall(r"`((?:\w+/)+\w+\.py)`", ARCHITECTURE + DECISIONS))
    assert len(named) > 10
    assert not [name for name in named if not (PACKAGE / name).is_file() and not (ROOT / name).is_file()]


def test_every_function_that_the_plain_run_names_is_there() -> None:
    named = re.findall(r"`(?:\w+\.)?(\w+)`", section(ARCHITECTURE, "A plain run"))
    source = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    assert len(named) > 20
    assert not [name for name in named if not re.search(rf"\b(class|def) {name}\b|^{name} =", source, re.MULTILINE)]


def test_every_dependency_has_a_reason_and_was_tried() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = [dependency.split(">=") for dependency in tomllib.load(file)["project"]["dependencies"]]
    rows = re.findall(r"^\| `([\w]+)` \| ([\d.]+) \| .+ \|$", DEPENDENCIES, re.MULTILINE)
    assert [(name, Version(tried)) for name, tried in rows] == [(name, Version(bound)) for name, bound in listed]


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md"])
def test_the_number_of_checks_is_in_the_readme_and_the_changelog(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    before, _, after = re.split(r"(\d+)(?= checks(?!.*\d+ checks))", text, maxsplit=1, flags=re.DOTALL)
    made = f"{before}{len(CHECKS)}{after}"
    if os.environ.get("UPDATE_GOLDENS"):
        (ROOT / name).write_text(made, encoding="utf-8")
    assert (ROOT / name).read_text(encoding="utf-8") == made, "run make schemas"


def test_the_index_has_every_page() -> None:
    """The pages of checks are in the index of checks. The site's navigation has the same order of folders."""
    index = ROOT / "docs" / "index.md"
    pages = [page for page in PAGES if page.is_relative_to(index.parent) and page not in {index, *CHECK_PAGES.values()}]
    folders: dict[str, list[str]] = {folder: [] for folder in ORDER}
    for page in pages:
        title = re.findall(r"^# (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)[0]
        path = page.relative_to(index.parent).as_posix()
        folders[path.rpartition("/")[0]].append(f"[{title}]({path})")
    lines = (f"- {folder.capitalize() or 'Start'}: {', '.join(links)}" for folder, links in folders.items())
    held(index, "pages", "\n".join(lines))


def test_the_table_of_commands_is_short_and_has_every_command() -> None:
    page = ROOT / "docs" / "guides" / "which-command.md"
    text = page.read_text(encoding="utf-8")
    assert words(text) <= 300
    assert "docs/guides/which-command.md" in re.findall(r"\]\(([^)]+)\)", README)[0]
    shown = subprocess.run([sys.executable, "-m", "merge_gate", "--help"], capture_output=True, text=True, check=True)
    listed = re.findall(r"^    ([a-z]+(?: [a-z]+)?)  ", shown.stdout.partition("options:")[0], re.MULTILINE)
    missing = [command for command in listed if f"merge-gate {command}" not in text]
    assert missing == [command for command in ("schema", "completion") if command in listed]


def tables_with_tests() -> Iterator[tuple[str, str]]:
    """The rows of the tables whose last column names tests, and the page of each."""
    for name in ("evidence/reliability.md", "concepts/security.md"):
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        for table in re.findall(r"^\|.*\| tests? \|\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE):
            yield from ((name, row) for row in table.splitlines())


def test_each_fault_and_each_threat_names_tests_that_are_there() -> None:
    rows = list(tables_with_tests())
    assert {name for name, _ in rows} == {"evidence/reliability.md", "concepts/security.md"}
    assert len(rows) > 50
    for _, row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row.rstrip("|").rpartition("|")[2])
        assert named, row
        for file, test in named:
            assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"


# --- formats of bases ------------------------------------------------------------------------------------------------

BASES_PAGE = (ROOT / "docs" / "reference/bases.md").read_text(encoding="utf-8")


def test_each_format_is_judged_or_refused_as_the_table_says() -> None:
    rows = re.findall(r"^\| ([^|]+) \| `([\w-]+)` \| ([^|]+) \|", section(BASES_PAGE, "Formats"), re.MULTILINE)
    stated = {method: gate for _, method, gate in rows if method != "quant_method"}
    judged = {method.removesuffix("_4bit").removesuffix("_8bit") for method in JUDGED}
    assert {method for method, gate in stated.items() if gate == "judges it"} == judged
    assert {method for method, gate in stated.items() if gate.startswith("judges it if")} == set(JUDGED_WITH)
    refused = {method for method, gate in stated.items() if gate == "refuses it"}
    assert refused == stated.keys() - judged - JUDGED_WITH.keys()
    assert refused <= KNOWN_NAMES.keys()


def test_the_formats_were_not_tried_with_later_versions() -> None:
    """Later releases are tried when someone does; the page must not claim it before."""
    tried = re.search(r"torch ([\d.]+\d), transformers ([\d.]+\d) and PEFT ([\d.]+\d)", BASES_PAGE)
    assert tried
    installed = [Version(version(name)) for name in ("torch", "transformers", "peft")]
    assert all(Version(one) <= here for one, here in zip(tried.groups(), installed, strict=True))
