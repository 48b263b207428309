"""One architecture, the user's way and the gate's, side by side.

In: a model type and a directory to work in. Out: `Outcome`. Loads, merges and compares for itself (`user_merge`);
`gate_merge` is the one place that asks the gate for its merged tensors.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from merge_gate.engine import merge
from merge_gate.records import Verdict
from merge_gate.sources.preflight import preflight
from tests import architectures, methods
from tests.architectures import Architecture
from tests.gating import Gate, Judgement


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a user of PEFT ends with: the merged tensors by name, or why there are none; and what the load dropped."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    raised: str | None = None

    @property
    def good(self) -> bool:
        return self.raised is None and not (self.dropped or self.broken or self.tied)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came out for one type. `wrong` is empty where the gate agrees with the user's way in everything."""

    model_type: str
    built: bool = False
    reason: str | None = None
    model_class: str | None = None
    parameters: int = 0
    tensors: int = 0
    dropped: tuple[str, ...] = ()
    raised: str | None = None
    healthy: str | None = None
    one_nan: str | None = None
    wrong: tuple[str, ...] = ()
    seconds: float = 0.0


def trial(model_type: str, work: Path) -> Outcome:
    """Build, adapt, merge both ways, compare."""
    started = time.perf_counter()
    base, adapter = work / "base", work / "adapter"
    try:
        architecture = architectures.build(model_type, base)
        trained = architectures.save_lora(architecture, base, adapter)
    except Exception as error:  # noqa: BLE001 - whatever transformers or PEFT raise: there is nothing to gate
        return Outcome(model_type=model_type, reason=_sentence(error), seconds=_since(started))
    user = user_merge(architecture, base, adapter, trained)
    gate = Gate()
    healthy = judged(gate, base, adapter)
    wrong = list(disagreements(user, healthy))
    if user.good and healthy.verdict is Verdict.PASSED:
        wrong += different_bits(user.tensors, gate_merge(gate, base, adapter), architecture, base)
    one_nan = judged(gate, base, with_nan(adapter, work / "nan"))
    if one_nan.verdict is not Verdict.FAILED:
        wrong.append(f"one NaN: {one_nan.verdict}")
    return Outcome(
        model_type=model_type,
        built=True,
        model_class=architecture.model_class.__name__,
        parameters=architecture.parameters,
        tensors=len(trained),
        dropped=user.dropped,
        raised=user.raised,
        healthy=_word(healthy),
        one_nan=_word(one_nan),
        wrong=tuple(wrong),
        seconds=_since(started),
    )


# --- the user's way ------------------------------------------------------------------------------------------------


def user_merge(architecture: Architecture, base: Path, adapter: Path, trained: dict[str, Tensor]) -> Merged:
    """Load and merge by transformers and PEFT; `dropped` names what was trained and did not arrive with its values."""
    try:
        model = architectures.load(architecture, base)
        with methods.quiet():
            peft_model = PeftModel.from_pretrained(model, adapter)
        arrived = dict(peft_model.named_parameters(remove_duplicate=False))
        dropped = tuple(
            name for name, value in trained.items() if name not in arrived or not torch.equal(arrived[name], value)
        )
        tied = _tied(peft_model)
        with methods.quiet():
            merged = peft_model.merge_and_unload(safe_merge=True)
    except Exception as error:  # noqa: BLE001 - whatever PEFT raises is what its user sees
        return Merged(raised=_sentence(error))
    tensors = methods.values(merged)
    return Merged(tensors=tensors, dropped=dropped, broken=_broken(merged, tensors), tied=tied)


def _tied(model: nn.Module) -> tuple[str, ...]:
    """Targets whose weight another module holds as well: the merge changes that one too, which was not trained so."""
    holders = Counter(id(one) for module in model.modules() for one in module.parameters(recurse=False))
    layers = [
        (name, module.get_base_layer()) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    ]
    return tuple(name for name, layer in layers if hasattr(layer, "weight") and holders[id(layer.weight)] > 1)


def _broken(model: nn.Module, tensors: dict[str, Tensor]) -> tuple[str, ...]:
    """NaN and Inf; but some models mean "no limit" by an infinite buffer."""
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return tuple(name for name in methods.nonfinite(tensors) if name not in buffers or torch.isnan(tensors[name]).any())


def with_nan(adapter: Path, directory: Path) -> Path:
    """The adapter with one NaN, in the middle of the middle lora_B."""
    state = methods.load_file(adapter / methods.WEIGHTS)
    factors = [name for name in sorted(state) if ".lora_B." in name]
    broken = state[factors[len(factors) // 2]]
    broken.view(-1)[broken.numel() // 2] = torch.nan
    return methods.write_variant(adapter, directory, state)


# --- the gate's way ------------------------------------------------------------------------------------------------


def judged(gate: Gate, base: Path, adapter: Path) -> Judgement:
    torch.manual_seed(0)  # as `architectures.load`
    try:
        return gate.judge(adapter, base)
    except Exception as error:  # noqa: BLE001 - as the worker does: the adapter is undecided
        return Judgement(verdict=Verdict.ERROR, cause=_sentence(error), findings=(), evidence=None)


def gate_merge(gate: Gate, base: Path, adapter: Path) -> dict[str, Tensor]:
    """The merged tensors of the gate, by the base's names. The base is loaded by now."""
    files = preflight(str(adapter), allow_pickle=False)
    found: dict[str, Tensor] = {}
    loaded = gate.base(base, files, dtype="auto")
    merge.merge_adapter(loaded, files, on_tensor=lambda name, tensor: found.__setitem__(name, tensor.clone()))
    return found


# --- the comparison ------------------------------------------------------------------------------------------------


def disagreements(user: Merged, gate: Judgement) -> tuple[str, ...]:
    expected = Verdict.PASSED if user.good else Verdict.FAILED
    if gate.verdict is expected:
        return ()
    why = user.raised or "loads and merges"
    if user.dropped:
        why = f"{len(user.dropped)} tensors dropped"
    elif user.broken:
        why = f"{len(user.broken)} tensors not finite"
    elif user.tied:
        why = f"{len(user.tied)} targets tied"
    return (f"healthy: {_word(gate)}, and for a user of PEFT: {why}",)


def different_bits(
    user: dict[str, Tensor], gate: dict[str, Tensor], architecture: Architecture, base: Path
) -> tuple[str, ...]:
    """Tensors that the gate merged to other bits than PEFT, and those that PEFT changed and the gate did not merge."""
    before = methods.values(architectures.load(architecture, base))
    other = [name for name, tensor in gate.items() if name not in user or not methods.same_tensor(user[name], tensor)]
    untouched = before.keys() - gate.keys()
    pointers = {user[name].data_ptr() for name in gate if name in user}
    other += [
        name
        for name in sorted(untouched)
        if name in user and not methods.same_tensor(user[name], before[name]) and user[name].data_ptr() not in pointers
    ]
    return (f"bits of {len(other)} tensors: {', '.join(other[:3])}",) if other else ()


def _word(judgement: Judgement) -> str:
    return f"{judgement.verdict} ({judgement.cause})" if judgement.cause else str(judgement.verdict)


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return text if type(error).__name__ in text else f"{type(error).__name__}: {text}"


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 1)
