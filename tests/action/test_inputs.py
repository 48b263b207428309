"""What the action asks of its inputs: all wrong ones named at once, empty ones have defaults, paths have no links."""

import os
import re
from pathlib import Path

import pytest

from merge_gate._internal.errors import UsageError
from merge_gate._internal.interrupts import TIMEOUT_S
from merge_gate.action import inputs as action
from merge_gate.action.docker import container
from tests.support.action.step_files import asked
from tests.support.wording import Wording


def test_the_defaults_are_good(environ: dict[str, str]) -> None:
    inputs = action.read_inputs(asked(environ))
    assert inputs.run.config == Path(environ["GITHUB_WORKSPACE"], "gate.yml")
    assert inputs.run.output.parent.parent == Path(environ["RUNNER_TEMP"])
    assert inputs.upload_report is True
    assert re.fullmatch(r"merge-gate-report-release-gate-[0-9a-f]{6}", inputs.artifact_name)


@pytest.mark.parametrize(
    ("config", "said"), [("none.yml", "is not there (does actions/checkout come"), (".", "is a directory")]
)
def test_a_config_that_is_no_file_is_told_what_it_is(config, said, environ, wording) -> None:
    with wording.of(UsageError):
        action.read_inputs(asked(environ, config=config))


def test_no_two_uses_share_an_artifact_or_a_directory(environ: dict[str, str]) -> None:
    first, second = (action.read_inputs(asked({**environ, "MERGE_GATE_JOB_INDEX": "3"})) for _ in range(2))
    assert first.artifact_name != second.artifact_name
    assert first.artifact_name.startswith("merge-gate-report-release-gate-3-")
    assert first.run.output != second.run.output


def test_a_cache_is_an_option_of_the_run_and_a_mount(environ: dict[str, str]) -> None:
    inputs = action.read_inputs(asked(environ, cache_dir="kept", args="--refresh"))
    kept = Path(environ["GITHUB_WORKSPACE"], "kept").resolve()
    assert inputs.run.cache == kept
    assert container.gate_words(inputs.run, "cpu")[-3:] == ["--cache", str(kept), "--refresh"]
    assert action.read_inputs(asked(environ, cache="")).run.cache is None
    driven = action.read_inputs(asked(environ, cache="true", hf_cache="true")).run
    assert (driven.cache, driven.hf_cache) == (
        Path(environ["RUNNER_TEMP"], "merge-gate-verdicts"),
        Path(environ["RUNNER_TEMP"], "merge-gate-hub"),
    )
    assert container.gate_words(driven, "cpu")[-2:] == ["--cache", str(driven.cache)]


def test_adapters_need_no_configuration(environ: dict[str, str]) -> None:
    workspace = Path(environ["GITHUB_WORKSPACE"])
    for name in ("adapters/b", "adapters/a", "base", "inner"):
        (workspace / name).mkdir(parents=True)
    (workspace / "adapters/notes.txt").touch()
    given = {"config": "merge-gate.yml", "base": "./base", "dtype": "bfloat16, float16"}
    run = action.read_inputs(asked(environ, **given, adapters="\n./adapters/*\n acme/lora\n hub:acme/b\n")).run
    adapters = ("./adapters/a", "./adapters/b", "acme/lora", "hub:acme/b")
    assert (run.config, run.adapters, run.base) == (None, adapters, "./base")
    assert container.gate_words(run, "cpu") == [
        "run", *adapters, "--output", str(run.output), "--device", "cpu",
        "--base", "./base", "--dtype", "bfloat16,float16",
    ]  # fmt: skip
    inner = {"adapters": "../adapters/a", "base": str(workspace.parent), "working_directory": "inner"}
    run = action.read_inputs(asked(environ, config="", **inner)).run
    assert (run.adapters, run.base) == (("./adapters/a",), str(workspace.parent))


def test_a_directory_for_models_is_an_option_and_a_mount(environ: dict[str, str]) -> None:
    inputs = action.read_inputs(asked(environ, publish="merged"))
    merged = Path(environ["GITHUB_WORKSPACE"]).resolve() / "merged"
    assert inputs.run.publish == merged
    assert container.gate_words(inputs.run, "cpu")[-2:] == ["--publish", str(merged)]
    assert action.read_inputs(asked(environ, publish="")).run.publish is None


