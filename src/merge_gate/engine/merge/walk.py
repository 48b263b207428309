"""The merge of one adapter, layer by layer, inside PEFT's own walk. Each result is measured and dropped.

In: a `Base` and an adapter loaded on its scratch copy. Out: a closed `Ledger`, and the layers that PEFT's safe_merge
refused. Judges nothing.

PEFT's `merge_and_unload(safe_merge=True)` runs as a user would run it, with one difference: the `merge` of every tuner
layer of the scratch copy is wrapped. The wrapper has four steps:

1. Give the layer's base tensors private copies, on the device that computes.
2. Let PEFT merge with `safe_merge=True`. If PEFT's finite check refuses, merge again from fresh copies without the
   check, so that broken values can be counted and later layers are still judged. Do the same if a value is the largest
   of its dtype: without the check PEFT rounds once instead of twice, and can end at Inf.
3. Measure the layer's tensors in their final dtype.
4. Put the base's tensors back, so that only one layer's copies exist at a time.

Layers that plan.py gives to blocks of rows are measured before the walk begins (one_pass.py), for several adapters at
once. If a cross-check differs, no result of the blocks counts, and PEFT merges the whole adapter.

PEFT merges other layers before the walk reaches them, if they share nothing with any layer. That runs two at a time
(steps 1 to 4), because a merge of whole tensors often keeps only one core busy.

After PEFT has unloaded, every parameter and persistent buffer of its result is accounted for (ledger.py).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from merge_gate.engine.adapter.load_adapter import ADAPTER_NAME, Loaded, factors_of
from merge_gate.engine.adapter.peft_config import raised
from merge_gate.engine.base.loaded_base import Base, caught
from merge_gate.engine.merge import tensor_result
from merge_gate.engine.merge.ledger import Ledger
from merge_gate.engine.merge.plan import BlockLayer, agrees, plan_blocks
from merge_gate.engine.merge.private_copies import Names, PrivateCopies, Slot, Turns, slots_of
from merge_gate.engine.merge.rounding_floor import rounding_share
from merge_gate.engine.merge.sink import Outline, TensorSink
from merge_gate.engine.merge.twin import Deltas, Twins, exact_quantized, sums
from merge_gate.engine.tensors.measure import dtype_max, measure
from merge_gate.engine.tensors.quantized import is_quantized
from merge_gate.engine.tensors.threads import threads
from merge_gate.errors import EngineError
from merge_gate.records.measured import MeasureOptions, TensorMerge
from merge_gate.records.refusals import Refused, Undecidable
from merge_gate.tensor_names import ADAPTER_PREFIX

Progress = Callable[[int, int, str], None]
"""Called with the number of merged layers, the number of all layers, and the layer's name."""

