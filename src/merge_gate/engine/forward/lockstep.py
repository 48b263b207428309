"""Runs several models that share lazy tensors at the same time, so that each tensor is filled once for all of them.

In: models, their inputs, and the lazy tensors (lazy_tensors.py). Out: a `ModelRun` for each model: what it returned, or
its exception. Knows no adapter but DoRA. A model without lazy tensors runs as it would alone.

1. Each model runs in a thread of its own, and only one thread runs at a time.
2. Before an operation reads a lazy tensor, its thread waits. An operation that writes to one, or to another parameter
   of its model, fails.
3. When all threads wait, the tensors of the module that comes first in the model are filled, as far as a thread waits
   for them, and these threads go on. They are emptied when no thread waits for a tensor of this module any more.
4. Products of float16 matrices are summed in float32 and rounded once, as on a card. torch takes twice the time for
   them on a CPU, and may differ in the last bit.
5. PEFT makes the norms of a DoRA layer from a product as large as its weight, in each forward. `with_norms_in_blocks`
   makes them from W + scaling · B @ A, a few rows at a time.

An operation reads its tensors, whichever module they belong to. So a model that reads a layer's weight without calling
the layer runs like any other. The tensors of a module stay filled together, because models may read them in turns, or
in another order than each other.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from merge_gate.engine.tensors.watch import Memory, written_arguments
from merge_gate.records.refusals import Refused

MOST_OPERATIONS = 200_000
"""The limit of one model's operations, for code that loops. A Llama with 80 layers needs about 10,000."""

PRODUCT_ELEMENTS = 1 << 19
"""Elements of a matrix that are in float32 at the same time: 2 MiB, which stay in the processor's cache."""

Filled = Callable[[Iterable[str]], AbstractContextManager[None]]
Own = Callable[[str], torch.Tensor | None]
Place = tuple[int, str]
"""The number of a module, and the name of one of its tensors."""


@dataclass(slots=True, kw_only=True)
class ModelRun:
    """One model's forward pass. `own` gives this model's values of a lazy tensor, or None for the tensor's own.

    Nothing is written into `memory`. `returned` is what the model returned. `error` is why it returned nothing.
    """

    model: Any
    inputs: Mapping[str, Any]
    own: Own | None = None
    memory: Memory = field(default_factory=Memory)
    returned: Any = None
    error: BaseException | None = None


def run_together(runs: Sequence[ModelRun], tensors: Mapping[str, torch.Tensor], filled: Filled) -> None:
    """Run all of them, each as if it ran alone, with seed 0, except for step 4.

    Args:
        runs: the models. One that fails has its exception in `error`; the others go on.
        tensors: the lazy tensors by name. Their order decides which module is next.
        filled: gives the tensors of these names values for a `with` block. Its exceptions are raised.
    """
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as alone:  # threads.py says why
        alone.submit(_take_turns, runs, tensors, filled).result()


@torch.no_grad()
def _take_turns(runs: Sequence[ModelRun], tensors: Mapping[str, torch.Tensor], filled: Filled) -> None:
    numbers: dict[str, int] = {}
    places = {
        address: (numbers.setdefault(name.rpartition(".")[0], len(numbers)), name)
        for name, tensor in tensors.items()
        if (address := _address(tensor))
    }
    threads: list[_Thread] = []
    try:
        for run in runs:
            threads.append(_Thread(run, places))
            threads[-1].go_on(set())
        while waiting := [thread for thread in threads if thread.wanted]:  # 3.
            modules = min(thread.modules for thread in waiting)
            with contextlib.ExitStack() as stack:
                is_open: set[Place] = set()
                while ready := [thread for thread in threads if thread.wanted and thread.modules == modules]:
                    wanted = {place for thread in ready for place in thread.wanted} - is_open
                    stack.enter_context(filled(name for _, name in sorted(wanted)))
                    is_open |= wanted
                    for thread in ready:
                        thread.go_on(is_open)
    finally:
        for thread in threads:
            thread.stop()


