"""What PEFT merges wrongly, or cannot merge, although it may not say so. One table; each row has its source.

In: a loaded `PeftModel` and its config. Out: nothing, or `Refused`. What PEFT itself refuses needs no row: its
exception becomes `not-mergeable` with its own words. tests/engine/test_known_defects.py shows each row with plain
PEFT, so that a release that mends one makes the test say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peft.tuners.beft import BeftLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from merge_gate.engine.base.loaded_base import first_line
from merge_gate.engine.tensors.quantized import BNB_4BIT, has_layers_in, is_quantized
from merge_gate.errors import Refused
from merge_gate.records.measured import Refusal
from merge_gate.records.terms import Origin, Quantization
from merge_gate.tensor_names import ADAPTER_PREFIX
from merge_gate.text import listing

if TYPE_CHECKING:
    from merge_gate.engine.base.loaded_base import Base
    from merge_gate.records.measured import BaseFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """`where` yields the module, or an empty name for the whole adapter, for each case of the defect.

    With `config_alone` it is asked before anything is loaded, and gets no model.
    """

    name: str
    reason: str
    hint: str
    where: Callable[[Any, Any], Iterator[str]]
    config_alone: bool = False


def refuse_by_config(config: Any) -> None:
    """Hold a config against the rules that need no model, before PEFT acts on it (X-LoRA loads what it names).

    Raises:
        Refused: with the first rule that it meets.
    """
    _refuse(tuple(rule for rule in RULES if rule.config_alone), None, config)


def refuse_wrong_merges(model: Any, config: Any) -> None:
    """Hold a loaded adapter against the other rules.

    Raises:
        Refused: with the first rule that it meets.
    """
    _refuse(tuple(rule for rule in RULES if not rule.config_alone), model, config)


def _refuse(rules: tuple[Rule, ...], model: Any, config: Any) -> None:
    for rule in rules:
        places = list(rule.where(model, config))
        if places:
            named = f" (in {listing(places, 1)})" if places[0] else ""
            raise Refused(
                Refusal(
                    check="not-mergeable",
                    message=f"{rule.reason}{named}",
                    hint=rule.hint,
                    module=places[0] or None,
                    origin=Origin.CONFIG,
                )
            )


def _layers(model: Any) -> Iterator[tuple[str, Any, nn.Module]]:
    """(base's name, tuner layer, its base layer)."""
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield path.removeprefix(ADAPTER_PREFIX), module, module.get_base_layer()


def _quantized(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return weight is not None and is_quantized(weight)


def _no_merge(model: Any, config: Any) -> Iterator[str]:
    if config.is_prompt_learning or not hasattr(model.base_model, "merge_and_unload"):
        yield ""


def _of_kind(kind: str) -> Callable[[Any, Any], Iterator[str]]:
    def where(_model: Any, config: Any) -> Iterator[str]:
        if config.peft_type == kind:
            yield ""

    return where


def _replicated(_model: Any, config: Any) -> Iterator[str]:
    if getattr(config, "layer_replication", None):
        yield ""


def _arrow(_model: Any, config: Any) -> Iterator[str]:
    if getattr(config, "arrow_config", None):
        yield ""


def _oft_convolution(model: Any, config: Any) -> Iterator[str]:
    if config.peft_type != "OFT":
        return
    for name, _, base_layer in _layers(model):
        kernel = getattr(base_layer, "kernel_size", ())
        if any(size != 1 for size in kernel if isinstance(size, int)):
            yield name


def _quantized_kinds(model: Any, config: Any) -> Iterator[str]:
    kind = config.peft_type
    for name, _, base_layer in _layers(model):
        packed = type(getattr(base_layer, "weight", None)).__name__
        if _quantized(base_layer) and (kind == "RANDLORA" or (kind == "PVERA" and packed == BNB_4BIT)):
            yield name


def _quantized_unknown(model: Any, _config: Any) -> Iterator[str]:
    """A tuner layer for plain weights on packed ones: neither written for them nor given a backend for it.

    BEFT's adds to the bias alone, which is never packed.
    """
    for name, layer, base_layer in _layers(model):
        knows = getattr(layer, "quantization_backend", None) is not None or isinstance(layer, BeftLayer)
        if _quantized(base_layer) and not knows and not has_layers_in(type(layer).__module__, base_layer.weight):
            yield name


def _quantized_bias(model: Any, _config: Any) -> Iterator[str]:
    for name, layer, base_layer in _layers(model):
        if _quantized(base_layer) and any(dict(getattr(layer, "lora_bias", None) or {}).values()):
            yield name


def _merged_twice(model: Any, _config: Any) -> Iterator[str]:
    """Tied weights that carry an adapter each (trainable tokens excepted: both write the same rows)."""
    seen: set[int] = set()
    for name, layer, base_layer in _layers(model):
        weight = base_layer._parameters.get("weight")  # a parametrised weight is another object each time
        if weight is None or isinstance(layer, TrainableTokensLayer):
            continue
        if id(weight) in seen:
            yield name
        seen.add(id(weight))


def _tokens_without_bias(model: Any, _config: Any) -> Iterator[str]:
    """Trained tokens of a linear layer, which computes without its bias while they are trained: zeros are none."""
    for name, layer, base_layer in _layers(model):
        bias = base_layer._parameters.get("bias") if isinstance(base_layer, nn.Linear) else None
        if isinstance(layer, TrainableTokensLayer) and bias is not None and bool(bias.any()):
            yield name


RULES = (
    Rule(
        name="no-weights",
        reason="this method adds inputs or layers to the model at run time and has no weights to merge",
        hint="serve the adapter unmerged, and leave it out of this gate",
        where=_no_merge,
    ),
    Rule(
        name="x-lora",
        reason="X-LoRA chooses between adapters for each token; PEFT's merge drops the router and keeps one expert",
        hint="serve it unmerged, or gate the single expert that you want to merge",
        where=_of_kind("XLORA"),
        config_alone=True,
    ),
    Rule(
        name="arrow",
        reason="Arrow routes between adapters for each token and cannot be one merged weight",
        hint="serve it unmerged",
        where=_arrow,
        config_alone=True,
    ),
    Rule(
        name="layer-replication",
        reason="layer_replication changes the number of layers, and PEFT's merge does not reproduce that (peft#1707)",
        hint="serve the adapter unmerged on the replicated model",
        where=_replicated,
        config_alone=True,
    ),
    Rule(
        name="merged-twice",
        reason="two layers that share one weight carry an adapter each, and PEFT adds both deltas to that weight",
        hint="untie the base's embeddings before training and merging, or adapt other modules",
        where=_merged_twice,
    ),
    Rule(
        name="tokens-without-bias",
        reason=(
            "while tokens are trained PEFT leaves out the bias of a linear layer that carries them, and the merged "
            "model has it (peft/tuners/trainable_tokens/layer.py)"
        ),
        hint=(
            "serve it unmerged, as it was trained; or train the tokens anew on a base whose head has no bias, or is "
            "not tied to the embedding"
        ),
        where=_tokens_without_bias,
    ),
    Rule(
        name="oft-convolution",
        reason="OFT on a convolution with a kernel larger than 1 merges into weights that do not compute its forward",
        hint="serve it unmerged, or adapt only 1x1 convolutions and linear layers",
        where=_oft_convolution,
    ),
    Rule(
        name="quantized-unknown",
        reason="PEFT has no bitsandbytes layer for this method, and merges packed integers as if they were weights",
        hint="gate it on the unquantised base (quantization: none) and merge there",
        where=_quantized_unknown,
    ),
    Rule(
        name="quantized-random-projection",
        reason="PEFT merges this method into bitsandbytes layers in another order than its forward computes",
        hint="gate it on the unquantised base (quantization: none) and merge there",
        where=_quantized_kinds,
    ),
    Rule(
        name="quantized-lora-bias",
        reason=(
            "PEFT adds lora_bias to a bitsandbytes layer without its scaling, and its safe_merge fails there on good "
            "adapters too (peft/tuners/lora/bnb.py)"
        ),
        hint="gate it on the unquantised base (quantization: none) and merge there",
        where=_quantized_bias,
    ),
)


OUT_OF_BOUNDS = "is out of bounds for dimension"
"""torch's words for an index that points nowhere."""


DOCUMENTED_ON_PACKED = frozenset({"ADALORA", "IA3", "LOHA", "FOURIERFT", "DELORA", "OSF", "RANDLORA", "PVERA"})
"""Methods that docs/methods.md says PEFT cannot merge into a base in bitsandbytes' formats."""


def blamed_on(refusal: Refusal, base: Base, peft_type: str) -> Refusal:
    """An exception of PEFT on a quantized or incomplete base, as what the gate cannot judge.

    It proves nothing about the adapter, unless docs/methods.md says that PEFT cannot merge this method there.
    """
    facts = base.facts
    is_plain = facts.quantization == Quantization.NONE and not facts.incomplete
    is_documented = facts.quantization in set(Quantization) and peft_type in DOCUMENTED_ON_PACKED
    if refusal.check != "not-mergeable" or is_plain or (is_documented and not facts.incomplete):
        return refusal
    return replace(
        refusal,
        check=None,
        message=f"{refusal.message} (the base is {_kind_of(facts)})",
        hint="gate and merge on the complete, unquantized base",
        origin=Origin.BASE,
    )


def _kind_of(facts: BaseFacts) -> str:
    return "incomplete" if facts.incomplete else f"quantized: {facts.quantization}"


def refused_by_peft(config: Any, error: Exception) -> Refusal:
    """What PEFT's own refusal to merge says of the adapter."""
    if isinstance(error, ImportError):
        return Refusal(
            check=None,
            message=f"merging needs a package that is not installed: {first_line(error)}",
            hint="install the package that the message names in the environment that runs the gate",
        )
    text = first_line(error)
    if getattr(config, "trainable_token_indices", None) and isinstance(error, IndexError):
        return Refusal(
            check="shape-mismatch",
            message=f"trainable_token_indices name rows that the base's vocabulary does not have: {text}",
            hint="restore the adapter_config.json that was saved with the adapter, or name the base of the training",
            origin=Origin.CONFIG,
        )
    if any(words in text for words in ("inconsistent with indices", "sparse_dim", OUT_OF_BOUNDS)):
        return Refusal(
            check="shape-mismatch",
            message=f"the file's indices name places that the base's weight does not have: {text}",
            hint="this is not the base that the adapter was trained on, or the file is damaged",
            origin=Origin.ADAPTER,
        )
    return Refusal(
        check="not-mergeable",
        message=f"PEFT cannot merge this {config.peft_type.value} adapter: {type(error).__name__}: {text}",
        hint="PEFT's own message says what is not supported; serve the adapter unmerged, or retrain it without that",
        origin=Origin.MERGE,
    )
