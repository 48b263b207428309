"""`policy: release` and `--policy release`, as whole commands. The worker is played."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from merge_gate.cli.dispatch import main
from tests.support.judging.cases import base as base_facts
from tests.support.judging.cases import broken, lossy
from tests.support.played_merges import lay, played

COMMIT = "0e9e39f249a16976918f6564b8830bc894c89659"
LOSSY = {"merges": (lossy(0.7),)}
INFINITE = {
    "base": base_facts(dtype="bfloat16", nonfinite=(replace(broken("rotary.limit", posinf=1), is_buffer=True),))
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, cwd: Path) -> None:
    lay(tmp_path, names=["one"])


def gate(*words: str, changes: dict[str, Any] | None = None, **config: Any) -> int:
    text = {"version": 1, "base": "./base", "adapters": ["./one"]} | config
    Path("gate.yml").write_text(json.dumps(text))
    with played(Path("base"), changes=changes):
        return main(["run", "gate.yml", *words])


def report() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(Path("merge-gate-report/report.json").read_text())
    return loaded


@pytest.mark.parametrize(("changes", "check"), [(LOSSY, "rounding-loss"), (INFINITE, "base-nonfinite")])
def test_a_warning_is_an_error_of_a_release(changes: dict[str, Any], check: str) -> None:
    assert gate(changes=changes) == 0
    assert report()["config"]["policy"] == "default"
    assert gate(changes=changes, policy="release") == 1
    assert (report()["config"]["policy"], report()["adapters"][0]["cause"]) == ("release", check)
    assert gate("--policy", "release", changes=changes) == 1, "a file may be judged more strictly than it asks for"
    assert report()["config"]["policy"] == "release"


def test_the_key_of_a_check_overrides_the_policy() -> None:
    assert gate(changes=LOSSY, policy="release", checks={"rounding-loss": "warning"}) == 0
    assert gate(changes=LOSSY, policy="release", checks={"rounding-loss": {"limit": 0.8}}) == 0
    assert gate(changes=LOSSY, policy="release", checks={"rounding-loss": {"limit": 0.6}}) == 1
    assert gate(changes=LOSSY, policy="release", checks={"rounding-loss": "on"}) == 1
    adapter = {"path": "./one", "checks": {"rounding-loss": "off"}}
    assert gate(changes=LOSSY, policy="release", adapters=[adapter]) == 0


def test_the_policy_counts_in_a_cached_verdict() -> None:
    assert gate("--cache", "cache", changes=LOSSY) == 0
    assert gate("--cache", "cache", "--policy", "release", changes=LOSSY) == 1


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("acme/lora", "--base", "base"), 2),
        (("acme/lora", "--base", "base", "--revision", "v1"), 2),
        (("one", "--base", "acme/llama"), 2),
        (("one", "--base", "base"), 0),
        (("acme/lora", "--base", "base", "--revision", COMMIT), 3),
        pytest.param(
            ("one", "--base", "acme/llama", "--expect", f"base-sha256={'0' * 64}"),
            2,
            marks=pytest.mark.attempt("Y58a", "policy: release, a base on the Hub with sha256 and no commit", "exit 2"),
        ),
    ],
)
def test_what_is_on_the_hub_is_pinned(words: tuple[str, ...], code: int) -> None:
    """The tests have no network: what is pinned is asked for, and not judged."""
    with played(Path("base")):
        assert main(["run", *words, "--policy", "release"]) == code


def test_a_base_that_an_adapter_names_is_pinned(capfd: pytest.CaptureFixture[str]) -> None:
    written = json.loads(Path("one/adapter_config.json").read_text())
    Path("one/adapter_config.json").write_text(json.dumps(written | {"base_model_name_or_path": "acme/llama"}))
    with played(Path("base")):
        assert main(["run", "one", "--policy", "release"]) == 3
        assert "no commit pins it" in capfd.readouterr().out
        assert main(["run", "one"]) == 3
        assert "no commit pins it" not in capfd.readouterr().out


@pytest.mark.attempt("Y58b", "policy: release, sha256 of config.json alone for a base on the Hub", "exit 2")
def test_a_digest_of_one_file_is_no_commit() -> None:
    pinned = {"model": "acme/llama", "sha256": {"config.json": "0" * 64}}
    assert gate(policy="release", base=pinned) == 2
    assert gate(policy="release", base=pinned | {"revision": COMMIT}) == 3
    assert gate(policy="release", base={"model": "./base", "sha256": {"config.json": "0" * 64}}) == 1


@pytest.mark.attempt("D9-release", "an unknown variable under policy: release", "exit 2")
def test_an_unknown_variable_is_refused(variables, capfd: pytest.CaptureFixture[str]) -> None:
    variables["MERGE_GATE_DTPYE"] = "float16"
    assert gate() == 0
    assert gate(policy="release") == 2
    assert "MERGE_GATE_DTYPE" in capfd.readouterr().err
