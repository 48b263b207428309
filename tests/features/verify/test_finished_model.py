"""The comparison of tensors: the same facts for a base that is read in a pass, and figures that are true."""

import math
from pathlib import Path

import pytest
import torch

from merge_gate.engine.adapter_evidence import MergeRequest, merge
from merge_gate.engine.base.accounting import account_for
from merge_gate.engine.base.loaded_base import Source
from merge_gate.engine.base.model_class import model_class_for
from merge_gate.engine.base.skeleton import skeleton_of
from merge_gate.features.verify import finished_model
from merge_gate.features.verify.comparison import Comparison
from merge_gate.features.verify.exact_merge import deviation, requantized, units
from merge_gate.files.base_files import read_base
from merge_gate.files.feed import LocalFeed
from merge_gate.files.preflight import preflight
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.local_bases import load_base
from tests.support.verify.merges import RIGHT, WRONG, Scene

RECIPES = {recipe.name: recipe for recipe in (*RIGHT, *WRONG)}


def compared(merged: Path, base: Path, adapter: Path, *, in_a_pass: bool) -> Comparison:
    files, own, theirs = (
        preflight(str(adapter), allow_pickle=False),
        read_base(str(merged), name="m"),
        read_base(str(base), name="b"),
    )
    model_class = model_class_for(str(base), files, stored_tensors(base))
    account = account_for(str(base), model_class, "b", stored_tensors(base))
    with LocalFeed(str(base)) as base_feed, LocalFeed(str(merged)) as feed:
        source = Source(directory=str(base), label="b")
        loaded = (
            skeleton_of(source, model_class, theirs.tensors, base_feed)
            if in_a_pass
            else load_base(str(base), model_class=model_class, label="b")
        )
        of_base = finished_model.Files(directory=str(base), stored=theirs.tensors, feed=base_feed)
        of_merge = finished_model.Files(directory=str(merged), stored=own.tensors, feed=feed)
        finished = finished_model.load_merged(of_merge, "m", model_class, loaded, of_base)
        consumer = finished_model.ComparisonConsumer(loaded, finished, of_merge, of_base, account.map)
        evidence = merge(MergeRequest(base=loaded, members=(files,), consumers=(consumer,)))
        comparison = dict(evidence.facts)["verify"]
        assert isinstance(comparison, Comparison)
        assert evidence.refusal is None
        assert finished.lazy.kept_bytes() == 0
    return comparison


@pytest.mark.parametrize(
    "name", ["PEFT without safe_merge", "one layer only", "all files", "a head of zeros", "factors in bfloat16"]
)
def test_a_base_that_is_read_in_a_pass_gives_the_same_facts(name: str, scene: Scene, tmp_path: Path) -> None:
    recipe, out = RECIPES[name], tmp_path / "merged"
    recipe.make(scene, out)
    base, adapter = recipe.base_of(scene), recipe.adapter_of(scene)
    found = [compared(out, base, adapter, in_a_pass=in_a_pass) for in_a_pass in (True, False)]
    assert found[0] == found[1]
    assert found[0].compared > len(found[0].tensors)


def test_a_unit_is_the_distance_to_the_next_number() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        values = torch.tensor([1.0, 1.5, 3.25, 0.1, 100.0]).to(dtype)
        wide = torch.float64 if dtype is torch.float32 else torch.float32
        upper = torch.nextafter(values, torch.full_like(values, torch.inf))
        assert torch.equal(units(values.to(wide), dtype), (upper.to(wide) - values.to(wide)))


def test_figures_of_a_scaled_delta() -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(64, 64, generator=generator)
    delta = torch.randn(64, 64, generator=generator) * 0.01
    found = deviation(base + 3 * delta, base + delta, base)
    assert found.cross / found.delta_sq == pytest.approx(3, rel=1e-4)
    assert found.actual_sq == pytest.approx(9 * found.delta_sq, rel=1e-4)
    assert found.nonfinite == 0


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    base, actual = torch.ones(8), torch.ones(8)
    actual[2], actual[3] = torch.nan, -torch.inf
    found = deviation(actual, base + 1, base)
    assert found.nonfinite == 2
    assert found.delta_sq == 6
    assert math.isfinite(found.units)
    assert math.isinf(deviation(base + 1, actual, base).units), "no rounding makes a NaN of the merge finite"


def test_each_quantization_of_a_base_explains_itself() -> None:
    from bitsandbytes import functional  # noqa: PLC0415 - slow to import

    base = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    for kind in ("nf4", "fp4"):
        packed, state = functional.quantize_4bit(base, blocksize=64, quant_type=kind)
        found = requantized(functional.dequantize_4bit(packed, state) + 0.001, base + 0.001, base)
        assert found[0] == f"bnb-4bit {kind}"
        assert found[1] > 0.99
    assert requantized(base + torch.randn(64, 128) * 0.1, base, base) is None
