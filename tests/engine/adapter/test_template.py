"""An adapter that is merged on the scratch of the one before it is judged as if it were alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.base.model_class import model_class_for
from merge_gate.files.preflight import preflight
from merge_gate.records.files import AdapterFiles
from merge_gate.records.measured import Evidence
from merge_gate.records.terms import Quantization
from tests.support import methods
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.local_bases import load_local
from tests.support.engine.merges import merge_adapter

if TYPE_CHECKING:
    from pathlib import Path

CASES = {case.name: case for case in methods.CASES}

Tensors = dict[str, torch.Tensor]


def doubled(tensors: Tensors) -> Tensors:
    return {name: tensor * 2 for name, tensor in tensors.items()}


def untrained(tensors: Tensors) -> Tensors:
    return {
        name: tensor * 0 if "lora_B" in name or "embedding_B" in name else tensor for name, tensor in tensors.items()
    }


def with_nan(tensors: Tensors) -> Tensors:
    name = max(tensors)
    broken = tensors[name].clone()
    broken.view(-1)[0] = torch.nan
    return tensors | {name: broken}


VARIANTS: Mapping[str, Callable[[Tensors], Tensors]] = {
    "own": dict,
    "doubled": doubled,
    "untrained": untrained,
    "with_nan": with_nan,
}


def one_by_one(root: Path, base: Base, names: list[str]) -> list[tuple[Evidence, bool]]:
    """Evidence of these adapters on one base, and whether the next one can be merged on the same scratch."""
    found = []
    for name in names:
        before = base.template
        with methods.quiet():
            evidence = merge_adapter(base, read(root / name))
        found.append((replace(evidence, seconds=0.0), before is not None and base.template is before))
    return found


def read(directory: Path) -> AdapterFiles:
    return preflight(str(directory), allow_pickle=False)


def loaded(root: Path) -> Base:
    model_class = model_class_for(str(root / "base"), read(root / "saved"), stored_tensors(root / "base"))
    return load_local(
        str(root / "base"), model_class=model_class, label="base", dtype="auto", quantization=Quantization.NONE
    )


@pytest.mark.parametrize("case", ["lora-linear", "lora-dora", "lora-rslora", "lora-conv1d-gpt2"])
def test_adapters_of_one_kind_are_judged_as_each_would_be_alone(case: str, tmp_path: Path) -> None:
    spec = CASES[case]
    directory = methods.save_base(spec.base, tmp_path / "base", "bfloat16")
    with methods.quiet():
        methods.save_adapter(
            spec, methods.load_base(spec.base, directory), tmp_path / "saved", base_directory=directory
        )
    tensors = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    for name, change in VARIANTS.items():
        shutil.copytree(tmp_path / "saved", tmp_path / name)
        save_file(change(tensors), tmp_path / name / "adapter_model.safetensors", {"format": "pt"})

    order = ["own", "doubled", "untrained", "own", "with_nan", "doubled", "own"]
    together = one_by_one(tmp_path, loaded(tmp_path), order)
    alone = {name: one_by_one(tmp_path, loaded(tmp_path), [name])[0][0] for name in VARIANTS}
    assert [evidence for evidence, _ in together] == [alone[name] for name in order]
    assert [kept for _, kept in together] == [False, True, True, True, False, False, True]
    assert len({alone[name].merges for name in VARIANTS}) == len(VARIANTS)