class _Stopped(BaseException):
    """Ends a thread that waits for a tensor that will not come."""


class _Thread:
    """Steps 1 and 2. `wanted` are the tensors that it waits for; empty if it has ended."""

    def __init__(self, run: ModelRun, places: Mapping[int, Place]) -> None:
        self.wanted: set[Place] = set()
        self._run, self.places = run, places
        parameters = run.model.parameters() if isinstance(run.model, nn.Module) else ()
        self.weights = {*places, *filter(None, map(_address, parameters))}
        self._open: set[Place] | None = None
        self._own: dict[str, torch.Tensor | None] = {}
        self._turns: SimpleQueue[set[Place] | None] = SimpleQueue()
        self._pauses: SimpleQueue[set[Place]] = SimpleQueue()
        self._random = torch.Generator().manual_seed(0).get_state()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def modules(self) -> list[int]:
        """The numbers of the modules whose tensors it waits for."""
        return sorted({number for number, _ in self.wanted})

    def go_on(self, is_open: set[Place]) -> None:
        """Let the model run, with these tensors, until it waits for another one, or ends."""
        before = torch.get_rng_state()
        torch.set_rng_state(self._random)
        self._turns.put(is_open)
        self.wanted = self._pauses.get()
        self._random = torch.get_rng_state()
        torch.set_rng_state(before)

    def stop(self) -> None:
        """End the thread, wherever it is."""
        self._turns.put(None)
        self._thread.join()

    def name_in_base(self, tensor: torch.Tensor) -> str | None:
        """The name of the base's tensor in whose memory this one lies."""
        is_plain = tensor.layout is torch.strided and not tensor.is_meta
        return self._run.memory.name_of(tensor) if is_plain else None

    def wait_for(self, places: set[Place]) -> None:
        """Called by the model's own thread before it reads these tensors."""
        if self._open is None:  # the model's code has caught `_Stopped`
            raise _Stopped
        if not places <= self._open:
            self._pauses.put(places)
            self._wait()

    def values(self, name: str) -> torch.Tensor | None:
        """The model's own values of a tensor, made once while it is filled."""
        if self._run.own is not None and name not in self._own:
            own = self._run.own(name)
            self._own[name] = own if own is None else own.contiguous()
        return self._own.get(name)

    def _wait(self) -> None:
        self._open = self._turns.get()
        if self._open is None:
            raise _Stopped
        still_open = {name for _, name in self._open}
        self._own = {name: own for name, own in self._own.items() if name in still_open}

    def _work(self) -> None:
        try:
            self._wait()
            with torch.no_grad(), _Reads(self):
                self._run.returned = self._run.model(**self._run.inputs)
        except _Stopped:
            pass
        except BaseException as error:  # a model's own code, which may call `sys.exit`
            self._run.error = error.with_traceback(None)  # which would keep all tensors of the run
        finally:
            self._own.clear()
            self._pauses.put(set())


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Waits before each operation that reads a lazy tensor, and gives the operation the model's own values of it."""

    def __init__(self, thread: _Thread) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._thread, self._remaining = thread, MOST_OPERATIONS

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._remaining -= 1
        if self._remaining < 0:
            raise RuntimeError(f"more than {MOST_OPERATIONS} operations")
        kwargs = kwargs or {}
        written = (kwargs.get(name, args[at] if at < len(args) else None) for at, name in written_arguments(function))
        for tensor in _tensors(written):
            self._refuse(function, tensor)
        if not _returns_views(function):
            places = {*filter(None, map(self._place, (*_tensors(args), *_tensors(kwargs.values()))))}
            if places:
                self._thread.wait_for(places)
                args, kwargs = _pytree.tree_map(self._replaced, (args, kwargs))
        is_product = function.name() in {"aten::mm", "aten::addmm"} and not kwargs
        if is_product and {tensor.dtype for tensor in args} == {torch.float16}:  # torch refuses a mixture
            return _in_float32(*args)
        return function(*args, **kwargs)

    def _refuse(self, function: Any, tensor: torch.Tensor) -> None:
        """Refuse a write to a weight. RWKV's own forward does so."""
        name = self._thread.name_in_base(tensor)
        if name is not None:
            operation = function.overloadpacket.__name__
            raise Refused("base_written", tensor=name, operation=operation, step="forward run")
        if _address(tensor) in self._thread.weights:
            raise RuntimeError(f"{function} writes to a weight")

    def _place(self, value: Any) -> Place | None:
        return self._thread.places.get(_address(value)) if isinstance(value, torch.Tensor) else None

    def _replaced(self, value: Any) -> Any:
        """The same view of the model's own values, if it has some."""
        place = self._place(value)
        own = self._thread.values(place[1]) if place is not None else None
        if own is None:
            return value
        return own.as_strided(value.shape, value.stride(), own.storage_offset() + value.storage_offset())


