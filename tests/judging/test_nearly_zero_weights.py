"""`delta-norm` on real merges: weights that are nearly zero in the base, and adapters that exploded."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
import torch

from merge_gate.files.preflight import preflight
from merge_gate.judging.all_checks import judge_merge
from merge_gate.records.terms import Severity
from tests.support.engine import architectures
from tests.support.engine.merges import merge_adapter
from tests.support.gating import SPEC, Gate
from tests.support.models import make_adapter, read_tensors, write_tensors
from tests.support.verify.merges import weights_of, write_weights

if TYPE_CHECKING:
    from pathlib import Path

    from merge_gate.records.terms import Finding
    from tests.support.models import Shelf


def delta_norm(base: Path, adapter: Path) -> Finding | None:
    files = preflight(str(adapter), allow_pickle=False)
    evidence = merge_adapter(Gate().base(base, files, dtype="auto"), files)
    return next((one for one in judge_merge(SPEC, files, evidence) if one.check == "delta-norm"), None)


def nearly_zero(base: Path, part: str) -> None:
    write_weights(base, {name: one * (1e-9 if part in name else 1) for name, one in weights_of(base).items()})


@pytest.mark.attempt("D02", "a good adapter on a base with a layer that starts at zero", "delta-norm warns")
def test_a_layer_that_starts_at_zero_does_not_fail_a_good_adapter(shelf: Shelf, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(shelf.base("llama"), base)
    nearly_zero(base, "layers.1.self_attn.q_proj")
    make_adapter(base, tmp_path / "adapter")
    found = delta_norm(base, tmp_path / "adapter")
    assert found is not None
    assert found.severity is Severity.WARNING
    assert found.tensor == "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.attempt("D03", "an adapter that exploded by 1e6", "delta-norm fails")
def test_an_adapter_that_exploded_fails(shelf: Shelf, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(shelf.base("llama"), base)
    nearly_zero(base, "layers.1.self_attn.q_proj")
    make_adapter(base, tmp_path / "adapter")
    tensors = read_tensors(tmp_path / "adapter")
    write_tensors(tmp_path / "adapter", {name: one * 1e3 for name, one in tensors.items()})
    found = delta_norm(base, tmp_path / "adapter")
    assert found is not None
    assert found.severity is Severity.ERROR


@pytest.mark.attempt("D04", "SAM with random weights, half of its mask decoder nearly zero", "delta-norm warns")
def test_a_sam_with_weights_near_zero_passes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sam = architectures.build("sam", tmp_path / "base")
    architectures.save_lora(sam, tmp_path / "base", tmp_path / "adapter")
    nearly_zero(tmp_path / "base", "mask_decoder.transformer.layers.0")
    found = delta_norm(tmp_path / "base", tmp_path / "adapter")
    assert found is not None
    assert found.severity is Severity.WARNING
