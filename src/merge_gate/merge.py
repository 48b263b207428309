"""Adapter + base → `Evidence`: PEFT's own merge, one layer at a time, each result measured and dropped.

In: a `Base` and what the preflight read. Out: numbers and names; this module judges nothing.

PEFT's `merge_and_unload(safe_merge=True)` runs as a user would run it, with one difference: the `merge` of every tuner
layer of the scratch is wrapped. The wrapper

1. gives the layer's base tensors private copies, on the device that computes;
2. lets PEFT merge, with `safe_merge=True`; where PEFT's own finite check refuses, again from fresh copies without it,
   so that what is broken can be counted and the layers after it are still judged;
3. measures what the layer's tensors have become, in their final dtype;
4. puts the base's tensors back, so that no more than one layer's copies exist at a time.

After PEFT has unloaded, every parameter and persistent buffer of its result is accounted for: it is the base's own
(measured with the base), or was measured in step 3, or is measured now (modules that the adapter replaced, tensors
that its file overwrote).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from merge_gate import lowrank, rules
from merge_gate.adapter import ADAPTER_NAME, Loaded, Refused, combined, load_adapter
from merge_gate.base import ADAPTER_PREFIX, Base, first_line, measure_in, named_tensors
from merge_gate.measure import distance, dtype_max, dtype_name, measure, same_bits, unchanged_fraction
from merge_gate.parallel import spread
from merge_gate.quantized import dequantized, is_quantized
from merge_gate.records import AdapterFiles, Combine, Evidence, FileTensor, Origin, Refusal, TensorMerge, TensorStats

OnTensor = Callable[[str, torch.Tensor], None]
Progress = Callable[[int, int, str], None]

ROUNDED = (torch.bfloat16, torch.float16)
"""Dtypes in which a float32 delta loses bits, so that the loss is measured."""


def merge_adapter(
    base: Base, files: AdapterFiles, *, on_tensor: OnTensor | None = None, progress: Progress | None = None
) -> Evidence:
    """Merge one adapter into a scratch of the base and measure everything.

    Args:
        base: the loaded base; unchanged afterwards.
        files: what the preflight read of the adapter.
        on_tensor: called with the base's name and the merged tensor, before it is dropped.
        progress: called with layers merged, layers in all, and the layer's name.

    Raises:
        MemoryError, torch.OutOfMemoryError: the machine is too small.
    """
    return _evidence(base, (files,), lambda: load_adapter(base, files), on_tensor, progress)


def merge_combination(
    base: Base,
    members: tuple[AdapterFiles, ...],
    combine: Combine,
    *,
    on_tensor: OnTensor | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Combine adapters by PEFT's `add_weighted_adapter`, then as `merge_adapter`."""
    return _evidence(base, members, lambda: combined(base, members, combine), on_tensor, progress)


def _evidence(
    base: Base,
    members: tuple[AdapterFiles, ...],
    load: Callable[[], Loaded],
    on_tensor: OnTensor | None,
    progress: Progress | None,
) -> Evidence:
    started = time.perf_counter()
    file_tensors: tuple[FileTensor, ...] = ()
    kind = members[0].peft_type
    try:
        file_tensors = tuple(FileTensor(stats=stats) for files in members for stats in _measure_file(files))
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # PEFT's warnings are findings here, found by our own comparison
            loaded = load()
            refusal = rules.refusals(loaded.model, loaded.config)
            if refusal is not None:
                raise Refused(refusal)
            file_tensors = tuple(_with_use(base, loaded, one) for one in file_tensors)
            merger = Merger(base, loaded, on_tensor=on_tensor, progress=progress)
            merged = merger.run()
            merger.sweep(merged)
    except Refused as refused:
        return Evidence(
            base=base.facts,
            peft_type=kind,
            file_tensors=file_tensors,
            refusal=refused.refusal,
            parameters_total=base.facts.parameters,
            seconds=time.perf_counter() - started,
        )
    return Evidence(
        base=base.facts,
        peft_type=kind,
        file_tensors=file_tensors,
        missing=loaded.missing,
        unexpected=loaded.unexpected,
        targeted=loaded.targeted,
        merges=tuple(merger.merges.values()),
        tied=merger.tied(),
        refused_by_safe_merge=tuple(merger.refused),
        parameters_checked=merger.checked,
        parameters_total=merger.total,
        seconds=time.perf_counter() - started,
    )


