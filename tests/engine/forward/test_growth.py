"""When `forward: auto` leaves the model out in bfloat16 and float32, and that it misses nothing that a run finds."""

import functools
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from merge_gate.engine.adapter_evidence import merge, merge_together
from merge_gate.engine.base.loaded_base import Base
from merge_gate.records.measured import Forward, MeasureOptions
from tests.support import methods
from tests.support.engine.local_bases import base_for, edited_base, load_base, load_local
from tests.support.engine.local_bases import edited_adapter as edited
from tests.support.engine.merges import request_for
from tests.support.models import ALL_LINEAR, Shelf, Tensors, make_adapter, read_tensors, save_adapter

AUTO, REQUIRED = MeasureOptions(rows=True), MeasureOptions()
IN_LAYER = "base_model.model.model.layers.1."
DOWN = f"{IN_LAYER}mlp.down_proj"


def run(base: Base, adapter: Path, options: MeasureOptions = AUTO) -> Forward:
    evidence = merge(request_for(base, adapter, measure_options=options))
    assert evidence.refusal is None, evidence.refusal
    return evidence.forward


def is_run(base: Base, adapter: Path) -> bool:
    """Whether `auto` runs the model. If it does, it has the figures of `required`; if not, there is no NaN to find."""
    forward, required = run(base, adapter), run(base, adapter, REQUIRED)
    assert required.ran
    assert forward == required if forward.ran else required.nonfinite_module is None
    return forward.ran


def soften(tensors: Tensors) -> None:
    """Make the deltas of a LoRA small next to the weights of a tiny base, as those of real adapters are."""
    for name, tensor in tensors.items():
        tensor.mul_(0.02 if "lora_embedding_B" in name else 0.1 if "lora_B" in name else 1.0)


def tamed(shelf: Shelf, variant: str, place: Path) -> Path:
    """The same adapter with a small delta, and the base's own norms for DoRA's magnitudes."""
    stored = read_tensors(shelf.base("llama"), "model.safetensors")

    def change(one: Tensors) -> None:
        for key, tensor in one.items():
            name = key.removeprefix("base_model.model.").rpartition(".lora_")[0]
            if "magnitude" in key:
                tensor.copy_(stored[f"{name}.weight"].norm(dim=0 if "embed" in name else 1).view_as(tensor))
        soften(one)

    return edited(shelf.adapter(variant), place, change)


# --- what is merged into a weight ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "ran"), [("float32", False), ("bfloat16", False), ("float16", True)])
@pytest.mark.parametrize("variant", ["all-linear", "dora-all-linear", "embedding"])
def test_an_ordinary_merge_is_run_in_float16_only(
    shelf: Shelf, tmp_path: Path, variant: str, dtype: str, *, ran: bool
) -> None:
    adapter = tamed(shelf, variant, tmp_path / "adapter")
    forward = run(base_for(shelf.base("llama"), adapter, dtype), adapter)
    assert forward.ran is ran
    reason = (
        f"{dtype} holds values up to 3.4e38, and the adapter changes no row of a weight by more than 0.7 times its norm"
    )
    assert forward.why_not == (None if ran else reason)
    assert forward.layers_compared > 0


@pytest.mark.parametrize(
    "variant",
    [
        "modules-to-save",
        "saved-embedding",
        "token-rows",
        "lora-bias",
        "bias-all",
        "resized-vocabulary",
        "embedding-dora",
    ],
)
def test_what_is_more_than_a_merge_is_run(shelf: Shelf, variant: str) -> None:
    adapter = shelf.adapter(variant)
    assert is_run(base_for(shelf.base("llama"), adapter, "float32"), adapter)


