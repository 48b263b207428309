"""The key: whatever can change a verdict changes it, and nothing else does."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest

from merge_gate.records.config import AdapterSpec, BaseSpec, CheckSetting, Combine, Config, Expect
from merge_gate.records.files import AdapterFiles, BaseContent, BaseFiles, Entry, FileIdentity, HashedFile, Snapshot
from merge_gate.records.terms import Finding, ForwardMode, Origin, Quantization, Severity, Verdict
from merge_gate.run import verdict_key as key
from merge_gate.run.verdict_key import current_place, key_of, keyed, material, may_have_key
from tests.support.judged_entry import entry, judged_report

FILE = HashedFile(path="adapter_model.safetensors", size_bytes=9, sha256="a" * 64)
SPEC = AdapterSpec(
    name="one",
    source="./one",
    path="/checkout/one",
    base=BaseSpec(model="/checkout/base", label="./base"),
    checks=(CheckSetting(check="headroom", severity=Severity.WARNING, limit=0.5),),
    expect=Expect(r=4),
    line=3,
    column=5,
)
ENTRY = Entry(
    spec=SPEC,
    dtype="bfloat16",
    members=(AdapterFiles(directory="/checkout/one", files=(FILE,)),),
    base=Snapshot(name="./base", directory="/checkout/base"),
)
BASE = BaseContent(weights="b" * 64, settings="c" * 64)
STREAMED = Snapshot(
    name="./base", directory="/checkout/base", base_files=BaseFiles(directory="/checkout/base", is_streamed=True)
)
WARNING = Finding(check="config-invalid", severity=Severity.WARNING, message="odd", origin=Origin.CONFIG)
COMBINE = Combine(method="ties", adapters=("a", "b"), weights=(0.5, 0.5), density=0.5)


def of(entry: Entry = ENTRY, base: BaseContent = BASE, device: str = "cpu", trusts: tuple[str, ...] = ()) -> str:
    return key_of(material(entry, base, device, trusts))


def with_spec(**changes: object) -> Entry:
    return replace(ENTRY, spec=replace(SPEC, **changes))  # type: ignore[arg-type]


def with_files(**changes: object) -> Entry:
    files = replace(ENTRY.members[0], **changes)  # type: ignore[arg-type]
    return replace(ENTRY, members=(files,))


def with_base(**changes: object) -> Entry:
    return with_spec(base=replace(SPEC.base, **changes))  # type: ignore[arg-type]


DECIDES = {
    "a file's bytes": of(with_files(files=(replace(FILE, sha256="d" * 64),))),
    "a file's name": of(with_files(files=(replace(FILE, path="adapter_model.bin"),))),
    "one more file": of(with_files(files=(FILE, replace(FILE, path="adapter_config.json")))),
    "what the preflight says": of(with_files(findings=(WARNING,))),
    "a member": of(replace(ENTRY, members=(*ENTRY.members, *ENTRY.members))),
    "the base's weights": of(base=replace(BASE, weights="d" * 64)),
    "the base's settings": of(base=replace(BASE, settings="d" * 64)),
    "the base's name": of(replace(ENTRY, base=Snapshot(name="./other", directory="/checkout/base"))),
    "the base's commit": of(replace(ENTRY, base=replace(ENTRY.base or Snapshot(name="", directory=""), revision="1"))),
    "the base's last name": of(with_base(model="/checkout/other")),
    "no base in the config": of(with_base(model=None)),
    "the base's label": of(with_base(label="./other")),
    "the base's revision": of(with_base(revision="v1")),
    "quantisation": of(with_base(quantization=Quantization.BNB_8BIT)),
    "dtype": of(replace(ENTRY, dtype="float16")),
    "a severity": of(with_spec(checks=(replace(SPEC.checks[0], severity=Severity.ERROR),))),
    "a severity of warnings about the base": of(with_spec(checks=(replace(SPEC.checks[0], of_base=Severity.ERROR),))),
    "a limit": of(with_spec(checks=(replace(SPEC.checks[0], limit=0.6),))),
    "a check more": of(with_spec(checks=(*SPEC.checks, CheckSetting(check="no-effect", severity=Severity.OFF)))),
    "an expectation": of(with_spec(expect=Expect(r=8))),
    "an expected digest": of(with_spec(expect=Expect(r=4, sha256=(("a", "b"),)))),
    "no expectation": of(with_spec(expect=None)),
    "a combination": of(with_spec(combine=COMBINE)),
    "its method": of(with_spec(combine=replace(COMBINE, method="dare_ties"))),
    "its weights": of(with_spec(combine=replace(COMBINE, weights=(0.6, 0.4)))),
    "its density": of(with_spec(combine=replace(COMBINE, density=0.6))),
    "its signs": of(with_spec(combine=replace(COMBINE, majority_sign_method="total"))),
    "its seed": of(with_spec(combine=replace(COMBINE, seed=1))),
    "its members' names": of(with_spec(combine=replace(COMBINE, adapters=("b", "a")))),
    "no run of the model": of(with_spec(forward=ForwardMode.OFF)),
    "a run of the model or no verdict": of(with_spec(forward=ForwardMode.REQUIRED)),
    "a base that is streamed, and not run": of(replace(ENTRY, base=STREAMED)),
    "the device": of(device="NVIDIA H100"),
    "pickles": of(trusts=("allow-pickle",)),
    "code of the base": of(trusts=("trust-remote-code",)),
}


def test_whatever_decides_makes_another_key() -> None:
    keys = [of(), *DECIDES.values()]
    assert len(set(keys)) == len(keys), sorted(name for name, one in DECIDES.items() if keys.count(one) > 1)


def test_a_streamed_base_is_another_one_only_if_it_is_not_run() -> None:
    for forward, is_other in ((ForwardMode.AUTO, True), (ForwardMode.OFF, False), (ForwardMode.REQUIRED, False)):
        one = with_spec(forward=forward)
        assert (of(one) != of(replace(one, base=STREAMED))) is is_other


def test_names_places_and_time_limits_do_not() -> None:
    moved = FileIdentity(name=FILE.path, device=1, inode=2, size_bytes=9, mtime_ns=3, ctime_ns=4)
    for same in (
        with_spec(name="two", source="./two", path="/elsewhere/two", line=9, column=1, timeout_seconds=3.0),
        with_spec(path=None, hub_id="owner/one", revision="main"),
        with_base(model="/elsewhere/base"),
        with_files(directory="/elsewhere/one", files=(replace(FILE, identity=moved),)),
    ):
        assert of(same) == of()


@pytest.mark.parametrize(
    ("cls", "known"),
    [
        (
            AdapterSpec,
            {"base", "checks", "combine", "expect", "forward"}
            | {"name", "source", "path", "hub_id", "revision", "timeout_seconds", "line", "column"},
        ),
        (BaseSpec, {"model", "label", "revision", "dtypes", "quantization"} | {"access", "names", "sha256"}),
        (CheckSetting, {"check", "severity", "limit", "error_limit", "of_base", "wiped"}),
        (Combine, {"method", "adapters", "weights", "density", "majority_sign_method", "seed"}),
        (
            Config,
            {"allow_pickle", "trust_remote_code"}
            | {"path", "directory", "sha256", "adapters", "baseline", "baseline_path", "publish", "policy"},
        ),
    ],
)
def test_a_new_setting_is_thought_of_here(cls: type, known: set[str]) -> None:
    """A field that is new must be put into the key, or named above as one that decides nothing."""
    assert {one.name for one in fields(cls)} == known


@pytest.mark.parametrize("name", [one.name for one in fields(Expect)])
def test_every_fact_that_expect_states_makes_another_key(name: str) -> None:
    """The value is of no type that the field has: the key takes all fields as they are."""
    stated = replace(Expect(), **{name: (("a", "b"),) if name == "sha256" else "stated"})
    assert of(with_spec(expect=stated)) != of(with_spec(expect=Expect()))


def test_another_version_or_another_code_is_another_key() -> None:
    before = material(ENTRY, BASE, "cpu", ())
    assert (before["libraries"], before["gate"]) == (key.libraries(), key.own_code())
    others = before | {"libraries": key.libraries() | {"peft": "0.0.1"}}, before | {"gate": "e" * 64}
    assert len({of(), *map(key_of, others)}) == 3


def test_a_library_that_is_not_there_is_part_of_the_key() -> None:
    versions = key.libraries.__wrapped__(("PyYAML", "a-package-that-is-absent"))
    assert versions.pop("PyYAML")
    assert versions.pop("a-package-that-is-absent", "absent") is None
    assert versions.keys() == {"python", "machine"}


def test_an_error_has_no_key(tmp_path: Path) -> None:
    adapter = judged_report(entry(tmp_path))
    assert may_have_key(adapter)
    assert not may_have_key(replace(adapter, verdict=Verdict.ERROR))
    assert not may_have_key(replace(adapter, seconds=float("nan")))


def rewrite(file: Path) -> None:
    file.write_bytes(b"WEIGHTS")


@pytest.mark.parametrize("change", [rewrite, Path.unlink])
def test_an_adapter_that_changed_since_it_was_hashed_has_no_key(change: Callable[[Path], None], tmp_path: Path) -> None:
    one = entry(tmp_path)
    report = judged_report(one)
    made = keyed(one, report, BASE, "cpu", ())
    assert made[0].judged.key == key_of(made[1])
    assert keyed(one, replace(report, verdict=Verdict.ERROR), BASE, "cpu", ()) is None
    change(tmp_path / "adapter_model.safetensors")
    assert keyed(one, report, BASE, "cpu", ()) is None


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({"GITHUB_REPOSITORY": "acme/adapters", "GITHUB_RUN_ID": "7"}, "acme/adapters run 7"),
        ({"CI_PROJECT_PATH": "acme/adapters", "CI_JOB_ID": "8"}, "acme/adapters run 8"),
        ({"JOB_NAME": "gate", "BUILD_NUMBER": "9"}, "gate run 9"),
        ({"MERGE_GATE_PLACE": "acme/adapters run 7", "CI_PROJECT_PATH": "x", "CI_JOB_ID": "8"}, "acme/adapters run 7"),
        ({"GITHUB_REPOSITORY": "acme/adapters"}, "box"),
        ({"GITHUB_RUN_ID": "7"}, "box"),
        ({}, "box"),
        ({"MERGE_GATE_PLACE": "x" * 1000}, "x" * 200),
    ],
)
def test_the_place_is_the_ci_run_or_the_machine(environ: dict[str, str], place: str) -> None:
    assert current_place(environ, "box") == place


def test_the_place_of_a_machine_without_a_name_is_unknown() -> None:
    assert current_place({}, "") == "unknown"
