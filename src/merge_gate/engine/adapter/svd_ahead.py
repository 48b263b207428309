"""Decompositions of the base's weights, begun before PEFT asks for them, so that two are under way at a time.

In: a PEFT tuner, while it makes the layers of one target after another. Out: what `torch.linalg.svd` gives PEFT, by
the same function, of the same values, with as many threads. Knows no method: what PEFT decomposes of the first target
shows what it will ask of the next ones.

1. PEFT asks for the decomposition of a target's weight, cast to float32 or transposed.
2. The same is begun for the next target, on a thread of its own: much of a decomposition keeps one core only.
3. PEFT asks again. It gets the result if it asks with these values, bit for bit; other ones are decomposed then and
   there, as without all this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.tensors.threads import threads

AT_A_TIME = 2
"""A decomposition of a weight takes several times its memory, and one is seldom made of two cores' time."""

THIN = {"full_matrices": False}
"""How every method of PEFT asks for it."""

Form = Callable[[torch.Tensor], torch.Tensor]
"""A weight's values, in float32, → what a method decomposes of it."""

_FORMS: tuple[Form, ...] = (lambda values: values, lambda values: values.T)


@contextlib.contextmanager
def decomposed_ahead(tuner: Any, base: Base) -> Iterator[None]:
    """While PEFT makes the layers of an adapter, weights are decomposed two at a time.

    Args:
        tuner: PEFT's class for the method, or None.
        base: whose weights they are.
    """
    name = "_create_and_replace"
    create, svd = vars(tuner).get(name) if tuner is not None else None, torch.linalg.svd
    if create is None or threads() == 1:
        yield
        return
    with ThreadPoolExecutor(AT_A_TIME, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as pool:
        ahead = _Ahead(pool=pool, own=svd, base=base)

        def create_and_replace(self: Any, config: Any, adapter: str, target: Any, *others: Any, **named: Any) -> Any:
            ahead.reach(self, config, target)
            try:
                return create(self, config, adapter, target, *others, **named)
            finally:
                ahead.leave()

        setattr(tuner, name, create_and_replace)
        torch.linalg.svd = ahead.svd
        try:
            yield
        finally:
            torch.linalg.svd = svd
            setattr(tuner, name, create)
            pool.shutdown(cancel_futures=True)


@dataclass(slots=True, kw_only=True)
class _Begun:
    """A decomposition under way, and of what."""

    values: torch.Tensor
    form: Form
    result: Future[Any]


@dataclass(slots=True, kw_only=True)
class _Ahead:
    """`weight` is that of the target at which PEFT is; `coming` are those of the targets after it."""

    pool: ThreadPoolExecutor
    own: Callable[..., Any]
    base: Base
    weight: torch.Tensor | None = None
    coming: Iterator[torch.Tensor] | None = None
    begun: dict[int, _Begun] = field(default_factory=dict)

    def reach(self, tuner: Any, config: Any, target: Any) -> None:
        self.weight = _weight(target)
        if self.coming is None:
            modules = list(tuner.model.named_modules())
            places = {id(module): place for place, (_, module) in enumerate(modules)}
            after = modules[places.get(id(target), len(modules)) + 1 :]
            targets = (one for path, one in after if tuner._check_target_module_exists(config, path))
            self.coming = (weight for one in targets if (weight := _weight(one)) is not None)

    def leave(self) -> None:
        """What was begun for a target and not asked for is not kept."""
        if self.weight is not None:
            self.begun.pop(id(self.weight), None)
        self.weight = None

    def svd(self, matrix: torch.Tensor, *others: Any, **named: Any) -> Any:
        """In the place of `torch.linalg.svd`."""
        if self.weight is None or others or named != THIN or sorted(matrix.shape) != sorted(self.weight.shape):
            return self.own(matrix, *others, **named)  # svd_lowrank, among others, comes here with a small one
        begun = self.begun.pop(id(self.weight), None)
        if begun is not None and _same(matrix, begun.values):
            self._begin(begun.form, AT_A_TIME)
            return begun.result.result()
        with self._filled(self.weight):
            form = _form_of(matrix, self.weight)
        if form is not None:
            self._begin(form, AT_A_TIME - 1)
        return self.own(matrix, **named)

    def _begin(self, form: Form, at_most: int) -> None:
        while self.coming is not None and len(self.begun) < at_most:
            weight = next(self.coming, None)
            if weight is None:
                return
            with self._filled(weight):
                values = form(weight.detach().to(torch.float32, copy=True))
            self.begun[id(weight)] = _Begun(values=values, form=form, result=self.pool.submit(self._decompose, values))

    def _decompose(self, values: torch.Tensor) -> Any:
        with torch.no_grad():
            return self.own(values, **THIN)

    def _filled(self, weight: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.base.hollow is None else self.base.hollow.filled([weight])


def _weight(target: Any) -> torch.Tensor | None:
    """What a method would decompose of a target: a plain matrix."""
    weight = target._parameters.get("weight") if isinstance(target, nn.Module) else None
    if type(weight) is not nn.Parameter or weight.dim() != 2 or not weight.is_floating_point():  # noqa: PLR2004
        return None
    return weight if weight.device.type == "cpu" else None


def _form_of(matrix: torch.Tensor, weight: torch.Tensor) -> Form | None:
    """How the matrix was made of the weight; None if it is another one."""
    values = weight.detach().to(torch.float32)
    return next((form for form in _FORMS if _same(matrix, form(values))), None)


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two matrices are one to a function: values and layout."""
    is_alike = left.dtype == right.dtype and left.shape == right.shape and left.stride() == right.stride()
    return is_alike and torch.equal(left, right)
