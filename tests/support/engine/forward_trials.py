"""A model type on made-up inputs: which inputs run it, in lockstep or alone.

In: a model type. Out: `Outcome`. The gate makes the inputs and the lockstep; transformers and PEFT are what both are
held against.
"""

import contextlib
import copy
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from merge_gate.engine.base.made_up_inputs import Inputs, candidates
from merge_gate.engine.forward.lockstep import ModelRun
from merge_gate.engine.tensors import module_copies
from tests.support.engine import architectures
from tests.support.methods import quiet, same_tensor

MOST_CPU_S = 4
"""No further configuration is tried after that."""

Measure = Callable[[Any, Any, Inputs, list[torch.Tensor], list[torch.Tensor]], dict[str, Any]]
"""Gets the model, PEFT's model, their inputs, and the outputs of both. Returns more fields of the outcome."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came out for one type.

    `inputs` and `number` are the first inputs that ran the whole model, and how many were tried; `failure` is why the
    first ones did not. `share` is the share of parameters that were read, `unlike` the dtypes in which the model does
    not run or is not finite. `twice` are the modules that lockstep filled more often than the model, alone, comes back
    to them from other modules.
    `differs` says which layers compute another thing once they are merged.
    """

    model_class: str
    is_causal: bool
    inputs: str | None = None
    number: int = 0
    failure: str | None = None
    share: float = 0.0
    repeats: bool = False
    finite: bool = False
    unlike: tuple[str, ...] = ()
    adapter: str | None = None
    lockstep: str | None = None
    twice: tuple[str, ...] = ()
    error: float = 0.0
    differs: tuple[str, ...] = ()


def trial(model_type: str, measure: Measure = lambda *_: {}) -> Outcome:
    """Build, run, adapt, run in lockstep, and what else is measured.

    Raises:
        CannotBuildError: transformers builds no small model of this type.
    """
    started, outcome = time.process_time(), None
    for architecture, model in architectures.models(model_type, torch.float32):
        model_class, is_causal = architecture.model_class.__name__, architecture.task_type == "CAUSAL_LM"
        if outcome is not None and outcome.model_class != model_class:
            break
        ran = first_that_runs(model.eval())
        if isinstance(ran, str):
            outcome = outcome or Outcome(model_class=model_class, is_causal=is_causal, failure=ran)
        else:
            name, number, inputs = ran
            facts = _facts(architecture, model, inputs, measure)
            return Outcome(model_class=model_class, is_causal=is_causal, inputs=name, number=number, **facts)
        if time.process_time() - started > MOST_CPU_S:
            break
    assert outcome is not None
    return outcome


def first_that_runs(model: Any) -> tuple[str, int, Inputs] | str:
    """The first inputs that the model accepts, and their number; or why the first ones failed."""
    failure = None
    for number, (name, inputs) in enumerate(candidates(model), start=1):
        try:
            returned(model, inputs)
        except Exception as error:  # noqa: BLE001 - a model's own
            failure = failure or sentence(error)
            continue
        return name, number, inputs
    return failure or "no inputs are known"


def outputs(model: Any, inputs: Inputs) -> list[torch.Tensor]:
    """The floating tensors that the model returns, with seed 0."""
    return floating(returned(model, inputs))


def floating(returned: Any) -> list[torch.Tensor]:
    """The floating tensors in what a model returns."""
    from merge_gate.engine.forward.activations import tensors_of  # noqa: PLC0415 - the inputs need no feature

    return list(tensors_of(returned))


def returned(model: Any, inputs: Inputs) -> Any:
    """What the model returns, with seed 0."""
    given = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    with torch.no_grad(), quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(**given)


