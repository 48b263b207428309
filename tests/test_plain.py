"""The fast way gives what PEFT's own merge gives, and steps aside for everything that is not plain."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from merge_gate.base import Base, load_base, shape_for
from merge_gate.merge import merge_by_peft
from merge_gate.plain import merge_plain
from merge_gate.preflight import preflight
from tests import models

if TYPE_CHECKING:
    from collections.abc import Callable

    from merge_gate.records import AdapterFiles
    from tests.models import Shelf

DTYPES = ("float32", "bfloat16", "float16")
PLAIN = (
    "plain",
    "all-linear",
    "every-projection",
    "regex",
    "excluded",
    "layers-to-transform",
    "rslora",
    "patterns",
    "gaussian",
    "dropout",
    "bfloat16-file",
    "float16-file",
    "lopsided",
    "sharded-base",
    "tied-base",
    "wide",
    "conv1d",
    "feature-extraction",
)

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own


def _files(directory: Path) -> AdapterFiles:
    return preflight(str(directory), allow_pickle=True)


def _base(shelf: Shelf, variant: str, files: AdapterFiles, dtype: str) -> Base:
    name = models.VARIANTS[variant].base
    directory = str(shelf.base(name))
    return load_base(directory, shape=shape_for(directory, files), label=name, dtype=dtype)


def _into(tensors: dict[str, torch.Tensor]) -> Callable[[str, torch.Tensor], None]:
    return lambda name, tensor: tensors.__setitem__(name, tensor.clone())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", PLAIN)
def test_the_fast_way_gives_what_peft_gives(variant: str, dtype: str, shelf: Shelf) -> None:
    files = _files(shelf.adapter(variant))
    base = _base(shelf, variant, files, dtype)
    fast_tensors: dict[str, torch.Tensor] = {}
    peft_tensors: dict[str, torch.Tensor] = {}

    fast = merge_plain(base, files, on_tensor=_into(fast_tensors))
    by_peft = merge_by_peft(base, files, on_tensor=_into(peft_tensors))

    assert fast is not None
    changed = {merge.stats.name: merge for merge in by_peft.merges if merge.changed}
    assert {merge.stats.name for merge in fast.merges} == set(changed)
    for merge in fast.merges:
        other = changed[merge.stats.name]
        assert torch.equal(fast_tensors[merge.stats.name], peft_tensors[merge.stats.name])
        assert merge.stats == other.stats
        assert merge.delta_norm == pytest.approx(other.delta_norm, rel=1e-4)
        assert merge.base_norm == pytest.approx(other.base_norm, rel=1e-5)
        assert (merge.lost_norm or 0.0) == pytest.approx(other.lost_norm or 0.0, rel=1e-2, abs=1e-7)
        assert merge.unchanged_fraction == pytest.approx(other.unchanged_fraction, abs=1e-3)
    for same in ("file_tensors", "missing", "unexpected", "targeted", "tied", "parameters_checked", "parameters_total"):
        assert getattr(fast, same) == getattr(by_peft, same), same


@pytest.mark.parametrize(
    "variant",
    [
        "dora",
        "pissa",
        "olora",
        "lora-bias",
        "bias-all",
        "bias-lora-only",
        "modules-to-save",
        "token-rows",
        "embedding",
        "saved-embedding",
        "resized-vocabulary",
        "name-in-keys",
        "pickled",
        "tied-head",
        "per-expert",
        "fused-experts",
        "six-labels",
        "prompt-tuning",
    ],
)
def test_it_steps_aside_for_what_is_not_plain(variant: str, shelf: Shelf) -> None:
    files = _files(shelf.adapter(variant))
    assert merge_plain(_base(shelf, variant, files, "float32"), files) is None


def _edited(shelf: Shelf, tmp_path: Path, edit: Callable[[models.Tensors], None]) -> AdapterFiles:
    directory = tmp_path / "edited"
    shutil.copytree(shelf.adapter("plain"), directory)
    tensors = models.read_tensors(directory)
    edit(tensors)
    models.write_tensors(directory, tensors)
    return _files(directory)


def _first(tensors: models.Tensors) -> str:
    return min(tensors)


EDITS: dict[str, Callable[[models.Tensors], object]] = {
    "a tensor less": lambda tensors: tensors.pop(_first(tensors)),
    "a tensor more": lambda tensors: tensors.__setitem__("base_model.model.stray.weight", torch.ones(2)),
    "another shape": lambda tensors: tensors.__setitem__(_first(tensors), torch.ones(3, 3)),
    "integers": lambda tensors: tensors.__setitem__(_first(tensors), tensors[_first(tensors)].to(torch.int32)),
    "a NaN": lambda tensors: tensors[_first(tensors)].view(-1).__setitem__(-1, math.nan),
    "a -Inf": lambda tensors: tensors[_first(tensors)].view(-1).__setitem__(0, -math.inf),
}


@pytest.mark.parametrize("edit", EDITS)
def test_it_steps_aside_for_a_file_that_is_not_whole_and_finite(edit: str, shelf: Shelf, tmp_path: Path) -> None:
    files = _edited(shelf, tmp_path, EDITS[edit])
    assert merge_plain(_base(shelf, "plain", files, "float32"), files) is None


def test_it_steps_aside_for_a_merge_that_overflows(shelf: Shelf, tmp_path: Path) -> None:
    def grow(tensors: models.Tensors) -> None:
        for tensor in tensors.values():
            tensor.mul_(3e4)

    files = _edited(shelf, tmp_path, grow)
    assert merge_plain(_base(shelf, "plain", files, "float32"), files) is not None
    assert merge_plain(_base(shelf, "plain", files, "float16"), files) is None


def test_one_plan_serves_equal_configs_and_no_others(shelf: Shelf, tmp_path: Path) -> None:
    files = _files(shelf.adapter("plain"))
    base = _base(shelf, "plain", files, "float32")
    first = merge_plain(base, files)
    assert len(base.plans) == 1
    changed = tmp_path / "alpha"
    shutil.copytree(shelf.adapter("plain"), changed)
    models.write_config(changed, models.read_config(changed) | {"lora_alpha": 1})
    second = merge_plain(base, _files(changed))
    assert len(base.plans) == 2
    assert first is not None
    assert second is not None
    assert first.merges[0].delta_norm != pytest.approx(second.merges[0].delta_norm)


def test_a_sum_that_only_rounding_twice_keeps_finite_fails(shelf: Shelf, tmp_path: Path) -> None:
    """12 + 65510 in float16: 65504 with safe_merge, which rounds the delta first, and Inf in PEFT's default merge."""
    files = _edited(shelf, tmp_path, lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    tensors = models.read_tensors(Path(files.directory))
    a = next(name for name in sorted(tensors) if "lora_A" in name)
    b = a.replace("lora_A", "lora_B")
    base = _base(shelf, "plain", files, "float16")
    weight = base.tensors[a.removeprefix("base_model.model.").replace("lora_A.", "")]
    weight[0, 0] = 12.0
    scaling = models.read_config(Path(files.directory))
    tensors[a][0, 0] = 65510.0 * scaling["r"] / scaling["lora_alpha"]
    tensors[b][0, 0] = 1.0
    models.write_tensors(Path(files.directory), tensors)
    assert merge_plain(base, files) is None
    evidence = merge_by_peft(base, files)
    assert [merge.stats.posinf for merge in evidence.merges if not merge.stats.finite] == [1]
