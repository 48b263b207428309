"""Adapters named on the command line, and a first file: the same configuration as a file that says it."""

import contextlib
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from merge_gate._internal.errors import ConfigError, UsageError
from merge_gate.config.from_arguments import config_of, names_a_file
from merge_gate.config.init_file import first_config
from merge_gate.config.load_config import load_config
from merge_gate.files.preflight import base_of
from merge_gate.records.config import ALL_WEIGHTS, COMMAND_LINE, Config
from merge_gate.records.files import WEIGHTS_NAME
from merge_gate.records.terms import Quantization
from tests.support.wording import Wording


@pytest.fixture
def here(tmp_path: Path, cwd: Path) -> Path:
    """Two adapters, one of them two levels down, and a base."""
    for name, base in (("support", "./base"), ("teams/a/billing", "./base")):
        (tmp_path / name).mkdir(parents=True)
        config = {"peft_type": "LORA", "base_model_name_or_path": base}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "base").mkdir()
    return tmp_path


@pytest.fixture
def closed(request: pytest.FixtureRequest, here: Path) -> Iterator[Path]:
    """`teams`, which may not be read, in a copy that anyone may read: pytest's own directories are closed to others."""
    with tempfile.TemporaryDirectory() as top, contextlib.chdir(top):
        shutil.copytree(here, top, dirs_exist_ok=True)
        place = Path(top, "teams")
        place.parent.chmod(0o755)
        place.chmod(getattr(request, "param", 0))
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        yield place
        os.seteuid(user)
        place.chmod(0o755)


def placeless(config: Config) -> tuple[object, ...]:
    return tuple(replace(adapter, line=1, column=1) for adapter in config.adapters)


def test_names_give_the_config_that_a_file_gives(here: Path) -> None:
    (here / "gate.yml").write_text(
        "version: 1\nbase: {model: base, dtype: [bfloat16, float16], quantization: bnb-4bit}\n"
        "adapters: [{path: ./support}, {path: 'teams/*/billing'}, {path: acme/lora}]\n"
    )
    names = ["./support", "teams/*/billing", "acme/lora"]
    direct = config_of(names, base="base", dtypes=["bfloat16", "float16"], quantization="bnb-4bit")
    assert placeless(direct) == placeless(load_config("gate.yml"))
    assert direct.adapters[0].base.quantization is Quantization.BNB_4BIT
    assert (direct.path, direct.label, direct.directory) == (None, COMMAND_LINE, str(Path.cwd()))


def test_checks_and_expectations_are_those_of_a_file(here: Path) -> None:
    (here / "gate.yml").write_text(
        "version: 1\nallow-pickle: true\nchecks: {no-effect: warning, headroom: {severity: error, limit: 0.9}}\n"
        "adapters: [{path: acme/lora, revision: v3, expect: {r: 16, sha256: {adapter_model.safetensors: "
        + "a" * 64
        + "}}}]\n"
    )
    direct = config_of(
        ["acme/lora"],
        revision="v3",
        checks={"no-effect": "warning", "headroom": {"severity": "error", "limit": 0.9}},
        expect={"r": 16, "sha256": {"adapter_model.safetensors": "a" * 64}},
        allow_pickle=True,
    )
    assert placeless(direct) == placeless(load_config("gate.yml"))
    assert direct.allow_pickle
    assert config_of(["support"]).sha256 != config_of(["support"], allow_pickle=True).sha256


def test_without_a_base_the_adapters_name_theirs(here: Path) -> None:
    (adapter,) = config_of(["support"]).adapters
    assert adapter.base.model is None


@pytest.mark.parametrize(
    ("names", "options", "named"),
    [
        (["./nowhere"], {}, '"./nowhere"'),
        (["support", "support"], {}, '"support"'),
        (["support"], {"dtypes": ["fp16"]}, "float16"),
        (["support"], {"quantization": "int3"}, "bnb-8bit"),
        (["support"], {"base": "./nothing"}, "./nothing"),
        (["support"], {"revision": "v3"}, "revision"),
        (["support"], {"checks": {"no-efect": "off"}}, "no-effect"),
        (["support"], {"expect": {"r": "many"}}, "many"),
        (["support"], {"checks": {"headroom": {"limit": None}}}, '"limit" has no value'),
        (["support"], {"checks": {"a\u202e": "off"}}, r'"a\u202e" contains a control character'),
        (["support"], {"checks": functools.reduce(lambda inner, _: {"a": inner}, range(40), {})}, "32 levels"),
    ],
)
@pytest.mark.usefixtures("here")
def test_problems_are_usage_errors(names: list[str], options: dict[str, object], named: str, wording: Wording) -> None:
    """The other sentences are in messages.txt."""
    with pytest.raises(UsageError, match=re.escape(named)) as caught:
        config_of(names, **options)  # type: ignore[arg-type]
    if names == ["support", "support"]:
        wording(caught.value)