def _facts(architecture: architectures.Architecture, model: Any, inputs: Inputs, measure: Measure) -> dict[str, Any]:
    with _Reads(model) as reads:
        of_base = outputs(model, inputs)
    facts: dict[str, Any] = {
        "repeats": alike(of_base, outputs(model, inputs)),
        "finite": all(bool(torch.isfinite(one).all()) for one in of_base),
    }
    try:
        with quiet():
            adapted = architectures.with_lora(architecture, copy.deepcopy(model, module_copies.tensors_of(model)))
        unmerged = adapted.get_base_model().eval()
        of_adapter = outputs(unmerged, inputs)
    except Exception as error:  # noqa: BLE001 - PEFT's own, or the model's with its layers
        adapted, unmerged, of_adapter = None, None, []
        facts["adapter"] = sentence(error)
    models, expected = [model, *([unmerged] if unmerged else [])], [of_base, *([of_adapter] if unmerged else [])]
    runs, filled = in_lockstep(models, inputs, model)
    sizes = {name: one.numel() for name, one in model.named_parameters()}
    facts["share"] = sum(sizes[name] for name in filled) / max(1, sum(sizes.values()))
    facts["twice"] = tuple(sorted({name.rpartition(".")[0] for name in filled if filled[name] > reads.needed[name]}))
    facts["lockstep"] = next(
        (
            f"{who}: {sentence(run.error) if run.error else 'other bits'}"
            for who, run, plain in zip(("base", "adapter"), runs, expected, strict=False)
            if run.error or not alike(plain, floating(run.returned))
        ),
        None,
    )
    return facts | measure(model, adapted, inputs, of_base, of_adapter)


class _Reads(TorchDispatchMode):
    """How often each parameter has to be filled for the operations of a model: once for each stay in its module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {one.untyped_storage().data_ptr(): name for name, one in model.named_parameters()}
        self._modules, self._here = set[str](), set[str]()
        self.needed = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = function(*args, **kwargs or {})
        given = [one for one in _pytree.tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        made = [one for one in _pytree.tree_leaves(returned) if isinstance(one, torch.Tensor)]
        memory = {one.untyped_storage().data_ptr() for one in made}
        places = {one.untyped_storage().data_ptr() for one in given} - memory  # a view reads no values
        names = {self._names[place] for place in places if place in self._names}
        if names:
            modules = {name.rpartition(".")[0] for name in names}
            if modules != self._modules:
                self._modules, self._here = modules, set()
            self.needed.update(names - self._here)
            self._here |= names
        return returned


def in_lockstep(models: list[Any], inputs: Inputs, base: nn.Module) -> tuple[list[ModelRun], Counter[str]]:
    """Run them, with NaN in the base's tensors except while they are filled. How often each was filled."""
    from merge_gate.engine.forward.lockstep import ModelRun, run_together  # noqa: PLC0415

    tensors = {name: one for name, one in base.named_parameters() if one.is_floating_point() and one.numel()}
    values = {name: one.detach().clone() for name, one in tensors.items()}
    fills: Counter[str] = Counter()

    @contextlib.contextmanager
    def filled(names: Iterable[str]) -> Iterator[None]:
        wanted = list(names)
        fills.update(wanted)
        _put({tensors[name]: values[name] for name in wanted})
        yield
        _put({tensors[name]: torch.tensor(torch.nan) for name in wanted})

    given = [
        {key: one.clone() if isinstance(one, torch.Tensor) else one for key, one in inputs.items()} for _ in models
    ]
    runs = [ModelRun(model=model, inputs=own) for model, own in zip(models, given, strict=True)]
    _put(dict.fromkeys(tensors.values(), torch.tensor(torch.nan)))
    try:
        with quiet():
            run_together(runs, tensors, filled)
    finally:
        _put({tensors[name]: values[name] for name in tensors})
    return runs, fills


@torch.no_grad()
def _put(values: dict[nn.Parameter, torch.Tensor]) -> None:
    for tensor, value in values.items():
        tensor.copy_(value)


def alike(tensors: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(tensors) == len(others) and all(map(same_tensor, tensors, others))


def sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
