"""`combine`: PEFT's add_weighted_adapter on real adapters, held against what plain PEFT makes of the same members."""

import copy
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, LoraGAConfig
from torch import Tensor

from merge_gate.files.preflight import preflight
from merge_gate.records.config import Combine
from merge_gate.records.terms import Verdict
from tests.support import faults_methods, methods, models
from tests.support.engine.merges import merge_combination
from tests.support.gating import Bench, Judgement
from tests.support.merged import kept

BASE = "llama-bias"
WEIGHTS = (0.6, 0.4)
PRUNING = (
    "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd", "magnitude_prune",
    "magnitude_prune_svd",
)  # fmt: skip
METHODS = ("linear", "cat", "svd", *PRUNING)
"""Only `cat` gives W + Σ weight · delta; the others approximate it by design."""
RANDOM = tuple(method for method in METHODS if method.startswith("dare"))


def make_members(bench: Bench, name: str, **kwargs: Any) -> tuple[Path, Path]:
    """Two adapters with one config and other tensors."""
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"]} | kwargs
    case = methods.make_case(f"combine-{name}", BASE, "LoraConfig", **settings)
    one = bench.adapter(case)
    state = faults_methods.load_file(one / methods.WEIGHTS)
    other = bench.root / "adapters" / f"combine-{name}-other"
    if not other.exists():
        methods.write_variant(one, other, {key: tensor.flip(*range(tensor.ndim)) for key, tensor in state.items()})
    return one, other


def make_combine(method: str, **changes: Any) -> Combine:
    settings: dict[str, Any] = {"method": method, "adapters": ("one", "two"), "weights": WEIGHTS}
    if method in PRUNING:
        settings["density"] = 0.5
    return Combine(**settings | changes)


def combine_with_peft(
    bench: Bench,
    members: tuple[Path, ...],
    method: str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    safe: bool = True,
    weights: tuple[float, ...] = WEIGHTS,
    rows: int | None = None,
) -> dict[str, Tensor]:
    """What a user gets, who enlarges the vocabulary to `rows` before loading."""
    names = [f"member_{position}" for position in range(len(members))]
    with methods.quiet():
        torch.manual_seed(0)
        base: Any = copy.deepcopy(bench.base(BASE, dtype))
        if rows is not None:
            base.resize_token_embeddings(rows, mean_resizing=False)
        model = PeftModel.from_pretrained(base, members[0], adapter_name=names[0])
        for name, member in zip(names[1:], members[1:], strict=True):
            model.load_adapter(str(member), name)
        torch.manual_seed(seed)
        density = 0.5 if method in PRUNING else None
        model.add_weighted_adapter(names, list(weights), "mix", combination_type=method, density=density)
        model.set_adapter("mix")
        return methods.values(model.merge_and_unload(safe_merge=safe))


def gate(bench: Bench, members: tuple[Path, ...], combine: Combine, dtype: str = "float32") -> Judgement:
    return bench.gate.combine(members, bench.base_directory(BASE, dtype), combine)


def weighted_sum(bench: Bench, members: tuple[Path, ...]) -> dict[str, Tensor]:
    """W + Σ weight · delta: what a user of a weighted combination asks for."""
    base = bench.base(BASE, "float32")
    plain = methods.values(base)
    merged = [methods.merge(base, member) for member in members]
    return {
        name: tensor + sum(weight * (one[name] - tensor) for weight, one in zip(WEIGHTS, merged, strict=True))
        for name, tensor in plain.items()
    }


