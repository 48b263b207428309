"""`merge-gate export`: what it writes, what it refuses, and that nothing is lost or left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file

import merge_gate
from merge_gate.cli.dispatch import main
from merge_gate.engine.base.model_class import TASK_CLASSES
from merge_gate.features.publish.partial import PartialDirectory, unchanged
from merge_gate.records.files import EXPORT_NAME
from merge_gate.records.terms import Result
from tests.support import methods
from tests.support.cases import digests
from tests.support.command import code_of, environment, start
from tests.support.engine import architectures
from tests.support.engine.architectures import Architecture
from tests.support.engine.published import configured
from tests.support.models import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Shelf,
    make_adapter,
    read_config,
    read_tensors,
    to_pickle,
    write_config,
    write_tensors,
)
from tests.support.publish_kills import killed_before_a_look

PREFIX = "base_model.model."


def lay(shelf: Shelf, place: Path, base: str = "llama-bfloat16", **lora: Any) -> Path:
    """`base` and `adapter` in a directory."""
    shutil.copytree(shelf.base(base), place / "base")
    make_adapter(place / "base", place / "adapter", **lora)
    return place


def export(place: Path, *words: str) -> int:
    return main(
        ["export", str(place / "adapter"), "--base", str(place / "base"), "--output", str(place / "out"), *words]
    )


def record(place: Path) -> dict[str, Any]:
    return json.loads((place / "out" / EXPORT_NAME).read_text())


def is_clean(place: Path) -> bool:
    """Whether nothing is left next to the inputs and the export."""
    return {path.name for path in place.iterdir()} <= {"base", "adapter", "out"}


@pytest.fixture(scope="module")
def exported(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of an adapter with patterns that are no powers of two, of names that a wrapper has changed."""
    place = lay(shelf, tmp_path_factory.mktemp("exported"), alpha_pattern={"v_proj": 13}, r=20, lora_alpha=20)
    tensors = read_tensors(place / "adapter")
    write_tensors(
        place / "adapter", {name.replace(PREFIX, f"{PREFIX}_orig_mod."): one for name, one in tensors.items()}
    )
    before = digests(place)
    synced, own = set[str](), os.fsync
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda one: own(one) or synced.add(Path(f"/proc/self/fd/{one}").readlink().name))
        assert export(place) == 0
    assert synced > {ADAPTER_CONFIG, ADAPTER_WEIGHTS}  # so that a crash of the machine leaves all files or none
    assert any(EXPORT_NAME in name for name in synced)
    assert digests(place / "base", place / "adapter") == {
        path: digest for path, digest in before.items() if "/out/" not in str(path)
    }
    return place


