"""The fast way gives what PEFT's own merge gives, and steps aside for everything that is not plain."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from merge_gate.engine.base import Base, load_base
from merge_gate.engine.measure import measure
from merge_gate.engine.merge import merge_adapter, merge_by_peft
from merge_gate.engine.plain import merge_plain
from merge_gate.engine.shape import shape_for
from merge_gate.errors import EngineError
from merge_gate.records import Thresholds
from merge_gate.sources.preflight import preflight
from tests import models

if TYPE_CHECKING:
    from collections.abc import Callable

    from merge_gate.records import AdapterFiles, Evidence
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
    "tall",
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


def _edited(
    shelf: Shelf, tmp_path: Path, edit: Callable[[models.Tensors], object], *, variant: str = "plain"
) -> AdapterFiles:
    directory = tmp_path / "edited"
    shutil.copytree(shelf.adapter(variant), directory)
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


# --- a bound and a sample instead of the whole ------------------------------------------------------------------------

USUAL = Thresholds(headroom=0.5, delta_norm=10.0, rounding_loss=1e-9)


@pytest.mark.parametrize("way", [merge_plain, merge_by_peft])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bound_and_a_sample_tell_what_the_whole_merge_tells(
    dtype: str, way: Callable[..., Evidence | None], shelf: Shelf
) -> None:
    files = _files(shelf.adapter("tall"))
    base = _base(shelf, "tall", files, dtype)
    quick, whole = way(base, files, thresholds=USUAL), merge_plain(base, files)
    assert quick is not None
    assert whole is not None
    assert whole.parameters_bounded == 0
    assert 0 < quick.parameters_bounded < quick.parameters_checked == whole.parameters_checked
    assert quick.parameters_bounded == sum(merge.bounded for merge in quick.merges)
    for one, other in zip(quick.merges, whole.merges, strict=True):
        assert (one.module, one.changed, one.stats.finite) == (other.module, other.changed, other.stats.finite)
        assert one.stats.minimum <= other.stats.minimum <= other.stats.maximum <= one.stats.maximum
        assert one.stats.maximum == -one.stats.minimum if one.bounded else one.stats == other.stats
        assert one.delta_norm == other.delta_norm
        assert one.base_norm is None
        assert (one.lost_norm or 0.0) == pytest.approx(other.lost_norm or 0.0, rel=0.1, abs=1e-7)
        assert one.unchanged_fraction == pytest.approx(other.unchanged_fraction, abs=0.02)


def test_what_may_be_above_a_threshold_is_measured(shelf: Shelf) -> None:
    files = _files(shelf.adapter("tall"))
    base = _base(shelf, "tall", files, "float16")
    whole = merge_plain(base, files)
    small = merge_plain(base, files, thresholds=replace(USUAL, headroom=1e-9, rounding_loss=0.0))
    low = merge_plain(base, files, thresholds=replace(USUAL, delta_norm=1e-9))
    assert whole is not None
    assert small is not None
    assert low is not None
    assert small.merges == whole.merges
    assert low.parameters_bounded > 0
    assert [merge.base_norm for merge in low.merges] == [merge.base_norm for merge in whole.merges]


def test_all_can_be_merged_and_the_loss_estimated(shelf: Shelf) -> None:
    files = _files(shelf.adapter("tall"))
    base = _base(shelf, "tall", files, "bfloat16")
    whole, found = merge_plain(base, files), merge_plain(base, files, thresholds=Thresholds(rounding_loss=0.5))
    assert whole is not None
    assert found is not None
    assert found.parameters_bounded == 0
    assert {merge.estimated for merge in whole.merges} == {False}
    assert {merge.estimated for merge in found.merges} == {True, False}
    for one, other in zip(found.merges, whole.merges, strict=True):
        assert one.stats == other.stats
        assert one.lost_norm == pytest.approx(other.lost_norm, rel=0.1 if one.estimated else 1e-9)


def test_a_change_that_the_sample_misses_is_found(shelf: Shelf, tmp_path: Path) -> None:
    """One row of hundreds changes, and it is none of those that are merged first."""

    def one_row(tensors: models.Tensors) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                kept = tensor[1].clone() + 1.0
                tensor.zero_()[1] = kept

    files = _edited(shelf, tmp_path, one_row, variant="tall")
    base = _base(shelf, "tall", files, "bfloat16")
    found = merge_plain(base, files, thresholds=USUAL)
    assert found is not None
    assert all(merge.changed for merge in found.merges)
    assert found.parameters_bounded == 0


@pytest.mark.parametrize("rest", [0.0, 1e-4])
def test_a_sample_that_does_not_speak_for_the_rest_is_not_used(rest: float, shelf: Shelf, tmp_path: Path) -> None:
    """A few rows were trained, as of a head on a few tokens; what rounding takes of the others says nothing of them."""

    def few_rows(tensors: models.Tensors) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                kept = tensor[1:3].clone()
                tensor.mul_(rest)[1:3] = kept + 1.0

    files = _edited(shelf, tmp_path, few_rows, variant="tall")
    base = _base(shelf, "tall", files, "bfloat16")
    quick, whole = merge_plain(base, files, thresholds=USUAL), merge_plain(base, files)
    assert quick is not None
    assert whole is not None
    assert quick.parameters_bounded == 0
    assert quick.lost_share == pytest.approx(whole.lost_share)


def test_an_estimate_close_to_its_limit_is_measured(shelf: Shelf) -> None:
    files = _files(shelf.adapter("tall"))
    base = _base(shelf, "tall", files, "bfloat16")
    whole = merge_adapter(base, files)
    assert whole.lost_share is not None
    for limit, estimated in ((whole.lost_share, False), (whole.lost_share * 2, True), (whole.lost_share / 2, True)):
        found = merge_adapter(base, files, thresholds=replace(USUAL, rounding_loss=limit))
        assert (found.parameters_bounded > 0) == estimated
        assert found.lost_share == pytest.approx(whole.lost_share, rel=0.1 if estimated else 1e-9)


def test_a_value_above_its_bound_is_an_error_of_the_gate(shelf: Shelf) -> None:
    """As where somebody writes to the base while it is in use."""
    files = _files(shelf.adapter("tall"))
    base = _base(shelf, "tall", files, "bfloat16")
    for tensor in base.tensors.values():
        tensor.mul_(1e6)
    with pytest.raises(EngineError, match="above its bound"):
        merge_plain(base, files, thresholds=USUAL)


def test_a_weight_of_the_base_that_is_not_finite_is_never_bounded(shelf: Shelf) -> None:
    files = _files(shelf.adapter("tall"))
    base = _base(shelf, "tall", files, "bfloat16")
    name = merge_plain(base, files).merges[0].stats.name  # type: ignore[union-attr]
    base.tensors[name][1, 1] = math.nan
    base.stats[name] = measure(base.tensors[name], name)
    assert merge_plain(base, files, thresholds=USUAL) is None
    broken = next(merge for merge in merge_adapter(base, files, thresholds=USUAL).merges if merge.stats.name == name)
    assert broken.stats.nan == 1


@pytest.mark.parametrize("overflow", [True, False])
def test_float16_at_its_limit_is_merged_one_by_one(overflow: bool, shelf: Shelf, tmp_path: Path) -> None:
    """An overflow of one element that no sample sees, and its like below the limit."""
    size = 70000.0 if overflow else 60000.0

    def one_value(tensors: models.Tensors) -> None:
        for tensor in tensors.values():
            tensor.mul_(1e-3)
        name = min(name for name in tensors if "lora_A" in name)
        scaling = models.read_config(shelf.adapter("tall"))
        tensors[name][0, 3] = size * scaling["r"] / scaling["lora_alpha"]
        tensors[name.replace("lora_A", "lora_B")][1, 0] = 1.0

    files = _edited(shelf, tmp_path, one_value, variant="tall")
    base = _base(shelf, "tall", files, "float16")
    evidence = merge_adapter(base, files, thresholds=USUAL)
    infinite = [merge for merge in evidence.merges if not merge.stats.finite]
    assert [merge.stats.posinf for merge in infinite] == ([1] if overflow else [])
    largest = max(evidence.merges, key=lambda merge: merge.stats.max_abs)
    assert largest.bounded == 0
    assert overflow or largest.stats.max_abs == pytest.approx(size, rel=1e-3)