def test_an_adapters_files_stand_for_it_as_hooks_name_them(here: Path) -> None:
    (here / "support" / "adapter_model.safetensors").write_bytes(b"")
    names = ["support/adapter_config.json", "support/adapter_model.safetensors", "teams/a/billing/adapter_config.json"]
    assert not names_a_file(names)
    assert not names_a_file(names[:1])
    assert [adapter.source for adapter in config_of(names).adapters] == ["support", "teams/a/billing"]


def test_the_files_of_an_adapter_in_the_current_directory(here: Path, cwd: Path) -> None:
    os.chdir(here / "support")
    (adapter,) = config_of(["adapter_config.json"]).adapters
    assert (adapter.name, adapter.path) == ("support", str(here / "support"))


def test_directories_of_one_name_are_told_apart(here: Path) -> None:
    for place in ("a/lora/final", "b/lora/final", "c/other/final", "single"):
        (here / place).mkdir(parents=True)
        (here / place / WEIGHTS_NAME).touch()
    names = ["a/lora/final", "b/lora/final", "c/other/final", "single"]
    found = [adapter.name for adapter in config_of(names, base="base").adapters]
    assert found == ["a-lora-final", "b-lora-final", "other-final", "single"]


@pytest.mark.usefixtures("closed")
def test_an_unreadable_adapter_is_left_to_the_preflight() -> None:
    (adapter,) = config_of(["teams"]).adapters
    assert adapter.source == "teams"


@pytest.mark.parametrize("name", ["./teams/*", "./teams/a"])
def test_an_unreadable_directory_is_not_reported_as_absent(wording: Wording, name: str, closed: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(f'"{closed}"')) as caught:
        config_of([name])
    wording(str(caught.value).replace(str(closed), "<closed>").rpartition(" (")[2])


def test_without_a_current_directory_names_mean_nothing(here: Path, wording: Wording) -> None:
    (here / "gone").mkdir()
    os.chdir(here / "gone")
    (here / "gone").rmdir()
    with pytest.raises(UsageError) as of_names:
        config_of(["support"])
    with pytest.raises(UsageError) as of_config:
        first_config([str(here / "support")], lambda _: None)
    wording(of_names.value, of_config.value)


@pytest.mark.parametrize("closed", [0o111], indirect=True)
def test_a_missing_config_in_a_directory_that_may_not_be_listed(wording: Wording, closed: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f'"{closed}"')) as caught:
        load_config(str(closed / "gate.yml"))
    wording(str(caught.value).replace(str(closed), "<closed>").rpartition(" (")[2])


def test_a_config_is_told_from_adapters(here: Path, wording: Wording) -> None:
    (here / "list").write_text("version: 1")
    assert names_a_file(["gate.yml"])
    assert names_a_file(["list"])
    assert not names_a_file(["support", "acme/lora"])
    with pytest.raises(UsageError, match=re.escape('"gate.yml"')):
        names_a_file(["support", "gate.yml"])
    (here / "support.zip").touch()
    with wording.of(UsageError, match=re.escape('"support.zip"')):
        names_a_file(["support.zip"])


@pytest.mark.usefixtures("here")
def test_a_name_that_is_not_utf_8_is_refused() -> None:
    """A glob finds such a directory (tests/test_cli.py)."""
    with pytest.raises(UsageError, match=r'"caf\\udce9"'):
        config_of([os.fsdecode(b"caf\xe9")])


OWN_REPORT = (
    '{"schema_version": "1.0", "complete": true, "result": "pass", "counts": {}, "tool": {"name": "merge-gate"}}'
)


def named(config: Config) -> list[str]:
    return [spec.name for spec in config.adapters]


def test_a_glob_skips_where_reports_are(here: Path) -> None:
    """An adapter in such a directory, or what is left of one, is gated."""
    for name in ("now", "once/previous", "twice", "with-an-adapter", "foreign", "empty"):
        (here / name).mkdir(parents=True)
    for name in ("once/previous", "twice", "with-an-adapter"):
        (here / name / "report.json").write_text(OWN_REPORT)
    (here / "foreign" / "report.json").write_text("{}")
    (here / "with-an-adapter" / "adapter_model.safetensors").touch()
    gated = ["base", "empty", "foreign", "support", "teams", "with-an-adapter"]
    assert named(config_of(["./*"], output="./now/")) == gated
    assert named(config_of(["./*"], output="support")) == sorted([*gated, "now"])
    (here / "merge-gate.yml").write_text('version: 1\nadapters: ["./*"]\n')
    assert named(load_config("merge-gate.yml", output=str(here / "now"))) == gated
    assert named(config_of(["foreign", "twice"], output="twice")) == ["foreign", "twice"]


