"""What several files say of the action agrees: action.yml, entrypoint.py, checks of inputs, docs, workflows, locks."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from merge_gate.action import caches
from merge_gate.action import inputs as action
from merge_gate.action import step as gate_step
from merge_gate.cli.parser import parsers

ROOT = Path(__file__).resolve().parents[2]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS = {step["name"]: step for step in ACTION["runs"]["steps"]}
PREPARE, GATE, UPLOAD, VERDICT = (STEPS[name] for name in ("Prepare", "Run merge-gate", "Upload report", "Verdict"))
DOCS = (ROOT / "docs" / "reference/action.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guides/github-actions.md").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def table(heading: str) -> dict[str, list[str]]:
    """The rows of the tables under a heading of docs/reference/action.md, by their first cell."""
    section = DOCS.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows}


def test_every_input_reaches_the_gate_step_and_no_other_way() -> None:
    environ = {
        f"MERGE_GATE_INPUT_{name.upper().replace('-', '_')}": f"${{{{ inputs.{name} }}}}" for name in ACTION["inputs"]
    }
    assert GATE["env"] == {**environ, "MERGE_GATE_JOB_INDEX": "${{ strategy.job-index }}"}


def test_the_first_step_has_the_key_of_the_caches_and_no_token() -> None:
    """Both steps compute the same places and keys, so they need the same words."""
    token = PREPARE["env"]["MERGE_GATE_INPUT_HF_TOKEN"]
    assert token == "${{ inputs.hf-token != '' && 'set' || '' }}"
    assert {**PREPARE["env"], "MERGE_GATE_INPUT_HF_TOKEN": GATE["env"]["MERGE_GATE_INPUT_HF_TOKEN"]}.items() <= GATE[
        "env"
    ].items()
    names = (*caches._SUBJECT, "cache", "hf-cache", "runtime", "hf-token")
    needed = {f"MERGE_GATE_INPUT_{name.upper().replace('-', '_')}" for name in names}
    assert set(PREPARE["env"]) == {*needed, "MERGE_GATE_JOB_INDEX"}


def test_every_step_has_a_name_and_no_token_but_the_comment() -> None:
    assert len(STEPS) == len(ACTION["runs"]["steps"])
    assert [name for name, step in STEPS.items() if "github.token" in str(step)] == ["Comment"]


def test_a_cache_is_saved_under_a_key_of_the_gate_only() -> None:
    """A run that a fork can influence has no key (tests/action/test_caches.py)."""
    for kind, name in (("verdicts", "cached verdicts"), ("hub", "the Hub's cache")):
        restore, save = STEPS[f"Restore {name}"], STEPS[f"Save {name}"]
        assert restore["with"]["path"] == save["with"]["path"] == f"${{{{ steps.prepare.outputs.{kind}-path }}}}"
        assert restore["if"] == f"${{{{ steps.prepare.outputs.{kind}-prefix != '' }}}}"
        assert save["with"]["key"] == f"${{{{ steps.gate.outputs.{kind}-cache-key }}}}"
        assert f"steps.gate.outputs.{kind}-cache-key != ''" in save["if"]
        assert restore["continue-on-error"] is save["continue-on-error"] is True


def test_every_input_is_checked() -> None:
    """A token is the gate's to check."""
    assert {name for name, _, _ in action.RULES} | {"args", "hf-token"} == set(ACTION["inputs"])


def test_the_defaults_pass_their_checks() -> None:
    for name, pattern, _ in action.RULES:
        given = ACTION["inputs"][name]
        assert given.get("required") or re.fullmatch(pattern, given["default"]), name
        assert given.get("required") or given["default"] == action.DEFAULTS.get(name, ""), name


def test_the_documents_list_the_inputs_with_their_defaults() -> None:
    rows = table("Inputs")
    assert list(rows) == list(ACTION["inputs"])
    for name, given in ACTION["inputs"].items():
        shown = "required" if given.get("required") else f"`{given['default']}`" if given["default"] else "empty"
        assert rows[name][0] == shown, name


