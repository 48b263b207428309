"""A base in another dtype, cast from the base in memory, so that the files are read once for several dtypes.

In: a loaded `Base`, and another dtype. Out: a `Base` whose weights are cast while they are read (hollow.py). None if it
could differ from what `from_pretrained` gives in that dtype: the base is loaded from its files then.

1. Every tensor of the known base has to be mapped from a file. A tensor that was cast before is rounded already. One
   that was computed (fused experts) may round at another place.
2. An outline of the base in the other dtype is loaded on torch's meta device. It has the names, the shapes, and the
   dtype that transformers gives each tensor (some stay in float32).
3. transformers loads the base again, from tensors of those dtypes: hollow, cast, or the known base's own. Afterwards
   all of them have to be in their places, and no code may have read their values.
4. A cast is monotone, so the extremes of a tensor become the extremes of its cast. If one of them, or the tensor, is
   not finite, the cast is measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from merge_gate.engine.base.loaded_base import (
    Base,
    ModelClass,
    Place,
    Source,
    head_options,
    load_with_info,
    loads_as_usual,
    measure_base,
    named_tensors,
    outlines,
    place_of,
    refuse_mismatches,
)
from merge_gate.engine.base.other_class import stored_names
from merge_gate.engine.tensors.hollow import CASTABLE, LEAST_ELEMENTS, Hollow, cast_from
from merge_gate.engine.tensors.measure import dtype_name, measure
from merge_gate.records.measured import TensorStats
from merge_gate.records.terms import Quantization

Tensors = dict[str, torch.Tensor]


def in_another_dtype(known: Base, model_class: ModelClass, directory: str, dtype: str) -> Base | None:
    """The base as `from_pretrained` gives it in another dtype.

    Args:
        known: the loaded base. It stays unchanged.
        model_class: the class and head of the base.
        directory: the files of the base, unchanged since it was loaded.
        dtype: the other dtype, as the configuration spells it.
    """
    source = known.source
    if known.facts.quantization != Quantization.NONE or source.device.type != "cpu" or known.hollow is not None:
        return None
    if not loads_as_usual(getattr(transformers, model_class.class_name)) or not is_mapped(known):
        return None
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    try:
        return _cast(
            known, model_class, replace(source, directory=directory, options={**source.options, "dtype": wanted})
        )
    except Exception:  # the load from files reports what is wrong
        return None


def is_mapped_otherwise(directory: str, model_class: ModelClass, dtype: str) -> bool:
    """Whether the files hold the base in another dtype and can be mapped, so that this dtype can be cast from them."""
    transformers_class, options = (
        getattr(transformers, model_class.class_name),
        {"local_files_only": True, "use_safetensors": True},
    )
    try:
        config = json.loads(Path(directory, "config.json").read_bytes())
        stored = str(config.get("dtype") or config.get("torch_dtype"))
        if stored == dtype or not {stored, dtype} <= {dtype_name(one) for one in CASTABLE}:
            return False
        if "quantization_config" in config or not loads_as_usual(transformers_class):
            return False
        outline, expected = load_with_info(
            transformers_class, directory, dtype="auto", **options, **head_options(model_class), device_map="meta"
        )
        names = stored_names(Path(directory))
    except Exception:  # the load reports what is wrong
        return False
    prefix = f"{outline.base_model_prefix}."
    wanted = {name for name, _, _ in named_tensors(outline)} - expected.newly_initialized
    return all(not names.isdisjoint((name, prefix + name, name.removeprefix(prefix))) for name in wanted)


def _cast(known: Base, model_class: ModelClass, source: Source) -> Base | None:
    transformers_class = getattr(transformers, model_class.class_name)
    # 2.
    outline, expected = load_with_info(
        transformers_class, source.directory, **source.options, **head_options(model_class), device_map="meta"
    )
    refuse_mismatches(expected, source.label, model_class)
    wanted = {name: tensor for name, _, tensor in named_tensors(outline)}
    dtypes = {name: tensor.dtype for name, tensor in wanted.items() if name not in expected.newly_initialized}
    if expected.newly_initialized != known.newly_initialized or _shapes(wanted) != _shapes(known.tensors):
        return None
    # 3.
    sources = {name: known.tensors[name].detach() for name in dtypes}
    cast = [name for name in dtypes if sources[name].dtype != dtypes[name]]
    if any(one.dtype not in CASTABLE for name in cast for one in (sources[name], wanted[name])):
        return None
    large = {name: sources[name] for name in cast if sources[name].numel() >= LEAST_ELEMENTS}
    hollow = Hollow(cast_from(name, source, dtypes[name]) for name, source in large.items())
    small = {name: sources[name].to(dtypes[name]) for name in cast if name not in large}
    given = {**sources, **small, **hollow.tensors}
    config = outline.config
    model, loading = load_with_info(transformers_class, None, config=config, dtype=config.dtype, state_dict=dict(given))
    found = {name: tensor for name, _, tensor in named_tensors(model)}
    is_same = (
        loading.newly_initialized == expected.newly_initialized
        and outlines(found) == outlines(wanted)
        and all(place_of(found[name]) == place_of(tensor) for name, tensor in given.items())
    )
    if not is_same:
        return None
    # 4.
    base = measure_base(model, source, expected, known=dict(_stats(known, given, hollow)), hollow=hollow)
    return None if base.was_misread() else base


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _stats(known: Base, given: Tensors, hollow: Hollow) -> Iterator[tuple[Place, TensorStats]]:
    """The figures of tensors that have no values yet, or that were measured with the known base."""
    for name, tensor in given.items():
        if not tensor.numel():
            continue
        if name in hollow.tensors:
            yield place_of(tensor), _cast_stats(known.stats[name], known.tensors[name], tensor.dtype)
        elif place_of(tensor) == place_of(known.tensors[name]):
            yield place_of(tensor), known.stats[name]


def _cast_stats(stats: TensorStats, source: torch.Tensor, dtype: torch.dtype) -> TensorStats:
    extremes = torch.tensor([stats.minimum or 0.0, stats.maximum or 0.0], dtype=source.dtype).to(dtype)
    if not stats.finite or not extremes.isfinite().all():
        return measure(source.to(dtype), stats.name)
    least, most = extremes.tolist()
    return replace(stats, dtype=dtype_name(dtype), minimum=least, maximum=most)


# --- 1. ------------------------------------------------------------------------------------------------------------


def is_mapped(known: Base) -> bool:
    """Whether each tensor is in a file that is mapped into memory, except tensors that the files lack."""
    spans = _mapped_spans()
    return all(
        any(start <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= end for start, end in spans)
        for name, tensor in known.tensors.items()
        if name not in known.newly_initialized and tensor.numel()
    )


def _mapped_spans() -> list[tuple[int, int]]:
    """Addresses of mapped files. The mappings are private, so no other process can write through them."""
    spans: list[tuple[int, int]] = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, _, _, _, inode, *_ = line.split()
        start, end = (int(part, 16) for part in addresses.split("-"))
        if inode != "0" and spans and spans[-1][1] == start:
            spans[-1] = spans[-1][0], end
        elif inode != "0":
            spans.append((start, end))
    return spans
