"""Adapter + base → `Evidence`: what was measured of one adapter, assembled. Judges nothing.

In: a `Base` and what the preflight read. Out: numbers and names, or the `Refusal` that says why there are none.

0. A plain adapter takes the fast way and is done.                     plain.py
1. Measure every tensor of the adapter's file.                         `_measure_file`
2. Load it on a scratch, by PEFT, every name accounted for.            load.py
3. Refuse what PEFT merges wrongly.                                    defects.py
4. Say of each broken tensor of the file whether a merge reads it.     `_with_use`
5. Merge, layer by layer, and account for every parameter.             walk.py
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from merge_gate.engine import defects as rules
from merge_gate.engine.base import ADAPTER_PREFIX, Base
from merge_gate.engine.combine import combined
from merge_gate.engine.load import Loaded, load_adapter
from merge_gate.engine.measure import measure, same_bits
from merge_gate.engine.plain import OnTensor, Progress, merge_plain
from merge_gate.engine.walk import Merger
from merge_gate.errors import Refused
from merge_gate.records import (
    EVERYTHING,
    AdapterFiles,
    Combine,
    Evidence,
    FileTensor,
    Origin,
    Refusal,
    TensorStats,
    Thresholds,
)

CLOSE = 1.1
"""A loss by rounding that is estimated within this factor of its limit is measured."""


def merge_adapter(
    base: Base,
    files: AdapterFiles,
    *,
    thresholds: Thresholds = EVERYTHING,
    on_tensor: OnTensor | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Merge one adapter into a scratch of the base and measure everything.

    Args:
        base: the loaded base; unchanged afterwards.
        files: what the preflight read of the adapter.
        thresholds: what need not be known exactly: a tensor whose values stay below them may be merged in a sample
            only (plain.py, `merge_bounded`).
        on_tensor: called with the base's name and the merged tensor, before it is dropped; goes with `EVERYTHING`.
        progress: called with layers merged, layers in all, and the layer's name.

    Raises:
        MemoryError, torch.OutOfMemoryError: the machine is too small.
    """

    def merged(thresholds: Thresholds) -> Evidence:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            evidence = merge_plain(base, files, thresholds=thresholds, on_tensor=on_tensor, progress=progress)
        return evidence or merge_by_peft(base, files, thresholds=thresholds, on_tensor=on_tensor, progress=progress)

    return _exact_enough(merged, thresholds)


def _exact_enough(merged: Callable[[Thresholds], Evidence], thresholds: Thresholds) -> Evidence:
    """An estimate that is close to the limit it is compared with gives way to the measurement."""
    evidence = merged(thresholds)
    share, limit = evidence.lost_share, thresholds.rounding_loss
    estimated = any(merge.estimated for merge in evidence.merges)
    if estimated and share is not None and limit / CLOSE <= share <= limit * CLOSE:
        return merged(EVERYTHING)
    return evidence


def merge_by_peft(
    base: Base,
    files: AdapterFiles,
    *,
    thresholds: Thresholds = EVERYTHING,
    on_tensor: OnTensor | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """As `merge_adapter`, without the fast way."""
    merger = partial(Merger, thresholds=thresholds, on_tensor=on_tensor, progress=progress)
    return _evidence(base, (files,), lambda: load_adapter(base, files), merger)


def merge_combination(
    base: Base,
    members: tuple[AdapterFiles, ...],
    combine: Combine,
    *,
    thresholds: Thresholds = EVERYTHING,
    on_tensor: OnTensor | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Combine adapters by PEFT's `add_weighted_adapter`, then as `merge_adapter`."""

    def merged(thresholds: Thresholds) -> Evidence:
        merger = partial(Merger, thresholds=thresholds, on_tensor=on_tensor, progress=progress)
        return _evidence(base, members, lambda: combined(base, members, combine), merger)

    return _exact_enough(merged, thresholds)


def _evidence(
    base: Base,
    members: tuple[AdapterFiles, ...],
    load: Callable[[], Loaded],
    make_merger: Callable[[Base, Loaded], Merger],
) -> Evidence:
    started = time.perf_counter()
    file_tensors: tuple[FileTensor, ...] = ()
    kind = members[0].peft_type
    try:
        file_tensors = tuple(FileTensor(stats=stats) for files in members for stats in _measure_file(files))
        with warnings.catch_warnings(), torch.no_grad(), torch.sparse.check_sparse_tensor_invariants():  # type: ignore[no-untyped-call]
            # torch trusts the indices of a sparse tensor, and some methods take them from the file
            warnings.simplefilter("ignore")  # PEFT's warnings are findings here, found by our own comparison
            loaded = load()
            rules.refuse_wrong_merges(loaded.model, loaded.config)
            file_tensors = tuple(_with_use(base, loaded, one) for one in file_tensors)
            merger = make_merger(base, loaded)
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
        seed=loaded.seed,
        parameters_checked=merger.checked,
        parameters_bounded=sum(merge.bounded for merge in merger.merges.values()),
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
            message=f"the pickled weights are damaged, or hold something else than tensors ({type(error).__name__})",
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
    except Exception:
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