def recipes() -> list[dict]:
    blocks = re.findall(r"^```yaml\n(.*?)^```", DOCS + GUIDE, re.MULTILINE | re.DOTALL)
    return [yaml.safe_load(block) for block in blocks]


def test_the_recipes_use_inputs_and_outputs_that_exist() -> None:
    steps = [
        step for recipe in recipes() if "jobs" in recipe for job in recipe["jobs"].values() for step in job["steps"]
    ]
    ours = [step for step in steps if step.get("uses", "").startswith(("OWNER/merge-gate@", "./.merge-gate"))]
    assert len(ours) >= 8
    for step in ours:
        assert not ("config" in step.get("with", {}) and {"adapters", "verify"} & set(step["with"])), step
        assert set(step.get("with", {})) <= set(ACTION["inputs"]), step
    used = set(re.findall(r"steps\.gate\.outputs\.([a-z-]+)", DOCS + GUIDE))
    assert used
    assert used <= set(ACTION["outputs"])


def test_the_documents_pin_checkout_in_one_way() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (*(ROOT / "docs").rglob("*.md"), *workflows())]
    pins = {pin for text in texts for pin in re.findall(r"actions/checkout@(.*)", text)}
    assert len(pins) == 1, pins


def test_the_documents_list_the_outputs() -> None:
    assert list(table("Outputs")) == list(ACTION["outputs"])


def test_outputs_come_from_outputs_that_are_set() -> None:
    tell = (ROOT / "src" / "merge_gate" / "action" / "step.py").read_text(encoding="utf-8")
    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    keys = set(caches.key_outputs({}))
    for value in re.findall(r"steps\.gate\.outputs\.([a-z-]+)", text):
        assert f'"{value}": ' in tell or value in keys, value
    assert set(re.findall(r"steps\.prepare\.outputs\.([a-z-]+)", text)) == set(caches.outputs({}))


def test_an_action_that_ended_early_says_error() -> None:
    assert ACTION["outputs"]["result"]["value"].endswith("|| 'error' }}")


def test_no_expression_stands_in_a_script() -> None:
    for step in STEPS.values():
        if "uses" not in step:
            assert "${{" not in step["run"]
            assert step["shell"] == "bash"


def test_the_report_survives_and_the_verdict_is_always_given() -> None:
    assert UPLOAD["if"].startswith("${{ !cancelled() && ")
    assert VERDICT["if"] == "${{ !cancelled() }}"
    assert UPLOAD["with"]["if-no-files-found"] == "error"


def test_every_option_of_run_has_an_input_or_goes_through_args() -> None:
    run = parsers()[0].parse_args(["run", "x"])
    known = {f"--{name.replace('_', '-')}" for name in vars(run)} - {"--command", "--names"}
    of_named_adapters = "--base --dtype --quantization --revision --set --expect --allow-pickle"
    through_args = (
        "--only --plan --policy --refresh --access --forward --max-shard-size --ray --quiet --verbose --color"
    )
    others = known - set(action.RESERVED_OPTIONS) - set(of_named_adapters.split())
    assert others == set(through_args.split()), "a new option: give it an input, or allow it in `args` here"
    parse = parsers()[0].parse_args
    for arguments in (
        ["run", "c", "--output", "o", "--device", "cuda:1", "--only", "a", "--refresh"],
        ["run", "c", "--device", "auto"],
    ):
        assert parse(arguments).names == ["c"]


def test_the_devices_are_those_of_the_command() -> None:
    (pattern,) = (pattern for name, pattern, _ in action.RULES if name == "device")
    for device in ("auto", "cpu", "cuda", "cuda:0", "cuda:12"):
        assert re.fullmatch(pattern, device)
        assert parsers()[0].parse_args(["run", "c", "--device", device]).device == device


def test_the_python_that_native_asks_for_is_the_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11"
    assert "(3, 11)" in Path(gate_step.__file__).read_text(encoding="utf-8")