def test_methods_that_peft_merges_are_measured(shelf: Shelf, tmp_path: Path) -> None:
    """IA3 multiplies rows of some weights, and columns of others."""
    settings = {"target_modules": ["up_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    save_adapter(shelf.base("llama"), tmp_path / "ia3", peft.IA3Config(task_type="CAUSAL_LM", **settings))
    base = base_for(shelf.base("llama"), tmp_path / "ia3", "float32")
    ran, scale = {}, f"{IN_LAYER}mlp.up_proj.ia3_l"
    for factor in (1.0, 1.5, 0.5, 2.0, 0.1, 0.0, -1.0):
        adapter = edited(tmp_path / "ia3", tmp_path / str(factor), lambda one, f=factor: one[scale][:1].mul_(f))
        ran[factor] = is_run(base, adapter)
    assert ran == {factor: abs(factor - 1) > 0.7 for factor in ran}


MIXED = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm"])),
        ("mixtral", peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **MIXED)),
    ],
    ids=["a tensor that PEFT merges", "a parameter that is no layer's weight"],
)
def test_other_tensors_that_peft_merges_are_run(
    name: str, config: peft.PeftConfig, shelf: Shelf, tmp_path: Path
) -> None:
    save_adapter(shelf.base(name), tmp_path, config)
    assert is_run(base_for(shelf.base(name), tmp_path, "float32"), tmp_path)


def test_a_class_that_inherits_from_a_linear_layer_is_run(tmp_path: Path) -> None:
    sizes = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.FalconForCausalLM(transformers.FalconConfig(**sizes)).save_pretrained(tmp_path / "base")
    make_adapter(tmp_path / "base", tmp_path / "a", target_modules=["query_key_value"], lora_alpha=0.1)
    base = base_for(tmp_path / "base", tmp_path / "a", "float32")
    assert type(base.model.get_submodule("transformer.h.0.self_attention.query_key_value")) is not torch.nn.Linear
    assert is_run(base, tmp_path / "a")


# --- how large it may be ---------------------------------------------------------------------------------------------


def into(tensors: Tensors, base: Path, name: str, factor: float, row: int | None = None) -> None:
    """Let a LoRA of full rank, and of scale 1, make a weight (or one row) so many times as large."""
    weight = read_tensors(base, "model.safetensors")[f"{name.removeprefix('base_model.model.')}.weight"].float()
    change = torch.zeros_like(weight)
    rows = slice(None) if row is None else slice(row, row + 1)
    change[rows] = weight[rows] * (factor - 1)
    tensors[f"{name}.lora_A.weight"].copy_(torch.eye(weight.shape[1]))
    tensors[f"{name}.lora_B.weight"].copy_(change)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_may_change_by_less_than_its_norm(shelf: Shelf, tmp_path: Path, dtype: str) -> None:
    name = f"{IN_LAYER}self_attn.o_proj"
    make_adapter(shelf.base("llama"), tmp_path / "a", target_modules=["o_proj"], r=32, lora_alpha=32)
    base, ran = base_for(shelf.base("llama"), tmp_path / "a", dtype), {}
    for row, factors in {None: (1.5, 1.65, 0.35, -1.0, 1.8, 0.2), 3: (1.65, 1.8, 0.2, -1.0), 31: (0.0,)}.items():
        for factor in factors:

            def change(one: Tensors, factor: float = factor, row: int | None = row) -> None:
                soften(one)
                into(one, shelf.base("llama"), name, factor, row)

            ran[row, factor] = is_run(base, edited(tmp_path / "a", tmp_path / f"{row}-{factor}", change))
    assert ran == {case: abs(case[1] - 1) > 0.7 for case in ran}


TOKEN = ("base_model.model.model.embed_tokens.lora_embedding_A", (slice(None), 5))
MAGNITUDE = (f"{DOWN}.lora_magnitude_vector", slice(5, 6))


@pytest.mark.parametrize(
    ("variant", "dtype", "place", "expected"),
    [
        ("embedding", "float32", TOKEN, {1.0: False, 500.0: True}),
        ("dora-all-linear", "bfloat16", MAGNITUDE, {1.3: False, 0.7: False, -1.0: True, 2.0: True, 0.2: True}),
    ],
    ids=["a row of an embedding is a token", "a magnitude of DoRA is the norm of its row"],
)
def test_a_row_may_change_by_a_factor(
    variant: str, dtype: str, place: tuple[str, Any], expected: dict[float, bool], shelf: Shelf, tmp_path: Path
) -> None:
    tame, (name, rows) = tamed(shelf, variant, tmp_path / "tame"), place
    base, ran = base_for(shelf.base("llama"), tame, dtype), {}
    for factor in expected:
        adapter = edited(tame, tmp_path / str(factor), lambda one, f=factor: one[name][rows].mul_(f))
        ran[factor] = is_run(base, adapter)
    assert ran == expected


