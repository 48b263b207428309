"""The merge of one adapter, layer by layer, inside PEFT's own walk. Each result is measured and dropped.

In: a `Base` and an adapter loaded on its scratch copy. Out: `MergedTensors`, and the layers that PEFT's safe_merge
refused. Judges nothing.

PEFT's `merge_and_unload(safe_merge=True)` runs as a user would run it, with one difference: the `merge` of every tuner
layer of the scratch copy is wrapped. The wrapper has four steps:

1. Give the layer's base tensors private copies, on the device that computes.
2. Let PEFT merge with `safe_merge=True`. If PEFT's finite check refuses, merge again from fresh copies without the
   check, so that broken values can be counted and later layers are still judged. Do the same if a value is the largest
   of its dtype: without the check PEFT rounds once instead of twice, and can end at Inf.
3. Prove that this merge computes what the unmerged layer computes (proof.py), and measure its tensors. If they are not
   float32, PEFT merges float32 copies too, in the same way. That merge is proved, and the tensors may differ from it
   only by rounding (rounded_merge.py). For layers that go in blocks, the cross-checked ones are proved.
4. Put the base's tensors back, so that only one layer's copies exist at a time.

Layers that plan.py gives to blocks of rows are measured before the merge begins (one_pass.py), for several adapters at
once. If a cross-check differs, no result of the blocks counts, and PEFT merges the whole adapter. If a base is read for
that pass, PEFT merges other layers then, too, as far as they share nothing with any layer.

After PEFT has unloaded, every parameter and persistent buffer of its result is accounted for (account.py,
merged_tensors.py).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from merge_gate._internal.errors import EngineError
from merge_gate._internal.tensor_names import ADAPTER_PREFIX
from merge_gate.engine.adapter.load_adapter import ADAPTER_NAME, Loaded, factors_of, own_tensors
from merge_gate.engine.adapter.peft_config import raised
from merge_gate.engine.base.loaded_base import Base, caught
from merge_gate.engine.consumer import Consumer, Outline
from merge_gate.engine.merge.account import Places
from merge_gate.engine.merge.merged_tensors import ROUNDED, ROUNDING_SHARE, MergedTensors, is_the_bases, of_tensor
from merge_gate.engine.merge.plan import BlockLayer, agrees, merge_in_blocks, plan_blocks
from merge_gate.engine.merge.private_copies import MergeTarget, Names, PendingMerges, private_copies, targets_of
from merge_gate.engine.merge.proof import Unmerged, same_random_numbers, unmerged
from merge_gate.engine.merge.rounded_merge import INTERMEDIATE, ROUNDED_FACTORS, rounded_factors, unexplained
from merge_gate.engine.merge.rounding_floor import rounding_share
from merge_gate.engine.tensors.measure import dtype_max, measure, same_bits, shares_storage
from merge_gate.engine.tensors.placement import device_of, raise_if_of_the_run, random_states, restore_random
from merge_gate.engine.tensors.quantized import dequantized, is_quantized, scales
from merge_gate.engine.tensors.watch import Watch
from merge_gate.records.measured import LayerDifference, MeasureOptions, TensorDifference, TensorMerge
from merge_gate.records.refusals import CannotJudge, Refused

Progress = Callable[[int, int, str], None]
"""Called with the number of merged layers, the number of all layers, and the layer's name."""


LayerMerge = tuple[bool, list[tuple[TensorMerge, Any]]]
"""PEFT's merge of a layer: whether safe_merge accepted it, and figures, each with the layer if that changed them."""


