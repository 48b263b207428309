"""A base on a local disk, loaded as the worker loads it (worker/merging/group_bases.py), or by `from_pretrained`."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from merge_gate.engine.base import loaded_base
from merge_gate.engine.base.loaded_base import Base, ModelClass, Source
from merge_gate.engine.base.model_class import model_class_for
from merge_gate.engine.base.skeleton import NoSkeletonError, skeleton_of
from merge_gate.files.feed import LocalFeed
from merge_gate.files.preflight import preflight
from tests.support.engine.base_headers import stored_tensors
from tests.support.files.pickles import read_pickle
from tests.support.models import ADAPTER_WEIGHTS, Tensors, read_tensors, write_tensors


def load_base(directory: str, *, model_class: ModelClass, **options: Any) -> Base:
    """By `from_pretrained`. The options are those of `Source`."""
    return loaded_base.load_base(Source(directory=directory, **options), model_class)


def load_local(
    directory: str, *, model_class: ModelClass, is_mapped: bool = True, feed: LocalFeed | None = None, **options: Any
) -> Base:
    """The skeleton over the files, which are mapped, or fed; by `from_pretrained` if there is none."""
    source, feed = Source(directory=directory, **options), feed or LocalFeed(directory)
    try:
        return skeleton_of(source, model_class, stored_tensors(directory), feed, is_mapped=is_mapped)
    except NoSkeletonError:
        return loaded_base.load_base(source, model_class)


def base_for(directory: Path, adapter: Path, dtype: str = "auto", *, load: Any = load_local, **options: Any) -> Base:
    """Loaded with the class that the adapter needs."""
    files = preflight(str(adapter), allow_pickle=True, read_pickle=read_pickle)
    model_class = model_class_for(str(directory), files, stored_tensors(directory))
    loaded: Base = load(str(directory), model_class=model_class, label="base", dtype=dtype, **options)
    return loaded


def edited_base(
    source: Path, out: Path, change: Callable[[Tensors], object], *, file: str = "model.safetensors"
) -> Path:
    """A copy of a base of one file; `change` edits its tensors in place, or returns those that are other ones."""
    shutil.copytree(source, out)
    tensors = read_tensors(out, file)
    changed = change(tensors)
    write_tensors(out, tensors | changed if isinstance(changed, dict) else tensors, file)
    return out


def edited_adapter(source: Path, out: Path, change: Callable[[Tensors], object]) -> Path:
    return edited_base(source, out, change, file=ADAPTER_WEIGHTS)
