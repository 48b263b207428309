"""One architecture, the user's way and the gate's, side by side.

In: a model type and a directory to work in. Out: `Outcome`. Loads, merges and compares for itself (`user_merge`);
`gate_merge` is the one place that asks the gate for its merged tensors.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from merge_gate.files.preflight import preflight
from merge_gate.records.terms import Verdict
from tests.support import methods
from tests.support.engine import architectures
from tests.support.engine.architectures import Architecture
from tests.support.engine.merges import NOT_RUN, merge_adapter
from tests.support.gating import Gate, Judgement
from tests.support.merged import kept


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a user of PEFT ends with: tensors by name, before and after, or why there are none; and what is not right.

    `dropped` are tensors of the file that did not arrive with their values, `broken` merged ones that are not finite,
    `tied` targets whose weight another module holds as well, `other` targets that compute another thing once they are
    merged, `lost` targets of which no tensor was changed.
    """

    before: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    raised: str | None = None

    @property
    def complaint(self) -> str | None:
        """The first thing that is not right, or None."""
        if self.raised is not None:
            return self.raised
        words = {
            "tensors dropped": self.dropped,
            "tensors not finite": self.broken,
            "targets tied": self.tied,
            "targets not changed": self.lost,
            "targets merged into another layer": self.other,
        }
        return next((f"{len(names)} {word}" for word, names in words.items() if names), None)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came out for one type. `wrong` is empty where the gate agrees with the user's way in everything.

    `findings` are the checks with a finding for the healthy adapter, if it passed.
    """

    model_type: str
    built: bool = False
    reason: str | None = None
    model_class: str | None = None
    parameters: int = 0
    tensors: int = 0
    dropped: tuple[str, ...] = ()
    complaint: str | None = None
    healthy: str | None = None
    findings: tuple[str, ...] = ()
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
        return Outcome(model_type=model_type, reason=sentence(error), seconds=_since(started))
    user = user_merge(architecture, base, adapter, trained)
    gate = Gate()
    healthy = judged(gate, base, adapter)
    wrong = list(disagreements(user, healthy))
    if not user.complaint and healthy.verdict is Verdict.PASSED:
        wrong += different_bits(user, gate_merge(gate, base, adapter))
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
        complaint=user.complaint,
        healthy=word(healthy),
        findings=tuple(sorted({one.check for one in healthy.findings} if healthy.verdict is Verdict.PASSED else ())),
        one_nan=word(one_nan),
        wrong=tuple(wrong),
        seconds=_since(started),
    )


# --- the user's way ------------------------------------------------------------------------------------------------


def user_merge(architecture: Architecture, base: Path, adapter: Path, trained: dict[str, Tensor]) -> Merged:
    """Load and merge by transformers and PEFT."""
    try:
        model = architectures.load(architecture, base)
        before = {name: tensor.clone() for name, tensor in methods.values(model).items()}
        with methods.quiet():
            peft_model = PeftModel.from_pretrained(model, adapter)
        dropped, tied, targets = _dropped(peft_model, trained), _tied(peft_model), _targets(peft_model)
        other = _merged_otherwise(peft_model)
        with methods.quiet():
            merged = peft_model.merge_and_unload(safe_merge=True)
    except Exception as error:  # noqa: BLE001 - whatever PEFT raises is what its user sees
        return Merged(raised=sentence(error))
    tensors = methods.values(merged)
    changed = {name for name in before if name in tensors and not methods.same_tensor(before[name], tensors[name])}
    lost = tuple(one for one in targets if not any(name.startswith(f"{one}.") for name in changed))
    return Merged(
        before=before,
        tensors=tensors,
        dropped=dropped,
        broken=_broken(merged, tensors),
        tied=tied,
        other=other,
        lost=lost,
    )


def _merged_otherwise(model: nn.Module) -> tuple[str, ...]:
    """Convolutions in two dimensions that are a class of their own, where this is so."""
    found = []
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and isinstance(base := layer.get_base_layer(), nn.Conv2d):
            if type(base).forward is nn.Conv2d.forward:
                continue
            one: Any = copy.deepcopy(layer).float().eval()
            with torch.no_grad():
                unmerged = one(torch.linspace(-1, 1, base.in_channels * 400).reshape(1, -1, 20, 20))
                one.merge()
                merged = one(torch.linspace(-1, 1, base.in_channels * 400).reshape(1, -1, 20, 20))
            if float((merged - unmerged).norm() / unmerged.norm()) > 1e-3:
                found.append(path)
    return tuple(found)


def _dropped(model: nn.Module, trained: dict[str, Tensor]) -> tuple[str, ...]:
    arrived = dict(model.named_parameters(remove_duplicate=False))
    return tuple(
        name for name, value in trained.items() if name not in arrived or not torch.equal(arrived[name], value)
    )


def _targets(model: nn.Module) -> tuple[str, ...]:
    """Names in the base; a wrapper inside another one stands for the same module."""
    paths = [path for path, module in model.named_modules() if isinstance(module, LoraLayer)]
    return tuple(path.removeprefix("base_model.model.") for path in paths if not path.endswith(".base_layer"))


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


def with_nan(adapter: Path, directory: Path, name: str | None = None) -> Path:
    """The adapter with one NaN, in the middle of that tensor, or else of the middle lora_B."""
    state = methods.load_file(adapter / methods.WEIGHTS)
    factors = [one for one in sorted(state) if ".lora_B." in one]
    broken = state[name or factors[len(factors) // 2]]
    broken.view(-1)[broken.numel() // 2] = torch.nan
    return methods.write_variant(adapter, directory, state)


# --- the gate's way ------------------------------------------------------------------------------------------------


def judged(gate: Gate, base: Path, adapter: Path, dtype: str = "auto") -> Judgement:
    torch.manual_seed(0)  # as `architectures.load`
    try:
        return gate.judge(adapter, base, dtype=dtype)
    except Exception as error:  # noqa: BLE001 - as the worker does: the adapter is undecided
        return Judgement(verdict=Verdict.ERROR, cause=sentence(error), findings=(), evidence=None)


def gate_merge(gate: Gate, base: Path, adapter: Path) -> dict[str, Tensor]:
    """The merged tensors of the gate, by the base's names. The base is loaded by now."""
    files = preflight(str(adapter), allow_pickle=False)
    with kept() as found:
        merge_adapter(gate.base(base, files, dtype="auto"), files, no_forward=NOT_RUN)
    return found