def test_a_model_is_verified_on_the_cpu_and_without_a_config(environ: dict[str, str]) -> None:
    model = Path(environ["GITHUB_WORKSPACE"]).resolve() / "merged"
    model.mkdir()
    run = action.read_inputs(asked(environ, config="", verify="merged", args="--base ./b --adapter ./a")).run
    assert (run.verifies, run.config, run.device, run.gpus) == (True, model, "cpu", "none")
    expected = ["verify", "merged", "--output", str(run.output), "--base", "./b", "--adapter", "./a"]
    assert container.gate_words(run, "cpu") == expected
    run = action.read_inputs(asked(environ, config="", verify="merged", adapters="acme/a", base="acme/b")).run
    assert container.gate_words(run, "cpu")[4:] == ["--base", "acme/b", "--adapter", "acme/a"]


def test_a_shard_is_an_option_of_the_run_and_a_part_of_the_name(environ: dict[str, str]) -> None:
    inputs = action.read_inputs(asked({**environ, "MERGE_GATE_JOB_INDEX": "1"}, shard="2/4", args="--refresh"))
    assert inputs.run.arguments == ("--shard", "2/4", "--refresh")
    assert inputs.artifact_name.startswith("merge-gate-report-release-gate-shard-2-of-4-")


def test_values_may_look_like_anything(environ: dict[str, str]) -> None:
    directory = Path(environ["GITHUB_WORKSPACE"], "--output=x y")
    directory.mkdir()
    (directory / "a=b.yml").touch()
    inputs = action.read_inputs(asked(environ, config="--output=x y/a=b.yml", args="--only 'a b' --only=c"))
    assert inputs.run.config.name == "a=b.yml"
    assert inputs.run.arguments == ("--only", "a b", "--only=c")


