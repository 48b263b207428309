"""Scales that AWQ and SmoothQuant have moved into a norm or the layer before are undone, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from merge_gate.features.quantized.checkpoint import Checkpoint
from tests.support.quantized.checkpoints import Tensors, moved, opened, read, requantized
from tests.support.quantized.folded import BLOCK, CONFIG, SETTINGS, base, delta, folded, quantized


def released(
    path: Path, own: Tensors, kind: str, *, strength: float = 1, size: float = 0.1, bits: int = 4, moves: bool = True,
    is_gemma: bool = False,
) -> tuple[Checkpoint, Tensors]:  # fmt: skip
    """A release with so much of an adapter, and the deltas."""
    layers = [name for name, tensor in own.items() if tensor.dim() == 2]
    deltas = {name: delta(kind, name, own[name].float(), size) for name in layers}
    merged = {name: tensor.float() + strength * deltas.get(name, 0) for name, tensor in own.items()}
    stored = folded(merged, is_gemma=is_gemma) if moves else merged
    release = opened(path, quantized(stored, bits), own, SETTINGS, **CONFIG)
    if is_gemma:
        release.folds.of_one_plus = {name for name, tensor in own.items() if "norm" in name}
    release.folds.touched = {name for name, own_delta in deltas.items() if own_delta.any()}
    return release, deltas


def factor(release: Checkpoint, own: Tensors, deltas: Tensors, name: str) -> float:
    """The multiple of the delta that is in the release, with a factor of the weight fitted together."""
    base_values, change = own[name].float().flatten(), deltas[name].flatten()
    moved = read(release, name).flatten() - base_values
    return float(torch.linalg.lstsq(torch.stack((base_values, change), 1), moved[:, None]).solution[1])


@pytest.mark.parametrize("strength", [1, 0])
@pytest.mark.parametrize(("kind", "kv_heads"), [("lora", 8), ("lora", 2), ("ia3", 8), ("ia3", 2)])
def test_the_strength_is_that_of_the_merge(kind: str, kv_heads: int, strength: int, tmp_path: Path) -> None:
    own = base(kv_heads)
    release, deltas = released(tmp_path, own, kind, strength=strength)
    for name in release.folds.touched:
        assert factor(release, own, deltas, name) == pytest.approx(strength, abs=0.06), name


@pytest.mark.parametrize(("name", "noise"), [("awq", 0.12), ("smoothquant", 0.03)])
def test_a_release_of_llm_compressor_is_near_its_base(name: str, noise: float, tmp_path: Path) -> None:
    stored, own, settings = moved(name)
    release = opened(tmp_path, stored, own, settings, hidden_size=64, num_attention_heads=4)
    norms = [key for key in own if "layernorm" in key]
    assert norms
    assert not any(torch.equal(stored[key], own[key]) for key in norms)
    for key, tensor in own.items():
        distance = float((read(release, key) - tensor.float()).norm() / tensor.float().norm())
        assert distance < (noise if "proj" in key else 1e-6), key


@pytest.mark.parametrize("is_gemma", [False, True])
def test_the_rest_of_the_model_is_the_base(is_gemma: bool, tmp_path: Path) -> None:
    own = base()
    release, _ = released(tmp_path, own, "ia3", size=0.02, bits=8, is_gemma=is_gemma)
    for name in own.keys() - release.folds.touched:
        distance = (read(release, name) - own[name].float()).norm() / own[name].float().norm()
        assert float(distance) < 0.02, name


def test_nothing_is_undone_without_a_changed_norm(tmp_path: Path) -> None:
    own = base()
    release, _ = released(tmp_path, own, "ia3", moves=False)
    for name in own:
        rows, columns = release.folds.factors(name) if own[name].dim() == 2 else (torch.ones(1), torch.ones(1))
        assert rows.eq(1).all(), name
        assert columns.eq(1).all(), name


def test_a_trained_norm_is_kept(tmp_path: Path) -> None:
    own, norm = base(), f"{BLOCK}input_layernorm.weight"
    trained = {**own, norm: own[norm] * (1 + 0.1 * torch.randn(128, generator=torch.Generator().manual_seed(2)))}
    release = opened(tmp_path, quantized({name: t.float() for name, t in trained.items()}, 4), own, SETTINGS, **CONFIG)
    assert torch.equal(read(release, norm), trained[norm].bfloat16().float())


def test_the_scales_of_a_norm_stay_if_a_layer_lacks_them(tmp_path: Path) -> None:
    own, key = base(), f"{BLOCK}self_attn.k_proj.weight"
    moved_scales = folded({name: tensor.float() for name, tensor in own.items()})
    release = opened(tmp_path, quantized(moved_scales | {key: own[key].float()}, 4), own, SETTINGS, **CONFIG)
    for norm, is_undone in (("input_layernorm", False), ("post_attention_layernorm", True)):
        name = f"{BLOCK}{norm}.weight"
        assert torch.equal(read(release, name), own[name].float()) is is_undone, norm


def test_other_values_are_quantized_with_the_scales(tmp_path: Path) -> None:
    own = base()
    release, deltas = released(tmp_path, own, "lora")
    for name, change in deltas.items():
        merged = own[name].float() + change
        again = requantized(release, name, merged)
        assert again is not None
        assert float((again - read(release, name)).norm()) < 0.6 * float((again - merged).norm()), name
