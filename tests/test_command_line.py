"""The command line before a command runs: variables for options, help texts, completion, and what is shown."""

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from merge_gate._internal.errors import UsageError
from merge_gate.cli.arguments import requested_config
from merge_gate.cli.dispatch import main
from merge_gate.cli.parser import parsed, parsers, unknown_variables, without_variable
from tests.support.tried import tried
from tests.support.wording import Wording


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (one for one in parsers()[0]._actions if one.dest == "command")
    return found.choices


@pytest.fixture(autouse=True)
def usual(variables, cwd, tmp_path: Path) -> None:
    """Help texts are 80 columns wide, and a configuration is there."""
    variables["COLUMNS"] = "80"
    (tmp_path / "merge-gate.yml").write_text("version: 1\nadapters: [acme/one]\n")


def test_a_variable_stands_for_an_option(variables) -> None:
    given = {"MERGE_GATE_DEVICE": "cuda:1", "MERGE_GATE_QUIET": "true", "MERGE_GATE_REFRESH": "0"}
    variables.update(given, MERGE_GATE_CACHE="")
    values = parsed(["run", "gate.yml"])
    assert (values.device, values.quiet, values.refresh, values.cache) == ("cuda:1", True, False, None)
    assert values.variables == {"--device": "MERGE_GATE_DEVICE", "--quiet": "MERGE_GATE_QUIET"}


@pytest.mark.parametrize("words", [["--output", "b"], ["--output=b"], ["-o", "b"], ["-ob"]])
def test_a_flag_goes_before_its_variable(words: list[str], variables) -> None:
    variables["MERGE_GATE_OUTPUT"] = "a"
    values = parsed(["run", "gate.yml", *words])
    assert (values.output, values.variables) == ("b", {})
    assert parsed(["run", "gate.yml"]).output == "a"
    assert parsed(["run", "--", "gate.yml"]).output == "a"


@pytest.mark.attempt("C30", "MERGE_GATE_SHARD=2/2 in the environment of a job", "ignored: every adapter is merged")
@pytest.mark.parametrize("command", commands())
def test_no_variable_makes_the_gate_trust_more(command: str, variables) -> None:
    shown = {action for action in commands()[command]._actions if "[env: " in str(action.help)}
    options = {option for action in shown for option in action.option_strings}
    assert not options & (without_variable() | {"--set", "--expect", "--only", "--report", "--allow"})
    assert not any(isinstance(action, argparse._AppendAction) for action in shown)
    variables.update(MERGE_GATE_ALLOW_PICKLE="1", MERGE_GATE_SHARD="2/2", MERGE_GATE_IMAGE="cpu")
    if command == "run":
        values = parsed(["run", "x"])
        assert (values.allow_pickle, values.image, values.shard, values.variables) == (False, "", None, {})


@pytest.mark.parametrize(
    ("variable", "value"), [("DEVICE", "tpu"), ("ACCESS", "guess"), ("REFRESH", "maybe"), ("OUTPUT", "gate.yml")]
)
def test_a_wrong_variable_is_named(variable, value, variables, capsys, wording) -> None:
    Path("gate.yml").write_text("")
    variables[f"MERGE_GATE_{variable}"] = value
    with pytest.raises(SystemExit):
        sys.exit(main(["run", "merge-gate.yml"]))
    said = capsys.readouterr().err
    assert f"MERGE_GATE_{variable}" in said
    wording(said.rpartition("error: ")[2])


def test_a_variable_is_refused_where_its_option_would_be(variables, wording: Wording) -> None:
    variables["MERGE_GATE_DTYPE"] = "float16"
    with wording.of(UsageError, match="MERGE_GATE_DTYPE"):
        requested_config(parsed(["run", "merge-gate.yml"]))


def test_the_variables_that_were_used_are_named(variables, capsys, wording) -> None:
    variables["MERGE_GATE_COLOR"] = "never"
    assert main(["check", "nowhere.yml"]) == 2
    wording(capsys.readouterr().err.splitlines()[0])


MEANT = {
    "DTPYE": "DTYPE", "DEVISE": "DEVICE", "BASES": "BASE", "QUANTISATION": "QUANTIZATION", "OUT_PUT": "OUTPUT",
    "ALLOW_PICKLE": "", "XYZZY_PLUGH": "",
}  # fmt: skip


@pytest.mark.parametrize("name", tried("D9", "a variable MERGE_GATE_…", "warning, did you mean", list(MEANT)))
def test_an_unknown_variable_is_named(variables, name: str) -> None:
    variables[f"MERGE_GATE_{name}"] = "x"
    (line,) = parsed(["run", "one"]).unknown_variables
    meant = MEANT[name] and f"MERGE_GATE_{MEANT[name]}"
    assert name in line
    assert ("did you mean" in line) is bool(meant)
    assert meant in line


def test_an_unknown_variable_is_a_warning(variables, capsys: pytest.CaptureFixture[str]) -> None:
    variables.update(MERGE_GATE_DTPYE="float16", MERGE_GATE_EMPTY="")
    assert main(["schema", "config"]) == 0
    error = capsys.readouterr().err
    assert error.count("warning") == 1
    assert "MERGE_GATE_DTPYE" in error