WRONG = {
    "config": ["", "other.yml", "a\nb"],
    "runtime": ["Docker"],
    "gpus": ["-1"],
    "device": ["cuda:x"],
    "image": ["--privileged", "a b"],
    "adapters": ["./absent", "./absent/*", "gate.yml"],
    "base": ["acme/base"],
    "dtype": ["float16"],
    "fail-on": ["error", "broken"],
    "fail-on-not-judged": ["no"],
    "cache": ["./kept"],
    "hf-cache": ["~/.cache/huggingface"],
    "upload-sarif": ["1"],
    "comment": ["always"],
    "upload-report": ["True", "yes"],
    "pull": ["Always"],
    "memory": ["16 GB", "0"],
    "shm-size": ["lots"],
    "cpus": ["two"],
    "timeout-minutes": ["0", "-5"],
    "working-directory": ["nowhere"],
    "output": ["gate.yml"],
    "artifact-name": ["a/b"],
    "retention-days": ["-1", "401", "1.5"],
    "args": [
        "--only 'a", "--output x", "--out=x", "-ox", "-qo x", "--device cpu", "--container", "--shard 1/2",
        "--cache elsewhere", "--publish=elsewhere",
    ],
    "shard": ["2", "0/2", "2/4 --refresh"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_input_is_named_with_what_was_expected(environ, name, value, wording) -> None:
    given = {name.replace("-", "_"): value, **({"config": ""} if name == "adapters" else {})}
    with wording.of(UsageError) as raised:
        action.read_inputs(asked(environ, **given))
    assert "\n" not in raised.value.message
    assert "docs/reference/action.md" in raised.value.hint


def test_a_model_is_verified_or_adapters_are_gated(environ: dict[str, str], wording: Wording) -> None:
    for given in (
        {"verify": "nowhere", "config": ""},
        {"verify": ".", "publish": "merged"},
        {"verify": ".", "config": "", "adapters": "a/b\nc/d", "cache": "true", "dtype": "float16"},
        {"adapters": "a/b", "config": "other.yml"},
        {"cache": "true", "cache_dir": "x", "hf_cache": "true", "hf_cache_dir": "y"},
    ):
        with wording.of(UsageError):
            action.read_inputs(asked(environ, **given))


@pytest.mark.parametrize("gpus", ["0,1", "GPU-5f1c", "MIG-5f1c", "0:1", "nvidia.com/gpu=0,nvidia.com/gpu=1"])
def test_gpus_have_indices_uuids_and_cdi_names(environ: dict[str, str], gpus: str) -> None:
    assert action.read_inputs(asked(environ, gpus=gpus)).run.gpus == gpus


def test_all_wrong_inputs_are_named_at_once(environ: dict[str, str]) -> None:
    with pytest.raises(UsageError) as raised:
        action.read_inputs(asked(environ, runtime="x", device="x", args="--output x"))
    assert [line.split(":")[0] for line in raised.value.message.splitlines()] == ["runtime", "device", "args"]


def test_an_empty_input_has_its_default(environ: dict[str, str]) -> None:
    given = action.read_inputs(
        asked(environ, **{name.replace("-", "_"): "" for name, _, _ in action.RULES if name != "config"})
    )
    assert (given.runtime, given.run.gpus, given.run.device, given.run.pull) == ("auto", "auto", "auto", "missing")
    assert (given.upload_report, given.retention_days) == (True, 0)
    assert (given.fail_on, given.fail_on_not_judged, given.upload_sarif, given.comment) == (
        "failed",
        True,
        False,
        False,
    )
    assert given.run.timeout_s == TIMEOUT_S
    assert (given.run.mounts, given.run.hf_cache) == ((), None)


def test_limits_and_mounts(environ: dict[str, str], tmp_path: Path) -> None:
    mounts = f"\n {tmp_path}/bases \n/srv/adapters\n"
    given = action.read_inputs(
        asked(environ, mounts=mounts, memory="16g", shm_size="512m", cpus="1.5", timeout_minutes="0.5", pull="never")
    )
    assert given.run.mounts == (tmp_path / "bases", Path("/srv/adapters"))
    assert (given.run.memory, given.run.shm_size, given.run.cpus) == ("16g", "512m", "1.5")
    assert given.run.timeout_s == 30
    assert given.run.pull == "never"


def test_relative_paths_start_in_the_working_directory(environ: dict[str, str]) -> None:
    inner = Path(environ["GITHUB_WORKSPACE"], "a", "b")
    inner.mkdir(parents=True)
    (inner / "gate.yml").touch()
    given = action.read_inputs(asked(environ, working_directory="a/b", output="out", hf_cache_dir="../cache"))
    assert given.run.config == inner / "gate.yml"
    assert given.run.output == inner / "out"
    assert given.run.hf_cache == inner.parent / "cache"


@pytest.mark.parametrize("name", ["config", "output", "hf-cache-dir"])
def test_the_home_directory_has_its_sign(environ, tmp_path: Path, variables, name: str) -> None:
    variables["HOME"] = str(tmp_path)
    (tmp_path / "x").touch() if name == "config" else None
    given = action.read_inputs(asked(environ, **{name.replace("-", "_"): "~/x"}))
    assert getattr(given.run, name.removesuffix("-dir").replace("-", "_")) == tmp_path / "x"


def test_a_runner_whose_work_lies_behind_a_link(environ: dict[str, str], tmp_path: Path) -> None:
    """`_work` on another disk: the workspace and the temporary directory are named by the link."""
    (tmp_path / "_work").symlink_to(tmp_path)
    linked = {
        **environ,
        "GITHUB_WORKSPACE": str(tmp_path / "_work" / "workspace"),
        "RUNNER_TEMP": str(tmp_path / "_work" / "temp"),
    }
    roots = (tmp_path / "_work" / "workspace", tmp_path / "workspace")
    for config in ("gate.yml", *(str(root / "gate.yml") for root in roots)):
        assert action.read_inputs(asked(linked, config=config)).run.config == tmp_path / "workspace" / "gate.yml"
    for output in (f"{linked['RUNNER_TEMP']}/out", f"{tmp_path}/temp/out"):
        given = action.read_inputs(asked(linked, output=output)).run.output
        assert given == given.resolve() == tmp_path / "temp" / "out"


def test_a_link_of_the_checkout_is_left_for_the_launcher(environ: dict[str, str], tmp_path: Path) -> None:
    link = Path(environ["GITHUB_WORKSPACE"], "reports")
    link.symlink_to(tmp_path)
    assert action.read_inputs(asked(environ, output="reports")).run.output == link
    assert action.read_inputs(asked(environ, output="reports/x")).run.output == link / "x"
    assert os.path.lexists(link)


@pytest.mark.parametrize(
    "name", ["config", "adapters", "base", "dtype", "image", "verify", "working_directory", "args"]
)
def test_a_long_value_is_cut(environ: dict[str, str], name: str) -> None:
    with pytest.raises(UsageError) as caught:
        action.read_inputs(asked(environ, **{"config": "", "adapters": "", name: "'" + "x" * 100_000}))
    assert f"{name.replace('_', '-')}: " in caught.value.message
    assert len(caught.value.message) < 1_500


@pytest.mark.parametrize("name", ["adapters", "base", "image", "args", "working_directory"])
def test_a_misplaced_token_is_named_and_not_repeated(environ: dict[str, str], name: str, wording: Wording) -> None:
    with pytest.raises(UsageError) as caught:
        action.read_inputs(asked(environ, hf_token="hf_s3cr3t\n", **{name: "acme/hf_s3cr3t"}))
    assert "s3cr3t" not in str(caught.value)
    wording(caught.value)
