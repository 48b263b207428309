"""The messages about a configuration: `messages.txt` is what people read, so look at each change of it.

UPDATE_GOLDENS=1 writes it again.
"""

import importlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from merge_gate._internal.errors import ConfigError, ExitCode, GateError, UsageError
from merge_gate.config.from_arguments import config_of, names_a_file
from merge_gate.config.init_file import first_config
from merge_gate.config.load_config import load_config
from merge_gate.files.preflight import base_of
from merge_gate.records.config import Config
from tests.support.config.invalid import COMBINE, DIGEST, DIRECTORIES, ENTRY, HEAD, KNOWN, KNOWN_ENTRY, LIST, WRONG
from tests.support.wording import Wording, hold_in_order

GOLDEN = Path(__file__).with_name("messages.txt")

MORE = {
    "a tag on the whole file": "!x {version: 1}\n",
    "a merge of a refused value": LIST + "base: {<<: !x {a: b}, model: acme/b}\n",
    "a merge of a list with text": LIST + "base: {<<: [x], model: acme/b}\n",
    "a list of mappings as a key": LIST + "? {a: b}\n: b\n",
    "an anchor twice": "version: 1\nadapters: [&a acme/x, &a acme/y]\n",
    "a problem in the value of a duplicate key": LIST + "version: !x 1\n",
    "a null key": LIST + "~: 1\n",
    "a quoted << is a key": LIST + "'<<': {}\n",
    "a key that is too long to compare": LIST + f"{'a' * 201}: 1\n",
    "text that YAML cannot start": LIST + "base: @x\n",
    "a character that is not ASCII in a syntax error": LIST + "base: [a\u00fc b] c\u00fc: *\u00fc\n",
    "a character that is not ASCII in an escape": LIST + 'base: "\\\u00fc"\n',
    "a block without an end": "version: 1\nadapters:\n  - a\n b\n",
    "a control character in a comment": LIST + "# \x07\n",
    "a typo in a mapping whose key is mistyped": LIST
    + "checks: {rounding_loss: {severity: warn, limt: 0.2}, headrom: wran}\n",
    "a typo of a key of the base": LIST + "bse: {modle: acme/b, dtpye: fp16}\n",
    "a key that is gone": LIST + "base: {model: acme/b, read: touched}\n",
    "digits": LIST + f"checks: {{delta-norm: {{limit: {'9' * 301}}}}}\n",
    "digits of a hexadecimal number": LIST + f"checks: {{headroom: {{limit: 0x{'f' * 301}}}}}\n",
    "an octal number": LIST + "baseline: 0o17\n",
    "a hexadecimal number": ENTRY + "name: 0xff\n",
    "infinity with a sign": LIST + "limits: {seconds: -.INF}\n",
    "a mapping where text stands": ENTRY + "name: {a: b}\n",
    "an empty list where text stands": ENTRY + "name: []\n",
    "an empty mapping where a list stands": "version: 1\nadapters: {}\n",
    "a list where a mapping stands": LIST + "checks: [headroom]\n",
    "a whole number that is wanted": ENTRY + "expect: {r: [1]}\n",
    "a severity that nothing is like": LIST + "checks: {headroom: {severity: maybe}}\n",
    "a number where a word belongs": LIST + "base: {quantization: 4}\n",
    "a severity without a value": LIST + "checks: {headroom: {severity: ~}}\n",
    "a dtype without a value": LIST + "base: {dtype: [~]}\n",
    "no path at all": LIST.replace("./adapters/support", "~"),
    "text that is too long": LIST + f"base: {'a/' * 2049}\n",
    "an empty type": ENTRY + "expect: {peft_type: ''}\n",
    "a blank digest": ENTRY + "expect: {sha256: {a: ' '}}\n",
    "a digest without a value": ENTRY + "expect: {sha256: {a: ~}}\n",
    "a file of digests with a backslash": ENTRY + f"expect: {{sha256: {{'a\\b': {'a' * 64}}}}}\n",
    "a file named as pydantic names keys": ENTRY + "expect: {sha256: {'[key]': x}}\n",
    "a seed that is too large": COMBINE + "{method: cat, adapters: [support], weights: [1], seed: 4294967296}\n",
    "several things wrong in a combination": COMBINE + "{method: x, adapters: [1, support], density: 2}\n    nam: x\n",
    "a member that nothing is like": COMBINE + "{method: cat, adapters: [zzzzz], weights: [1]}\n",
    "a sign for a method that elects none": COMBINE
    + "{method: dare_linear, adapters: [support], weights: [1], density: 0.5, majority_sign_method: total}\n",
    "a combination without a value": HEAD + "  - {name: both, combine: ~}\n",
    "a path and a combination without values": HEAD + "  - {path: ~, combine: ~}\n",
    "another revision of a base": "version: 1\nbase: {model: acme/b, revision: v1}\nadapters:\n  - ./a/x\n"
    "  - {name: q, base: {revision: v2}, combine: {method: cat, adapters: [x], weights: [1]}}\n",
    "a name that is too long on disk": HEAD + f"  - ./{'n' * 201}\n",
    "names that are too long on disk": HEAD + f"  - ./{'n' * 200}*\n",
    "a name of as many characters as are compared": HEAD + f"  - ./{'n' * 200}\n",
    "members that differ by an underscore": HEAD + "  - {path: ./a/x, name: x_y}\n"
    "  - {name: q, combine: {method: cat, adapters: [z-y, z_y], weights: [1, 1]}}\n",
    "a combination without a name, that begins with its base": HEAD + "  - ./adapters/support\n"
    "  - {base: ~, combine: {method: cat, adapters: [support], weights: [1]}}\n",
    "a combination whose name comes last": HEAD + "  - ./adapters/support\n"
    "  - {combine: {method: cat, adapters: [support], weights: [1]}, name: support}\n",
    "a combination with a dtype twice": HEAD + "  - ./adapters/support\n"
    "  - {name: q, base: {dtype: [float16, float16]}, combine: {method: cat, adapters: [support], weights: [1]}}\n",
    "a base that is not there, after its dtype": LIST + "base: {dtype: float16, model: ./models/none}\n",
    "a directory in one that holds none": HEAD + "  - ./adapters/support/x\n",
    "a glob in a directory that holds none": HEAD + "  - ./adapters/support/x*\n",
    "a glob in the middle of a path": HEAD + "  - ./adapters/*/x-*/y\n",
    "a glob at home": HEAD + "  - ~/no-such-*\n",
    "a glob in no directory": HEAD + "  - ./none/x-*\n",
    "a Hub id of git": HEAD + "  - acme/x.git\n",
    "a Hub id with two hyphens": HEAD + "  - acme/x--y\n",
    "a Hub id with two dots": HEAD + "  - acme/x..y\n",
    "a base of one part beside nothing": LIST + "base: gpt 2\n",
    "a base that is a file": LIST + "base: adapters/weights.safetensors\n",
    "a base beside a directory": LIST + "base: adapters/bas\n",
    "a directory with a slash at its end": HEAD + "  - ./adapters/suport/\n",
    "a revision of a base by another": "version: 1\nbase: ./models/base\nadapters:\n"
    "  - {path: ./a/x, base: {revision: v1}}\n",
    "the first of two wrong entries": HEAD + "  - 5\n  - ./a/x\n  - {path: ./b/x, base: {model: 1}}\n",
    "a value that contains itself, beside others": "version: 1\nadapters: &a [*a, 5, *a]\nbase: &b {model: 5, x: *b}\n",
    "a name of two combinations without a method": HEAD
    + "  - ./a/x\n  - &c {name: q, combine: {adapters: [x], weights: [1]}}\n  - {<<: *c}\n",
    "a check of bases that is switched off": LIST + "checks: {base-incomplete: off}\n",
    "broken links": HEAD + "  - ./a/broken\n  - ./a/broken/\n  - a/broken\n  - ./a/long\n",
    "a broken link with the name of a Hub id": HEAD + "  - {path: a/broken, revision: v1}\n",
    "digits, as many as are read": LIST + f"checks: {{delta-norm: {{limit: {'9' * 300}}}}}\n",
    "a Hub id with a revision, below a directory": HEAD + "  - adapters/x@v1\n",
    "a revision without its base": LIST + "base: {model: ~, revision: v1}\n",
    "a path of Windows": HEAD + "  - 'c:\\models\\x'\n  - 'models\\x'\n",
    "a Hub id with two marks of a revision": HEAD + "  - acme/x@v1@2\n",
    "a base of one part with a revision": LIST + "base: gpt2@v1\n",
    "a directory whose name has a hidden character": HEAD + "  - ./a/odd*\n",
    "the same adapter beside a name": HEAD + "  - {path: ./a/x, name: y}\n  - {path: acme/z, name: y}\n",
}
READ = {
    "a base of one part": LIST + "base: gpt2\n",
    "as little as may be": LIST,
    "all of it": """\
version: 1
base: {model: acme/base, revision: v1, dtype: [auto, float32], quantization: bnb-8bit}
adapters:
  - ./adapters/support/
  - {path: ./adapters/team-*, checks: {headroom: on, rounding-loss: {limit: 0.3}}, limits: {seconds: 5}}
  - {name: h, path: acme/x, revision: v2, base: {model: ./models/other, dtype: float16}}
  - {path: adapters/nowhere, revision: main, base: {model: models/nowhere, revision: v5},
     expect: {peft_type: LoRa, r: 1, lora_alpha: 2.5}}
  - {path: ./a/x, base: {model: models/elsewhere, revision: v3}, expect: {base: b, sha256: {a/b: %s}}}
  - {path: acme/_, base: {revision: v9, dtype: [float16]}}
  - {name: c, combine: {method: dare_ties, adapters: [support, team-a], weights: [1, -0.5], density: 1,
     seed: 4294967295, majority_sign_method: frequency}}
  - {name: d, combine: {method: cat, adapters: [h], weights: [1]}, base: {dtype: float16, quantization: none}}
checks: {headroom: off, delta-norm: {severity: warning, limit: 1.5}, no-effect: {limit: ~}}
limits: {seconds: 60}
allow-pickle: yes
trust-remote-code: true
""".replace(", no-effect: {limit: ~}", "")
    % ("A" * 64),
    "other ways to write it": """\
---
"version": 0x1
adapters: &all
  - {path: "acme/a", name: "12", revision: !!str 7}
  - ? path
    : acme/b
base: !!map
  model: >-
    acme/base
  dtype: auto
checks: {headroom: {severity: "off", limit: +.5e0}, delta-norm: {limit: 0o12}, no-effect: !!bool Off}
...
""",
    "lines and the order of a glob": HEAD
    + "  - ./adapters/support\n  - path: ./adapters/team-*\n  - {path: acme/x, base: {access: download}}\n"
    "base: {access: stream}\n",
    "bases that override what they name": HEAD + "  - {path: ./adapters/support, base: {dtype: float32}}\n"
    "  - {path: ./adapters/billing, base: {model: acme/base}}\n  - {path: ./a/x, base: acme/other}\n"
    "  - {path: ./adapters/team-a, base: {revision: v2}}\n  - {path: ./adapters/team-b, base: gpt2}\n"
    "base: {model: acme/base, revision: v1, dtype: [bfloat16, float16], names: [acme/base-1b, base-v2]}\n",
    "halves of checks, and limits": HEAD
    + "  - {path: ./adapters/support, checks: {headroom: warning, delta-norm: {limit: 1e-3},"
    " rounding-loss: error}}\n  - ./a/x\nchecks: {headroom: {severity: error, limit: 0.9}, delta-norm: error,"
    " rounding-loss: {error-limit: 0.9}, no-effect: warning}\n",
    "a directory, and an id of the Hub": HEAD + "  - adapters/support\n  - acme/support-2\n"
    "  - {path: adapters/elsewhere, revision: main}\n",
    "anchors, aliases and merge keys": HEAD
    + "  - &first {path: ./adapters/support, base: &b {model: ./models/base, dtype: float16}}\n"
    "  - {<<: *first, path: ./adapters/billing}\n"
    "  - {path: ./adapters/team-a, base: {<<: [*b, {dtype: float32}], quantization: none}}\n"
    "  - {<<: {path: ./adapters/team-b}, <<: {name: z}}\n",
    "a combination on the base of its members": HEAD
    + "  - {name: both, base: {dtype: float16}, combine: {method: cat, adapters: [support, x], weights: [1, -1]}}\n"
    "  - {path: ./adapters/support, base: ./models/base}\n  - {path: ./a/x, base: ./models/base}\n",
    "texts that look like numbers": "version: 1\nadapters: [{path: acme/x, revision: 2026-01-31, name: 12:30:45}]\n",
    "numbers as text": "version: 1\nadapters: [{path: acme/x, name: 1.2.3, revision: '1'}, {path: c/d, name: 1_0}]\n",
}