@dataclass(slots=True, kw_only=True)
class AdapterMerge:
    """One adapter's merge. `refused` has the layers that only safe_merge refuses.

    `cross_checked` has the layers that PEFT confirmed. `differing` has those whose merge in blocks is not PEFT's: the
    merge then has to run again, without blocks. `adapted` has the base's names of tensors under layers that were merged
    in their place. `consumers` get every tensor that the merge gives a value of its own. `wrong` has the tensors of the
    final model that are not what they must be, and `not_compared` the layers whose merge is not proved, and why.
    """

    base: Base
    loaded: Loaded
    measure_options: MeasureOptions
    progress: Progress | None = None
    on_work: Callable[[], None] = lambda: None
    in_blocks: bool = True
    consumers: Sequence[Consumer] = ()
    safe_merge: bool = True
    merged: MergedTensors = field(init=False)
    refused: list[str] = field(default_factory=list)
    cross_checked: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    adapted: set[str] = field(default_factory=set)
    compared: dict[str, LayerDifference] = field(default_factory=dict)
    not_compared: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, TensorDifference] = field(default_factory=dict)
    layers_by_peft: int = 0
    layers: list[tuple[str, Any]] = field(init=False)
    planned: list[BlockLayer] = field(default_factory=list)
    blocks: dict[int, tuple[BlockLayer, TensorMerge]] = field(default_factory=dict)
    _early: dict[int, LayerMerge] = field(default_factory=dict)
    _pending: PendingMerges = field(init=False)
    _places: Places = field(init=False)
    _called: set[int] = field(default_factory=set)
    _total: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _done: int = 0
    _depth: int = 0

    def __post_init__(self) -> None:
        self.merged = MergedTensors(self.base, consumers=self.consumers)

    def plan(self) -> None:
        """Find the layers that are merged in blocks: `planned`, in the model's order."""
        named = self.loaded.model.named_modules()
        tuners = ((path, layer) for path, layer in named if isinstance(layer, BaseTunerLayer))
        layers = [(path.removeprefix(ADAPTER_PREFIX), layer) for path, layer in tuners]
        self.layers, self._total = layers, len(layers)
        self._pending = PendingMerges(
            target for _, layer in layers for target in targets_of(layer, self.loaded.base_names)
        )
        self._places = Places(self.base, self.loaded)
        if self.in_blocks:
            self.planned = plan_blocks(self.base, layers, self.loaded.base_names, self._pending)
        for name in self._places.changed():
            self._differs(name, "load")
        for path in self._places.inactive_copies():
            self._differs(path, "not merged")
        for block in self.planned:
            self._compare_with_files(block.path, block.layer, factors=self.loaded.is_probed)
            factors = (block.update.lora_a, block.update.lora_b, block.update.magnitude)
            self._places.memory.protect(block.path, *(factor for factor in factors if factor is not None))
        self.not_compared |= self.loaded.unproved
        for path, layer in layers if self.loaded.injected.unaccounted else ():
            if any(
                target.name in self.loaded.injected.unaccounted for target in targets_of(layer, self.loaded.base_names)
            ):
                self.not_compared[path] = "its initialization changes the weight in a way that nothing proves"

    def _compare_with_files(self, path: str, layer: Any, *, factors: bool = True) -> None:
        """Compare what a layer's merge starts from. The load has compared the factors, unless PEFT ran since."""
        if self._places.has_other_settings(layer):
            self._differs(path, "settings")
        if factors and self._places.has_other_factors(layer):
            self._differs(path, "factors")

    def can_change(self, in_file: Collection[str]) -> dict[str, Outline]:
        """The base's tensors that the merge can change, and their shapes and dtypes afterwards.

        They are below a layer, or have a trained copy, or are in the adapter's file (`in_file`), or were resized. A
        tied tensor is there by its own name if the merge unties it: one or each of its two modules has a trained copy.
        """
        in_blocks = {id(block.layer): [block.target] for block in self.planned}
        targets = [in_blocks.get(id(layer)) or targets_of(layer, self.loaded.base_names) for _, layer in self.layers]
        below = {target.name for of_layer in targets for target in of_layer} | set(in_file)
        wrappers = [module for module in self.loaded.model.modules() if isinstance(module, ModulesToSaveWrapper)]
        copied = {id(module) for wrapper in wrappers for module in wrapper.original_module.modules()}
        outlines: dict[str, Outline] = {}
        for module in self.loaded.model.modules():
            for attribute, tensor in module._parameters.items():
                name = self.base.first_name(self.loaded.base_names.get((id(module), attribute), ""))
                known = self.base.tensors.get(name)
                if tensor is None or known is None:
                    continue
                if name in below or id(module) in copied or tensor.shape != known.shape:
                    outlines[name] = tensor.shape, known.dtype
        named = dict(self.loaded.model.get_base_model().named_modules())
        copied_at = [path for path, module in named.items() if module in wrappers]
        copies = {path: getattr(named[path].modules_to_save, ADAPTER_NAME, None) for path in copied_at}
        for name, first in self.base.aliases.items():
            parts = [tensor_name.rpartition(".") for tensor_name in (name, first)]
            own, other = (getattr(copies.get(path), attribute, None) for path, _, attribute in parts)
            if own is not other:
                (path, _, attribute), known = parts[0], self.base.tensors[first]
                outlines[name] = getattr(copies.get(path) or named[path], attribute).shape, known.dtype
        return outlines

    def refuse_too_large(self, free_bytes: int) -> None:
        """Refuse to begin if PEFT's own merge of a layer does not fit in memory: each kind of layer needs one.

        A lower bound: the weight, its copy, the copy that safe_merge makes, and the delta, which LoRA makes twice.

        Raises:
            EngineError: it does not fit.
        """
        needed = ((_peft_bytes(layer, self.loaded.base_names), path) for path, layer in self.layers)
        most, path = max(needed, default=(0, ""))
        if most > free_bytes:
            raise EngineError(
                f"PEFT's merge of {path} takes at least {most / 2**30:.1f} GiB of memory, and only "
                f"{free_bytes / 2**30:.1f} GiB are free: the base was not read",
                hint="run the gate with more memory, or raise the memory limit of its container or job",
            )

    def merge_in_blocks(self, block: BlockLayer, weight: torch.Tensor) -> TensorMerge | None:
        """Merge and measure a planned layer on any thread. If it is None, the layer is left to PEFT's own merge."""
        self.on_work()
        options, once = self.measure_options, not self.safe_merge
        merge = merge_in_blocks(self.base, block, weight, options, self.consumers, once=once)
        if merge is not None:
            self.blocks[id(block.layer)] = block, merge
            self._progressed(block.path)
        return merge

    def cross_check(self, block: BlockLayer, merged: TensorMerge) -> bool:
        """Whether PEFT merges the layer to the same bits, on one thread like the blocks. `merged` has their figures."""
        layer, targets = block.layer, targets_of(block.layer, self.loaded.base_names)
        private = private_copies(layer, targets, self.base, mapped=self.loaded.mapped)
        with torch.no_grad(), private, packed_sums(targets) as packed:
            # The float32 merge links the unmerged layer with this one. It is faster without PEFT's finite check.
            made = _Made(safe_merge=False, before=self._unmerged(layer, targets), packed=packed)
            try:
                self._watched(layer.merge, safe_merge=True)
            except Exception as error:
                raise_if_of_the_run(error)
                return False  # PEFT gives the reason when it merges the whole adapter
            if not agrees(self.base, block, merged):
                return False
            self._proved(block.path, layer, targets, layer.merge, made)
        return True

    def finish(self) -> None:
        """PEFT's merge_and_unload with every layer's merge wrapped.

        Raises:
            Refused: PEFT cannot merge this adapter; the fact quotes PEFT.
            CannotJudge: a measurement failed, which says nothing about the adapter.
        """
        watch = Watch(self._places.memory, "merge")
        for path, layer in self.layers:
            layer.merge = self._wrapped(path, layer, layer.merge, watch)
        try:
            with watch:
                merged = self.loaded.model.merge_and_unload(safe_merge=True)
        except (Refused, CannotJudge, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # PEFT refuses with six kinds of exception
            raise self._refused(error) from error
        finally:
            for _, layer in self.layers:
                layer.__dict__.pop("merge", None)
        for name in self.merged.account_for(merged, self._places):
            self._differs(name, "after")
        for path, layer in self._places.layers:
            if id(layer) not in self._called:
                self._differs(path, "not merged")

    def _differs(self, tensor: str, fault: str, values: int | None = None, factor: float | None = None) -> None:
        """The first fault of a tensor counts."""
        self.wrong.setdefault(tensor, TensorDifference(tensor=tensor, fault=fault, values=values, factor=factor))

    def _wrapped(self, path: str, layer: Any, original: Callable[..., None], watch: Watch) -> Callable[..., None]:
        def merge(*positional: Any, **named: Any) -> None:
            self._called.add(id(layer))
            if self._depth:  # PEFT merges an inner layer for the outer one
                original(*positional, **named)
                return
            names = inspect.signature(original).bind(*positional, **named).arguments.get("adapter_names")
            by_peft = functools.partial(original, adapter_names=names)
            self._depth += 1
            try:
                with watch.paused():  # a merge by PEFT has its own watch
                    self._merge_layer(path, layer, by_peft)
            except (Refused, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise CannotJudge("not_measured", module=path, error=caught(error)) from error
            finally:
                self._depth -= 1

        return merge

    def _progressed(self, path: str) -> None:
        with self._lock:
            self._done += 1
            if self.progress is not None:
                self.progress(self._done, self._total, path)

    # --- one layer ---

    def _merge_layer(self, path: str, layer: Any, by_peft: Callable[..., None]) -> None:
        for target in targets_of(layer, self.loaded.base_names):
            if self._places.is_moved(target):
                self._differs(target.name, "before")
        if id(layer) in self.blocks:
            self._enter_block(*self.blocks[id(layer)])
            return
        made = self._early.pop(id(layer), None)
        if made is None:
            made = self._made(path, layer, by_peft)
            self._progressed(path)
        else:
            layer.merged_adapters.append(ADAPTER_NAME)
        is_safe, merges = made
        if not is_safe:
            self.refused.append(path)
        for merge, changed_by in merges:
            self.merged.enter(merge, changed_by)
            self.adapted.add(merge.stats.name)
        self.layers_by_peft += 1

    def _made(self, path: str, layer: Any, by_peft: Callable[..., None], *, keep_marks: bool = True) -> LayerMerge:
        """Steps 1 to 4."""
        targets = targets_of(layer, self.loaded.base_names)
        for target in targets:
            self._pending.begin(target)
        before, merges = layer.get_base_layer(), list[tuple[TensorMerge, Any]]()
        private = private_copies(layer, targets, self.base, keep_marks=keep_marks, mapped=self.loaded.mapped)  # 1.
        with private as reset, packed_sums(targets) as packed:
            share = rounding_share(layer, self.loaded.initial_factors.get(id(layer)))  # of the weight before the merge
            drawn, before_merge = random_states(), self._unmerged(layer, targets)
            self._compare_with_files(path, layer)  # not before: the layer has run
            made = _Made(safe_merge=self.safe_merge, before=before_merge, packed=packed, drawn=drawn)
            trained = {id(tensor): name for name, tensor in own_tensors(layer).items()}
            is_safe = self._tried(by_peft, made)  # 2.
            if not is_safe or _at_the_edge(targets):
                reset()
                packed.clear()
                made.safe_merge = False
                self._tried(by_peft, made)
            if layer.get_base_layer() is before:
                with same_random_numbers():
                    exact = self._proved(path, layer, targets, by_peft, made)
                merges = self._measured(layer, targets, exact, share)  # 3.
            merged = [(target, target.tensor, target.parameter.data) for target in targets]
        for target, tensor, data in merged:
            self._put_back(target, tensor, data)  # 4.
            if layer.get_base_layer() is before and target.tensor is not None:
                self._places.leave(target, target.tensor)
        if layer.get_base_layer() is not before:
            self._exchanged(path, layer.get_base_layer(), trained)
        return is_safe, merges

    def _exchanged(self, path: str, after: nn.Module, trained: Mapping[int, str]) -> None:
        """LN tuning exchanges the module. Its `trained` tensors, by id and by name in the layer, stay in the place."""
        for name, tensor in own_tensors(after).items():
            place = f"{_INNER.sub('', path)}.{name}"
            if trained.get(id(tensor), "").endswith(f".{name}") and not self._places.replace(place, tensor):
                self._differs(place, "after")

    def independent_layers(self) -> dict[str, list[tuple[str, Any]]]:
        """Layers that share no tensor, keyed by one of their tensors."""
        inside = {id(inner) for _, layer in self.layers for inner in layer.modules() if inner is not layer}
        by_tensor: dict[str, list[tuple[str, Any]]] = {}
        for path, layer in self.layers:
            if id(layer) not in inside and self._is_independent(layer):
                largest = max(targets_of(layer, self.loaded.base_names), key=lambda target: target.data.numel())
                by_tensor.setdefault(largest.name, []).append((path, layer))
        return by_tensor

    def _is_independent(self, layer: Any) -> bool:
        """Whether a layer merges only into tensors of the base, and no other layer uses these."""
        targets = targets_of(layer, self.loaded.base_names)
        alone = all(
            type(target.parameter) is nn.Parameter
            and self._pending.is_alone(target)
            and target.name in self.base.tensors
            and shares_storage(self.base.tensors[target.name], target.data)
            for target in targets
        )
        tuners = [inner for inner in layer.modules() if isinstance(inner, BaseTunerLayer)]
        return bool(targets) and alone and tuners == [layer] and not list(layer.get_base_layer().children())

    def merge_early(self, path: str, layer: Any) -> None:
        """Let PEFT merge an independent layer while its tensors have values. A failure is repeated later."""
        self.on_work()
        try:
            with torch.no_grad():
                by_peft = functools.partial(layer.merge, adapter_names=None)
                self._early[id(layer)] = self._made(path, layer, by_peft, keep_marks=False)
        except Exception as error:
            raise_if_of_the_run(error)
            return
        self._progressed(path)

    def forget_early(self) -> None:
        """Let the merge repeat what `merge_early` has merged."""
        self._done -= len(self._early)
        self._early.clear()

    def _put_back(self, target: MergeTarget, tensor: torch.Tensor | None, data: torch.Tensor) -> None:
        """Step 4.

        A tensor that another layer still has to merge into stays as this layer left it. So does a tensor that was no
        longer the base's own (rewritten by an initialization, overwritten by the file, or resized).
        """
        original = self._pending.end(target)
        known = self.base.tensors.get(target.name)
        if original is not None and known is not None and shares_storage(known, original):
            target.put(target.parameter, original)
        else:
            target.put(tensor, data)

    def _refused(self, error: Exception) -> Refused:
        return Refused("merge_raised", **raised(error, self.loaded.config, self.base))

    def _tried(self, by_peft: Callable[..., None], made: _Made) -> bool:
        """Step 2. False if PEFT's finite check refuses. Any other exception refuses the adapter."""
        try:
            self._watched(by_peft, safe_merge=made.safe_merge)
        except Refused:
            raise
        except Exception as error:  # PEFT refuses with six kinds of exception
            if made.safe_merge and isinstance(error, ValueError) and "NaNs detected" in str(error):
                return False
            raise self._refused(error) from error
        return True

    def _watched(self, by_peft: Callable[..., None], *, safe_merge: bool) -> None:
        """Let PEFT merge."""
        with Watch(self._places.memory, "merge"):
            by_peft(safe_merge=safe_merge)

    def _enter_block(self, block: BlockLayer, merge: TensorMerge) -> None:
        """Enter a layer that was merged in blocks, and mark it as merged for PEFT."""
        block.layer.merged_adapters.append(ADAPTER_NAME)
        self._pending.end(block.target)
        self.merged.enter(merge, block.layer)
        self.merged.given_to_consumers.add(block.target.name)
        self.adapted.update(target.name for target in targets_of(block.layer, self.loaded.base_names))

    # --- step 3 ---

    def _measured(
        self, layer: Any, targets: list[MergeTarget], exact: dict[str, torch.Tensor], share: float
    ) -> list[tuple[TensorMerge, Any]]:
        """Measure the layer's tensors. Consumers get what the layer changed, and again what one before it changed."""
        of_bias = min(share, ROUNDING_SHARE)  # the bias is trained apart from the factors (lora_bias)
        merges, rows = list[tuple[TensorMerge, Any]](), self.measure_options.rows
        for target in targets:
            tensor = target.tensor
            if tensor is None:
                continue
            is_changed = not is_the_bases(self.base, target.name, tensor)
            rounding = of_bias if target.attribute == "bias" else share
            values = exact.get(target.name) if is_changed else None
            merge = of_tensor(self.base, target.module, target.name, tensor, values, rounding_share=rounding, rows=rows)
            merges.append((merge, layer if is_changed else None))
            if is_changed or target.name in self.merged.given_to_consumers:
                self.merged.pass_on(target.module, target.name, tensor)
        return merges

    def _unmerged(self, layer: Any, targets: list[MergeTarget]) -> Unmerged | None:
        """What the layer computes in float32, before PEFT merges it: that may change the layer."""
        if any(is_quantized(target.parameter) for target in targets):
            return None
        is_float32 = all(target.data.dtype is torch.float32 for target in targets)
        copies = contextlib.nullcontext() if is_float32 else self._in_float32(layer, targets)
        with same_random_numbers(), copies:
            return unmerged(layer, device_of(layer, self.base.device))

    def _in_float32(self, layer: Any, targets: list[MergeTarget]) -> contextlib.AbstractContextManager[Any]:
        return private_copies(layer, targets, self.base, dtype=torch.float32)

    def _proved(
        self, path: str, layer: Any, targets: list[MergeTarget], by_peft: Callable[..., None], made: _Made
    ) -> dict[str, torch.Tensor]:
        """Prove the layer's merge. Returns the merged tensors without the rounding of their dtype, by name.

        For a quantized weight, these are the values that PEFT has packed in the merge before.
        """
        packed_targets = [target for target in targets if is_quantized(target.parameter)]
        final = {target.name: target.tensor.data for target in targets if target.tensor is not None}
        if all(tensor.dtype is torch.float32 for tensor in final.values()) and not packed_targets:
            self._compare(path, layer, made.before)
            return {}
        try:
            if packed_targets:
                return self._proved_unpacked(path, layer, targets, packed_targets, made.packed)
            exact = self._merged_in_float32(
                layer, targets, by_peft, made, lambda: self._compare(path, layer, made.before)
            )
            shared = next((share for kind, share in INTERMEDIATE.items() if isinstance(layer, kind)), None)
            expected = {} if shared is None else exact
            if isinstance(layer, ROUNDED_FACTORS):
                with rounded_factors(layer, next(iter(final.values())).dtype):
                    expected = self._merged_in_float32(layer, targets, by_peft, made)
        except Exception as error:  # the merge itself has succeeded, and was measured
            raise_if_of_the_run(error)
            self.not_compared[path] = "PEFT does not merge it in float32"
            return {}
        for target in targets:
            if target.name in exact and final[target.name].is_floating_point():
                self._explain(target, final[target.name], exact[target.name], expected.get(target.name), shared or 0.0)
        return {name: values for name, values in exact.items() if final[name].dtype in ROUNDED}

    def _merged_in_float32(
        self,
        layer: Any,
        targets: list[MergeTarget],
        by_peft: Callable[..., None],
        made: _Made,
        look: Callable[[], None] = lambda: None,
    ) -> dict[str, torch.Tensor]:
        """The tensors of PEFT's merge into float32 copies, by name. `look` is called while they are in the layer."""
        with self._in_float32(layer, targets):
            if made.drawn is not None:
                restore_random(made.drawn)
            self._watched(by_peft, safe_merge=made.safe_merge)
            look()
            return {target.name: target.tensor.data for target in targets if target.tensor is not None}

    def _explain(
        self,
        target: MergeTarget,
        final: torch.Tensor,
        exact: torch.Tensor,
        expected: torch.Tensor | None,
        shared: float,
    ) -> None:
        """The tensor may differ from its merge in float32 only by rounding. One in float64 is compared in float32."""
        difference: tuple[int | None, float | None] | None = (None, None)
        if final.shape == exact.shape == target.data.shape:
            final = final.float() if final.dtype is torch.float64 else final
            difference = unexplained(final, exact, target.data.to(final.device), expected, shared=shared)
        if difference is not None:
            self._differs(target.name, "in", *difference)

    def _proved_unpacked(
        self, path: str, layer: Any, targets: list[MergeTarget], of_packed: list[MergeTarget], sums: list[Packed]
    ) -> dict[str, torch.Tensor]:
        """Plain layers take the place of a quantized one: one has its values, and one has the sum of PEFT's merge."""
        target, module, marks = of_packed[0], layer.base_layer, list(layer.merged_adapters)
        bias = next((target for target in targets if target.attribute == "bias"), None)
        values = dequantized(target.module, target.parameter)
        merged = sums[-1].values if sums else values  # a merge into the bias alone packs nothing
        if len(of_packed) > 1 or module is not target.module or merged.numel() != values.numel():
            self.not_compared[path] = "its code needs the packed weight"
            return {}
        if not _has_the_bits_of(target, sums[-1].again() if sums else target.parameter):
            self._differs(target.name, "packed")
        exact = merged.to(values.device, torch.float32).reshape(values.shape)
        if sums and merged.dtype is not torch.float32:  # rounded: that would be more than the limits
            self.not_compared[path] = "PEFT rounds its sum to 16 bits before it packs it"
            return {target.name: exact}
        layer.merged_adapters.clear()
        layer.base_layer = _linear(values, None if bias is None else bias.data)
        try:
            before = unmerged(layer, self.base.device)
        finally:
            layer.base_layer = module
            layer.merged_adapters[:] = marks
        self._compare(path, layer, before, _linear(exact, None if bias is None else bias.tensor))
        return {target.name: exact}

    def _compare(self, path: str, layer: Any, before: Unmerged | None, merged: nn.Module | None = None) -> None:
        """`merged` is what unloading leaves: the layer itself would add the adapter if PEFT has not merged it."""
        if before is None:
            self.not_compared[path] = "it does not run alone, or draws random numbers"
            return
        class_name = type(layer.get_base_layer()).__name__
        compared = before.compared(_INNER.sub("", path), class_name, merged or layer.base_layer)
        if compared is not None:
            self.compared[path] = compared


@dataclass(slots=True, kw_only=True)
class _Made:
    """How PEFT made a merge. `before` is what the layer computed in float32, unless its weight is quantized.

    A merge in float32 gets this `safe_merge`. `drawn` has the generators' states before a merge that may draw.
    """

    safe_merge: bool
    before: Unmerged | None
    packed: list[Packed]
    drawn: list[torch.Tensor] | None = None


class Packed(NamedTuple):
    """Values that PEFT packs, and what packs them again."""

    values: torch.Tensor
    again: Callable[[], Any]


def _has_the_bits_of(target: MergeTarget, packed: Any) -> bool:
    """Whether the merged tensor has the integers and the scales of `packed`."""
    merged: Any = target.tensor
    packed = packed.to(merged.device)
    pairs = zip(scales(target.module, packed), scales(target.module, merged), strict=True)
    return same_bits(packed.data, merged.data) and all(same_bits(ours, theirs) for (_, ours), (_, theirs) in pairs)


_PATCHED = threading.Lock()

_INNER = re.compile(r"(\.(token_adapter|base_layer))+$")
"""The end of a path that a layer of PEFT has inside of another one in the place of a module of the base."""


@contextlib.contextmanager
def packed_sums(targets: list[MergeTarget]) -> Iterator[list[Packed]]:
    """Yields the values that PEFT packs inside of the block, in its order: W + delta before it is quantized again.

    Each method adds in its own way (OFT and RoAd rotate, HiRA multiplies), but all end with a new parameter of the
    packed class. For one layer at a time, because the class is patched for all.
    """
    sums: list[Packed] = []
    packed: set[Any] = {type(target.parameter) for target in targets if is_quantized(target.parameter)}
    kinds = [kind for kind in packed if "__new__" in vars(kind)]

    def made_by(make: Any) -> Any:
        def make_and_keep(kind: Any, data: Any = None, *given: Any, **named: Any) -> Any:
            if isinstance(data, torch.Tensor) and data.is_floating_point():
                sums.append(Packed(data, lambda: make(kind, data, *given, **named)))
            return make(kind, data, *given, **named)

        return staticmethod(make_and_keep)

    with _PATCHED if kinds else contextlib.nullcontext():
        own = [vars(kind)["__new__"] for kind in kinds]
        for kind, original in zip(kinds, own, strict=True):
            kind.__new__ = made_by(original.__func__)
        try:
            yield sums
        finally:
            for kind, original in zip(kinds, own, strict=True):
                kind.__new__ = original


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear layer of these values in float32."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight.float(), requires_grad=False)
    values = None if bias is None else bias.detach().to(weight.device, torch.float32)
    layer.register_parameter("bias", None if values is None else nn.Parameter(values, requires_grad=False))
    return layer


def _peft_bytes(layer: Any, names: Names) -> int:
    targets = targets_of(layer, names)
    if any(is_quantized(target.parameter) for target in targets):
        return 0  # it is in memory, and its merge takes a few times as much
    factors, largest = factors_of(layer), max((target.data.numel() for target in targets), default=0)
    stored = max((target.data.nbytes for target in targets), default=0)
    return 3 * stored + (2 * largest * factors[1].itemsize if factors is not None else stored)


def _at_the_edge(targets: list[MergeTarget]) -> bool:
    """Whether a merged value is the largest of a 16-bit dtype: rounded once, W + delta may then be Inf."""
    merged = [target.tensor for target in targets if target.tensor is not None and target.tensor.dtype in ROUNDED]
    return any(measure(tensor, "").max_abs >= dtype_max(tensor.dtype) for tensor in merged)
