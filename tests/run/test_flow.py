"""The whole flow in one process but for the worker: where bases come from, what settings can and cannot do, what is
written when, and what an accident costs."""

import dataclasses
import errno
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from merge_gate._internal import whole_file
from merge_gate._internal.errors import GateError, UsageError
from merge_gate.config.load_config import load_config
from merge_gate.files import resolve
from merge_gate.files.base_watch import BaseWatch
from merge_gate.judging import all_checks
from merge_gate.records.measured import BaseFacts
from merge_gate.records.options import RunOptions
from merge_gate.records.refusals import NotJudged
from merge_gate.records.report import AdapterReport, Report
from merge_gate.records.terms import Quantization, Result, Severity, Verdict
from merge_gate.report.stored.report_files import write_report
from merge_gate.run import flow, tally, view
from merge_gate.run.feature import Feature
from merge_gate.run.flow import run_gate
from merge_gate.run.selection import select
from merge_gate.worker import supervisor
from merge_gate.worker.device import why_no_card
from merge_gate.worker.protocol import BaseLoaded, Event, Unjudged
from tests.support.command import merge_gate, strict_json, wait_until
from tests.support.faults import LFS_POINTER, both, configure, malicious_pickle, overwrite, poison, remove, rename
from tests.support.hub import LoopbackHub
from tests.support.models import Shelf, to_pickle
from tests.support.reports import PASS
from tests.support.sampled import sampled

WEIGHTS = "adapter_model.safetensors"
OFF = "off"


def write(place: Path, *adapters: Mapping[str, Any], **top: Any) -> Path:
    """JSON is YAML."""
    path = place / "gate.yml"
    config = {"version": 1, "adapters": list(adapters)} | top
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return path


def lay(place: Path, shelf: Shelf, name: str, break_: Callable[[Path], object] | None = None) -> None:
    shutil.copytree(shelf.adapter("plain"), place / "adapters" / name)
    if break_ is not None:
        break_(place / "adapters" / name)


def by_name(report: Report) -> dict[tuple[str, str], AdapterReport]:
    return {(one.name, one.base.dtype): one for one in report.adapters}


def told(report: AdapterReport) -> str:
    return f"{report.name}: {report.verdict} {report.cause}\n" + "\n".join(f"  {f}" for f in report.findings)


Entries = dict[tuple[str, str], AdapterReport]
"""The lines of a report, by name and dtype."""


class Watcher:
    """A view that does nothing but what a test asks of it."""

    def __init__(self, **on: Callable[..., object]) -> None:
        self._on = on

    def __getattr__(self, name: str) -> Callable[..., object]:
        return self._on.get(name, lambda *_, **__: None)


# --- one run over many settings --------------------------------------------------------------------------------------

NAN = poison("lora_B", where="last")
UNLOADABLE: dict[str, Callable[[Path], object]] = {
    "file-missing": remove(WEIGHTS),
    "file-lfs-pointer": overwrite(LFS_POINTER),
    "file-corrupt": overwrite(b"\0" * 64),
    "pickle-refused": to_pickle,
    "config-unsafe": configure(megatron_config={"x": 1}, megatron_core="megatron.core"),
    "config-invalid": configure(peft_type=...),
}


@pytest.mark.attempt("M3", "an encoder's adapter among adapters of a language model", "the base names it")
def test_a_base_names_the_first_adapter_of_each_class(shelf: Shelf, tmp_path: Path) -> None:
    shutil.copytree(shelf.base("llama"), tmp_path / "base")
    encoder = both(configure(task_type="FEATURE_EXTRACTION"), rename("base_model.model.model.", "base_model.model."))
    for name, break_ in (("a", None), ("encoder", encoder), ("z", encoder)):
        lay(tmp_path, shelf, name, break_)
    config = write(tmp_path, {"path": "./adapters/*"}, base={"model": "./base", "dtype": ["bfloat16", "float16"]})
    found = run_gate(load_config(config), RunOptions())
    assert found.result is Result.PASS
    assert {(one.loaded_as, one.first_adapter, len(one.findings)) for one in found.bases} == {
        ("LlamaForCausalLM", "a", 0),
        ("LlamaModel", "encoder", 1),
    }


