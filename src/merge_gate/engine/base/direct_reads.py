"""Finds layers whose weight a model reads without calling the layer, by one forward pass on tensors without data.

In: a model. Out: `DirectReads`. The model is not changed, and this module imports nothing of adapters.

1. Copy the model. Each parameter becomes a fake tensor, which has a shape, an autograd history, and no data.
2. While a layer's forward runs, replace each of its parameters by another leaf of the autograd graph.
3. Run the model, on the first inputs that it accepts (made_up_inputs.py). Then run those of its parts that are models
   and that did not run.
4. A layer is read directly if the graph of the outputs contains its parameter, but not the leaf that replaced it.
"""

# PEFT replaces a Linear by its own layer, which adds the delta to what the Linear returns. Some models never call the
# Linear: `nn.MultiheadAttention` reads `out_proj.weight` and multiplies by itself. Step 4 needs positive evidence. It
# is no evidence that a layer was not called, because an expert may have received no token.
#
# A model that does not run gives no evidence. The code of a base (trust_remote_code) is never run here.

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from merge_gate.engine.base.made_up_inputs import candidates
from merge_gate.engine.tensors.module_copies import fake_copy

MOST_CALLS = 30_000
"""The limit of torch calls in all forward passes of a model. A Llama with 80 layers makes 5,345."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectReads:
    """What the forward passes showed.

    `modules` are those whose parameters the forward reads without calling them, and `in_logits` those of them that a
    logit depends on. `complete`: the model accepted some inputs. `ran` are then the modules with parameters of their
    own whose forward ran. Of a pass that failed, `modules` has what the outputs up to the failure show.
    """

    complete: bool = False
    ran: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()
    in_logits: frozenset[str] = frozenset()


def trace(model: nn.Module) -> DirectReads:
    """Run steps 1 to 4. The result is empty if the model does not run this way, or is not transformers' own."""
    if not isinstance(model, transformers.PreTrainedModel) or has_foreign_code(model):
        return DirectReads()
    state, disabled = torch.get_rng_state(), logging.root.manager.disable
    logging.disable()  # torch and transformers log what cannot run
    try:
        with (
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),  # compiling would cost more than the pass
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            return _trace_fake(fake_copy(model))
    except Exception:  # the model cannot be copied this way
        return DirectReads()
    finally:
        logging.disable(disabled)
        torch.set_rng_state(state)


def has_foreign_code(model: nn.Module) -> bool:
    """Whether the class of some module is defined outside of transformers and torch."""
    libraries = ("transformers.", "torch.")
    return not all(type(module).__module__.startswith(libraries) for module in model.modules())


def _trace_fake(model: Any) -> DirectReads:
    leaves, calls = _Leaves(model), _CallLimit()
    returned, outputs = _run(model, calls)
    complete, ran = returned is not None, frozenset(leaves.ran)
    # 3., from the outside in
    complete_parts: list[str] = []
    for path, part in model.named_modules():
        is_inside = any(path.startswith(f"{outer}.") for outer in complete_parts)
        has_run = complete and any(f"{module_path}.".startswith(f"{path}.") for module_path in ran)
        if path and isinstance(part, transformers.PreTrainedModel) and not is_inside and not has_run:
            returned_by_part, of_part = _run(part, calls)
            outputs += of_part
            complete_parts += [path] if returned_by_part is not None else []
    named = returned.items() if isinstance(returned, dict) else ()
    logits = [value for name, value in named if name.startswith("logits")]
    return DirectReads(
        complete=complete,
        ran=ran if complete else frozenset(),
        modules=leaves.read_directly(outputs),
        in_logits=leaves.read_directly(_tensors_of(logits)),
    )


class _Leaves:
    """Step 2: for each parameter that only one module holds, the leaf that replaces it while that module runs."""

    def __init__(self, model: nn.Module) -> None:
        self._replaced: list[tuple[str, torch.Tensor, torch.Tensor]] = []  # (path, parameter, leaf)
        self.ran: set[str] = set()
        holders: dict[int, int] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                holders[id(parameter)] = holders.get(id(parameter), 0) + 1
        for path, module in model.named_modules():
            pairs = {
                name: (parameter, parameter.detach().requires_grad_())
                for name, parameter in module._parameters.items()
                if parameter is not None and parameter.is_floating_point() and holders[id(parameter)] == 1
            }
            if pairs:
                self._replaced += [(path, *pair) for pair in pairs.values()]
                leaves = {name: leaf for name, (_, leaf) in pairs.items()}
                module.forward = _with_leaves(module, leaves, functools.partial(self.ran.add, path))

    def read_directly(self, outputs: Iterable[torch.Tensor]) -> frozenset[str]:
        """Step 4."""
        reached = _leaves_of(outputs)
        called = {path for path, _, leaf in self._replaced if id(leaf) in reached}
        return frozenset(
            path for path, parameter, _ in self._replaced if id(parameter) in reached and path not in called
        )


def _with_leaves(
    module: nn.Module, leaves: dict[str, torch.Tensor], on_start: Callable[[], None]
) -> Callable[..., Any]:
    """The module's forward, with `leaves` for its parameters while it runs."""
    forward = module.forward

    @functools.wraps(forward)
    def run(*positional: Any, **named: Any) -> Any:
        on_start()
        parameters = dict(module._parameters)
        module._parameters.update(leaves)  # type: ignore[arg-type]
        try:
            return forward(*positional, **named)
        finally:
            module._parameters.update(parameters)

    return run


def _leaves_of(outputs: Iterable[torch.Tensor]) -> set[int]:
    """Ids of the tensors in which the autograd graph of the outputs starts."""
    pending: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen: set[Any] = set()
    leaves: set[int] = set()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):  # only the node of a leaf has it
                leaves.add(id(node.variable))
            pending += [other for other, _ in node.next_functions if other is not None]
    return leaves


# --- forward passes ----------------------------------------------------------------------------------------------


def _run(model: Any, calls: TorchFunctionMode) -> tuple[Any, list[torch.Tensor]]:
    """Step 3: what the model returned, or None, and all tensors that show what was read.

    Of a pass that failed, these are what its modules returned before that.
    """
    shown: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: shown.extend(_tensors_of(output)))
        for module in model.modules()
    ]
    try:
        for _, inputs in candidates(model):
            before = len(shown)
            with contextlib.suppress(Exception), calls:  # inputs that do not fit, or code that needs values
                returned = model(**inputs)
                shown[before:] = _tensors_of(returned)
                return returned, shown
    finally:
        for hook in hooks:
            hook.remove()
    return None, shown


class _CallLimit(TorchFunctionMode):
    """Stops after MOST_CALLS calls of torch."""

    def __init__(self) -> None:
        super().__init__()
        self._remaining = MOST_CALLS

    def __torch_function__(self, function: Any, _types: Any, positional: Any = (), named: Any = None) -> Any:
        self._remaining -= 1
        if self._remaining < 0:
            raise RuntimeError("too many calls")
        return function(*positional, **(named or {}))


def _tensors_of(output: Any) -> list[torch.Tensor]:
    return [value for value in _pytree.tree_leaves(output) if isinstance(value, torch.Tensor)]