def test_a_dora_whose_norm_overflows_is_run(shelf: Shelf, tmp_path: Path) -> None:
    """Its magnitudes are those of the base, and its merged weight is zero."""
    tame = tamed(shelf, "dora-all-linear", tmp_path / "tame")
    adapter = edited(tame, tmp_path / "b", lambda one: [one[f"{DOWN}.lora_{end}.weight"].mul_(1e11) for end in "AB"])
    assert is_run(base_for(shelf.base("llama"), adapter, "float32"), adapter)


def test_one_value_may_not_be_far_above_all_others_of_its_weight(shelf: Shelf, tmp_path: Path) -> None:
    """A row of 32 equal values: one of them changes by 0.69 times the norm of all, which is 3.9 times its own."""
    name = "model.layers.1.self_attn.o_proj.weight"
    directory = edited_base(shelf.base("llama"), tmp_path / "base", lambda tensors: tensors[name].fill_(0.1))
    make_adapter(directory, tmp_path / "a", target_modules=["o_proj"], r=32, lora_alpha=32)

    def concentrate(one: Tensors) -> None:
        into(one, directory, f"base_model.model.{name.removesuffix('.weight')}", 1.0)
        change = torch.zeros(32)
        change[7] = 0.39
        one[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"][4] = change

    adapter = edited(tmp_path / "a", tmp_path / "b", concentrate)
    assert is_run(base_for(directory, adapter, "float32"), adapter)


def test_what_rounding_takes_needs_the_model(shelf: Shelf, tmp_path: Path) -> None:
    adapter = edited(
        shelf.adapter("all-linear"),
        tmp_path / "small",
        lambda one: [tensor.mul_(1e-3) for name, tensor in one.items() if "lora_B" in name],
    )
    base = base_for(shelf.base("llama"), adapter, "bfloat16")
    assert run(base, adapter).rounding_change is not None
    assert not run(base, adapter, MeasureOptions(rows=True, norm_limit=0.999)).ran


@pytest.mark.parametrize("load", [load_local, load_base, functools.partial(load_local, is_mapped=False)])
def test_late_runs_of_a_pass_have_the_figures_of_early_ones(
    shelf: Shelf, tmp_path: Path, load: Callable[..., Base]
) -> None:
    """Two adapters have to run, and stand next to one that need not."""
    loud = edited(shelf.adapter("plain"), tmp_path / "loud", lambda one: [part.mul_(30) for part in one.values()])
    adapters = [loud, tamed(shelf, "plain", tmp_path / "tame"), shelf.adapter("bias-all"), loud]
    base = base_for(shelf.base("llama"), loud, "float32", load=load)

    auto, required = (
        merge_together([request_for(base, one, measure_options=options) for one in adapters])
        for options in (AUTO, REQUIRED)
    )
    assert [one and one.forward.ran for one in auto] == [True, False, True, True]
    assert [auto[n].forward for n in (0, 2, 3)] == [required[n].forward for n in (0, 2, 3)]  # type: ignore[union-attr]


# --- NaN that a run finds --------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = SIZES | {"vocab_size": 24, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1}


def clip() -> Any:
    vision = SIZES | {"image_size": 8, "patch_size": 4}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=8))


