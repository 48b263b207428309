"""`delta-norm` on real merges: weights that are nearly zero in the base, and adapters that exploded."""

import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import SamConfig, SamModel

from merge_gate.engine.adapter_evidence import MergeRequest, merge
from merge_gate.engine.base.loaded_base import MOST_TYPICAL, Base
from merge_gate.engine.base.model_class import model_class_for
from merge_gate.engine.base.skeleton import skeleton_of
from merge_gate.engine.base.stored_spans import stored_bytes
from merge_gate.files.preflight import preflight
from merge_gate.judging.all_checks import judge_merge, measure_options
from merge_gate.records.terms import Finding, Quantization, Severity
from tests.support import methods
from tests.support.engine import architectures
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.fed_bases import CountingFeed, source
from tests.support.engine.merges import runs
from tests.support.gating import SPEC, Gate
from tests.support.models import Shelf, make_adapter, read_tensors, write_tensors
from tests.support.verify.merges import weights_of, write_weights


def loaded(base: Path, adapter: Path, quantization: Quantization = Quantization.NONE) -> Base:
    return Gate().base(base, preflight(str(adapter), allow_pickle=False), dtype="auto", quantization=quantization)


def skeleton(base: Path, adapter: Path) -> Base:
    model_class = model_class_for(str(base), preflight(str(adapter), allow_pickle=False), stored_tensors(base))
    with methods.quiet():
        return skeleton_of(source(base), model_class, stored_tensors(base), CountingFeed(str(base)))


BASES: dict[str, Callable[[Path, Path], Base]] = {
    "loaded": loaded,
    "skeleton": skeleton,
    "bnb-4bit": partial(loaded, quantization=Quantization.BNB_4BIT),
}


def judged(base: Base, adapter: Path) -> Finding | None:
    files = preflight(str(adapter), allow_pickle=False)
    evidence = merge(MergeRequest(base=base, members=(files,), measure_options=measure_options(SPEC), consumers=runs()))
    return next((one for one in judge_merge(SPEC, files, evidence) if one.check == "delta-norm"), None)


def severity(base: Base, adapter: Path) -> Severity | None:
    found = judged(base, adapter)
    return None if found is None else found.severity


def changed(shelf: Shelf, to: Path, *parts: str, factor: float = 1e-9) -> Path:
    """The base with these weights multiplied."""
    shutil.copytree(shelf.base("llama"), to)
    times(to, *parts, factor=factor)
    return to


def times(base: Path, *parts: str, factor: float) -> None:
    write_weights(
        base,
        {name: one * (factor if any(part in name for part in parts) else 1) for name, one in weights_of(base).items()},
    )


def explode(adapter: Path) -> None:
    write_tensors(
        adapter, {name: one * (1e6 if "lora_B" in name else 1) for name, one in read_tensors(adapter).items()}
    )


def reads_of(base: Base, directory: Path) -> dict[str, int]:
    """How often each tensor of a skeleton was read from its files."""
    feed = base.feed._feed
    assert isinstance(feed, CountingFeed)
    stored = {one.name: one for one in stored_tensors(directory)}
    return {name: feed.reads.count(one.span) for name, one in stored_bytes(str(directory), stored).items()}


@pytest.mark.attempt("D02", "a good adapter on a base with a layer that starts at zero", "delta-norm warns")
def test_a_layer_that_starts_at_zero_fails_no_good_adapter(shelf: Shelf, tmp_path: Path) -> None:
    base = changed(shelf, tmp_path / "base", "layers.1.self_attn.q_proj")
    make_adapter(base, tmp_path / "adapter")
    found = judged(loaded(base, tmp_path / "adapter"), tmp_path / "adapter")
    assert found.severity is Severity.WARNING
    assert found.tensor == "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.attempt("D03", "an adapter that exploded by 1e6", "delta-norm fails")
def test_an_adapter_that_exploded_fails(shelf: Shelf, tmp_path: Path) -> None:
    make_adapter(shelf.base("llama"), tmp_path / "adapter")
    explode(tmp_path / "adapter")
    assert severity(loaded(shelf.base("llama"), tmp_path / "adapter"), tmp_path / "adapter") is Severity.ERROR


