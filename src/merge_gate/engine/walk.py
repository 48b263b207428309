"""The merge of one adapter, layer by layer: PEFT merges, each result is measured and dropped.

In: a `Base` and an adapter loaded on its scratch. Out: a `TensorMerge` for every tensor that is not the base's any
more, and the count of what was checked. Judges nothing.

PEFT's `merge_and_unload(safe_merge=True)` runs as a user would run it, with one difference: the `merge` of every tuner
layer of the scratch is wrapped. The wrapper

1. gives the layer's base tensors private copies, on the device that computes;
2. lets PEFT merge, with `safe_merge=True`; where PEFT's own finite check refuses, again from fresh copies without it,
   so that what is broken can be counted and the layers after it are still judged; likewise where a value is the
   largest of its dtype, since without it PEFT rounds once instead of twice and can end at Inf;
3. measures what the layer's tensors have become, in their final dtype;
4. puts the base's tensors back, so that no more than one layer's copies exist at a time.

After PEFT has unloaded, every parameter and persistent buffer of its result is accounted for: it is the base's own
(measured with the base), or was measured in step 3, or is measured now (modules that the adapter replaced, tensors
that its file overwrote).

A layer of the common kind, vanilla LoRA on a plain linear layer, skips steps 1 to 4: plain.py bounds it, or measures it
in blocks of rows with PEFT's bits, without a copy.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from merge_gate.engine.base import ADAPTER_PREFIX, Base, first_line, measure_in, named_tensors, wrap
from merge_gate.engine.load import ADAPTER_NAME, Loaded
from merge_gate.engine.measure import distance, dtype_max, measure, same_bits, unchanged_fraction
from merge_gate.engine.plain import ROUNDED, Delta, OnTensor, Progress, is_vanilla, merge_blocks, merge_bounded
from merge_gate.engine.quantized import dequantized, is_quantized
from merge_gate.engine.threads import spread
from merge_gate.errors import EngineError, Refused
from merge_gate.records import EVERYTHING, Origin, Refusal, TensorMerge, Thresholds


@dataclass(slots=True)
class Slot:
    """One tensor of the base under a tuner layer: where it hangs, its name, and what it held before the layer."""

    module: nn.Module
    attribute: str
    name: str
    parameter: torch.Tensor
    data: torch.Tensor

    @property
    def tensor(self) -> torch.Tensor | None:
        """What hangs there now: the parameter, another one, or a plain tensor (PEFT's MultiheadAttention)."""
        found: torch.Tensor | None = getattr(self.module, self.attribute, None)
        return found

    def put(self, tensor: torch.Tensor | None) -> None:
        """Hang a tensor there: a parameter as one, anything else as it was found."""
        self.module.__dict__.pop(self.attribute, None)
        if tensor is None or isinstance(tensor, nn.Parameter):
            self.module._parameters[self.attribute] = tensor
        else:
            self.module._parameters.pop(self.attribute, None)
            self.module.__dict__[self.attribute] = tensor


@dataclass(slots=True)
class Merger:
    """One adapter's merge. `merges` holds what was measured, by the base's names; `refused` is safe_merge's opinion."""

    base: Base
    loaded: Loaded
    thresholds: Thresholds = EVERYTHING
    on_tensor: OnTensor | None = None
    progress: Progress | None = None
    merges: dict[str, TensorMerge] = field(default_factory=dict)
    refused: dict[str, None] = field(default_factory=dict)
    adapted: dict[str, list[Any]] = field(default_factory=dict)
    checked: int = 0
    total: int = 0
    _pending: dict[int, int] = field(default_factory=dict)
    _original: dict[int, torch.Tensor] = field(default_factory=dict)
    _merged: dict[int, TensorMerge] = field(default_factory=dict)
    _depth: int = 0
    _done: int = 0

    def run(self) -> nn.Module:
        """PEFT's merge_and_unload with every layer's merge wrapped.

        Raises:
            Refused: PEFT cannot merge this adapter; the message is PEFT's.
            EngineError: the measuring failed, which says nothing about the adapter.
        """
        model = self.loaded.model
        layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]
        for _, layer in layers:
            for slot in self._slots(layer):
                self._pending[id(slot.parameter)] = self._pending.get(id(slot.parameter), 0) + 1
        named = [(path.removeprefix(ADAPTER_PREFIX), layer) for path, layer in layers]
        self._merge_blocks(named, len(layers))
        for path, layer in named:
            layer.merge = self._wrapped(path, layer, layer.merge, len(layers))
        try:
            merged: nn.Module = model.merge_and_unload(safe_merge=True)
        except (Refused, EngineError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # PEFT refuses with six kinds of exception
            raise Refused(_not_mergeable(self.loaded.config, error)) from error
        finally:
            for _, layer in layers:
                layer.__dict__.pop("merge", None)
        return merged

    def _wrapped(self, name: str, layer: Any, original: Callable[..., None], total: int) -> Callable[..., None]:
        def merge(*positional: Any, **named: Any) -> None:
            if self._depth:  # PEFT merges an inner layer on the outer's behalf
                original(*positional, **named)
                return
            asked = inspect.signature(original).bind(*positional, **named).arguments
            adapter_names = asked.get("adapter_names")
            self._depth += 1
            try:
                if self._take_merged(layer):
                    return
                self._merge_layer(name, layer, original, adapter_names)
            except (Refused, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise EngineError(
                    f"{name} could not be measured: {type(error).__name__}: {first_line(error)}"
                ) from error
            finally:
                self._depth -= 1
            self._progressed(name, total)

        return merge

    def _merge_blocks(self, layers: list[tuple[str, Any]], total: int) -> None:
        """The common case (vanilla LoRA on a plain linear layer) by plain.py.

        All such layers at once, before PEFT's walk comes to them. What is not finite is left to PEFT's own merge, so
        that it can be said what is broken.
        """
        plain = [(path, layer, slot) for path, layer in layers if (slot := self._plain_weight(layer)) is not None]
        for (path, layer, _), merge in zip(plain, spread(lambda one: self._block_merge(*one[1:]), plain), strict=True):
            if merge is not None:
                self._merged[id(layer)] = merge
                self._progressed(path, total)

    def _block_merge(self, layer: Any, slot: Slot) -> TensorMerge | None:
        lora_a, lora_b = (side[ADAPTER_NAME].weight.data for side in (layer.lora_A, layer.lora_B))
        delta = Delta(
            name=slot.name,
            lora_a=lora_a.to(self.base.device),
            lora_b=lora_b.to(self.base.device),
            scaling=layer.scaling[ADAPTER_NAME],
            swapped=layer.fan_in_fan_out,
        )
        settled = merge_bounded(self.base, delta, self.thresholds)
        return settled or merge_blocks(
            self.base,
            delta,
            slot.data.to(self.base.device),
            thresholds=self.thresholds,
            on_tensor=self.on_tensor,
        )

    def _take_merged(self, layer: Any) -> bool:
        """Book a layer that `_merge_blocks` has done as merged; False where PEFT has to merge it."""
        merge = self._merged.pop(id(layer), None)
        if merge is None:
            return False
        for slot in self._slots(layer):
            self._pending[id(slot.parameter)] -= 1
        layer.merged_adapters.append(ADAPTER_NAME)
        self.adapted.setdefault(merge.stats.name, []).append(layer)
        self.merges[merge.stats.name] = merge
        return True

    def _progressed(self, path: str, total: int) -> None:
        self._done += 1
        if self.progress is not None:
            self.progress(self._done, total, path)

    def _plain_weight(self, layer: Any) -> Slot | None:
        """The weight of a vanilla LoRA layer that nothing else merges into, and that PEFT's injection left alone."""
        if not is_vanilla(layer):
            return None
        slot = next((slot for slot in self._slots(layer) if slot.attribute == "weight"), None)
        if slot is None or self._pending.get(id(slot.parameter)) != 1:
            return None
        known = self.base.tensors.get(slot.name)
        return slot if known is not None and _same_storage(known, slot.data) else None

    def _merge_layer(
        self, name: str, layer: Any, original: Callable[..., None], adapter_names: list[str] | None
    ) -> None:
        slots = self._slots(layer)
        before = layer.get_base_layer()
        self._privatise(layer, slots)
        try:
            safe = self._by_peft(original, adapter_names, safe_merge=True)
            if not safe or _at_the_edge(slots):
                self._again(layer, slots)
                self._by_peft(original, adapter_names, safe_merge=False)
            if not safe:
                self.refused[name] = None
            if layer.get_base_layer() is before:
                self._record(layer, slots, original)
        finally:
            self._restore(slots)

    def _by_peft(self, original: Callable[..., None], adapter_names: list[str] | None, *, safe_merge: bool) -> bool:
        """Step 2. False where PEFT's finite check refuses; the adapter is `Refused` for any other exception."""
        try:
            original(safe_merge=safe_merge, adapter_names=adapter_names)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # PEFT refuses with six kinds of exception
            if safe_merge and isinstance(error, ValueError) and "NaNs detected" in str(error):
                return False
            raise Refused(_not_mergeable(self.loaded.config, error)) from error
        return True

    def _again(self, layer: Any, slots: list[Slot]) -> None:
        """Undo a merge that was not finished: fresh copies, and nothing marked as merged."""
        for slot in slots:
            slot.put(slot.parameter)
            slot.parameter.data = slot.data
        for inner in layer.modules():
            if isinstance(inner, BaseTunerLayer):
                inner.merged_adapters.clear()
        self._privatise(layer, slots)

    def _slots(self, layer: Any) -> list[Slot]:
        found: list[Slot] = []
        seen: set[int] = set()
        for module in layer.get_base_layer().modules():
            for attribute, parameter in module._parameters.items():
                name = self.loaded.slots.get((id(module), attribute))
                if parameter is None or name is None or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                found.append(Slot(module, attribute, name, parameter, parameter.data))
        return found

    def _privatise(self, layer: Any, slots: list[Slot]) -> None:
        """Step 1.

        Of a quantised weight the wrapper is enough: PEFT puts a new parameter in its place, but marks the old one.
        """
        for slot in slots:
            self._original.setdefault(id(slot.parameter), slot.data)
            if is_quantized(slot.parameter):
                slot.put(wrap(slot.parameter))
            else:
                slot.parameter.data = slot.data.to(self.base.device, copy=True)
        if self.base.device.type != "cpu":
            layer._move_adapter_to_device_of_base_layer(ADAPTER_NAME)

    def _restore(self, slots: list[Slot]) -> None:
        """Step 4.

        A tensor that another layer still has to merge into keeps what this one made of it; so does one that was not
        the base's own any more (rewritten by an initialisation, overwritten by the file, resized).
        """
        for slot in slots:
            left = self._pending.get(id(slot.parameter), 1) - 1
            self._pending[id(slot.parameter)] = left
            if left > 0:
                continue
            original = self._original.pop(id(slot.parameter), slot.data)
            known = self.base.tensors.get(slot.name)
            if known is not None and _same_storage(known, original):
                slot.put(slot.parameter)
                slot.parameter.data = original

    # --- step 3 ---

    def _record(self, layer: Any, slots: list[Slot], original: Callable[..., None]) -> None:
        merged = ((slot, slot.tensor) for slot in slots)
        results: list[tuple[Slot, torch.Tensor]] = [(slot, tensor) for slot, tensor in merged if tensor is not None]
        changed = [(slot, tensor) for slot, tensor in results if not self._is_bases(slot.name, tensor)]
        exact = self._exact(layer, slots, changed, original)
        for slot, tensor in results:
            path = slot.name.rpartition(".")[0]
            if any(slot is one for one, _ in changed):
                self.adapted.setdefault(slot.name, []).append(layer)
                merge = self._compare(slot.module, slot.name, path, tensor, exact.get(slot.name))
            else:
                merge = TensorMerge(
                    module=path, stats=self.base.stats[slot.name], dtype_max=dtype_max(tensor.dtype), changed=False
                )
            self.merges[slot.name] = merge
            if self.on_tensor is not None:
                self.on_tensor(slot.name, tensor.data)

    def _is_bases(self, name: str, tensor: torch.Tensor) -> bool:
        known = self.base.tensors.get(name)
        if known is None or type(known) is not type(tensor) or is_quantized(tensor):
            return False
        return same_bits(known, tensor.to(known.device))

    def _compare(
        self, module: nn.Module, name: str, path: str, tensor: torch.Tensor, exact: torch.Tensor | None
    ) -> TensorMerge:
        stats, *scales = measure_in(module, tensor, name)
        broken = next((scale for scale in scales if not scale.finite), None)
        if stats.finite and broken is not None:
            stats = broken
        values = dequantized(module, tensor) if is_quantized(tensor) else tensor.data
        ceiling = dtype_max(values.dtype)
        known = self.base.tensors.get(name)
        if known is None or known.shape != tensor.shape or not stats.finite:
            return TensorMerge(module=path, stats=stats, dtype_max=ceiling, changed=True)
        was = dequantized(module_of_base(self.base, name), known) if is_quantized(known) else known.data
        was = was.to(values.device)
        same = was.dtype == values.dtype and same_bits(was, values)
        reference = exact if exact is not None else values
        return TensorMerge(
            module=path,
            stats=stats,
            dtype_max=ceiling,
            changed=not same,
            base_norm=distance(was),
            delta_norm=distance(reference, was),
            lost_norm=None if exact is None else distance(values, exact),
            unchanged_fraction=unchanged_fraction(was, values) if was.dtype == values.dtype else None,
        )

    def _exact(
        self, layer: Any, slots: list[Slot], changed: list[tuple[Slot, torch.Tensor]], original: Callable[..., None]
    ) -> dict[str, torch.Tensor]:
        """The same merge into float32 copies: what the merged tensors would be without the rounding of their dtype."""
        rounded = [slot for slot, tensor in changed if tensor.dtype in ROUNDED or is_quantized(tensor)]
        if not rounded:
            return {}
        if any(is_quantized(tensor) for _, tensor in changed):
            return _exact_quantized(layer, changed)
        kept = [(slot, slot.tensor, slot.parameter.data) for slot in slots]
        merged = list(layer.merged_adapters)
        try:
            for slot in slots:
                slot.put(slot.parameter)
                slot.parameter.data = slot.data.to(self.base.device, torch.float32)
            layer.merged_adapters.clear()
            original(safe_merge=False, adapter_names=[ADAPTER_NAME])
            return {slot.name: slot.tensor.data for slot in rounded if slot.tensor is not None}
        except Exception:
            return {}
        finally:
            layer.merged_adapters[:] = merged
            for slot, parameter, data in kept:
                slot.put(parameter)
                slot.parameter.data = data

    def probe(self, layer: Any) -> list[torch.Tensor]:
        """What the layer's tensors would become, without measuring or keeping anything."""
        slots = self._slots(layer)
        before = layer.get_base_layer()
        kept = [(slot, slot.tensor) for slot in slots]
        self._privatise(layer, slots)
        try:
            layer.merge(safe_merge=False)
            after = layer.get_base_layer()
            if after is not before:
                found = [parameter.detach().clone() for parameter in after.parameters()]
                layer.unmerge()
                return found
            return [self._values(slot) for slot in slots]
        finally:
            for inner in layer.modules():
                if isinstance(inner, BaseTunerLayer):
                    inner.merged_adapters.clear()
            for slot, parameter in kept:
                slot.put(parameter)
                slot.parameter.data = slot.data
            self._original.clear()

    @staticmethod
    def _values(slot: Slot) -> torch.Tensor:
        tensor = slot.tensor
        assert tensor is not None  # noqa: S101 - a slot is made of a parameter that exists
        return dequantized(slot.module, tensor) if is_quantized(tensor) else tensor.detach().clone()

    # --- the whole model ---

    def sweep(self, merged: nn.Module) -> None:
        """Account for every parameter and persistent buffer of PEFT's result; measure what nobody has measured yet.

        Raises:
            Refused: PEFT left a tuner layer in the model.
        """
        left = next((path for path, module in merged.named_modules() if isinstance(module, BaseTunerLayer)), None)
        if left is not None:
            raise Refused(
                Refusal(check="not-mergeable", message=f"PEFT left {left} unmerged in its result", origin=Origin.MERGE)
            )
        for name, module, tensor in named_tensors(merged):
            self.total += tensor.numel()
            known = self.base.tensors.get(name)
            if known is None or not _same_storage(known, tensor):
                self._record_replaced(name, module, tensor, known)
            self.checked += tensor.numel()

    def _record_replaced(self, name: str, module: nn.Module, tensor: torch.Tensor, known: torch.Tensor | None) -> None:
        if known is not None and self._is_bases(name, tensor):
            return
        self.merges[name] = self._compare(module, name, name.rpartition(".")[0], tensor, None)
        if self.on_tensor is not None:
            self.on_tensor(name, tensor.data)

    def tied(self) -> tuple[tuple[str, str], ...]:
        """Tensors that a layer changed for one module while another module shares them without that adapter."""
        pairs = []
        for name, layers in self.adapted.items():
            sharers = self.loaded.sharers.get(name, ())
            whole = all(isinstance(layer, TrainableTokensLayer) for layer in layers)
            if len(sharers) > 1 and not whole and self.merges[name].changed:
                own = name.rpartition(".")[0]
                pairs.append((name, next((path for path in sharers if path != own), sharers[-1])))
        return tuple(pairs)


def _at_the_edge(slots: list[Slot]) -> bool:
    """Whether a merged value is the largest of a 16-bit dtype: W + delta rounded once may then be Inf."""
    merged = [slot.tensor for slot in slots if slot.tensor is not None and slot.tensor.dtype in ROUNDED]
    return any(measure(tensor, "").max_abs >= dtype_max(tensor.dtype) for tensor in merged)


def _same_storage(known: torch.Tensor, tensor: torch.Tensor) -> bool:
    return known.data_ptr() == tensor.data_ptr() and known.shape == tensor.shape and known.dtype == tensor.dtype


def module_of_base(base: Base, name: str) -> nn.Module:
    """The base's module that owns a tensor."""
    return base.model.get_submodule(name.rpartition(".")[0])


def _exact_quantized(layer: Any, changed: list[tuple[Slot, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """W + delta before re-quantising, where the layer can say its delta."""
    exact = {}
    for slot, tensor in changed:
        if slot.attribute != "weight" or not is_quantized(tensor) or getattr(layer, "lora_variant", None):
            continue
        try:
            delta = layer.get_delta_weight(ADAPTER_NAME)
            exact[slot.name] = dequantized(slot.module, slot.parameter).float() + delta.float()
        except Exception:  # noqa: S112 - a figure for a warning: without it the loss is not reported
            continue
    return exact


def _not_mergeable(config: Any, error: Exception) -> Refusal:
    if isinstance(error, ImportError):
        return Refusal(
            check=None,
            message=f"merging needs a package that is not installed: {first_line(error)}",
            hint="install the package that the message names in the environment that runs the gate",
        )
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    return Refusal(
        check="not-mergeable",
        message=f"PEFT cannot merge this {kind} adapter: {type(error).__name__}: {first_line(error)}",
        hint="PEFT's own message says what is not supported; serve the adapter unmerged, or retrain it without that",
        origin=Origin.MERGE,
    )
