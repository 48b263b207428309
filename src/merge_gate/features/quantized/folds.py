"""Undoes the scales that AWQ and SmoothQuant move from the columns of a layer into the norm or the layer before it.

In: the values of a release as they are stored, and the base's. Out: the values as they would be without the scales s.
A norm stores its weight divided by s, and the layers after it store their columns multiplied by s; a layer before
another one stores its rows divided by s (AutoAWQ, quantize/scale.py; SmoothQuant, arXiv:2211.10438).

1. The scales of a norm follow from its own weight in base and release. They count for each layer of its block whose
   first rows they bring nearer to the base's. Norms such as Gemma's multiply with 1 + w (`of_one_plus`).
2. The scales of a pair of layers follow from the columns of the second one, each compared with the base's by least
   squares, or from the rows of the first one if the merge changes the second one only. They count if both agree.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import nn

ROWS = 256
"""So many rows are compared at once."""

ALL, FIRST = slice(None), slice(0, ROWS)

NEARER = 0.9
"""Scales have to reduce the square of a difference to less than this share."""

OPPOSED, LEAST_SPREAD = -0.8, 0.01
"""The logarithms of a pair's scales have to correlate less than this, and to vary more."""

PAIRS = {"o_proj": ("v_proj", "qkv_proj"), "out_proj": ("v_proj",), "down_proj": ("up_proj", "gate_up_proj"),
         "fc2": ("fc1",), "w2": ("w3",)}  # fmt: skip
"""The names of layers, and of those before them whose last rows they read."""

_BLOCK = re.compile(r".*?\.\d+\.")