def error_of(bench: Bench, members: tuple[Path, ...], method: str) -> float:
    """Largest difference from the weighted sum, over all tensors, as a share of the largest change."""
    plain, wanted = methods.values(bench.base(BASE, "float32")), weighted_sum(bench, members)
    got = combine_with_peft(bench, members, method)
    change = max((wanted[name] - plain[name]).abs().max().item() for name in plain)
    return max((got[name] - wanted[name]).abs().max().item() for name in plain) / change


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("method", METHODS)
def test_the_combination_has_pefts_bits(method: str, dtype: str, bench: Bench) -> None:
    members = make_members(bench, "plain")
    expected = combine_with_peft(bench, members, method, seed=5, dtype=dtype)
    files = tuple(preflight(str(member), allow_pickle=False) for member in members)
    with kept() as seen:
        evidence = merge_combination(
            bench.gate.base(bench.base_directory(BASE, dtype), files[0], dtype="auto"),
            files,
            make_combine(method, seed=5),
        )
    changed = {one.stats.name for one in evidence.merges if one.changed}
    assert changed == {f"model.layers.0.self_attn.{leaf}.weight" for leaf in ("q_proj", "v_proj")}
    assert methods.same({name: expected[name] for name in seen}, seen)


@pytest.mark.parametrize("method", METHODS)
def test_good_members_pass(method: str, bench: Bench) -> None:
    judgement = gate(bench, make_members(bench, "plain"), make_combine(method))
    assert judgement.verdict is Verdict.PASSED, judgement


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("value", faults_methods.VALUES)
@pytest.mark.parametrize("method", ["linear", "cat", "ties"])
def test_a_broken_member_fails_and_is_named(method, value, position, bench, tmp_path) -> None:
    members = list(make_members(bench, "plain"))
    state = faults_methods.load_file(members[position] / methods.WEIGHTS)
    tensor = faults_methods.floating(state)[-1]
    broken = faults_methods.put(state, tensor, value, "first")
    members[position] = methods.write_variant(members[position], tmp_path / "broken", broken)
    judgement = gate(bench, tuple(members), make_combine(method))
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "adapter-nonfinite"), judgement
    assert judgement.findings[0].tensor == tensor


@pytest.mark.parametrize("method", ["linear", "cat", "svd", "ties"])
def test_a_combination_that_overflows_fails(method: str, bench: Bench, tmp_path: Path) -> None:
    members = list(make_members(bench, "plain"))
    state = faults_methods.load_file(members[0] / methods.WEIGHTS)
    for tensor in faults_methods.floating(state):
        state = faults_methods.scale(state, tensor, 4)
    members[0] = methods.write_variant(members[0], tmp_path / "large", state)
    merged = combine_with_peft(bench, tuple(members), method, dtype="float16", safe=False)
    assert methods.nonfinite(merged), "the members are not large enough for this test"
    judgement = gate(bench, tuple(members), make_combine(method), dtype="float16")
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "merged-nonfinite"), judgement


@pytest.mark.parametrize("method", RANDOM)
def test_random_methods_repeat_by_seed_and_the_seed_is_recorded(method: str, bench: Bench) -> None:
    members = make_members(bench, "plain")
    one, again, other = (gate(bench, members, make_combine(method, seed=seed)).evidence for seed in (3, 3, 4))
    assert other is not None
    assert one.merges == again.merges
    assert one.merges != other.merges
    assert one.seed == 3


PLAIN: dict[str, Any] = {}
LORA_GA = {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
BLOCKS = BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2)
SUMMED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": (PLAIN, PLAIN),
    **{name: ({"init_lora_weights": name},) * 2 for name in ("gaussian", "orthogonal", "mica")},
    "lora_ga": (LORA_GA, LORA_GA),
    "of another rank": (PLAIN, {"r": 3}),
    "on fewer layers than the first": (PLAIN, {"layers_to_transform": [0]}),
    "on other layers than the first": (PLAIN, {"target_modules": ["o_proj"]}),
}
"""Both configs of members of which `cat` makes the weighted sum; the second combines as the first config says."""

WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    **{
        name: (settings, settings, "")
        for name, settings in {
            "rslora": {"use_rslora": True, "lora_alpha": 4},
            "bias-term": {"lora_bias": True},
            "dora": {"use_dora": True},
            "kasa": {"kasa_config": KasaConfig()},
            "blocks": {"use_bdlora": BLOCKS},
            "tokens": {"trainable_token_indices": [1, 5]},
            "pissa": {"init_lora_weights": "pissa"},
            "olora": {"init_lora_weights": "olora"},
        }.items()
    },
    "outside of the first one's layers": ({"layers_to_transform": [0]}, {"target_modules": ["lm_head"]}, "lm_head"),
    "excluded by the first": ({"exclude_modules": ["v_proj"]}, PLAIN, "layers.0.self_attn.v_proj"),
    "head of the first": ({"modules_to_save": ["lm_head"]}, PLAIN, "lm_head"),
    "head of the second": (PLAIN, {"modules_to_save": ["lm_head"]}, "lm_head"),
    "biases of the second": (PLAIN, {"bias": "all"}, "bias"),
}
"""Members that add_weighted_adapter combines into something else than the weighted sum: both configs, and where."""


def make_unlike(bench: Bench, *settings: dict[str, Any]) -> tuple[Path, Path]:
    first, second = (make_members(bench, f"{zlib.crc32(str(one).encode())}", **one) for one in settings)
    return first[0], second[1]


@pytest.mark.parametrize("name", SUMMED)
def test_cat_gives_the_weighted_sum(name: str, bench: Bench) -> None:
    """Plain PEFT, and the yardstick of the test after this one."""
    members = make_unlike(bench, *SUMMED[name])
    assert error_of(bench, members, "cat") < 1e-4
    for method in ("cat", "svd", "ties_svd") if "rank" in name else ("cat",):
        judgement = gate(bench, members, make_combine(method))
        assert judgement.verdict is Verdict.PASSED, judgement


@pytest.mark.parametrize("name", WRONG)
def test_what_peft_combines_wrongly_is_refused(name: str, bench: Bench) -> None:
    *settings, place = WRONG[name]
    members = make_unlike(bench, *settings)
    assert error_of(bench, members, "cat") > 1e-2, "PEFT combines this rightly now: the rule can go"
    judgement = gate(bench, members, make_combine("cat"))
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "not-mergeable"), judgement
    assert place in judgement.findings[0].message


@pytest.mark.parametrize(("weight", "verdict"), [(1.0, Verdict.PASSED), (0.5, Verdict.FAILED)])
def test_biases_of_one_member_need_the_weight_one(weight: float, verdict: Verdict, bench: Bench) -> None:
    """As they are written whole, that is their weighted sum."""
    members = make_unlike(bench, PLAIN, {"bias": "all"})
    judgement = gate(bench, members, make_combine("cat", weights=(0.5, weight)))
    assert judgement.verdict is verdict, judgement


def test_a_tensor_of_a_member_that_does_not_fit_has_its_own_name(bench: Bench, tmp_path: Path) -> None:
    one, other = make_members(bench, "plain")
    state = faults_methods.load_file(other / methods.WEIGHTS)
    name = next(key for key in state if "lora_B" in key)
    methods.write_variant(other, tmp_path / "short", state | {name: state[name][:-1].clone()})
    judgement = gate(bench, (one, tmp_path / "short"), make_combine("cat"))
    assert judgement.cause == "shape-mismatch", judgement
    assert judgement.findings[0].tensor == name


OPPOSITE = (1.0, -1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
def test_members_that_cancel_each_other_have_no_effect(method: str, dtype: str, bench: Bench) -> None:
    """PEFT's product of the factors is not zero in float32: its rounding is no effect."""
    one, _ = make_members(bench, "plain")
    judgement = gate(bench, (one, one), make_combine(method, weights=OPPOSITE), dtype)
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "no-effect"), judgement


def test_members_that_nearly_cancel_each_other_pass(bench: Bench) -> None:
    one, _ = make_members(bench, "plain")
    judgement = gate(bench, (one, one), make_combine("cat", weights=(1.0, -0.999999)))
    assert judgement.verdict is Verdict.PASSED, judgement