# --- the adapter's own file ----------------------------------------------------------------------------------------


def _measure_file(files: AdapterFiles) -> list[TensorStats]:
    return [measure(tensor, name) for name, tensor in _read_file(files) if isinstance(tensor, torch.Tensor)]


def _read_file(files: AdapterFiles) -> Iterator[tuple[str, torch.Tensor]]:
    if files.weights is None:
        return
    path = Path(files.directory) / files.weights
    if path.suffix == ".safetensors":
        from safetensors import safe_open  # noqa: PLC0415 - only this reader needs it

        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                yield name, opened.get_tensor(name)
        return
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler's own errors: not tensors only, or not a pickle
        raise_refused_pickle(error)
    else:
        yield from state.items() if isinstance(state, dict) else ()


def raise_refused_pickle(error: Exception) -> None:
    """Translate what the restricted unpickler says.

    Raises:
        Refused: always.
    """
    raise Refused(
        Refusal(
            check="file-corrupt",
            message=f"the pickled weights hold something else than tensors: {first_line(error)}",
            hint="do not load this file; save the adapter as safetensors",
            origin=Origin.FILE,
        )
    ) from error


# --- which tensors the merge uses ----------------------------------------------------------------------------------


def _with_use(base: Base, loaded: Loaded, one: FileTensor) -> FileTensor:
    """A non-finite tensor that the merge does not read is training state: a warning, not a failure."""
    if one.stats.finite:
        return one
    if one.stats.name in loaded.unexpected:
        return FileTensor(stats=one.stats, used=False)
    if one.stats.name not in loaded.model_key:
        return one
    return FileTensor(stats=one.stats, used=_is_used(base, loaded, loaded.model_key[one.stats.name]))


def _is_used(base: Base, loaded: Loaded, key: str) -> bool:
    """Whether a merge reads the tensor that was loaded under `key`: other values there, other merged values.

    Decided by merging, not by a table of names: the tensor is loaded with two different finite contents, with every
    other non-finite tensor made finite, and the layers it can reach are merged into private copies each time.
    """
    layers = _reached(loaded.model, key)
    if not layers:
        return True  # a trained module or a tensor of the base: it is the merged value
    finite = {name: torch.nan_to_num(value, 0.5, 0.5, 0.5) for name, value in loaded.state.items() if _floating(value)}
    noise = torch.rand(finite[key].shape, generator=torch.Generator().manual_seed(1)).to(finite[key].dtype)
    merger = Merger(base, loaded)
    results = []
    try:
        for value in (finite[key], finite[key] * 2 + noise, loaded.state[key]):
            loaded.model.load_state_dict({**finite, key: value}, strict=False)
            results.append([merger.probe(layer) for layer in layers])
    except Exception:  # noqa: BLE001 - it could not be shown that the tensor is unused
        return True
    finally:
        loaded.model.load_state_dict(loaded.state, strict=False)
    first, second, actual = results
    return any(
        not torch.isfinite(broken).all() or not same_bits(one, other)
        for left, right, bad in zip(first, second, actual, strict=True)
        for one, other, broken in zip(left, right, bad, strict=True)
    )


def _floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _reached(model: Any, key: str) -> list[Any]:
    """The outermost tuner layers that hold the key; for a tensor shared by the whole model, all of them."""
    layers = list(tuner_layers(model))
    own = [layer for path, layer in layers if key.startswith(f"{path}.")]
    if own:
        return own
    shared = key.count(".") <= 2 or not key.startswith(ADAPTER_PREFIX)  # noqa: PLR2004 - base_model.vera_A.default
    return [layer for _, layer in layers] if shared else []


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of PEFT's layers that are not inside another one, but for wrappers of parameters, which nest."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if any(path.startswith(f"{outer}.") for outer in inside) and type(module).__name__ != "ParamWrapper":
            continue
        inside.append(path)
        yield path, module


# --- the merge -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Slot:
    """One tensor of the base under a tuner layer: where it hangs, its name, and what it held before the layer."""

    module: nn.Module
    attribute: str
    name: str
    parameter: torch.Tensor
    data: torch.Tensor


