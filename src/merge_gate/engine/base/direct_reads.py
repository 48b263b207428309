"""Layers whose weight a model reads without calling them: what one forward pass shows, with tensors that hold no data.

In: a model. Out: `Reads`. Writes to nothing, and takes no memory for tensors. Knows nothing of adapters.

PEFT puts a layer of its own in the place of a Linear; its part of the sum is in what that layer returns. Some models
never call the Linear: `nn.MultiheadAttention` takes `out_proj.weight` and multiplies for itself. What counts here is
positive evidence, never that a layer was not called (no token may have gone to an expert):

1. The model is copied; each parameter becomes a fake tensor, which has a shape and no data, and a history.
2. While a layer's forward runs, each of its parameters is another leaf of that history.
3. The model runs once, on inputs that are made up by their names. Where it fails, its parts that are models do.
4. A layer is read apart where its parameter itself is in the history of what came out, and that other leaf is not.

What cannot run is not known, and nothing is said of it. Nor is the code of a base's own (trust_remote_code) run.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

MOST_CALLS = 30_000
"""Calls of torch in one forward pass, beyond which it is given up: a Llama of 80 layers makes 5,345."""

TOKENS, SAMPLES, FRAMES, EDGE, CHANNELS = 8, 4_000, 100, 32, 3
"""Sizes of inputs where the configuration names none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """`apart` are modules whose parameters a forward reads without calling them; `in_logits` those of them in a logit.

    `complete`: the whole model ran, and `ran` are the modules with parameters of their own that it came to. Otherwise
    `apart` is what its parts have shown, as far as they came.
    """

    complete: bool = False
    ran: frozenset[str] = frozenset()
    apart: frozenset[str] = frozenset()
    in_logits: frozenset[str] = frozenset()


def trace(model: nn.Module) -> Reads:
    """What a forward pass reads past its layers; nothing where the model cannot run so, or is not transformers' own."""
    if not isinstance(model, transformers.PreTrainedModel) or _has_foreign_code(model):
        return Reads()
    state, disabled = torch.get_rng_state(), logging.root.manager.disable
    logging.disable()  # torch and transformers say what cannot run
    try:
        with (
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),  # nothing is compiled for this
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            return _traced(_faked(model))
    except Exception:
        return Reads()  # a model that cannot be copied so
    finally:
        logging.disable(disabled)
        torch.set_rng_state(state)


def _has_foreign_code(model: nn.Module) -> bool:
    ours = ("transformers.", "torch.")
    return not all(type(module).__module__.startswith(ours) for module in model.modules())


def _faked(model: nn.Module) -> Any:
    """Step 1."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for tensor in own.values():
                if tensor is not None and id(tensor) not in memo:
                    fake: torch.Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if own is module._parameters:
                        fake = nn.Parameter(fake, requires_grad=fake.is_floating_point())
                    memo[id(tensor)] = fake
    copied: Any = copy.deepcopy(model, memo).eval()
    with contextlib.suppress(Exception):  # the usual way groups tokens by expert, which depends on values
        copied.set_experts_implementation("batched_mm")
    return copied


def _traced(model: Any) -> Reads:
    layers = _Layers(model)
    whole = _ran(model)
    if whole.complete:
        logits = (value for name, value in whole.named if name.startswith("logits"))
        return Reads(
            complete=True,
            ran=frozenset(layers.ran),
            apart=layers.apart(whole.outputs),
            in_logits=layers.apart(logits),
        )
    outputs = whole.outputs
    done: list[str] = []
    for path, part in model.named_modules():
        inside = any(path.startswith(f"{one}.") for one in done)
        if path and isinstance(part, transformers.PreTrainedModel) and not inside:
            ran = _ran(part)
            outputs += ran.outputs
            done += [path] if ran.complete else []
    return Reads(apart=layers.apart(outputs))


class _Layers:
    """Step 2: the modules of a model that own a parameter alone, and the leaves that stand for it while they run."""

    def __init__(self, model: nn.Module) -> None:
        self._owned: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        self.ran: set[str] = set()
        holders: dict[int, int] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                holders[id(parameter)] = holders.get(id(parameter), 0) + 1
        for path, module in model.named_modules():
            leaves = {
                name: (parameter, parameter.detach().requires_grad_())
                for name, parameter in module._parameters.items()
                if parameter is not None and parameter.is_floating_point() and holders[id(parameter)] == 1
            }
            if leaves:
                self._owned += [(path, *pair) for pair in leaves.values()]
                exchanged = {name: leaf for name, (_, leaf) in leaves.items()}
                module.forward = _exchanging(module, exchanged, functools.partial(self.ran.add, path))

    def apart(self, outputs: Iterable[torch.Tensor]) -> frozenset[str]:
        """Step 4."""
        found = _leaves(outputs)
        called = {path for path, _, leaf in self._owned if id(leaf) in found}
        return frozenset(path for path, parameter, _ in self._owned if id(parameter) in found and path not in called)


def _exchanging(module: nn.Module, leaves: dict[str, torch.Tensor], begun: Callable[[], None]) -> Callable[..., Any]:
    forward = module.forward

    @functools.wraps(forward)
    def run(*positional: Any, **named: Any) -> Any:
        begun()
        held = dict(module._parameters)
        module._parameters.update(leaves)  # type: ignore[arg-type]
        try:
            return forward(*positional, **named)
        finally:
            module._parameters.update(held)

    return run


def _leaves(outputs: Iterable[torch.Tensor]) -> set[int]:
    """Ids of the tensors that a history begins with."""
    waiting: list[Any] = [one.grad_fn for one in outputs if one.grad_fn is not None]
    seen: set[Any] = set()
    found: set[int] = set()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                found.add(id(node.variable))
            waiting += [other for other, _ in node.next_functions if other is not None]
    return found


# --- one forward pass --------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class _Run:
    """What came out, by the names of the model's output; of a run that failed, what its modules returned until then."""

    complete: bool
    named: list[tuple[str, torch.Tensor]] = field(default_factory=list)

    @property
    def outputs(self) -> list[torch.Tensor]:
        return [tensor for _, tensor in self.named]


