"""The ways in which each method's adapter is broken, and what is true of each.

In: a case of `tests.support.methods` with its saved adapter and base. Out: `trials` (what to break) and `find_truth`
(what a gate must say of it), found by merging with plain PEFT and looking at every merged tensor. May not know
merge_gate.

What is true of a trial
1. Something non-finite in the merged model, or a merge that PEFT cannot finish: failed. The cause is
   `adapter-nonfinite` where the file holds NaN or Inf, else `merged-nonfinite`.
2. NaN or Inf in a tensor of the file that the merge reads, though the result is finite: failed, `adapter-nonfinite`.
3. NaN or Inf in a tensor that the merge does not read: passed, with a warning `adapter-nonfinite`.
4. A merge that leaves every bit of the base as it was: failed, `no-effect`. (A tensor so large that a norm or an
   orthogonal map divides the delta away can do that.)
5. Else passed.
The merge reads a tensor when finite noise on it changes the merged model.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from tests.support import methods

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor, nn

VALUES = {"nan": float("nan"), "+inf": float("inf"), "-inf": float("-inf")}
POSITIONS = ("first", "last", "all")
EVERY_PLACE = tuple(itertools.product(VALUES, POSITIONS))
ONE_NAN = (("nan", "last"),)
"""Of `EVERY_PLACE`, the one that most methods are tried with each day."""
PEFT_RAISES = (RuntimeError, ValueError, IndexError, ArithmeticError)
OVERFLOW_EXPONENTS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 28)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One adapter to judge on the base in `dtype` (or quantised so). `tensor` None: nothing is broken."""

    case: str
    dtype: str
    tensor: str | None = None
    value: str = "healthy"
    position: str = ""

    def __str__(self) -> str:
        parts = (self.case, self.dtype, self.tensor, self.value, self.position)
        return " ".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What a gate must say. `nonfinite` names the merged tensors; `raised` is what PEFT raised instead of merging.

    `cause` is None also where it is enough that the adapter does not pass (an index that points nowhere).
    """

    passes: bool
    cause: str | None = None
    warns: bool = False
    nonfinite: tuple[str, ...] = ()
    raised: str | None = None


def trials(
    case: methods.Case,
    state: Mapping[str, Tensor],
    *,
    bases: Iterable[str],
    home: str,
    small: str,
    places: Iterable[tuple[str, str]] = EVERY_PLACE,
) -> Iterator[Trial]:
    """Healthy on every base; on `home` each tensor with each of `places`; each tensor too large for `small`.

    Tensors of integers hold indices: they get one that points nowhere.
    """
    for dtype in bases:
        yield Trial(case=case.name, dtype=dtype)
    for tensor in floating(state):
        for value, position in places:
            yield Trial(case=case.name, dtype=home, tensor=tensor, value=value, position=position)
        yield Trial(case=case.name, dtype=small, tensor=tensor, value="overflow")
    for tensor in sorted(set(state) - set(floating(state))):
        yield Trial(case=case.name, dtype=home, tensor=tensor, value="index")


def floating(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    return tuple(sorted(name for name, tensor in state.items() if tensor.is_floating_point()))


def put(state: Mapping[str, Tensor], tensor: str, value: str, position: str) -> dict[str, Tensor]:
    """`state` with `value` at the first, the last or every element of `tensor`."""
    broken = state[tensor].clone().contiguous()
    flat = broken.view(-1)
    index = {"first": slice(0, 1), "last": slice(-1, None), "all": slice(None)}[position]
    flat[index] = VALUES[value]
    return dict(state) | {tensor: broken}


def scale(state: Mapping[str, Tensor], tensor: str, exponent: int) -> dict[str, Tensor]:
    return dict(state) | {tensor: state[tensor] * 10.0**exponent}


def point_nowhere(state: Mapping[str, Tensor], tensor: str) -> dict[str, Tensor]:
    """`state` with the first index of `tensor` far outside of anything."""
    broken = state[tensor].clone().contiguous()
    broken.view(-1)[0] = torch.iinfo(broken.dtype).max
    return dict(state) | {tensor: broken}


@dataclass
class Bench:
    """One case's adapter with its bases, where trials are made and their truth is found.

    `bases` has the base in each dtype or quantisation. NaN and Inf are tried on the one called `home`, numbers that
    are too large on `small`. `directory` is written anew for each trial.
    """

    case: methods.Case
    bases: Mapping[str, nn.Module]
    source: Path
    directory: Path
    home: str = "float32"
    small: str = "float16"

    def __post_init__(self) -> None:
        self.state = load_file(self.source / methods.WEIGHTS)
        self.healthy = methods.merge(self.bases[self.home], self.source)
        self.read = {tensor: self._is_read(tensor) for tensor in floating(self.state)}

    def trials(self, places: Iterable[tuple[str, str]] = EVERY_PLACE) -> Iterator[Trial]:
        return trials(self.case, self.state, bases=self.bases, home=self.home, small=self.small, places=places)

    def prepare(self, trial: Trial) -> Truth:
        """Writes the trial's adapter into `directory` and says what is true of it."""
        if trial.tensor is None:
            return self._find(self.state, trial.dtype)
        if trial.value == "overflow":
            return self._prepare_overflow(trial.tensor, trial.dtype)
        if trial.value == "index":
            return replace(self._find(point_nowhere(self.state, trial.tensor), trial.dtype), cause=None)
        found = self._find(put(self.state, trial.tensor, trial.value, trial.position), trial.dtype)
        if found.cause == "merged-nonfinite" or self.read[trial.tensor]:
            return replace(found, passes=False, cause="adapter-nonfinite")
        return replace(found, warns=True)

    def _prepare_overflow(self, tensor: str, dtype: str) -> Truth:
        """Scales the tensor up until the merge overflows; where it never does, the largest is judged."""
        for exponent in OVERFLOW_EXPONENTS:
            found = self._find(scale(self.state, tensor, exponent), dtype)
            if found.cause == "merged-nonfinite":
                return found
        return found

    def _find(self, state: Mapping[str, Tensor], dtype: str) -> Truth:
        """Writes `state` and merges it. A file that itself holds NaN or Inf is the caller's to blame."""
        methods.write_variant(self.source, self.directory, state)
        base = self.bases[dtype]
        try:
            merged = methods.merge(base, self.directory)
        except PEFT_RAISES as error:
            return Truth(passes=False, cause="merged-nonfinite", raised=f"{type(error).__name__}: {error}")
        nonfinite = methods.nonfinite(merged)
        if nonfinite:
            return Truth(passes=False, cause="merged-nonfinite", nonfinite=nonfinite)
        if methods.same(methods.values(base), merged):
            return Truth(passes=False, cause="no-effect")
        return Truth(passes=True)

    def _is_read(self, tensor: str) -> bool:
        noise = torch.randn(self.state[tensor].shape, generator=torch.Generator().manual_seed(11)) * 0.1
        moved = self.state | {tensor: (self.state[tensor] + noise).to(self.state[tensor].dtype)}
        methods.write_variant(self.source, self.directory, moved)
        return not methods.same(self.healthy, methods.merge(self.bases[self.home], self.directory))