@dataclass(slots=True)
class Merger:
    """One adapter's merge. `merges` holds what was measured, by the base's names; `refused` is safe_merge's opinion."""

    base: Base
    loaded: Loaded
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
            return model.merge_and_unload(safe_merge=True)
        except Refused:
            raise
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # PEFT refuses with six kinds of exception
            raise Refused(_not_mergeable(self.loaded.config, error)) from error
        finally:
            for _, layer in layers:
                layer.__dict__.pop("merge", None)

    def _wrapped(self, name: str, layer: Any, original: Callable[..., None], total: int) -> Callable[..., None]:
        def merge(*, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            if self._depth:  # PEFT merges an inner layer on the outer's behalf
                original(safe_merge=safe_merge, adapter_names=adapter_names)
                return
            self._depth += 1
            try:
                if self._take_merged(layer):
                    return
                self._merge_layer(name, layer, original, adapter_names)
            finally:
                self._depth -= 1
            self._progressed(name, total)

        return merge

    def _merge_blocks(self, layers: list[tuple[str, Any]], total: int) -> None:
        """The common case (vanilla LoRA on a plain linear layer) by lowrank.py, which has the bits of PEFT's merge.

        All such layers at once, before PEFT's walk comes to them. What is not finite is left to PEFT's own merge, so
        that it can be said what is broken.
        """
        plain = [(path, layer, slot) for path, layer in layers if (slot := self._plain_weight(layer)) is not None]
        for (path, layer, _), merge in zip(plain, spread(lambda one: self._block_merge(*one[1:]), plain), strict=True):
            if merge is not None:
                self._merged[id(layer)] = merge
                self._progressed(path, total)

    def _block_merge(self, layer: Any, slot: Slot) -> TensorMerge | None:
        weight = slot.data.to(self.base.device)
        lora_a, lora_b = (side[ADAPTER_NAME].weight.data.to(weight.device) for side in (layer.lora_A, layer.lora_B))
        scaling, swapped = layer.scaling[ADAPTER_NAME], layer.fan_in_fan_out
        if not lowrank.supports(weight, lora_a, lora_b, fan_in_fan_out=swapped):
            return None
        merged = torch.empty_like(weight) if self.on_tensor is not None else None

        def keep(row: int, block: torch.Tensor) -> None:
            if merged is not None:
                merged[row : row + block.shape[0]] = block

        found = lowrank.merge_measured(
            weight,
            lora_a,
            lora_b,
            scaling,
            scratch=self.base.buffers(),
            fan_in_fan_out=swapped,
            emit=None if merged is None else keep,
        )
        if not found.finite:
            return None
        if self.on_tensor is not None and merged is not None:
            self.on_tensor(slot.name, merged)
        return self._from_blocks(slot, found, lowrank.delta_norm_sq(lora_a, lora_b, scaling))

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
        vanilla = (
            type(layer) is LoraLinear
            and layer.active_adapters == [ADAPTER_NAME]
            and ADAPTER_NAME in layer.lora_A
            and ADAPTER_NAME not in layer.lora_variant
            and not layer.lora_bias[ADAPTER_NAME]
            and not layer.merged_adapters
            and not layer.disable_adapters
        )
        if not vanilla:
            return None
        slot = next((slot for slot in self._slots(layer) if slot.attribute == "weight"), None)
        if slot is None or self._pending.get(id(slot.parameter)) != 1:
            return None
        known = self.base.tensors.get(slot.name)
        return slot if known is not None and _same_storage(known, slot.data) else None

    def _from_blocks(self, slot: Slot, found: lowrank.LowRankMerge, delta_sq: float) -> TensorMerge:
        """Figures of the fast way. The loss by rounding is measured on a sample of the blocks (lowrank.SAMPLE_EVERY)."""
        delta_norm = math.sqrt(delta_sq)
        rounded = slot.data.dtype in ROUNDED
        return TensorMerge(
            module=slot.name.rpartition(".")[0],
            stats=TensorStats(
                name=slot.name,
                dtype=dtype_name(slot.data.dtype),
                shape=tuple(slot.data.shape),
                numel=found.numel,
                minimum=found.minimum,
                maximum=found.maximum,
            ),
            dtype_max=dtype_max(slot.data.dtype),
            changed=found.changed,
            base_norm=self.base.norm(slot.name),
            delta_norm=delta_norm,
            lost_norm=math.sqrt(found.lost_sq / found.delta_sq) * delta_norm if rounded and found.delta_sq else None,
            unchanged_fraction=found.unchanged / found.sampled,
        )

    def _merge_layer(
        self, name: str, layer: Any, original: Callable[..., None], adapter_names: list[str] | None
    ) -> None:
        slots = self._slots(layer)
        before = layer.get_base_layer()
        self._privatise(layer, slots)
        try:
            try:
                original(safe_merge=True, adapter_names=adapter_names)
            except ValueError as error:
                if "NaNs detected" not in str(error):
                    raise
                self._again(layer, slots)
                original(safe_merge=False, adapter_names=adapter_names)
                self.refused[name] = None
            if layer.get_base_layer() is before:
                self._record(layer, slots, original)
        finally:
            self._restore(slots)

    def _again(self, layer: Any, slots: list[Slot]) -> None:
        """Undo a merge that was not finished: fresh copies, and nothing marked as merged."""
        for slot in slots:
            slot.module._parameters[slot.attribute] = slot.parameter  # type: ignore[assignment]
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
        """Step 1. A quantised weight needs no copy: PEFT puts a new parameter in its place."""
        for slot in slots:
            self._original.setdefault(id(slot.parameter), slot.data)
            if not is_quantized(slot.parameter):
                slot.parameter.data = slot.data.to(self.base.device, copy=True)
        if self.base.device.type != "cpu":
            layer._move_adapter_to_device_of_base_layer(ADAPTER_NAME)

    def _restore(self, slots: list[Slot]) -> None:
        """Step 4. A tensor that another layer still has to merge into keeps what this one made of it; so does one that
        was not the base's own any more (rewritten by an initialisation, overwritten by the file, resized)."""
        for slot in slots:
            left = self._pending.get(id(slot.parameter), 1) - 1
            self._pending[id(slot.parameter)] = left
            if left > 0:
                continue
            original = self._original.pop(id(slot.parameter), slot.data)
            known = self.base.tensors.get(slot.name)
            if known is not None and _same_storage(known, original):
                slot.module._parameters[slot.attribute] = slot.parameter  # type: ignore[assignment]
                slot.parameter.data = original

    # --- step 3 ---

    def _record(self, layer: Any, slots: list[Slot], original: Callable[..., None]) -> None:
        results = [(slot, slot.module._parameters[slot.attribute]) for slot in slots]
        results = [(slot, tensor) for slot, tensor in results if tensor is not None]
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
        kept = [(slot, slot.module._parameters[slot.attribute], slot.parameter.data) for slot in slots]
        merged = list(layer.merged_adapters)
        try:
            for slot in slots:
                slot.module._parameters[slot.attribute] = slot.parameter  # type: ignore[assignment]
                slot.parameter.data = slot.data.to(self.base.device, torch.float32)
            layer.merged_adapters.clear()
            original(safe_merge=False, adapter_names=[ADAPTER_NAME])
            return {slot.name: slot.module._parameters[slot.attribute].data for slot in rounded}  # type: ignore[union-attr]
        except Exception:  # noqa: BLE001 - a figure for a warning: without it the loss is not reported
            return {}
        finally:
            layer.merged_adapters[:] = merged
            for slot, parameter, data in kept:
                slot.module._parameters[slot.attribute] = parameter
                slot.parameter.data = data

    def probe(self, layer: Any) -> list[torch.Tensor]:
        """What the layer's tensors would become, without measuring or keeping anything."""
        slots = self._slots(layer)
        before = layer.get_base_layer()
        kept = [(slot, slot.module._parameters[slot.attribute]) for slot in slots]
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
                slot.module._parameters[slot.attribute] = parameter
                slot.parameter.data = slot.data
            self._original.clear()

    @staticmethod
    def _values(slot: Slot) -> torch.Tensor:
        tensor = slot.module._parameters[slot.attribute]
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
            whole = getattr(self.loaded.config, "ensure_weight_tying", False) or all(
                type(layer).__name__ == "TrainableTokensLayer" for layer in layers
            )
            if len(sharers) > 1 and not whole and self.merges[name].changed:
                own = name.rpartition(".")[0]
                pairs.append((name, next((path for path in sharers if path != own), sharers[-1])))
        return tuple(pairs)


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
        except Exception:  # noqa: BLE001 - a figure for a warning: without it the loss is not reported
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