def mamba() -> Any:
    sizes = {"vocab_size": 24, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    return transformers.MambaModel(transformers.MambaConfig(**sizes))


TRAINED: dict[str, tuple[Callable[[], Any], list[str], str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "the exponential of a temperature": (clip, ["q_proj"], "logit_scale", lambda one: one + 90),
    "the exponential of a decay": (mamba, ["in_proj"], "layers.0.mixer.A_log", lambda one: one + 90),
    "a negative variance": (methods.BASES["resnet"], ["convolution"], "embedder.normalization.running_var", torch.neg),
    "a weight norm of zero": (
        methods.BASES["wav2vec2"],
        ["q_proj"],
        "parametrizations.weight.original1",
        torch.zeros_like,
    ),
}
"""A base, the targets of a LoRA, the end of the name of a tensor that its file has too, and the values there."""


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_parameter_that_makes_nan_is_found(name: str, tmp_path: Path) -> None:
    build, targets, end, change = TRAINED[name]
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(tmp_path / "base")
    (stored,) = (key for key in model.state_dict() if key.endswith(end))
    save_adapter(tmp_path / "base", tmp_path / "made", peft.LoraConfig(target_modules=targets))
    edited(tmp_path / "made", tmp_path / "a", soften)
    values = change(model.state_dict()[stored])
    adapter = edited(tmp_path / "a", tmp_path / "b", lambda one: one.update({f"base_model.model.{stored}": values}))
    for dtype in ("float32", "bfloat16"):
        base = base_for(tmp_path / "base", adapter, dtype)
        assert not run(base, tmp_path / "a").ran, "only its other tensors are merged"
        assert is_run(base, adapter)
        if "decay" not in name:  # exp(-inf) is 0
            assert run(base, adapter).nonfinite_module is not None


def test_a_projection_that_is_erased_before_a_norm_is_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip().save_pretrained(tmp_path / "base")
    config = peft.IA3Config(target_modules=["text_projection"], feedforward_modules=[])
    save_adapter(tmp_path / "base", tmp_path / "a", config)
    base = base_for(tmp_path / "base", tmp_path / "a", "float32")
    adapter = edited(tmp_path / "a", tmp_path / "b", lambda one: [part.zero_() for part in one.values()])
    assert not is_run(base, tmp_path / "a")
    assert is_run(base, adapter)
    assert run(base, adapter).nonfinite_module is not None


def random_lora(tensors: Tensors, draw: random.Random) -> None:
    size = 10 ** draw.uniform(-3, 6)
    for name, tensor in tensors.items():
        tensor.mul_(size if "lora_B" in name else 1.0)


def random_copies(tensors: Tensors, base: Tensors, draw: random.Random) -> None:
    """A few tensors of the base in the file: scaled, shifted, or with one value that is out of all proportion."""
    for name in draw.sample(sorted(base), 3):
        values, size = base[name].clone(), 10 ** draw.uniform(-3, 38)
        if draw.random() < 1 / 3:
            values *= size
        elif draw.random() < 1 / 2:
            values += size * draw.choice((-1, 1))
        else:
            values.view(-1)[draw.randrange(values.numel())] = size
        module, _, attribute = name.rpartition(".")
        targeted = "base_layer." if module.rpartition(".")[2] in ALL_LINEAR else ""
        tensors[f"base_model.model.{module}.{targeted}{attribute}"] = values


@pytest.mark.parametrize("trials", [8, pytest.param(300, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("kind", ["lora", "copies"])
def test_no_random_adapter_returns_nan_unseen(kind: str, trials: int, shelf: Shelf, tmp_path: Path) -> None:
    """The others are those that `auto` leaves out: each of them is run, too."""
    make_adapter(shelf.base("llama"), tmp_path / "a", target_modules=ALL_LINEAR)
    stored = read_tensors(shelf.base("llama"), "model.safetensors")
    bases = {dtype: base_for(shelf.base("llama"), tmp_path / "a", dtype) for dtype in ("float32", "bfloat16")}
    left_out = 0
    for number in range(trials):
        draw, place = random.Random(number), tmp_path / str(number)

        def change(one: Tensors, draw: random.Random = draw) -> None:
            random_lora(one, draw) if kind == "lora" else random_copies(one, stored, draw)

        adapter = edited(tmp_path / "a", place, change)
        base = bases[draw.choice(sorted(bases))]
        if not run(base, adapter).ran:
            left_out += 1
            assert run(base, adapter, REQUIRED).nonfinite_module is None, number
        shutil.rmtree(place)
    assert left_out == 0 if kind == "copies" else 0 < left_out < trials