def test_kernels_that_cancel_each_other_have_no_effect(bench: Bench) -> None:
    case = methods.make_case("combine-kernels", "convnext", "LoraConfig", r=2, target_modules=["patch_embeddings"])
    adapter = bench.adapter(case)
    judgement = bench.gate.combine(
        (adapter, adapter), bench.base_directory(case.base, "float32"), make_combine("cat", weights=OPPOSITE)
    )
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "no-effect"), judgement


# --- vocabularies that were enlarged -------------------------------------------------------------------------------

EMBEDDING = "base_model.model.model.embed_tokens.weight"


def enlarged(bench: Bench, name: str, change: Callable[[Tensor], Tensor] | None = None) -> Path:
    """An adapter that brings embeddings of 30 rows, of which the base has 24; `change` is made to them."""
    out = bench.root / "adapters" / f"combine-{name}"
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(7)  # of the rows that are added
    models.save_adapter(bench.base_directory(BASE, "float32"), out, config, seed=len(name), rows=30)
    if change is not None:
        tensors = models.read_tensors(out)
        models.write_tensors(out, tensors | {EMBEDDING: change(tensors[EMBEDDING])})
    return out


def in_row(row: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_add(0, torch.tensor([row]), torch.ones(1, tensor.shape[1]))


@pytest.mark.parametrize(
    ("first", "second", "weights", "passes"),
    [
        pytest.param(("one", None), ("other", None), WEIGHTS, True, id="the same rows"),
        pytest.param(None, ("one", None), WEIGHTS, True, id="rows of the second"),
        pytest.param(("one", None), None, WEIGHTS, True, id="rows of the first"),
        pytest.param(("one", None), ("new", in_row(29)), WEIGHTS, False, id="other rows of the second"),
        pytest.param(None, ("old", in_row(3)), WEIGHTS, False, id="a row of the base"),
        pytest.param(None, ("old", in_row(3)), (0.6, 1.0), True, id="a row of the base, with the weight 1"),
    ],
)
def test_an_enlarged_vocabulary_is_combined_without_weights(first, second, weights, passes, bench) -> None:
    plain = make_members(bench, "plain")
    members = tuple(
        plain[place] if made is None else enlarged(bench, *made) for place, made in enumerate((first, second))
    )
    with kept() as seen:
        judgement = gate(bench, members, make_combine("cat", weights=weights))
    if not passes:
        assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "not-mergeable"), judgement
        return
    assert judgement.verdict is Verdict.PASSED, judgement
    assert seen["model.embed_tokens.weight"].shape[0] == 30
    expected = combine_with_peft(bench, members, "cat", weights=weights, rows=30)
    assert methods.same({name: expected[name] for name in seen}, seen)


def test_vocabularies_of_two_sizes_are_refused(bench: Bench) -> None:
    one = enlarged(bench, "one")
    other = enlarged(bench, "shorter", lambda tensor: tensor[:26])
    judgement = gate(bench, (one, other), make_combine("cat"))
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "shape-mismatch"), judgement


RANK_3, SAVED = (PLAIN, {"r": 3}), {"modules_to_save": ["lm_head"]}
PARAMETER = {"target_modules": [], "target_parameters": ["q_proj.weight"]}


@pytest.mark.parametrize(
    ("settings", "method", "match"),
    [
        (RANK_3, "linear", "same r"),
        (RANK_3, "ties", "same r"),
        (RANK_3, "magnitude_prune", "same r"),
        ((SAVED, SAVED), "cat", "modules_to_save"),
        (({"bias": "lora_only"},) * 2, "cat", "bias"),
        ((PARAMETER, PARAMETER), "cat", "nn.Parameter"),
    ],
)
def test_what_peft_refuses_to_combine_is_refused(settings, method, match, bench) -> None:
    members = make_unlike(bench, *settings)
    with pytest.raises(ValueError, match=match):
        combine_with_peft(bench, members, method)
    judgement = gate(bench, members, make_combine(method))
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "not-mergeable"), judgement
    assert match in judgement.findings[0].message