@pytest.fixture
def laid(variables) -> Iterator[Path]:
    """A directory whose name is short enough to stand in a message, with what the documents name; it is home, too."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        place = Path(short)
        for name in (*DIRECTORIES, "n" * 201):
            (place / name).mkdir(parents=True)
        for name in ("b/config.json", "b/adapter_config.json", "adapters/support/adapter_config.json"):
            (place / name).touch()
        (place / "adapters/weights.safetensors").touch()
        (place / "a/odd\u202e").mkdir()
        for name, target in (("broken", "none"), ("long", "z" * 201)):
            (place / "a" / name).symlink_to(target)
        variables["HOME"] = short
        yield place


def shown(place: Path, text: str, known: str | None, load: Callable[[str], Config]) -> str:
    """What comes of a file: its problems, or its configuration."""
    (place / "merge-gate.yml").write_text(text, encoding="utf-8")
    (place / "known.yml").unlink(missing_ok=True)
    if known is not None:
        (place / "known.yml").write_text(known, encoding="utf-8")
    try:
        config = load(str(place / "merge-gate.yml"))
    except GateError as error:
        return str(error)
    return "\n".join([*(str(one) for one in config.adapters), *map(str, config.baseline), str(config.baseline_path)])


def told(place: Path, load: Callable[[str], Config] = load_config) -> Iterator[str]:
    """What is said of one case after the other."""
    texts = {case: text for case, (text, _) in WRONG.items()} | MORE | READ
    files = [(case, text, None) for case, text in texts.items()]
    files += [(f"baseline: {case}", LIST + "baseline: known.yml\n", known) for case, known in BASELINES.items()]
    for case, text, known in files:
        yield f"== {case}\n{shown(place, text, known, load)}\n".replace(str(place), "<here>")


BASELINES = {
    "good": KNOWN + KNOWN_ENTRY.replace("no-effect", "headroom").replace(DIGEST, DIGEST.upper()),
    "none": "version: 1\naccept: []\n",
    "not there": None,
    "a list": "- a\n",
    "empty": "version: 1\naccept:\n",
    "several wrong": "version: 2\naccept:\n  - 5\n" + KNOWN_ENTRY.replace("a1", "zz")
    + KNOWN_ENTRY.replace("2026-12-31", "2026-02-30")
    + KNOWN_ENTRY.replace("no-effect", "no-efect") + "    also: [headrom, 5]\n"
    + KNOWN_ENTRY.replace("    reason: a stub\n", "") + KNOWN_ENTRY,
    "also checks that there are not": KNOWN + "    also: [headroom, zzzzzz]\n",
    "the same twice, and another": KNOWN + KNOWN_ENTRY + KNOWN_ENTRY.replace("no-effect", "headroom"),
    "more wrong": "version: 1\naccept:\n" + KNOWN_ENTRY.replace("a stub", '""') + KNOWN_ENTRY.replace("a1", "team-*")
    + KNOWN_ENTRY.replace("no-effect", '"*"') + KNOWN_ENTRY.replace("2026-12-31", "soon")
    + KNOWN_ENTRY.replace("    owner: team-a\n", "") + KNOWN_ENTRY + "    dtype: float16\n",
    "without entries": "version: 1\n",
}  # fmt: skip


def test_messages_of_configurations(laid: Path) -> None:
    if os.environ.get("UPDATE_GOLDENS"):
        GOLDEN.write_text("\n".join(told(laid)), encoding="utf-8")
    hold_in_order(GOLDEN, told(laid))


@pytest.mark.parametrize("target", ["none", "z" * 201])
def test_a_file_that_is_a_broken_link(tmp_path, target, cwd, wording) -> None:
    Path("gate.yml").symlink_to(target)
    with wording.of(ConfigError):
        load_config("gate.yml")


@pytest.fixture
def here(tmp_path: Path, cwd) -> Path:
    for name, base in (
        ("a/one", "./b1"),
        ("a/deep/er/two", "./b1"),
        ("c/three", "./b2"),
        ("none/four", None),
        ("far/1/2/3/4/5", None),
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (tmp_path / "a/deep/er/two/too/deep").mkdir(parents=True)
    (tmp_path / "a/deep/er/two/too/deep/adapter_config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_a_first_file(here: Path, wording: Wording) -> None:
    wording(first_config(["a"], base_of))
    (here / "b1").mkdir()
    assert yaml.safe_load(first_config(["a"], base_of))["base"] == {"model": "./b1"}
    for names in (["a"], ["a/one", "c"], ["none"]):
        wording(first_config(names, base_of))
    os.chdir("a")
    assert yaml.safe_load(first_config(["../c"], base_of))["adapters"] == ["../c/three"]
    assert yaml.safe_load(first_config([str(here / "c")], base_of))["adapters"] == [f"{here}/c/three"]


def test_a_first_file_of_training_runs(here: Path, tmp_path: Path, wording: Wording) -> None:
    """A run with its adapter, one with checkpoints only, full models, a cache, and letters that JSON would escape."""
    lora = json.dumps({"base_model_name_or_path": "/data/tiny-base"})
    for name in (
        "t/runs/support", "t/runs/support/checkpoint-500", "t/runs/support/checkpoint-1000", "t/.cache/old",
        "t/runs/2026/sums/checkpoint-9", "t/runs/2026/sums/checkpoint-10", "t/ü 😀", "t/a/sums", "t/b/sums",
        "t/runs/alone/checkpoint-9",
    ):  # fmt: skip
        (here / name).mkdir(parents=True)
        (here / name / "adapter_config.json").write_text(lora)
        (here / name / "optimizer.pt").touch()
    for name in ("t/models/tiny-base", "t/runs/full/checkpoint-3"):
        (here / name).mkdir(parents=True)
        (here / name / "config.json").write_text("{}")
        (here / name / "model-00001-of-00002.safetensors").touch()
    text = first_config(["t"], base_of)
    wording(text)
    (tmp_path / "merge-gate.yml").write_text(text, encoding="utf-8")
    assert [one.source for one in load_config("merge-gate.yml").adapters][-2:] == ["./t/runs/support", "./t/ü 😀"]


def test_a_base_that_lies_elsewhere_is_found_for_each(here: Path) -> None:
    """Above the adapter, as a path from there; or a model of that name, unless there are two."""
    for name in ("c/b2", "far/b1", "near/b1"):
        (here / name).mkdir(parents=True, exist_ok=True)
        (here / name / "config.json").write_text("{}")
        (here / name / "model.safetensors").touch()
    text = first_config(["a/one", "c"], base_of)
    assert {"path": "./a/one", "base": "./b1"} in yaml.safe_load(text)["adapters"]
    assert "  - {path: ./c/three, base: ./c/b2}\n" in text
    assert "  - {path: ./a/one, base: ./far/b1}\n" in first_config(["a/one", "c", "far"], base_of)
    several = yaml.safe_load(first_config(["a/one", "c", "far", "near"], base_of))
    assert {"path": "./a/one", "base": "./b1"} in several["adapters"]


FITTING = {"./a/one": ["./models/x"], "./c/three": ["./models/x", "./models/y"]}


def test_bases_that_fit_are_offered(here: Path, wording: Wording) -> None:
    """Near the current directory, too. One that is the only one is written."""
    for name in ("x", "y", "z"):
        (here / "models" / name).mkdir(parents=True)
        (here / "models" / name / "config.json").write_text("{}")
        (here / "models" / name / "model.safetensors").touch()

    def fits(adapter: str, base: str) -> bool:
        return base in FITTING[adapter]

    text = first_config(["a/one", "c"], base_of, None, fits)
    wording(text)
    assert yaml.safe_load(text)["adapters"] == [
        {"path": "./a/one", "base": "./models/x"},
        {"path": "./c/three", "base": "./b2"},
    ]
    wording(first_config(["c"], base_of, None, fits))
    (here / "merge-gate.yml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config("merge-gate.yml")
    assert [problem.line for problem in caught.value.problems] == [text[: text.index("./b2")].count("\n") + 1]


def test_a_base_whose_name_is_none_of_the_hubs_is_looked_for(here: Path) -> None:
    """A path of the training, without the ./ before it."""
    for named in ("runs/full/b2", r"C:\models\b2"):
        assert "#" in first_config(["a/one"], lambda _, named=named: named).partition("model: ")[2].splitlines()[0]
    (here / "c/b2").mkdir(parents=True)
    (here / "c/b2/config.json").write_text("{}")
    (here / "c/b2/model.safetensors").touch()
    text = first_config(["a/one", "c/b2"], lambda _: "runs/full/b2")
    assert yaml.safe_load(text)["base"] == {"model": "./c/b2"}


@pytest.mark.parametrize("directory", ["empty", "far", "gone", "a/one/adapter_config.json"])
def test_a_first_file_of_nothing(here: Path, directory: str, wording: Wording) -> None:
    with wording.of(UsageError) as caught:
        first_config([directory], base_of)
    assert f'"{directory}"' in caught.value.message


def test_a_directory_of_adapters_is_none_itself(here: Path, wording: Wording) -> None:
    with wording.of(UsageError):
        config_of(["a/"])
    with pytest.raises(UsageError, match=r'"none/".*"four"'):
        config_of(["a/one", "none/"])
    assert [one.source for one in config_of(["a/one", "a/deep"]).adapters] == ["a/one", "a/deep"]


def test_an_adapter_may_hold_adapters(here: Path) -> None:
    (here / "a/one/checkpoint-1").mkdir()
    (here / "a/one/checkpoint-1/adapter_config.json").write_text("{}")
    assert [one.source for one in config_of(["a/one"]).adapters] == ["a/one"]


def test_a_file_among_adapters(here: Path, wording: Wording) -> None:
    assert names_a_file(["gone.yaml"])
    with wording.of(UsageError):
        names_a_file(["a/one", "gone.yaml"])


@pytest.mark.usefixtures("here")
def test_problems_of_the_command_line(wording: Wording) -> None:
    with wording.of(UsageError):
        config_of(["a/one", "./gone", "/"], quantization="8bit", dtypes=["auto", "auto"])
    with wording.of(UsageError, match="zzzzzz"):
        config_of(["a/one"], dtypes=["zzzzzz"])
    with pytest.raises(UsageError, match=r'"lora_alpha".*got "abc"'):
        config_of(["a/one"], expect={"lora_alpha": "abc"})
    assert re.fullmatch("[0-9a-f]{64}", config_of(["a/one"]).sha256)


@pytest.mark.parametrize(
    "path",
    [
        "gone.yml", "zzzzzzzz", ".", "gate.yml.d", "gates", "none/x", "pipe", "x" * 300, "a\0b", "large", "latin",
        "whole", "", "gate.yml/x", "wide",
    ],
)  # fmt: skip
def test_files(tmp_path: Path, cwd, path: str, wording: Wording) -> None:
    for name, data in {
        "gate.yml": b"a", "other.yaml": b"b", "large": b"#" * (1 << 20) + b"#", "whole": b"#" * (1 << 20),
        "latin": b"# a\nb: \xc3\xbc\xfc\n", "wide": LIST.encode("utf-16"),
    }.items():  # fmt: skip
        Path(name).write_bytes(data)
    Path("gate.yml.d").mkdir()
    Path("gates").mkdir()
    Path("gates/gate.yml").touch()
    os.mkfifo("pipe")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}:")
    assert caught.value.exit_code is ExitCode.USAGE
    if path != "whole":  # an empty file: its sentence is in messages.txt
        wording(caught.value)


def test_a_fresh_import_makes_the_same_models(monkeypatch: pytest.MonkeyPatch, laid: Path) -> None:
    """What is made when the modules are imported does not depend on what was imported, or asked, before."""
    for name in [name for name in sys.modules if name.startswith(("merge_gate.config", "tests.support.schemas"))]:
        monkeypatch.delitem(sys.modules, name)
    fresh = importlib.import_module("merge_gate.config.load_config")
    assert fresh.load_config is not load_config
    schemas = importlib.import_module("tests.support.schemas")
    assert schemas.config_schema() == json.loads((schemas.SCHEMAS / "config.schema.json").read_text())
    hold_in_order(GOLDEN, told(laid, fresh.load_config))