def test_a_glob_that_matches_only_reports_is_an_error(here: Path) -> None:
    (here / "now").mkdir()
    with pytest.raises(UsageError, match=re.escape('no directory matches "n*" (only directories with reports)')):
        config_of(["n*"], output="now")


@pytest.mark.attempt("D3g", "init --pin", "the digest of each base in a directory")
def test_a_first_config_pins_bases_that_are_here(here: Path) -> None:
    digests = {"./base": "a" * 64, "./other": "b" * 64}
    (here / "merge-gate.yml").write_text(first_config(["."], base_of, digests.__getitem__))
    config = load_config("merge-gate.yml")
    assert {adapter.base.sha256 for adapter in config.adapters} == {((ALL_WEIGHTS, "a" * 64),)}
    (here / "other").mkdir()
    text = first_config(["."], lambda place: "acme/llama" if "support" in place else "./other", digests.__getitem__)
    (here / "merge-gate.yml").write_text(text)
    pinned = {adapter.name: adapter.base.sha256 for adapter in load_config("merge-gate.yml").adapters}
    assert pinned == {"billing": ((ALL_WEIGHTS, "b" * 64),), "support": ()}


@pytest.mark.parametrize(
    ("current", "named", "listed"),
    [
        ("support", ".", "."),
        ("support/checkpoint-5", "..", ".."),
        (".", "<here>/support", "./support"),
        (".", "checkpoint-5", "./checkpoint-5"),
    ],
)
def test_a_first_config_names_directories_from_here(current, named, listed, here, cwd: Path) -> None:
    for name in ("support/checkpoint-5", "checkpoint-5"):
        (here / name).mkdir()
    (here / "checkpoint-5/adapter_config.json").write_text("{}")
    os.chdir(here / current)
    text = first_config([named.replace("<here>", str(here))], base_of)
    assert yaml.safe_load(text)["adapters"] == [listed]


@pytest.mark.parametrize("base", ["acme/base", "gpt2"])
@pytest.mark.usefixtures("here")
def test_a_first_config_takes_a_base_of_the_hub_as_it_is(base: str, wording: Wording) -> None:
    text = first_config(["support"], lambda _: base)
    assert yaml.safe_load(text)["base"] == {"model": base}
    wording(next(line for line in text.splitlines() if base in line))


def test_a_base_is_a_directory_above_the_adapter_or_a_model(here: Path, wording: Wording) -> None:
    """A model has a config and weights; a directory above the adapter need not, since the adapter names it."""
    (here / "teams/data/base/tiny").mkdir(parents=True)
    text = first_config(["teams"], lambda _: "data/base/tiny")
    assert yaml.safe_load(text)["base"] == {"model": "./teams/data/base/tiny"}
    wording(next(line for line in text.splitlines() if "data/base/tiny" in line))
    for name, files in (("x", ["config.json"]), ("y", ["model.safetensors"]), ("z", ["config.json", "model.bin"])):
        (here / name / "tiny").mkdir(parents=True)
        for file in files:
            (here / name / "tiny" / file).touch()
    text = first_config(["."], lambda _: "/elsewhere/tiny")
    assert yaml.safe_load(text)["base"] == {"model": "./z/tiny"}


def test_a_first_config_cuts_long_names(here: Path) -> None:
    long = "/" + "x" * 200
    cut = f'"{long[:199]}…"'
    assert cut in first_config(["support"], lambda _: long)
    text = first_config(["support", "teams"], lambda place: long if "support" in place else f"{long}x")
    assert text.count(cut) == 2
    run = f"{'r' * 99}/{'s' * 99}"
    for step in (1, 2):
        (here / run / f"checkpoint-{step}").mkdir(parents=True)
        (here / run / f"checkpoint-{step}" / "adapter_config.json").write_text("{}")
    assert len(f"./{run}") == 201
    assert f'"./{run[:197]}…"' in first_config([run.partition("/")[0]], base_of)


@pytest.mark.parametrize("directory", ["teams", "teams/a"])
def test_an_unreadable_directory_is_not_reported_as_empty(wording: Wording, directory: str, closed: Path) -> None:
    with pytest.raises(UsageError) as caught:
        first_config(["base", directory], base_of)
    assert f'"{directory}"' in caught.value.message
    wording(caught.value.message.rpartition(": ")[2], caught.value.hint)


def test_a_first_config_names_unreadable_directories(wording: Wording, closed: Path) -> None:
    text = first_config([".", "support"], base_of)
    (line,) = (line for line in text.splitlines() if '"./teams"' in line)
    wording(line)
    assert "./support" in text