@pytest.mark.attempt("D05", "a good adapter that changes only weights that are nearly zero", "delta-norm warns")
@pytest.mark.attempt("D06", "an adapter that exploded on weights that are nearly zero", "delta-norm fails")
@pytest.mark.parametrize("kind", BASES)
def test_an_adapter_that_changes_only_nearly_zero_weights(kind: str, shelf: Shelf, tmp_path: Path) -> None:
    base = changed(shelf, tmp_path / "base", "q_proj", "v_proj")
    make_adapter(base, tmp_path / "adapter")
    load = BASES[kind]
    assert severity(load(base, tmp_path / "adapter"), tmp_path / "adapter") is Severity.WARNING
    explode(tmp_path / "adapter")
    found = judged(load(base, tmp_path / "adapter"), tmp_path / "adapter")
    assert found.severity is Severity.ERROR
    assert found.module in {f"model.layers.{number}.self_attn.{name}_proj" for number in (0, 1) for name in "qv"}


@pytest.mark.attempt("D07", "a good adapter on one projection of zeros", "passed")
@pytest.mark.attempt("D08", "an adapter that exploded on one projection of zeros", "delta-norm fails")
@pytest.mark.parametrize("kind", BASES)
def test_an_adapter_of_one_projection_of_zeros(kind: str, shelf: Shelf, tmp_path: Path) -> None:
    base = changed(shelf, tmp_path / "base", "layers.1.self_attn.q_proj", factor=0)
    make_adapter(base, tmp_path / "adapter", target_modules=["model.layers.1.self_attn.q_proj"])
    load = BASES[kind]
    assert severity(load(base, tmp_path / "adapter"), tmp_path / "adapter") is None
    explode(tmp_path / "adapter")
    found = judged(load(base, tmp_path / "adapter"), tmp_path / "adapter")
    assert (found.severity, found.module) == (Severity.ERROR, "model.layers.1.self_attn.q_proj")


@pytest.mark.attempt("D04", "SAM with random weights, half of its mask decoder nearly zero", "delta-norm warns")
def test_a_sam_with_weights_near_zero_passes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sam = architectures.build("sam", tmp_path / "base")
    architectures.save_lora(sam, tmp_path / "base", tmp_path / "adapter")
    times(tmp_path / "base", "mask_decoder.transformer.layers.0", factor=1e-9)
    assert severity(loaded(tmp_path / "base", tmp_path / "adapter"), tmp_path / "adapter") is Severity.WARNING


@pytest.mark.attempt("D09", "LoRA on the vision encoder of a SAM as transformers initializes it", "delta-norm warns")
def test_a_sam_as_transformers_initializes_it_passes(tmp_path: Path) -> None:
    """Every weight of its vision encoder is zero, or 1e-10."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "image_size": 64, "patch_size": 16}
    vision = {**size, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 32, "output_channels": 16}
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    config = SamConfig(
        vision_config={**vision, "global_attn_indexes": [1], "window_size": 2},
        prompt_encoder_config={**size, "mask_input_channels": 4},
        mask_decoder_config=decoder,
    )
    with methods.quiet():
        SamModel(config).save_pretrained(tmp_path / "base")
        model = get_peft_model(
            SamModel.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["qkv"], init_lora_weights=False)
        )
        model.save_pretrained(tmp_path / "adapter")
    found = judged(loaded(tmp_path / "base", tmp_path / "adapter"), tmp_path / "adapter")
    assert found.severity is Severity.WARNING
    assert dict(found.measured)["ratio"] > 1e6


def test_a_typical_weight_is_measured_only_if_a_delta_is_large(shelf: Shelf, tmp_path: Path) -> None:
    """The weights next to it are read again for it, and no more with the next adapter, for which they are known."""
    bases = {"plain": shelf.base("llama"), "changed": changed(shelf, tmp_path / "base", "q_proj", "v_proj")}
    make_adapter(bases["plain"], tmp_path / "adapter")
    reads = {}
    for kind, directory in bases.items():
        base = skeleton(directory, tmp_path / "adapter")
        for time in ("first", "second"):
            before = Counter(reads_of(base, directory))
            assert (severity(base, tmp_path / "adapter") is None) is (kind == "plain")
            reads[kind, time] = Counter(reads_of(base, directory)) - before
    typical = reads["changed", "first"] - reads["plain", "first"]
    assert 0 < len(typical) <= MOST_TYPICAL
    assert set(typical.values()) == {1}
    assert reads["changed", "second"] == reads["plain", "second"]
