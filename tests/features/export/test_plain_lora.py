"""A plain LoRA merges as its adapter does, by PEFT itself, whatever ranks, scales, patterns, and dtypes it had."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from merge_gate._internal.errors import NoPlainLoraError
from merge_gate._internal.tensor_names import ADAPTER_PREFIX, module_of
from merge_gate.features.export.export_flow import write_adapter
from merge_gate.features.export.plain_lora import LEAST_RANK, PlainLora, array_of, plain_lora, refuse, repaired_names
from merge_gate.files.headers import open_regular, parse_places
from merge_gate.files.preflight import preflight
from merge_gate.records.files import StoredTensor
from merge_gate.records.measured import ServedClass
from merge_gate.records.terms import Verdict
from tests.support import methods
from tests.support.gating import Gate
from tests.support.models import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ALL_LINEAR,
    Shelf,
    Tensors,
    make_adapter,
    read_config,
    read_tensors,
    write_tensors,
)
from tests.support.properties import examples
from tests.support.wording import Wording

GATE = Gate()


def plain(base: Path, adapter: Path, out: Path, *, fill: bool = True) -> PlainLora:
    """The plain LoRA of an adapter that the gate passes, also written to `out`."""
    files = preflight(str(adapter), allow_pickle=False)
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    refuse(config, files.tensors)
    judgement = GATE.judge(adapter, base, is_export=True)
    assert judgement.verdict is Verdict.PASSED and judgement.evidence is not None, judgement  # noqa: PT018 - narrows
    served = judgement.evidence.served
    assert served is not None
    with open_regular(str(adapter / ADAPTER_WEIGHTS)) as file:
        read = [(one, file.seek(begin), file.read(end - begin)) for one, begin, end in parse_places(file)]
    made = plain_lora(
        config, {one.name: array_of(one.dtype, one.shape, data) for one, _, data in read}, served, fill=fill
    )
    write_adapter(out, made.config, made.tensors)
    return made


def merged(base: Path, adapter: Path, dtype: torch.dtype) -> Tensors:
    """PEFT's own merge."""
    with methods.quiet():
        return dict(loaded(base, adapter, dtype).merge_and_unload(safe_merge=True).state_dict())


def loaded(base: Path, adapter: Path, dtype: torch.dtype) -> PeftModel:
    with methods.quiet():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)


def exact(base: Path, adapter: Path) -> Tensors:
    """The adapted weights in float64."""
    layers = {name: one for name, one in loaded(base, adapter, torch.float32).named_modules() if hasattr(one, "lora_A")}
    return {
        f"{name.removeprefix(ADAPTER_PREFIX)}.weight": one.base_layer.weight.detach().double()
        + one.lora_B["default"].weight.double() @ one.lora_A["default"].weight.double() * one.scaling["default"]
        for name, one in layers.items()
    }


def same(base: Path, adapter: Path, out: Path, dtype: torch.dtype) -> bool:
    """Whether the merges have the same bits."""
    before, after = merged(base, adapter, dtype), merged(base, out, dtype)
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def make(shelf: Shelf, place: Path, *, base: str = "llama", **lora: Any) -> tuple[Path, Path]:
    adapter = place / "adapter"
    make_adapter(shelf.base(base), adapter, **lora)
    return shelf.base(base), adapter