AT_A_TIME = 2
"""Number of layers that PEFT merges at a time. Each takes several times a weight's memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """The result of PEFT's merge of one layer. `merges` pairs each tensor's figures with the layer, if it changed them.

    `safe`: safe_merge accepted the merge. `adapted` has the base's names of the layer's tensors.
    """

    safe: bool
    merges: tuple[tuple[TensorMerge, Any], ...] = ()
    adapted: frozenset[str] = frozenset()


@contextlib.contextmanager
def peft_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for PEFT's merges: each has as many torch threads as this one, because the bits depend on that."""
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(slots=True, kw_only=True)
class Walk:
    """One adapter's merge. `refused` has the layers that only safe_merge refuses.

    `cross_checked` has the layers that PEFT confirmed. `differing` has those whose merge in blocks is not PEFT's: the
    walk then has to run again, without blocks. `adapted` has the base's names of tensors under layers that were merged
    in their place. `sink` gets every tensor that the merge gives a value of its own.
    """

    base: Base
    loaded: Loaded
    measure_options: MeasureOptions
    progress: Progress | None = None
    on_work: Callable[[], None] = lambda: None
    in_blocks: bool = True
    sink: TensorSink | None = None
    safe_merge: bool = True
    ledger: Ledger = field(init=False)
    refused: list[str] = field(default_factory=list)
    cross_checked: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    adapted: set[str] = field(default_factory=set)
    layers_by_peft: int = 0
    layers: list[tuple[str, Any]] = field(init=False)
    planned: list[BlockLayer] = field(default_factory=list)
    blocks: dict[int, tuple[BlockLayer, TensorMerge]] = field(default_factory=dict)
    _beside: dict[int, Made] = field(default_factory=dict)
    _twins: Twins = field(default_factory=Twins)
    _turns: Turns = field(init=False)
    _total: int = 0
    _done: int = 0
    _depth: int = 0

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.base, sink=self.sink)

    def plan(self) -> None:
        """Find the layers that are merged in blocks: `planned`, in the model's order."""
        named = self.loaded.model.named_modules()
        layers = [(path.removeprefix(ADAPTER_PREFIX), one) for path, one in named if isinstance(one, BaseTunerLayer)]
        self.layers, self._total = layers, len(layers)
        self._turns = Turns(slot for _, layer in layers for slot in slots_of(layer, self.loaded.slots))
        if self.in_blocks:
            self.planned = plan_blocks(self.base, layers, self.loaded.slots, self._turns)

    def can_change(self, in_file: Collection[str]) -> dict[str, Outline]:
        """The base's tensors that the merge can change, and their shapes and dtypes afterwards.

        They are below a layer, or have a trained copy, or are in the adapter's file (`in_file`), or were resized.
        """
        in_blocks = {id(block.layer): [block.slot] for block in self.planned}
        slots = [in_blocks.get(id(layer)) or slots_of(layer, self.loaded.slots) for _, layer in self.layers]
        below = {slot.name for of_layer in slots for slot in of_layer} | set(in_file)
        wrappers = [one for one in self.loaded.model.modules() if isinstance(one, ModulesToSaveWrapper)]
        copied = {id(module) for wrapper in wrappers for module in wrapper.original_module.modules()}
        outlines: dict[str, Outline] = {}
        for module in self.loaded.model.modules():
            for attribute, tensor in module._parameters.items():
                name = self.base.first_name(self.loaded.slots.get((id(module), attribute), ""))
                known = self.base.tensors.get(name)
                if tensor is None or known is None:
                    continue
                if name in below or id(module) in copied or tensor.shape != known.shape:
                    outlines[name] = tensor.shape, known.dtype
        return outlines

    def refuse_too_large(self, free_bytes: int) -> None:
        """Refuse to begin if PEFT's own merge of a layer does not fit in memory: each kind of layer needs one.

        A lower bound: the weight, its copy, the copy that safe_merge makes, and the delta, which LoRA makes twice. A
        layer that is merged in blocks has no copy of its own (`cross_check`).

        Raises:
            EngineError: it does not fit.
        """
        in_blocks = {id(block.layer) for block in self.planned}
        needed = (
            (_peft_bytes(layer, self.loaded.slots, copies=1 if id(layer) in in_blocks else 2), path)
            for path, layer in self.layers
        )
        most, path = max(needed, default=(0, ""))
        if most > free_bytes:
            raise EngineError(
                f"PEFT's merge of {path} takes at least {most / 2**30:.1f} GiB of memory, and only "
                f"{free_bytes / 2**30:.1f} GiB are free: the base was not read",
                hint="run the gate with more memory, or raise the memory limit of its container or job",
            )

    def add(self, block: BlockLayer, merge: TensorMerge) -> None:
        """A planned layer was merged in blocks and measured. Layers without this call are left to PEFT's own merge."""
        self.blocks[id(block.layer)] = block, merge
        self._progressed(block.path)

    def cross_check(self, block: BlockLayer, merged: TensorMerge) -> bool:
        """Whether PEFT merges the layer to the same bits, on one thread like the blocks. `merged` has their figures."""
        slots = slots_of(block.layer, self.loaded.slots)
        copies = PrivateCopies(block.layer, slots, self.base, mapped=self.loaded.mapped, lends=True)
        with torch.no_grad(), copies:
            try:
                block.layer.merge(safe_merge=True)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception:
                return False  # PEFT gives the reason when it merges the whole adapter
            is_same = agrees(self.base, block, merged)
        return is_same and not copies.was_written

    def finish(self) -> None:
        """PEFT's merge_and_unload with every layer's merge wrapped.

        Raises:
            Refused: PEFT cannot merge this adapter; the fact quotes PEFT.
            Undecidable: a measurement failed, which says nothing about the adapter.
        """
        self._merge_beside()
        for path, layer in self.layers:
            layer.merge = self._wrapped(path, layer, layer.merge)
        try:
            merged = self.loaded.model.merge_and_unload(safe_merge=True)
        except (Refused, Undecidable, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # PEFT refuses with six kinds of exception
            raise self._refused(error) from error
        finally:
            for _, layer in self.layers:
                layer.__dict__.pop("merge", None)
        self.ledger.close(merged)

    def _wrapped(self, path: str, layer: Any, original: Callable[..., None]) -> Callable[..., None]:
        def merge(*positional: Any, **named: Any) -> None:
            if self._depth:  # PEFT merges an inner layer for the outer one
                original(*positional, **named)
                return
            names = inspect.signature(original).bind(*positional, **named).arguments.get("adapter_names")
            by_peft = functools.partial(original, adapter_names=names)
            self._depth += 1
            try:
                self._merge_layer(path, layer, by_peft)
            except (Refused, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise Undecidable("not_measured", module=path, error=caught(error)) from error
            finally:
                self._depth -= 1

        return merge

    def _progressed(self, path: str) -> None:
        self._done += 1
        if self.progress is not None:
            self.progress(self._done, self._total, path)

    # --- one layer ---

    def _merge_layer(self, path: str, layer: Any, by_peft: Callable[..., None]) -> None:
        if id(layer) in self.blocks:
            self._book_block(*self.blocks[id(layer)])
            return
        made = self._beside.pop(id(layer), None)
        if made is None:
            made = self._made(layer, by_peft)
            self._progressed(path)
        else:
            layer.merged_adapters.append(ADAPTER_NAME)
        if not made.safe:
            self.refused.append(path)
        for merge, changed in made.merges:
            self.ledger.book(merge, changed)
        self.adapted.update(made.adapted)
        self.layers_by_peft += 1

    def _made(self, layer: Any, by_peft: Callable[..., None], *, keep_marks: bool = True) -> Made:
        """Steps 1 to 4."""
        slots = slots_of(layer, self.loaded.slots)
        for slot in slots:
            self._turns.begin(slot)
        before = layer.get_base_layer()
        made = Made(safe=True)
        private = PrivateCopies(layer, slots, self.base, keep_marks=keep_marks, mapped=self.loaded.mapped)  # 1.
        with private as copies, Deltas(layer) as deltas, sums(slots) as packed:
            for slot in slots:
                self.base.confirm(slot.name)
            share = rounding_share(layer, self.loaded.initial_factors.get(id(layer)))  # of the weight before the merge
            safe = self._tried(by_peft, safe_merge=self.safe_merge)  # 2.
            if not safe or _at_the_edge(slots):
                copies.renew()
                packed.clear()
                self._tried(by_peft, safe_merge=False)
            if layer.get_base_layer() is before:
                changed = [(slot, tensor) for slot, tensor in _held(slots) if not self._is_the_bases(slot, tensor)]
                if any(is_quantized(tensor) for _, tensor in changed):
                    exact = exact_quantized(changed, packed)
                else:
                    exact = self._exact(layer, slots, changed, by_peft, deltas)
                made = self._measured(layer, slots, changed, exact, share)  # 3.
                self._pass_on(slots, changed)
            merged = [(slot, slot.tensor, slot.parameter.data) for slot in slots]
        for slot, tensor, data in merged:
            self._put_back(slot, tensor, data)  # 4.
        return replace(made, safe=safe)

    def apart(self) -> dict[str, list[tuple[str, Any]]]:
        """The layers that share nothing with others, and that PEFT has to merge: by a tensor of theirs."""
        left = [(path, layer) for path, layer in self.layers if id(layer) not in self.blocks]
        inside = {id(inner) for _, layer in left for inner in layer.modules() if inner is not layer}
        found: dict[str, list[tuple[str, Any]]] = {}
        for path, layer in left:
            if id(layer) not in inside and id(layer) not in self._beside and self._is_apart(layer):
                largest = max(slots_of(layer, self.loaded.slots), key=lambda slot: slot.data.numel())
                found.setdefault(largest.name, []).append((path, layer))
        return found

    def merge_beside(self, layer: Any) -> Made | None:
        """PEFT's merge of a layer that is apart. None if it failed: the walk repeats it, and reports it."""
        self.on_work()
        try:
            with torch.no_grad():
                return self._made(layer, functools.partial(layer.merge, adapter_names=None), keep_marks=False)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:
            return None

    def add_beside(self, path: str, layer: Any, made: Made) -> None:
        """Keep the result of `merge_beside` for the walk."""
        self._beside[id(layer)] = made
        self._progressed(path)

    def forget_beside(self) -> None:
        """Forget these results: a merge has drawn random numbers, and has to run in the order of the walk."""
        self._done -= len(self._beside)
        self._beside.clear()

    def _merge_beside(self) -> None:
        """Merge layers that share nothing with others, a few at a time."""
        apart = [one for layers in self.apart().values() for one in layers]
        if self.base.device.type != "cpu" or threads() == 1 or len(apart) < AT_A_TIME:
            return
        drawn = torch.get_rng_state()
        with peft_threads(AT_A_TIME) as pool:
            for (path, layer), made in zip(apart, pool.map(self.merge_beside, (one for _, one in apart)), strict=True):
                if made is not None:
                    self.add_beside(path, layer, made)
        if not torch.equal(drawn, torch.get_rng_state()):
            torch.set_rng_state(drawn)
            self.forget_beside()

    def _is_apart(self, layer: Any) -> bool:
        """Whether a layer merges only into tensors of the base, and no other layer uses these."""
        slots = slots_of(layer, self.loaded.slots)
        alone = all(
            type(slot.parameter) is nn.Parameter
            and self._turns.is_alone(slot)
            and slot.name in self.base.tensors
            and tensor_result.shares_storage(self.base.tensors[slot.name], slot.data)
            for slot in slots
        )
        tuners = [inner for inner in layer.modules() if isinstance(inner, BaseTunerLayer)]
        return bool(slots) and alone and tuners == [layer] and not list(layer.get_base_layer().children())

    def _put_back(self, slot: Slot, tensor: torch.Tensor | None, data: torch.Tensor) -> None:
        """Step 4.

        A tensor that another layer still has to merge into stays as this layer left it. So does a tensor that was no
        longer the base's own (rewritten by an initialization, overwritten by the file, or resized).
        """
        original = self._turns.end(slot)
        known = self.base.tensors.get(slot.name)
        if original is not None and known is not None and tensor_result.shares_storage(known, original):
            slot.put(slot.parameter, original)
        else:
            slot.put(tensor, data)

    def _refused(self, error: Exception) -> Refused:
        return Refused("merge_raised", **raised(error, self.loaded.config, self.base))

    def _tried(self, by_peft: Callable[..., None], *, safe_merge: bool) -> bool:
        """Step 2. False if PEFT's finite check refuses. Any other exception refuses the adapter."""
        try:
            by_peft(safe_merge=safe_merge)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # PEFT refuses with six kinds of exception
            if safe_merge and isinstance(error, ValueError) and "NaNs detected" in str(error):
                return False
            raise self._refused(error) from error
        return True

    def _book_block(self, block: BlockLayer, merge: TensorMerge) -> None:
        """Enter a layer that was merged in blocks, and mark it as merged for PEFT."""
        block.layer.merged_adapters.append(ADAPTER_NAME)
        self._turns.end(block.slot)
        self.ledger.book(merge, block.layer)
        self.ledger.passed_on.add(block.slot.name)
        self.adapted.update(slot.name for slot in slots_of(block.layer, self.loaded.slots))

    # --- step 3 ---

    def _measured(
        self,
        layer: Any,
        slots: list[Slot],
        changed: list[tuple[Slot, torch.Tensor]],
        exact: dict[str, torch.Tensor],
        share: float,
    ) -> Made:
        of_bias = min(share, tensor_result.ROUNDING_SHARE)  # the bias is trained apart from the factors (lora_bias)
        merges = tuple(
            (
                tensor_result.of_tensor(
                    self.base,
                    slot.module,
                    slot.name,
                    tensor,
                    exact.get(slot.name),
                    rounding_share=of_bias if slot.attribute == "bias" else share,
                ),
                layer if any(slot is one for one, _ in changed) else None,
            )
            for slot, tensor in _held(slots)
        )
        return Made(safe=True, merges=merges, adapted=frozenset(slot.name for slot, _ in _held(slots)))

    def _pass_on(self, slots: list[Slot], changed: list[tuple[Slot, torch.Tensor]]) -> None:
        """Hand out what the layer changed, and again what a layer before it had changed."""
        for slot, tensor in _held(slots):
            if slot.name in self.ledger.passed_on or any(slot is one for one, _ in changed):
                self.ledger.pass_on(slot.module, slot.name, tensor)

    def _is_the_bases(self, slot: Slot, tensor: torch.Tensor) -> bool:
        return tensor_result.is_the_bases(self.base, slot.name, tensor)

    def _exact(
        self,
        layer: Any,
        slots: list[Slot],
        changed: list[tuple[Slot, torch.Tensor]],
        by_peft: Callable[..., None],
        deltas: Deltas,
    ) -> dict[str, torch.Tensor]:
        """The same merge into float32 copies: the merged tensors without the rounding of their dtype."""
        rounded = [slot for slot, tensor in changed if tensor.dtype in tensor_result.ROUNDED]
        if not rounded:
            return {}
        try:
            with PrivateCopies(layer, slots, self.base, dtype=torch.float32), self._twins.of(layer, deltas):
                by_peft(safe_merge=False)
                return {slot.name: slot.tensor.data for slot in rounded if slot.tensor is not None}
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:
            return {}  # the loss by rounding is then not reported; it is only a warning


def _peft_bytes(layer: Any, names: Names, *, copies: int) -> int:
    slots = slots_of(layer, names)
    if any(is_quantized(slot.parameter) for slot in slots):
        return 0  # it is in memory, and its merge takes a few times as much
    factors, largest = factors_of(layer), max((slot.data.numel() for slot in slots), default=0)
    stored = max((slot.data.nbytes for slot in slots), default=0)
    return (1 + copies) * stored + (2 * largest * factors[1].itemsize if factors is not None else stored)


def _held(slots: list[Slot]) -> list[tuple[Slot, torch.Tensor]]:
    return [(slot, tensor) for slot in slots if (tensor := slot.tensor) is not None]


def _at_the_edge(slots: list[Slot]) -> bool:
    """Whether a merged value is the largest of a 16-bit dtype: rounded once, W + delta may then be Inf."""
    merged = [slot.tensor for slot in slots if slot.tensor is not None and slot.tensor.dtype in tensor_result.ROUNDED]
    return any(measure(tensor, "").max_abs >= dtype_max(tensor.dtype) for tensor in merged)