def _in_float32(*args: torch.Tensor) -> torch.Tensor:
    """Step 4, for `mm` and `addmm`."""
    *bias, left, right = args
    parts = torch.split(right, max(1, PRODUCT_ELEMENTS // max(1, len(right))), dim=1)
    product = torch.cat([left.float() @ part.float() for part in parts], 1)
    return sum(bias, product).half()


def with_norms_in_blocks(model: nn.Module) -> None:
    """Step 5, for all layers of a model."""
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "get_weight_norm"):
            layer.forward = functools.partial(_forward_of_dora, layer)


def _forward_of_dora(layer: Any, x: torch.Tensor, *, base_layer: Any, **given: Any) -> Any:
    """PEFT's forward. It needs the weights for their norms alone, so it gets one number in their shape."""
    norms = _norms(layer, base_layer.weight, given["lora_A"], given["lora_B"], given["scaling"])
    outline = norms.new_empty(()).expand(base_layer.weight.shape)
    layer.get_lora_weight, layer.get_weight_norm = (lambda **_: outline), (lambda **_: norms)
    inner = SimpleNamespace(weight=outline, bias=getattr(base_layer, "bias", None))
    return type(layer).forward(layer, x, base_layer=inner, **given)


def _norms(layer: Any, weight: torch.Tensor, lora_a: Any, lora_b: Any, scaling: float) -> torch.Tensor:
    """A norm for each output, with further dimensions for a convolution. An embedding has Aᵀ and Bᵀ, and no modules."""
    a, b = (factor.weight.flatten(1) if hasattr(factor, "weight") else factor.T for factor in (lora_a, lora_b))
    left, right = (a.T, b.T) if layer.fan_in_fan_out else (b, a)
    rows, dim = weight.flatten(1), 0 if layer.fan_in_fan_out else 1
    parts = zip(
        *(torch.split(matrix, max(1, PRODUCT_ELEMENTS // rows.shape[1])) for matrix in (rows, left)), strict=True
    )
    norms = [part.to(a.dtype, copy=True).addmm_(of_part, right, alpha=scaling).norm(dim=dim) for part, of_part in parts]
    joined: torch.Tensor = torch.cat(norms) if dim else torch.stack(norms).norm(dim=0)
    return joined.view(1, -1, *[1] * (weight.dim() - 2))


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among arguments of an operation, which are values and lists of values."""
    for argument in arguments:
        if isinstance(argument, list | tuple):
            yield from _tensors(argument)
        elif isinstance(argument, torch.Tensor):
            yield argument


def _address(tensor: torch.Tensor) -> int:
    """That of the tensor's storage; 0 if it has none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided and tensor.numel() else 0


@functools.cache
def _returns_views(function: Any) -> bool:
    """Whether an operation reads no values: what it returns are views of what it gets."""
    return any(value.alias_info is not None and not value.alias_info.is_write for value in function._schema.returns)