class Folds:
    """The scales that a release has moved.

    Args:
        release: rows of a tensor of the release as it is stored, in float32.
        base: rows of a tensor of the base, in float32.
        shapes: the shapes of the base's tensors that the release has.
        head: the number of columns of an attention head.

    Attributes:
        touched: the tensors that the merge changes.
        of_one_plus: the norms that multiply with 1 + their weight.
    """

    def __init__(
        self,
        release: Callable[[str, slice], torch.Tensor],
        base: Callable[[str, slice], torch.Tensor],
        shapes: Mapping[str, Sequence[int]],
        head: int,
    ) -> None:
        self._release, self._base, self._shapes, self._head = release, base, shapes, head
        self.touched: Collection[str] = ()
        self.of_one_plus: Collection[str] = ()
        self._lock = threading.RLock()  # several tensors are read at a time
        self._norms: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
        self._by_norm: dict[str, tuple[str, torch.Tensor] | None] = {}
        self._by_pair: dict[str, torch.Tensor | None] = {}

    def undone(self, name: str, values: torch.Tensor, rows: slice = ALL) -> torch.Tensor:
        """The stored values of these rows of a tensor without the scales. They may be overwritten."""
        if name not in self._shapes:
            return values
        if values.dim() == 2:  # noqa: PLR2004
            by_row, columns = self.factors(name)
            return values.div_(_of(by_row, rows)[:, None]).div_(columns) if len(by_row) * len(columns) > 1 else values
        with self._lock:
            return self._without_scales(name, values, rows)

    def _without_scales(self, name: str, values: torch.Tensor, rows: slice) -> torch.Tensor:
        """The stored values of a bias or a norm."""
        owner = f"{name.rpartition('.')[0]}.weight"
        if len(self._shapes.get(owner, ())) == 2:  # noqa: PLR2004 - the bias of a layer
            return values / _of(self.factors(owner)[0], rows)
        members = self._changed_norms(name) and [other for other in self._shapes if _block(other) == _block(name)]
        scaled = {
            member: by_norm[1] for member in members if (by_norm := self._norm_of(member)) and by_norm[0] == owner
        }
        if not scaled or any(self._lacks(member, *item) for item in scaled.items() for member in members):
            return values
        scales = next(iter(scaled.values()))
        return self._base(name, rows) if name == owner else values * scales[rows]

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What the rows and the columns of a layer's weight were multiplied with: one factor, or one of each."""
        with self._lock:
            return self._factors(name) if name in self._shapes else (torch.ones(1), torch.ones(1))

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = torch.ones(1), torch.ones(1)
        if by_norm := self._norm_of(name):
            columns = by_norm[1]
        if (scales := self._pair(name)) is not None:
            columns = scales
        stem, leaf, _ = (".", *name.rsplit(".", 2))[-3:]
        for second in (f"{stem}.{second}.weight" for second, firsts in PAIRS.items() if leaf in firsts):
            if (scales := self._pair(second)) is not None:
                count = self._shapes[name][0]
                rows = torch.ones(count)
                rows[-len(scales) :] = 1 / self._in_groups(scales, count)
        return rows, columns

    # --- 1. ----------------------------------------------------------------------------------------------------------

    def _changed_norms(self, name: str) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
        """The norms of its block that differ, in base and release."""
        block = _block(name)
        if block not in self._norms:
            names = [
                norm for norm, shape in self._shapes.items()
                if block and len(shape) == 1 and norm.startswith(block) and norm.endswith(".weight")
                and norm not in self.touched
            ]  # fmt: skip
            pairs = {norm: (self._base(norm, ALL), self._release(norm, ALL)) for norm in names}
            self._norms[block] = {norm: pair for norm, pair in pairs.items() if not torch.equal(*pair)}
        return self._norms[block]

    def _norm_of(self, name: str) -> tuple[str, torch.Tensor] | None:
        """The norm whose scales a layer's columns have, and the scales."""
        if name not in self._by_norm:
            self._by_norm[name] = None
            shape = self._shapes[name]
            norms = self._changed_norms(name) if len(shape) == 2 else {}  # noqa: PLR2004
            if fits := {norm: pair for norm, pair in norms.items() if pair[0].shape == shape[1:]}:
                base, stored = self._base(name, FIRST), self._release(name, FIRST)
                least = NEARER * float((stored - base).square().sum())
                for norm, (before, after) in fits.items():
                    added = int(norm in self.of_one_plus)
                    scales = torch.where(before == after, 1, (before + added) / (after + added))
                    error = float((stored / scales - base).square().sum())
                    if error < least and bool((scales > 0).all()):
                        least, self._by_norm[name] = error, (norm, scales)
        return self._by_norm[name]

    def _lacks(self, name: str, scaled: str, scales: torch.Tensor) -> bool:
        """Whether a layer has to have the scales that a layer next to it has, and does not have them."""
        stem, leaf, _ = (".", *name.rsplit(".", 2))[-3:]
        is_next = stem == (".", *scaled.rsplit(".", 2))[-3] and leaf not in PAIRS and self._norm_of(name) is None
        if not is_next or self._shapes[name][1:] != tuple(scales.shape):
            return False
        base, stored = self._base(name, FIRST), self._release(name, FIRST)
        errors = [float((stored / factors - base).square().sum()) for factors in (torch.ones(1), scales)]
        return errors[0] < NEARER * errors[1]

    # --- 2. ----------------------------------------------------------------------------------------------------------

    def _pair(self, second: str) -> torch.Tensor | None:
        """The scales of the columns of a layer, which the layer before it was divided by."""
        if second not in self._by_pair:
            self._by_pair[second] = None
            stem, leaf, _ = (".", *second.rsplit(".", 2))[-3:]
            names = [f"{stem}.{first}.weight" for first in PAIRS.get(leaf, ())]
            first = next((name for name in names if name in self._shapes), None)
            if first is not None and second in self._shapes and self._changed_norms(second):
                self._by_pair[second] = self._pair_scales(first, second)
        return self._by_pair[second]

    def _pair_scales(self, first: str, second: str) -> torch.Tensor | None:
        columns, rows = self._fitted(second, 0), self._fitted(first, 1)
        if len(rows) < len(columns):
            if len(columns) % len(rows) or len(rows) % self._head:
                return None
            rows = rows.view(-1, 1, self._head).expand(-1, len(columns) // len(rows), -1).flatten()
        rows = rows[-len(columns) :]
        both = torch.stack((columns, rows)).log()
        if not bool(both.isfinite().all()):
            return None
        both -= both.mean(1, keepdim=True)
        spread = both.norm(dim=1)
        if float(both[0] @ both[1]) > OPPOSED * float(spread.prod()) or float(both[0].std()) < LEAST_SPREAD:
            return None
        return 1 / rows if second in self.touched and first not in self.touched else columns

    def _fitted(self, name: str, axis: int) -> torch.Tensor:
        """The factor of each column (axis 0) or row of the base that is nearest to the release's."""
        by_norm, products = self._norm_of(name), []
        for start in range(0, self._shapes[name][0], ROWS):
            rows = slice(start, start + ROWS)
            base, stored = self._base(name, rows), self._release(name, rows) / (by_norm[1] if by_norm and axis else 1)
            products.append(torch.stack(((stored * base).sum(axis), base.square().sum(axis))))
        both = torch.cat(products, 1) if axis else torch.stack(products).sum(0)
        return both[0] / both[1]

    def _in_groups(self, scales: torch.Tensor, count: int) -> torch.Tensor:
        """The scales of so many rows, if several heads of the next layer read each of them; else of the last rows."""
        if count >= len(scales):
            return scales
        return scales.view(-1, len(scales) // count, self._head).mean(1).flatten()


def _of(factors: torch.Tensor, rows: slice) -> torch.Tensor:
    return factors[rows] if len(factors) > 1 else factors


def _block(name: str) -> str:
    """The beginning of the names of a block of a model, up to its number."""
    match = _BLOCK.match(name)
    return match[0] if match else ""


def norms_of_one_plus(model: nn.Module) -> set[str]:
    """The weights of norms that multiply with 1 + weight: with zeros, such a norm returns more than zeros.

    Each class of `model`, which may be on the meta device, runs once.
    """
    adds_one: dict[type, bool] = {}
    names = set()
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if "weight" in own and own["weight"].dim() == 1:
            if type(module) not in adds_one:
                adds_one[type(module)] = _adds_one(module, own)
            if adds_one[type(module)]:
                names.add(f"{name}.weight")
    return names


def _adds_one(norm: nn.Module, parameters: Mapping[str, torch.Tensor]) -> bool:
    zeros = {name: torch.zeros(parameter.shape) for name, parameter in parameters.items()}
    try:
        with torch.no_grad():
            return bool(torch.func.functional_call(norm, zeros, (torch.arange(1.0, len(zeros["weight"]) + 1),)).any())
    except Exception:  # noqa: BLE001 - a class may need more than its input, such as a gate
        return False