@pytest.mark.parametrize(("device", "is_noted"), [("auto", True), ("cpu", False)])
def test_a_card_that_torch_does_not_see_is_noted(device, is_noted, shelf, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(flow, "has_card", lambda: True)
    notes: list[str] = []
    config = write(tmp_path, {"path": str(shelf.adapter("plain"))}, base={"model": str(shelf.base("llama"))})
    found = run_gate(load_config(config), RunOptions(device=device), view=Watcher(note=notes.append))
    assert found.environment.device == "cpu"
    assert any(note.endswith(why_no_card(os.environ)) for note in notes) is is_noted


DTYPES = ("float32", "bfloat16", "float16")
NO_BASES = ("a" * 5000, "/" + "a" * 5000, "x\x00y", "../" * 40 + "etc")
"""Names of bases that no system takes."""


@pytest.fixture(scope="module")
def place(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("gate")
    shutil.copytree(shelf.base("llama"), place / "bases" / "llama")
    for name in ("good", "other"):
        lay(place, shelf, name)
    lay(place, shelf, "nan", NAN)
    lay(place, shelf, "overflow", both(poison("v_proj.lora_A", 1e4, "all"), poison("v_proj.lora_B", 1e4, "all")))
    lay(place, shelf, "names-its-base", configure(base_model_name_or_path="./bases/llama"))
    lay(place, shelf, "names-no-base", configure(base_model_name_or_path=None))
    for number, base in enumerate(NO_BASES):
        lay(place, shelf, f"hostile-{number}", configure(base_model_name_or_path=base))
    for check, break_ in UNLOADABLE.items():
        lay(place, shelf, check, break_)
    return place


@pytest.fixture(scope="module")
def judged(place: Path) -> Entries:
    base = {"model": "./bases/llama", "dtype": "float32"}
    members = {"weights": [0.5, 0.5], "method": "linear"}

    def entry(name: str, path: str | None = None, **more: Any) -> dict[str, Any]:
        return {"name": name, "path": f"./adapters/{path or name}", "base": base} | more

    off = dict.fromkeys(("adapter-nonfinite", "headroom", "delta-norm", "no-effect", "rounding-loss"), OFF)
    config = write(
        place,
        entry("good"),
        entry("other"),
        entry("nan"),
        entry("nan-unchecked", "nan", checks=off),
        entry("nan-warned", "nan", checks={"adapter-nonfinite": "warning"}),
        entry("dtypes", "overflow", base=base | {"dtype": [*DTYPES]}, checks={"delta-norm": OFF}),
        *(entry(f"{check}-off", check, checks={check: OFF}) for check in UNLOADABLE),
        *(entry(f"{check}-warned", check, checks={check: "warning"}) for check in UNLOADABLE),
        {"name": "names-its-base", "path": "./adapters/names-its-base"},
        {"name": "names-no-base", "path": "./adapters/names-no-base"},
        {"path": "./adapters/hostile-*"},
        {"name": "sum", "combine": members | {"adapters": ["good", "other"]}, "base": base},
        {"name": "sum-with-nan", "combine": members | {"adapters": ["good", "nan"]}, "base": base},
        {"name": "sum-with-pointer", "combine": members | {"adapters": ["file-lfs-pointer-off", "good"]}, "base": base},
        entry("as-expected", "good", expect={"r": 4, "lora_alpha": 8, "peft_type": "LORA"}),
        entry("not-as-expected", "good", expect={"r": 8}),
        entry("not-as-expected-but-warned", "good", expect={"r": 8}, checks={"expectation-failed": "warning"}),
    )
    return by_name(run_gate(load_config(str(config)), RunOptions(device="cpu")))


def test_every_entry_is_in_the_report_once_per_dtype(judged: Entries) -> None:
    dtypes = {dtype: one for (name, dtype), one in judged.items() if name == "dtypes"}
    assert [*dtypes] == [*DTYPES]
    assert [one.cause for one in dtypes.values()] == [None, None, "merged-nonfinite"], "each has its own verdict"
    assert len(judged) == 6 + 2 + 2 * len(UNLOADABLE) + 2 + len(NO_BASES) + 3 + 3


def test_every_merged_tensor_is_in_the_report(judged: Entries) -> None:
    for (name, dtype), one in judged.items():
        assert len({merge.stats.name for merge in one.tensors}) == len(one.tensors), name
        assert len({merge.module for merge in one.tensors}) == one.coverage.modules_merged, name
        assert {merge.stats.dtype for merge in one.tensors} <= {dtype}
    broken = {merge.module for merge in judged["nan", "float32"].tensors if merge.stats.nan}
    assert (
        broken == {one.module for one in judged["nan", "float32"].findings if one.check == "merged-nonfinite"} != set()
    )
    assert all(merge.changed for merge in judged["good", "float32"].tensors)
    assert judged["file-lfs-pointer-off", "float32"].tensors == ()


@pytest.mark.parametrize("name", ["nan-unchecked", "nan-warned"])
def test_a_nan_fails_whatever_is_switched_off(name: str, judged: Entries) -> None:
    one = judged[name, "float32"]
    assert (one.verdict, one.cause) == (Verdict.FAILED, "merged-nonfinite"), told(one)
    warned = {finding.check for finding in one.findings if finding.severity is Severity.WARNING}
    assert warned == ({"adapter-nonfinite"} if name == "nan-warned" else set())


@pytest.mark.parametrize("check", UNLOADABLE)
@pytest.mark.parametrize("how", ["off", "warned"])
def test_what_cannot_be_loaded_never_passes(check: str, how: str, judged: Entries) -> None:
    one = judged[f"{check}-{how}", "float32"]
    assert one.verdict in {Verdict.ERROR, Verdict.FAILED}, told(one)
    assert one.findings[0].message
    assert one.findings[0].hint
    assert one.coverage.parameters_checked == 0


def test_a_base_that_the_adapter_names_is_beside_the_config(judged: Entries) -> None:
    one = judged["names-its-base", "float32"]
    assert one.verdict is Verdict.PASSED, told(one)
    assert one.base.model == "./bases/llama"


def test_without_a_base_there_is_no_verdict(judged: Entries) -> None:
    one = judged["names-no-base", "auto"]
    assert one.verdict is Verdict.ERROR, told(one)
    assert "base.model" in one.findings[0].message
    assert "base: {model: …}" in one.findings[0].hint


def test_a_base_name_that_no_system_takes_costs_its_adapter(judged: Entries) -> None:
    hostile = [one.verdict for (name, _), one in judged.items() if name.startswith("hostile-")]
    assert hostile == [Verdict.ERROR] * len(NO_BASES)
    assert judged["good", "float32"].verdict is Verdict.PASSED


def test_a_combination_is_judged_by_what_it_makes(judged: Entries) -> None:
    assert judged["sum", "float32"].verdict is Verdict.PASSED, told(judged["sum", "float32"])
    assert judged["sum-with-nan", "float32"].verdict is Verdict.FAILED
    assert judged["sum-with-nan", "float32"].cause == "adapter-nonfinite"
    assert judged["sum-with-pointer", "float32"].verdict is not Verdict.PASSED
    assert judged["nan", "float32"].cause == "adapter-nonfinite"
    coverage = judged["sum", "float32"].coverage
    assert coverage.parameters_checked == coverage.parameters_total > 0


def test_what_is_expected_is_held_against_the_adapter(judged: Entries) -> None:
    assert judged["as-expected", "float32"].verdict is Verdict.PASSED
    assert judged["not-as-expected", "float32"].cause == "expectation-failed"
    assert judged["not-as-expected", "float32"].coverage.parameters_checked > 0, (
        "it is merged and looked at all the same"
    )
    assert judged["not-as-expected-but-warned", "float32"].verdict is Verdict.PASSED


def test_a_payload_does_not_run_though_its_checks_are_off(shelf: Shelf, tmp_path: Path) -> None:
    lay(tmp_path, shelf, "evil", malicious_pickle)
    checks = {"pickle-refused": OFF, "file-corrupt": OFF, "file-missing": OFF}
    entry = {"path": "./adapters/evil", "base": {"model": str(shelf.base("llama"))}, "checks": checks}
    report = run_gate(load_config(str(write(tmp_path, entry, **{"allow-pickle": True}))), RunOptions(device="cpu"))
    assert report.result is not Result.PASS
    assert not list(tmp_path.rglob("payload-ran"))


# --- selection -------------------------------------------------------------------------------------------------------


def test_only_selects_in_the_order_of_the_config(place: Path) -> None:
    names = ("good", "other", "nan")
    config = load_config(str(write(place, *({"path": f"./adapters/{name}"} for name in names))))
    assert [spec.name for spec in select(config, ("nan", "good"))] == ["good", "nan"]
    assert [spec.name for spec in select(config, ())] == list(names)
    with pytest.raises(UsageError, match="--only godo") as caught:
        select(config, ("good", "godo"))
    assert "good" in caught.value.hint


def test_the_options_that_are_meant_can_go_to_a_shell(place: Path) -> None:
    names = ("good", "$(id)")
    config = load_config(str(write(place, *({"name": name, "path": "./adapters/good"} for name in names))))
    with pytest.raises(UsageError) as caught:
        select(config, ("good,$(id)",))
    assert caught.value.hint.endswith(" --only good --only '$(id)'")


def test_a_combination_alone_finds_members_without_a_digest(place, monkeypatch) -> None:
    """A digest that cannot be taken costs the digest only."""

    def fail(*_: object) -> str:
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(resolve, "digest_files", fail)
    combine = {"method": "linear", "adapters": ["good", "other"], "weights": [0.5, 0.5]}
    members = ({"path": "./adapters/good"}, {"path": "./adapters/other"})
    config = write(place, *members, {"name": "sum", "combine": combine}, base={"model": "./bases/llama"})
    found = run_gate(load_config(str(config)), RunOptions(device="cpu", only=("sum",)))
    assert [(one.name, one.verdict) for one in found.adapters] == [("sum", Verdict.PASSED)]
    assert found.result is Result.PASS
    assert [base.sha256 for base in found.bases] == [None]


# --- the Hub ---------------------------------------------------------------------------------------------------------


def repository(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_hub_ids_are_pinned_and_judged_again_from_the_cache(shelf: Shelf, tmp_path: Path) -> None:
    """The base is named by adapter_config.json alone; one that cannot be fetched costs its own adapters.

    The second run has no network at all.
    """
    lay(tmp_path, shelf, "lora", configure(base_model_name_or_path="acme/llama"))
    write(
        tmp_path,
        {"path": "hub:acme/lora"},
        {"name": "broken", "path": "hub:acme/lora", "revision": "v2"},
        {"name": "lost", "path": "hub:acme/lora", "base": {"model": "acme/gone"}},
    )
    with LoopbackHub() as hub:
        base = hub.add_repo("acme/llama", repository(shelf.base("llama")))
        first = hub.add_repo("acme/lora", repository(tmp_path / "adapters" / "lora"))
        NAN(tmp_path / "adapters" / "lora")
        second = hub.add_repo("acme/lora", repository(tmp_path / "adapters" / "lora"), refs=("v2",))
        online = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        answers = {"merge-gate-report": merge_gate("run", "gate.yml", cwd=tmp_path, **online)}
    offline = online | {"HF_HUB_OFFLINE": "1"}
    answers["again"] = merge_gate("run", "gate.yml", "--output", "again", cwd=tmp_path, **offline)
    for directory, answer in answers.items():
        assert answer.code == 1, answer.said
        report = strict_json(tmp_path / directory / "report.json")
        lora, broken, lost = report["adapters"]
        assert [one["verdict"] for one in (lora, broken, lost)] == ["passed", "failed", "error"]
        assert [one["revision"] for one in (lora, broken)] == [first, second]
        assert [one["base"] | {"dtype": ""} for one in (lora, broken)] == [{
            "model": "acme/llama", "revision": base, "dtype": "", "quantization": "none",
        }] * 2  # fmt: skip
        (described,) = report["bases"]
        assert (described["model"], described["revision"]) == ("acme/llama", base)
        assert len(described["sha256"]) == 64


# --- what is written when --------------------------------------------------------------------------------------------


def small(place: Path, *names: str) -> Any:
    return load_config(
        str(write(place, *({"path": f"./adapters/{name}"} for name in names), base={"model": "./bases/llama"}))
    )


def test_a_provisional_report_replaces_an_old_one_from_the_start(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_report(PASS, out)
    old = (out / "summary.md").read_text()
    seen: list[dict[str, Any]] = []

    def start(*_: object) -> None:
        seen.append(strict_json(out / "report.json"))
        assert (out / "summary.md").read_text() != old

    view = Watcher(start=start)
    run_gate(small(place, "file-corrupt"), RunOptions(device="cpu", output=str(out)), view=view)
    assert (seen[0]["complete"], seen[0]["result"], seen[0]["adapters"]) == (False, "error", [])
    final = strict_json(out / "report.json")
    assert (final["complete"], final["result"]) == (True, "fail")


def test_what_was_judged_is_on_disk_after_an_accident(place: Path, tmp_path: Path) -> None:
    done: list[AdapterReport] = []

    def adapter_done(adapter: AdapterReport) -> None:
        done.append(adapter)
        if adapter.name == "good":
            raise KeyboardInterrupt

    config = small(place, "file-corrupt", "good", "nan")
    with pytest.raises(KeyboardInterrupt):
        run_gate(config, RunOptions(device="cpu", output=str(tmp_path)), view=Watcher(adapter_done=adapter_done))
    report = strict_json(tmp_path / "report.json")
    assert report["complete"] is False
    assert [one["name"] for one in report["adapters"]] == ["file-corrupt", "good"]
    assert "good" in (tmp_path / "summary.md").read_text()


def test_a_view_that_breaks_at_the_end_leaves_the_report(place: Path, tmp_path: Path) -> None:
    def finish(*_: object) -> None:
        raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="terminal"):
        run_gate(
            small(place, "file-corrupt"), RunOptions(device="cpu", output=str(tmp_path)), view=Watcher(finish=finish)
        )
    assert strict_json(tmp_path / "report.json")["complete"] is True


def test_what_was_judged_is_on_disk_while_a_digest_is_taken(place, tmp_path, monkeypatch) -> None:
    seen: list[bool] = []

    zeros = {"model.safetensors": "0" * 64}

    def slow(*_: object) -> dict[str, str]:
        wait_until(lambda: len(strict_json(tmp_path / "report.json")["adapters"]) == 2)
        seen.append(strict_json(tmp_path / "report.json")["complete"])
        return zeros

    monkeypatch.setattr(resolve, "digest_files", slow)
    monkeypatch.setattr(tally, "PAUSE_RATIO", 1e9)
    report = run_gate(small(place, "good", "nan"), RunOptions(device="cpu", output=str(tmp_path)))
    assert seen[0] is False
    assert [base.sha256 for base in report.bases] == [resolve.digest_of_digests(zeros)]
    assert [file.sha256 for base in report.bases for file in base.files] == ["0" * 64]


@pytest.mark.parametrize("comes_back", sampled([True, False], [True]))
def test_a_disk_that_gives_out_costs_no_verdict(comes_back, place, tmp_path, monkeypatch) -> None:
    """Only the report is lost, if the disk stays full, and that is not wrong usage (exit code 3)."""
    broken: list[bool] = []
    judged: list[str] = []
    notes: list[str] = []
    finished: list[Report] = []

    def no_room(*_: object) -> None:
        if broken and not (comes_back and "nan" in judged):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(whole_file.os, "fsync", no_room)
    view = Watcher(
        start=lambda *_: broken.append(True),
        adapter_done=lambda adapter: judged.append(adapter.name),
        note=notes.append,
        finish=lambda report, _: finished.append(report),
    )
    config = small(place, "file-corrupt", "good", "nan")
    if comes_back:
        report = run_gate(config, RunOptions(device="cpu", output=str(tmp_path)), view=view)
        assert strict_json(tmp_path / "report.json")["complete"] is True
    else:
        with pytest.raises(GateError, match="No space left") as caught:
            run_gate(config, RunOptions(device="cpu", output=str(tmp_path)), view=view)
        assert caught.value.exit_code == 3
        assert strict_json(tmp_path / "report.json")["complete"] is False, "the first one, whole"
        (report,) = finished
    assert [one.verdict for one in report.adapters] == [Verdict.FAILED, Verdict.PASSED, Verdict.FAILED]
    assert len([note for note in notes if "No space left" in note]) == 1


@pytest.mark.slow
def test_what_is_silent_is_named_and_each_hour_has_a_line(shelf, tmp_path, monkeypatch) -> None:
    """The first word comes at once here, and an hour is over as soon as it begins.

    `good` has the default limit, which is then that of the base's load too.
    """
    monkeypatch.setattr(supervisor, "FIRST_NOTE_S", 0.0)
    monkeypatch.setattr(view, "EVERY_S", 0.0)
    lay(tmp_path, shelf, "broken", overwrite(b"\0" * 64))
    lay(tmp_path, shelf, "good")
    lay(tmp_path, shelf, "silent", configure(target_modules="(([a-z0-9_.])+)+!"))
    entries = [
        {"path": "./adapters/broken"},
        {"path": "./adapters/good"},
        {"path": "./adapters/silent", "limits": {"seconds": 1}},
    ]
    config = load_config(str(write(tmp_path, *entries, base={"model": str(shelf.base("llama"))})))
    notes: list[str] = []
    report = run_gate(config, RunOptions(device="cpu"), view=Watcher(note=notes.append))
    assert [one.verdict for one in report.adapters] == [Verdict.FAILED, Verdict.PASSED, Verdict.ERROR]
    assert any(re.fullmatch(r"silent: .+ 1 s", said) for said in notes)
    assert any("1 of 3 " in said for said in notes)


def _failing_for(name: str, function: Callable[..., Any], named: Callable[..., str]) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        if named(*args) == name:
            raise RecursionError("too deep for anybody")
        return function(*args, **kwargs)

    return fail


def test_an_accident_with_one_adapter_costs_that_adapter(shelf, tmp_path, monkeypatch) -> None:
    """While its files are read, before it is merged, and after that."""
    accidents = ("reading", "judging", "judging-the-merge")
    for name in ("good", *accidents):
        lay(tmp_path, shelf, name)
    lay(tmp_path, shelf, "nan", NAN)
    monkeypatch.setattr(
        resolve, "preflight", _failing_for("reading", resolve.preflight, lambda directory: Path(directory).name)
    )
    delta_norm = all_checks.CHECKS["delta-norm"]
    of_files = _failing_for("judging", delta_norm.of_files, lambda case: case.spec.name)
    of_merge = _failing_for("judging-the-merge", delta_norm.of_merge, lambda case: case.spec.name)
    changed = {**all_checks.CHECKS, "delta-norm": dataclasses.replace(delta_norm, of_files=of_files, of_merge=of_merge)}
    monkeypatch.setattr(all_checks, "CHECKS", changed)
    names = ("good", *accidents, "nan")
    config = write(tmp_path, *({"path": f"./adapters/{name}"} for name in names), base=str(shelf.base("llama")))
    found = {one.name: one for one in run_gate(load_config(str(config)), RunOptions(device="cpu")).adapters}
    assert {name: one.verdict for name, one in found.items()} == {
        "good": Verdict.PASSED,
        **dict.fromkeys(accidents, Verdict.ERROR),
        "nan": Verdict.FAILED,
    }
    for name in accidents:
        (finding,) = found[name].findings
        assert "RecursionError: too deep for anybody" in finding.message


def test_a_feature_that_cannot_be_released_keeps_no_other_one(place: Path) -> None:
    released = []

    class Held(Feature):
        def __init__(self, name: str) -> None:
            self._name = name

        def close(self) -> None:
            released.append(self._name)
            raise OSError(self._name)

    held = {name: Held(name) for name in ("one", "two", "three")}
    run = flow.Run(small(place, "file-corrupt"), RunOptions(), view.View(), features=held)
    with pytest.raises(OSError, match="one"):
        run.close()
    assert sorted(released) == sorted(held)


def test_a_base_that_transformers_loads_is_named_with_the_reason(place, tmp_path, monkeypatch) -> None:
    """Though it is larger than the memory, or on a network mount."""
    facts = BaseFacts(
        model="./b", revision=None, dtype="float32", quantization=Quantization.NONE, no_skeleton="an odd\nclass"
    )

    def supervise(_: object, listen: Callable[[Event], None], *__: object, **___: object) -> None:
        listen(BaseLoaded(group=0, task=0, facts=facts, seconds=1.0))
        listen(Unjudged(task=0, refusal=NotJudged(message="the rest of the run is of no interest")))

    notes: list[str] = []
    monkeypatch.setattr(flow, "supervise", supervise)
    report = run_gate(small(place, "good"), RunOptions(device="cpu"), view=Watcher(note=notes.append))
    assert [base.no_skeleton for base in report.bases] == ["an odd\nclass"]
    assert any(note.endswith("an odd class") for note in notes), notes


# --- what is judged, hashed and reported are the same bytes -----------------------------------------------------------


MOMENTS = ("base_loading", "base_loaded", "adapter_done")
"""While a base is loaded, after that, and when the first of its adapters is done."""


@pytest.fixture(scope="module")
def meddled(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdapterReport]:
    """A run during which files are exchanged or cut short: two adapters on each base, each base with its own accident.

    On `still` an adapter's weights are exchanged as its base is loaded: a broken file is hashed, and a good one is
    there when the merge begins. A base with the name of a moment is exchanged at that moment. `cut` is cut short while
    it is mapped.
    """
    place = tmp_path_factory.mktemp("meddled")
    names = {"still": ("swapped", "good")} | {base: (f"{base}-first", f"{base}-second") for base in (*MOMENTS, "cut")}
    entries = []
    for base, (first, second) in names.items():
        shutil.copytree(shelf.base("llama"), place / base)
        lay(place, shelf, first, NAN if base == "still" else None)
        lay(place, shelf, second)
        entries += [{"path": f"./adapters/{name}", "base": f"./{base}"} for name in (first, second)]

    def exchange(file: Path, other: Path) -> None:
        shutil.copy(other, place / "new")
        (place / "new").replace(file)

    def meddle(moment: str) -> Callable[..., None]:
        def at_the_moment(*about: Any, **_: Any) -> None:
            model = about[0] if isinstance(about[0], str) else getattr(about[0], "model", None) or about[0].base.model
            base = Path(model).name
            weights = place / base / "model.safetensors"
            if base == moment:
                exchange(weights, weights)
            elif base == "still" and moment == "base_loading":
                exchange(place / "adapters" / "swapped" / WEIGHTS, place / "adapters" / "good" / WEIGHTS)
            elif base == "cut" and moment == "base_loaded":
                os.truncate(weights, 4096)

        return at_the_moment

    view = Watcher(**{moment: meddle(moment) for moment in MOMENTS})
    report = run_gate(load_config(str(write(place, *entries))), RunOptions(device="cpu"), view=view)
    return {one.name: one for one in report.adapters}


@pytest.mark.slow
def test_a_pass_certifies_the_bytes_that_it_names(meddled: dict[str, AdapterReport]) -> None:
    swapped, good = meddled["swapped"], meddled["good"]
    assert (swapped.verdict, good.verdict) == (Verdict.ERROR, Verdict.PASSED)
    assert any(WEIGHTS in one.message for one in swapped.findings), told(swapped)


@pytest.mark.parametrize("moment", MOMENTS)
def test_no_verdict_stands_on_a_base_that_changes(moment: str, meddled: dict[str, AdapterReport]) -> None:
    first, second = meddled[f"{moment}-first"], meddled[f"{moment}-second"]
    assert (first.verdict, second.verdict) == (Verdict.ERROR, Verdict.ERROR)
    assert any("changed" in one.message for one in first.findings), told(first)


def test_no_verdict_is_stored_under_the_digest_of_another_base(shelf, tmp_path, monkeypatch) -> None:
    """The base is exchanged after it was loaded and before it is hashed, so its digest is not that of the merge."""
    shutil.copytree(shelf.base("llama"), tmp_path / "base")
    lay(tmp_path, shelf, "good")
    weights, exchanged, start_hashing = tmp_path / "base" / "model.safetensors", threading.Event(), BaseWatch._hash

    def exchange(*_: object, **__: object) -> None:
        shutil.copy(weights, tmp_path / "new")
        (tmp_path / "new").replace(weights)
        exchanged.set()

    def hash_late(watch: BaseWatch, directory: str) -> None:
        exchanged.wait(60)
        start_hashing(watch, directory)

    monkeypatch.setattr(BaseWatch, "_hash", hash_late)
    config = load_config(str(write(tmp_path, {"path": "./adapters/good"}, base="./base")))
    options = RunOptions(device="cpu", features={"cache": str(tmp_path / "cache")})
    report = run_gate(config, options, view=Watcher(base_loaded=exchange))
    assert exchanged.is_set()
    assert [one.verdict for one in report.adapters] == [Verdict.ERROR]
    assert [base.sha256 is not None for base in report.bases] == [True], "it was hashed"
    assert [*(tmp_path / "cache" / "verdicts").iterdir()] == []


def test_a_base_that_is_cut_while_mapped_costs_its_adapters(meddled: dict[str, AdapterReport]) -> None:
    """The kernel answers with SIGBUS, which kills the worker; what is said is said of the file, not of memory.

    A model that ran then costs no verdict: the next worker finds the file cut.
    """
    on_it = [meddled["cut-first"], meddled["cut-second"]]
    assert [one.verdict for one in on_it] == [Verdict.ERROR, Verdict.ERROR]
    for one in on_it:
        assert "memory" not in " ".join(finding.hint for finding in one.findings), told(one)
    reasons = " ".join(finding.message for one in on_it for finding in one.findings)
    assert "SIGBUS" in reasons or "not fully covered" in reasons, (
        f"an entry without a verdict keeps its reason: {reasons}"
    )


@pytest.mark.slow
def test_a_report_stays_small_whatever_an_adapter_brings(shelf: Shelf, tmp_path: Path) -> None:
    """A config of megabytes, each entry of it wrong, and names of megabytes."""
    lay(tmp_path, shelf, "huge", configure(rank_pattern={f"layer-{number}": -1 for number in range(100_000)}))
    lay(tmp_path, shelf, "long", configure(rank_pattern={"x" * 3_000_000: "y" * 3_000_000}, peft_type="Z" * 1_000_000))
    config = write(
        tmp_path, *({"path": f"./adapters/{name}"} for name in ("huge", "long")), base=str(shelf.base("llama"))
    )
    report = run_gate(load_config(str(config)), RunOptions(device="cpu", output=str(tmp_path / "out")))
    assert (tmp_path / "out" / "report.json").stat().st_size < 1_000_000
    assert any("99,900" in finding.message for finding in report.adapters[0].findings)


def test_what_cannot_be_shown_of_an_adapter_costs_this_adapter(tmp_path: Path, shelf: Shelf) -> None:
    """The worker may send figures without meaning. The run goes on."""
    for name in ("odd", "good"):
        lay(tmp_path, shelf, name)
    shutil.copytree(shelf.base("llama"), tmp_path / "base")
    config = load_config(
        str(write(tmp_path, {"path": "./adapters/odd"}, {"path": "./adapters/good"}, base={"model": "./base"}))
    )

    def show(report: AdapterReport) -> None:
        if report.name == "odd" and report.verdict is Verdict.PASSED:
            raise LookupError("no such figure")

    report = run_gate(config, RunOptions(device="cpu"), view=Watcher(adapter_done=show, report_made=None))
    assert report.complete
    odd, good = sorted(report.adapters, key=lambda each: each.name != "odd")
    assert (odd.verdict, good.verdict) == (Verdict.ERROR, Verdict.PASSED)
    assert "no such figure" in odd.findings[-1].message
    assert "LookupError" in (odd.findings[-1].log or "")