def test_every_variable_in_the_repository_is_known(variables) -> None:
    """Those of the action, its containers, the recipes, and the tests. Only this file names others."""
    root = Path(__file__).resolve().parent.parent
    places = ("src", "tests", "docs", "recipes", "examples", "benchmarks", ".ci", ".github")
    files = [path for place in places for path in (root / place).rglob("*") if "__pycache__" not in path.parts]
    texts = [
        path.read_bytes() for path in (*files, *root.iterdir()) if path.is_file() and path.name != Path(__file__).name
    ]
    names = {name.decode() for text in texts for name in re.findall(rb"MERGE_GATE_[A-Z0-9_]*[A-Z0-9]\b", text)}
    variables.update(dict.fromkeys(names - {"MERGE_GATE_I", "MERGE_GATE_INPUT", "MERGE_GATE_DTPYE"}, "cpu"))
    unknown = unknown_variables(commands().values(), os.environ)
    assert len(names) > 60
    assert unknown == ()


@pytest.mark.parametrize("command", commands())
def test_help_fits_80_columns_and_cuts_no_word(command: str) -> None:
    asked = commands()[command]
    text = asked.format_help()
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"^examples:\n  .*merge-gate ", text, re.MULTILINE)
    for written in (asked.description, asked.epilog):
        assert set(str(written).split()) <= set(text.split())


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", ["50", "80"])
@pytest.mark.parametrize(("command", "options"), [("run", 8), ("verify", 4)])
def test_short_help_has_few_options_and_names_the_long_one(command, options, columns, capsys, variables) -> None:
    variables["COLUMNS"] = columns
    text = printed([command, "-h"], capsys)
    assert max(map(len, text.splitlines()[1:])) <= int(columns)  # without the usage
    assert len(re.findall(r"^  -", text, re.MULTILINE)) == options
    assert len(re.findall(r"^  merge-gate ", text, re.MULTILINE)) == 2
    assert f"`merge-gate {command} --help`" in text
    assert "[env:" not in text
    long = printed([command, "--help"], capsys)
    for action in commands()[command]._actions:
        assert all(re.search(rf"(^|[ ,]){option}\b", long) for option in action.option_strings)
    assert "  -h  " in long


@pytest.mark.parametrize("command", sorted(set(commands()) - {"run", "verify"}))
def test_a_command_with_few_options_has_one_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(commands()[command]._actions) <= 12
    assert printed([*command.split(), "-h"], capsys) == printed([*command.split(), "--help"], capsys)


@pytest.mark.parametrize(
    ("heading", "names"), [("published models", ["verify"]), ("more commands", ["schema", "completion"])]
)
def test_commands_that_few_need_are_groups(heading: str, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    group = printed(["-h"], capsys).partition(f"  {heading}:\n")[2].partition("\n\n")[0]
    assert [line.split()[0] for line in group.splitlines()] == names


@pytest.mark.parametrize(
    ("key", "hint"), [("rank", "sha256:FILE, base-sha256)"), ("base-sha25", 'did you mean "base-sha256"?')]
)
def test_the_keys_of_expect_are_listed(key: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parsed(["run", "one", "--expect", f"{key}=8"])
    assert hint in capsys.readouterr().err


def test_every_example_can_be_typed() -> None:
    for name, command in commands().items():
        text = str(command.epilog).partition("exit codes:")[0]
        lines = [line.strip() for line in text.splitlines() if line.startswith("  merge-gate ")]
        for line in lines:
            words = subprocess.run(
                ["bash", "-c", f"printf '%s\\n' {line.partition(' > ')[0].removeprefix('merge-gate ')}"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split("\n")[:-1]
            assert parsed(words).command == name


@pytest.mark.parametrize(
    ("words", "same"), [(["help"], ["--help"]), (["help", "run"], ["run", "--help"]), (["version"], ["--version"])]
)
def test_help_and_version_are_words_too(words: list[str], same: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(words, capsys) == printed(same, capsys) != ""


ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _shtab_merge_gate; echo "${COMPREPLY[*]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "merge-gate.bash"
    written, sys.stdout = sys.stdout, io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    try:
        assert main(["completion", "bash"]) == 0
        path.write_bytes(sys.stdout.buffer.getvalue())
    finally:
        sys.stdout = written
    return path


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ([""], {name.split()[0] for name in commands()}),
        (["report", ""], {"show", "diff", "combine", "baseline"}),
        (["run", "--re"], {"--refresh", "--report", "--revision"}),
        (["report", "show", "--format", ""], {"terminal", "json", "markdown", "html", "junit", "sarif"}),
    ],
)
def test_bash_completes_commands_and_options(words: list[str], offered: set[str], script: Path) -> None:
    asked = ["bash", "-c", ASK, "bash", str(script), "merge-gate", *words]
    answer = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert set(answer.stdout.split()) == offered


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_get_a_script_too(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert "merge-gate" in text
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, check=True)


def test_without_shtab_the_extra_is_named(monkeypatch, capsys, wording) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    wording(capsys.readouterr().err)