def test_the_export_is_whole_and_says_what_it_was_made_of(exported: Path) -> None:
    assert sorted(path.name for path in (exported / "out").iterdir()) == [ADAPTER_CONFIG, ADAPTER_WEIGHTS, EXPORT_NAME]
    assert is_clean(exported)
    facts = record(exported)
    assert facts["model_class"] == "LlamaForCausalLM"
    assert facts["scale_in"] == "lora_B"
    assert facts["padding"] == [f"model.layers.{layer}.self_attn.k_proj" for layer in (0, 1)]
    assert len(facts["renamed"]) == len(read_tensors(exported / "adapter"))
    assert [one["dtype"] for one in facts["comparisons"]] == ["bfloat16", "float32"]
    assert all(0 <= one["largest"] < 1e-2 and one["tensors"] == 4 for one in facts["comparisons"])
    assert {one["path"] for one in facts["adapter"]["files"]} == {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    assert facts["base"]["sha256"]


@pytest.mark.slow
def test_the_report_has_a_note_on_the_padding(exported: Path) -> None:
    """Another run of the gate warns of nothing. The same modules are a warning if the record does not name them."""
    found = merge_gate.gate(str(exported / "out"), base=str(exported / "base"), device="cpu")
    (adapter,) = found.adapters
    notes = [(one.check, one.severity.value, one.module) for one in adapter.findings]
    assert notes == [("no-effect", "note", "model.layers.0.self_attn.k_proj")]
    shutil.copytree(exported / "out", exported.parent / "without", ignore=shutil.ignore_patterns(EXPORT_NAME))
    found = merge_gate.gate(str(exported.parent / "without"), base=str(exported / "base"), device="cpu")
    assert [one.severity.value for one in found.adapters[0].findings] == ["warning"]


@pytest.mark.slow
def test_the_export_of_an_export_has_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    """By Python. Its record names the padding, too."""
    made = merge_gate.export(exported / "out", base=exported / "base", output=tmp_path / "again")
    assert made.report.result is Result.PASS
    assert list(made.record.padding) == record(exported)["padding"]
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (exported / "out" / name).read_bytes()
    assert all(one.differing == 0 for one in made.record.comparisons)


@pytest.mark.slow
def test_an_unchanged_export_is_replaced_and_no_changed_one(exported: Path, shelf: Shelf, tmp_path: Path) -> None:
    place = lay(shelf, tmp_path)
    shutil.copytree(exported / "out", place / "out")
    assert export(place) == 0
    assert record(place)["scale_in"] == "lora_alpha"
    (place / "out" / "notes.txt").write_text("mine")
    before = digests(place)
    assert export(place) == 2
    assert digests(place) == before


def test_a_kill_before_the_look_leaves_an_export_to_remove(exported: Path, tmp_path: Path) -> None:
    """A killed run's leftover of an earlier export is recognized by its record."""
    shutil.copytree(exported / "out", tmp_path / "one")
    killed_before_a_look(tmp_path)
    assert (tmp_path / ".one.partial" / "model" / EXPORT_NAME).exists()
    PartialDirectory(tmp_path / "one").remove()
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["model.safetensors"]


@pytest.mark.slow
def test_a_base_in_float64_is_compared_in_float64_and_float32(shelf: Shelf, tmp_path: Path) -> None:
    lay(shelf, tmp_path, base="llama", alpha_pattern={"v_proj": 13})
    tensors = read_tensors(tmp_path / "base", "model.safetensors")
    save_file({name: one.double() for name, one in tensors.items()}, tmp_path / "base" / "model.safetensors")
    configured(tmp_path / "base", dtype="float64")
    assert export(tmp_path) == 0
    assert [one["dtype"] for one in record(tmp_path)["comparisons"]] == ["float64", "float32"]


# --- the class that servers load -------------------------------------------------------------------------------------

WRAPPED = [
    ("qwen3_5", "AutoModelForCausalLM", "CAUSAL_LM"),
    ("gemma3", "AutoModelForCausalLM", "CAUSAL_LM"),
    ("qwen2_5_vl", "Qwen2_5_VLTextModel", None),
    ("qwen3_5", "Qwen3_5ForConditionalGeneration", None),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "class_name", "task_type"), WRAPPED)
def test_the_class_of_config_json_applies_every_module(
    model_type: str, class_name: str, task_type: str | None, tmp_path: Path
) -> None:
    architectures.build(model_type, tmp_path / "base")
    model_class: Any = getattr(transformers, class_name)
    architecture = Architecture(model_type=model_type, model_class=model_class, task_type=task_type, parameters=0)
    architectures.save_lora(architecture, tmp_path / "base", tmp_path / "adapter")
    assert export(tmp_path) == 0
    served = transformers.AutoConfig.from_pretrained(tmp_path / "base").architectures[0]
    assert record(tmp_path)["model_class"] == served
    with methods.quiet():
        model = PeftModel.from_pretrained(
            getattr(transformers, served).from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path / "out"
        )
    applied = [one for name, one in model.named_parameters() if "lora_B" in name]
    trained = [one for name, one in read_tensors(tmp_path / "adapter").items() if "lora_B" in name]
    assert sum(bool(one.any()) for one in applied) == sum(bool(one.any()) for one in trained) > 0
    assert len(applied) == len(trained) + len(record(tmp_path)["padding"])


# --- the class of the adapter's task ---------------------------------------------------------------------------------