def workflows() -> list[Path]:
    return [
        ROOT / "action.yml",
        *(ROOT / ".github").rglob("*.yml"),
        *(ROOT / "tests" / "e2e" / "workflows").glob("*.yml"),
        *(path for path in (ROOT / "recipes").iterdir() if path.is_file()),  # Python keeps a folder there
    ]


def test_every_action_is_pinned_to_one_commit_with_its_version() -> None:
    pins: dict[str, set[str]] = {}
    for path in workflows():
        for line in path.read_text(encoding="utf-8").splitlines():
            if found := re.search(r"uses: ([a-z-]+/[\w.-]+)(?:/[\w./-]+)?@(.*)", line):
                name, pin = found.groups()
                if name != "acme/merge-gate":
                    assert re.fullmatch(r"[0-9a-f]{40} # v\d+\.\d+\.\d+", pin), f"{path}: {line}"
                    pins.setdefault(name, set()).add(pin)
    assert {"actions/upload-artifact", "actions/cache", "github/codeql-action"} <= set(pins)
    assert {name: pin for name, pin in pins.items() if len(pin) > 1} == {}


def lock(name: str) -> dict[str, str]:
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    return {
        name.lower().replace("_", "-"): version
        for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)
    }


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_the_image_holds_what_the_package_asks_for(variant: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    locked = lock(f"image-{variant}.txt")
    for text in project["dependencies"]:
        asked = Requirement(text)
        name = asked.name.lower().replace("_", "-")
        assert asked.specifier.contains(locked[name].partition("+")[0]), name
    (sdk,) = (Requirement(text) for text in project["optional-dependencies"]["launcher"])
    assert sdk.specifier.contains(lock("launcher.txt")["docker"])


def test_the_variants_differ_in_torch_and_what_cuda_needs_only() -> None:
    cpu, cuda = lock("image-cpu.txt"), lock("image-cuda.txt")
    assert cpu.pop("torch").partition("+") == (cuda.pop("torch"), "+", "cpu")
    assert cpu.items() <= cuda.items()
    more = {re.sub(r"^(nvidia|cuda)-.*", r"\1", name) for name in cuda.keys() - cpu.keys()}
    assert more <= {"nvidia", "cuda", "triton"}


@pytest.mark.parametrize(
    "name", ["image-cpu.txt", "image-cuda.txt", "launcher.txt", "build.txt", "audit.txt", "e2e-tools.txt"]
)
def test_every_locked_file_has_its_hash(name: str) -> None:
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    entries = text.replace("\\\n", "").splitlines()
    assert all(re.fullmatch(r"[\w.-]+==\S+( ;.*?)?(\s+--hash=sha256:[0-9a-f]{64})+\s*", entry) for entry in entries)
    assert "http" not in re.sub(r"http(core|x)", "", text)


def test_the_dockerfile_pins_and_copies_what_it_says() -> None:
    base = re.search(r"^ARG BASE_IMAGE=python:(\d+\.\d+)\.\d+-slim-\w+$", DOCKERFILE, re.MULTILINE)
    assert base
    assert f"--python-version {base[1]} " in (ROOT / ".ci" / "lock.sh").read_text(encoding="utf-8")
    assert not re.search(r"^USER ", DOCKERFILE, re.MULTILINE)
    assert "--require-hashes" in DOCKERFILE


def test_a_release_writes_both_images() -> None:
    spec = importlib.util.spec_from_file_location("pin_images", ROOT / ".ci" / "pin_images.py")
    assert spec
    assert spec.loader
    pin_images = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pin_images)
    cpu, cuda = (f"ghcr.io/acme/merge-gate@sha256:{digit * 64}" for digit in "ab")
    text = pin_images.MODULE.read_text(encoding="utf-8")
    pinned = pin_images.pin(text, cpu, cuda)
    assert f'CPU = "{cpu}"\nCUDA = "{cuda}"\n' in pinned
    assert pin_images.pin(pinned, cuda, cpu) != pinned, "a later release writes over it"
    for wrong in (("x", cuda), (cpu, "ghcr.io/acme/merge-gate:latest"), (cpu, cpu)):
        with pytest.raises(SystemExit):
            pin_images.pin(text, *wrong)