def _ran(model: Any) -> _Run:
    """Step 3."""
    until_then: list[tuple[str, torch.Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: until_then.extend(tensors_of(output)))
        for module in model.modules()
    ]
    try:
        with _Bounded():
            return _Run(complete=True, named=list(tensors_of(model(**inputs_of(model)))))
    except Exception:  # inputs that do not fit, or a way that depends on values, which are not there
        return _Run(complete=False, named=until_then)
    finally:
        for hook in hooks:
            hook.remove()


class _Bounded(TorchFunctionMode):
    """No more than so many calls of torch."""

    def __init__(self) -> None:
        super().__init__()
        self._left = MOST_CALLS

    def __torch_function__(self, function: Any, _types: Any, positional: Any = (), named: Any = None) -> Any:
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("too many calls")
        return function(*positional, **(named or {}))


def tensors_of(output: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an output, under the name that it gives them."""
    if isinstance(output, torch.Tensor):
        yield name, output
    elif isinstance(output, dict):
        for key, value in output.items():
            yield from tensors_of(value, name or str(key))
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_of(value, name)


def inputs_of(model: Any) -> dict[str, Any]:
    """An input for each parameter of the forward that has a known name."""
    config = model.config
    dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
    tall, wide = _edges(config)
    bins = _of(config, "num_mel_bins", "feature_size", "input_feat_per_channel", default=80)
    shapes = {
        "pixel_values": (1, _of(config, "num_channels", "in_chans", "in_channels", default=CHANNELS), tall, wide),
        "input_features": (1, bins, 2 * _of(config, "max_source_positions", default=FRAMES // 2)),
        "input_values": (1, SAMPLES),
        "hidden_states": (1, TOKENS, _of(config, "hidden_size", default=EDGE)),
    }
    found: dict[str, Any] = {}
    for name in inspect.signature(type(model).forward).parameters:
        if name in {"input_ids", "decoder_input_ids"}:
            found[name] = torch.ones(1, TOKENS, dtype=torch.long)
        elif name == "bbox":
            found[name] = torch.ones(1, TOKENS, 4, dtype=torch.long)
        elif name == "use_cache":
            found[name] = False
        elif name in shapes:
            found[name] = torch.ones(shapes[name], dtype=dtype)
    return found


def _edges(config: Any) -> tuple[int, int]:
    size = _of(config, "image_size", "img_size", default=EDGE)
    if isinstance(size, dict):
        size = (size.get("height", EDGE), size.get("width", EDGE))
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _of(config: Any, *names: str, default: int) -> Any:
    """A number of the configuration, or of that of its vision tower."""
    places = (config, getattr(config, "vision_config", None))
    found = (getattr(place, name, None) for place in places for name in names)
    return next((value for value in found if value is not None), default)