POWERS_OF_TWO = {
    "plain": {},
    "r20": {"r": 20, "lora_alpha": 40},
    "alpha13": {"r": 8, "lora_alpha": 13},
    "rslora": {"use_rslora": True, "r": 16, "lora_alpha": 8},
    "alpha-pattern": {"alpha_pattern": {"v_proj": 32}},
    "alpha-regex": {"alpha_pattern": {r".*layers\.1\.self_attn\.q_proj": 1}},
    "rank-pattern": {"rank_pattern": {"v_proj": 16}},
    "rank-layer": {"rank_pattern": {r"model\.layers\.0\.self_attn\.q_proj": 2}},
    "r128": {"r": 128, "lora_alpha": 64},
    "layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "exclude": {"target_modules": ALL_LINEAR, "exclude_modules": ["down_proj", "k_proj"]},
    "regex": {"target_modules": r"model\.layers\.1\..*\.(q_proj|up_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "lm-head": {"target_modules": ["lm_head", "q_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("kind", POWERS_OF_TWO)
def test_scales_that_are_powers_of_two_give_the_same_bits(kind: str, shelf: Shelf, tmp_path: Path) -> None:
    """So do single scales that `lora_alpha / r` expresses."""
    base, adapter = make(shelf, tmp_path, **POWERS_OF_TWO[kind])
    made = plain(base, adapter, tmp_path / "out")
    assert made.config["r"] >= LEAST_RANK and made.config["r"].bit_count() == 1  # noqa: PT018 - one fact
    for dtype in (torch.float32, torch.bfloat16):
        assert same(base, adapter, tmp_path / "out", dtype)


@pytest.mark.parametrize("base", ["llama-tied", "gpt2"])
def test_other_bases_get_the_same_bits(base: str, shelf: Shelf, tmp_path: Path) -> None:
    targets = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True} if base == "gpt2" else {}
    directory, adapter = make(shelf, tmp_path, base=base, alpha_pattern={"layers.1.*|h.1.*": 32}, **targets)
    plain(directory, adapter, tmp_path / "out")
    assert same(directory, adapter, tmp_path / "out", torch.bfloat16)


@settings(max_examples=examples(8), phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_any_scale_differs_by_rounding_only(
    data: st.DataObject, shelf: Shelf, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its merge is as near to the exact one as that of the adapter. The export of an export has the same bytes."""
    place = tmp_path_factory.mktemp("any")
    ranks, alphas = st.integers(1, 40), st.one_of(st.integers(1, 64), st.sampled_from([0.5, 13.5, 7.3]))
    patterns = st.sampled_from(["v_proj", "q_proj", r".*layers\.1.*", "down_proj"])
    lora = {
        "r": data.draw(ranks),
        "lora_alpha": data.draw(alphas),
        "use_rslora": data.draw(st.booleans()),
        "rank_pattern": data.draw(st.dictionaries(st.sampled_from(["v_proj", "down_proj"]), ranks)),
        "alpha_pattern": data.draw(st.dictionaries(patterns, alphas, max_size=2)),
        "target_modules": data.draw(st.sampled_from([["q_proj"], ["q_proj", "v_proj"], ALL_LINEAR])),
    }
    base, adapter = make(shelf, place, **lora)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    save_file({name: one.to(dtype) for name, one in read_tensors(adapter).items()}, adapter / ADAPTER_WEIGHTS)
    made = plain(base, adapter, place / "out")
    before, after = (merged(base, one, torch.float32) for one in (adapter, place / "out"))
    for name, right in exact(base, adapter).items():
        unit = torch.finfo(torch.float32).eps * float(right.abs().max())
        own, others = (float((one[name].double() - right).abs().max()) for one in (before, after))
        assert others <= 3 * own + unit, name
    again = plain(base, place / "out", place / "again")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        assert (place / "again" / name).read_bytes() == (place / "out" / name).read_bytes()
    assert again.padding == ()
    assert not made.is_folded or made.config["lora_alpha"] == made.config["r"]


def test_servers_get_pairs_for_whole_types_and_fused_layers(shelf: Shelf, tmp_path: Path) -> None:
    base, adapter = make(shelf, tmp_path, target_modules=r"model\.layers\.1\.(self_attn\.q|mlp\.up)_proj")
    made = plain(base, adapter, tmp_path / "filled")
    types = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    everything = {f"model.layers.{layer}.{one}" for layer in (0, 1) for one in types}
    own = {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    tensors = load_file(tmp_path / "filled" / ADAPTER_WEIGHTS)
    assert {module_of(name) for name in tensors} == everything
    assert {*made.padding} == everything - own
    assert {module_of(name) for name, one in tensors.items() if one.any()} == own
    assert made.config["target_modules"] == ["gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
    lean = plain(base, adapter, tmp_path / "lean", fill=False)
    assert lean.padding == ()
    assert lean.config["target_modules"] == sorted(own)
    for directory in ("filled", "lean"):
        assert same(base, adapter, tmp_path / directory, torch.float32)


def test_copies_of_base_weights_are_dropped(shelf: Shelf, tmp_path: Path) -> None:
    base, adapter = make(shelf, tmp_path, target_modules=["embed_tokens"])
    own = read_tensors(base, "model.safetensors")["model.embed_tokens.weight"]
    write_tensors(adapter, read_tensors(adapter) | {f"{ADAPTER_PREFIX}model.embed_tokens.base_layer.weight": own})
    made = plain(base, adapter, tmp_path / "out")
    assert [name.partition("embed_tokens.")[2] for name in made.tensors] == ["lora_embedding_A", "lora_embedding_B"]
    assert same(base, adapter, tmp_path / "out", torch.float32)


# --- names -----------------------------------------------------------------------------------------------------------

KEY = "model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "name",
    [
        KEY,
        f"{ADAPTER_PREFIX}{ADAPTER_PREFIX}{KEY}",
        f"{ADAPTER_PREFIX}_orig_mod.{KEY}",
        f"_orig_mod.{ADAPTER_PREFIX}{KEY}",
        f"module.{ADAPTER_PREFIX}{KEY}",
        f"{ADAPTER_PREFIX}module._orig_mod.{KEY}",
        f"{ADAPTER_PREFIX}{KEY.replace('self_attn', 'self_attn._orig_mod')}",
        pytest.param("module." * 400_000 + ADAPTER_PREFIX + KEY, id="any number of prefixes"),
    ],
)
def test_names_are_repaired(name: str) -> None:
    assert repaired_names([name], ["model.layers.0.self_attn.q_proj.weight"]) == {name: ADAPTER_PREFIX + KEY}


@pytest.mark.parametrize(
    ("names", "base"),
    [
        ([ADAPTER_PREFIX + KEY], []),
        ([ADAPTER_PREFIX + KEY, f"{ADAPTER_PREFIX}module.{KEY}"], []),
        ([f"{ADAPTER_PREFIX}module.layer.lora_A.weight"], ["module.layer.weight"]),
    ],
    ids=["right", "two of one name", "a name of the base"],
)
def test_other_names_are_left_alone(names: list[str], base: list[str]) -> None:
    assert repaired_names(names, base) == {}


# --- what has no plain LoRA ------------------------------------------------------------------------------------------

CONFIG = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj"]).to_dict() | {"peft_type": "LORA"}

REFUSED: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1]},
    "bias": {"bias": "lora_only"},
    "lora bias": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa, iterated": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "loftq": {"init_lora_weights": "loftq"},
    "aLoRA": {"alora_invocation_tokens": [1]},
    "layers repeated": {"layer_replication": [[0, 2], [1, 2]]},
    "experts": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "a later option": {"use_something_new": True},
    **{kind: {"peft_type": kind} for kind in ("LOHA", "LOKR", "IA3", "VERA", "ADALORA")},
    "no method": {"peft_type": None},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_plain_lora_is_refused(kind: str, wording: Wording) -> None:
    with pytest.raises(NoPlainLoraError) as refused:
        refuse(CONFIG | REFUSED[kind], [])
    wording(refused.value)


@pytest.mark.parametrize("changes", [{}, {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"}])
def test_a_config_of_peft_is_plain(changes: dict[str, Any]) -> None:
    """A key that a release of PEFT adds, and that is set by default, has to be listed."""
    refuse(CONFIG | changes, [])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (f"{ADAPTER_PREFIX}lm_head.weight", "F32"),
        (f"{ADAPTER_PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta", "F32"),
        (f"{ADAPTER_PREFIX}model.layers.0.self_attn.q_proj.lora_B.bias", "F32"),
        (f"{ADAPTER_PREFIX}{KEY}", "F8_E4M3"),
    ],
)
def test_other_tensors_are_refused(name: str, dtype: str, wording: Wording) -> None:
    with pytest.raises(NoPlainLoraError) as refused:
        refuse(CONFIG, [StoredTensor(name=name, dtype=dtype, shape=(4, 4))])
    wording(refused.value)


def test_a_module_that_the_served_class_lacks_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    base, adapter = make(shelf, tmp_path)
    made = plain(base, adapter, tmp_path / "out")
    other = ServedClass(name="Other", loaded="Own", names={}, scalings={}, sizes={}, sources={})
    with pytest.raises(NoPlainLoraError):
        plain_lora(read_config(adapter), made.tensors, other, fill=True)