TASKS = [
    pytest.param("FEATURE_EXTRACTION", "FEATURE_EXTRACTION", "LlamaModel", id="embeddings", marks=pytest.mark.slow),
    pytest.param("CAUSAL_LM", "CAUSAL_LM", "LlamaForCausalLM", id="language"),
    pytest.param("CAUSAL_LM", "FEATURE_EXTRACTION", "LlamaModel", id="names-of-another-class", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("trained", "task_type", "class_name"), TASKS)
def test_the_class_of_the_task_applies_every_tensor(
    trained: str, task_type: str, class_name: str, shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """config.json names LlamaForCausalLM. PEFT drops tensors with the names of another class than the loaded one."""
    lay(shelf, tmp_path, base="llama", task_type=trained)
    write_config(tmp_path / "adapter", read_config(tmp_path / "adapter") | {"task_type": task_type})
    assert export(tmp_path) == 0
    said = capsys.readouterr().out
    assert said.count("VERDICT") == 1
    assert f"the names of {class_name}" in said
    assert record(tmp_path)["model_class"] == class_name
    assert read_config(tmp_path / "out")["task_type"] == task_type
    loaders = [getattr(transformers, TASK_CLASSES[task]) for task in (trained, task_type)]
    names = ("adapter", "out")
    with methods.quiet():
        models = [
            PeftModel.from_pretrained(one.from_pretrained(tmp_path / "base"), tmp_path / name).merge_and_unload()
            for one, name in zip(loaders, names, strict=True)
        ]
    own, exported = (getattr(model, "model", model).state_dict() for model in models)
    base = read_tensors(tmp_path / "base", "model.safetensors")
    key = "layers.1.self_attn.v_proj.weight"
    assert not torch.equal(exported[key], base[f"model.{key}"])
    assert all(torch.equal(one, exported[name]) for name, one in own.items())


# --- mistakes --------------------------------------------------------------------------------------------------------


def _configure(**changes: Any) -> Callable[[Path], None]:
    return lambda place: write_config(place / "adapter", read_config(place / "adapter") | changes)


def _link(place: Path) -> None:
    (place / "real").mkdir()
    (place / "out").symlink_to(place / "real")


def _write(name: str, text: str = "mine") -> Callable[[Path], None]:
    def write(place: Path) -> None:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)

    return write


MISTAKES: dict[str, tuple[int, Callable[[Path], object], list[str]]] = {
    "no output": (2, lambda _: None, ["adapter", "--base", "base"]),
    "no adapter": (2, lambda _: None, ["--base", "base", "--output", "out"]),
    "two adapters": (2, lambda place: shutil.copytree(place / "adapter", place / "adapter2"), ["adapt*"]),
    "two words": (2, lambda _: None, ["adapter", "adapter", "--base", "base", "--output", "out"]),
    "no such adapter": (2, lambda _: None, ["./adaptre"]),
    "a file as the adapter": (2, _write("weights.safetensors"), ["weights.safetensors"]),
    "a config as the adapter": (2, _write("gate.yml", "version: 1"), ["gate.yml"]),
    "no such base": (2, lambda _: None, ["adapter", "--base", "./bsae", "--output", "out"]),
    "exchanged": (2, lambda _: None, ["base", "--base", "adapter", "--output", "out"]),
    "an empty base": (2, lambda _: None, ["adapter", "--base", "", "--output", "out"]),
    "output is the adapter": (2, lambda _: None, ["adapter", "--base", "base", "--output", "adapter"]),
    "output is the base": (2, lambda _: None, ["adapter", "--base", "base", "--output", "base"]),
    "output in the adapter": (2, lambda _: None, ["adapter", "--base", "base", "--output", "adapter/plain"]),
    "output in the base": (2, lambda _: None, ["adapter", "--base", "base", "--output", "base/a/b"]),
    "output in the base that the adapter names": (
        2,
        lambda place: _configure(base_model_name_or_path=str(place / "base"))(place),
        ["adapter", "--output", "base/plain"],
    ),
    "output holds the inputs": (2, lambda _: None, ["adapter", "--base", "base", "--output", "."]),
    "output is a directory of someone's": (2, _write("out/notes.txt"), []),
    "output is an empty directory": (2, lambda place: (place / "out").mkdir(), []),
    "output is a file": (2, _write("out"), []),
    "output is the root": (2, lambda _: None, ["adapter", "--base", "base", "--output", "/"]),
    "output is the parent": (2, lambda _: None, ["adapter", "--base", "base", "--output", ".."]),
    "output is in a file": (2, _write("file"), ["adapter", "--base", "base", "--output", "file/out"]),
    "output is a link": (2, _link, []),
    "output is a dangling link": (2, lambda place: (place / "out").symlink_to(place / "nowhere"), []),
    "output has a broken record": (2, _write(f"out/{EXPORT_NAME}", "{"), []),
    "output has another tool's record": (2, _write(f"out/{EXPORT_NAME}", '{"tool": {"name": "x"}}'), []),
    "an option of run": (2, lambda _: None, ["adapter", "--base", "base", "--output", "out", "--dtype", "float32"]),
    "DoRA": (1, _configure(use_dora=True), []),
    "PiSSA": (1, _configure(init_lora_weights="pissa"), []),
    "not LoRA": (1, _configure(peft_type="LOHA"), []),
    "no config": (1, lambda place: (place / "adapter" / ADAPTER_CONFIG).unlink(), []),
    "a pickle": (1, lambda place: to_pickle(place / "adapter"), []),
}


@pytest.fixture(scope="module")
def laid(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay(shelf, tmp_path_factory.mktemp("laid"))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_has_a_sentence_and_loses_nothing(
    mistake: str, laid: Path, tmp_path: Path, cwd, capsys: pytest.CaptureFixture[str]
) -> None:
    code, break_, words = MISTAKES[mistake]
    place = tmp_path / "place"
    shutil.copytree(laid, place)
    os.chdir(place)
    break_(place)
    before = digests(place)
    words = words or ["adapter"]
    if len(words) == 1:
        words += ["--base", "base", "--output", "out"]
    assert code_of("export", *words) == code
    assert "Traceback" not in (said := capsys.readouterr().err)
    assert "merge-gate" in said
    assert digests(place) == before
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


def test_an_adapter_in_what_a_killed_run_left_is_not_removed(laid: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    shutil.copytree(laid / "adapter", left / "model")
    (left / "written-by-merge-gate").touch()
    before = digests(tmp_path)
    words = [str(left / "model"), "--base", str(laid / "base"), "--output", str(tmp_path / "out")]
    assert main(["export", *words]) == 2
    assert digests(tmp_path) == before


def _nan(place: Path) -> None:
    tensors = read_tensors(place / "adapter")
    next(iter(tensors.values()))[0, 0] = torch.nan
    write_tensors(place / "adapter", tensors)


def _other_embedding(place: Path) -> None:
    """A copy of a base weight that is not the base's: without it, the merge is another one."""
    tensors, key = read_tensors(place / "adapter"), "model.embed_tokens.weight"
    own = read_tensors(place / "base", "model.safetensors")[key].float() + 1
    tensors |= {f"{PREFIX}model.embed_tokens.base_layer.weight": own}
    write_tensors(place / "adapter", tensors)


def test_an_adapter_that_fails_is_not_exported(laid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(laid, tmp_path, dirs_exist_ok=True)
    _nan(tmp_path)
    assert export(tmp_path) == 1
    assert "adapter-nonfinite" in capsys.readouterr().out
    assert is_clean(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_changed_copy_of_a_base_weight_is_refused_at_once(
    shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay(shelf, tmp_path, base="llama", target_modules=["embed_tokens"])
    _other_embedding(tmp_path)
    assert export(tmp_path) == 1
    said = capsys.readouterr().err
    assert said.count("[1/1]") == 1
    assert "model.embed_tokens.weight" in said
    assert is_clean(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("edit", ["a blank", "a note", "another value"])
def test_an_export_whose_record_was_edited_is_a_users(edit: str, exported: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(exported / "out", tmp_path / "out"))
    assert unchanged(out, made_by="export") is not None
    text = (out / EXPORT_NAME).read_text()
    edits = {"a blank": text + " ", "a note": text.replace("{", '{"note": "mine",', 1), "another value": text}
    edits["another value"] = text.replace('"source": "', '"source": "mine, ', 1)
    assert edits[edit] != text
    (out / EXPORT_NAME).write_text(edits[edit])
    assert unchanged(out, made_by="export") is None


@pytest.mark.slow
@pytest.mark.parametrize("after", ["base (bfloat16)", "base (float32)", "passed"])
def test_a_killed_export_leaves_nothing_under_its_name(after: str, laid: Path, tmp_path: Path) -> None:
    """The next export removes what it left."""
    shutil.copytree(laid, tmp_path, dirs_exist_ok=True)
    before = digests(tmp_path)
    process = start("export", "adapter", "--base", "base", "--output", "out", cwd=tmp_path)
    until = time.monotonic() + 120
    while after not in (tmp_path / "log").read_text() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "log").unlink()
    assert not (tmp_path / "out").exists()
    assert {path: digest for path, digest in digests(tmp_path).items() if path in before} == before
    for path in tmp_path.glob(".merge-gate-export-*"):
        os.utime(path, (0, 0))  # else it may belong to a run that is about to lock it
    assert export(tmp_path) == 0
    assert is_clean(tmp_path)


@pytest.mark.slow
def test_a_full_disk_is_a_sentence(laid: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for it."""
    shutil.copytree(laid, tmp_path, dirs_exist_ok=True)
    words = ["export", "adapter", "--base", "base", "--output", "out"]
    command = ["bash", "-c", f"trap '' XFSZ; ulimit -f 1; exec {sys.executable} -P -m merge_gate {' '.join(words)}"]
    answer = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert answer.returncode in {2, 3}
    assert "Traceback" not in answer.stderr
    assert is_clean(tmp_path)
    assert not (tmp_path / "out").exists()