# --- the comparison ------------------------------------------------------------------------------------------------


def disagreements(user: Merged, gate: Judgement) -> tuple[str, ...]:
    expected = Verdict.FAILED if user.complaint else Verdict.PASSED
    if gate.verdict is expected:
        return ()
    return (f"healthy: {word(gate)}, and for a user of PEFT: {user.complaint or 'loads and merges'}",)


def different_bits(user: Merged, gate: dict[str, Tensor]) -> tuple[str, ...]:
    """Tensors that the gate merged to other bits than PEFT, and those that PEFT changed and the gate did not merge."""
    places = {user.tensors[name].data_ptr() for name in gate if name in user.tensors}
    same = methods.same_tensor
    found = [name for name, tensor in gate.items() if name not in user.tensors or not same(user.tensors[name], tensor)]
    found += [
        name
        for name, tensor in user.tensors.items()
        if name in user.before and tensor.data_ptr() not in places and not same(user.before[name], tensor)
    ]
    return (f"bits of {len(found)} tensors: {', '.join(found[:3])}",) if found else ()


def word(judgement: Judgement) -> str:
    return f"{judgement.verdict} ({judgement.cause})" if judgement.cause else str(judgement.verdict)


def sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return text if type(error).__name__ in text else f"{type(error).__name__}: {text}"


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 1)
