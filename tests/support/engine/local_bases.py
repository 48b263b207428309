"""A base on a local disk, loaded as the worker loads it (worker/group_bases.py), or by `from_pretrained`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from merge_gate.engine.base import loaded_base
from merge_gate.engine.base.loaded_base import Source
from merge_gate.engine.base.skeleton import NoSkeletonError, skeleton_of
from merge_gate.files.feed import LocalFeed
from tests.support.engine.base_headers import stored_tensors

if TYPE_CHECKING:
    from merge_gate.engine.base.loaded_base import Base, ModelClass


def load_base(directory: str, *, model_class: ModelClass, **options: Any) -> Base:
    """By `from_pretrained`. The options are those of `Source`."""
    return loaded_base.load_base(Source(directory=directory, **options), model_class)


def load_local(directory: str, *, model_class: ModelClass, is_mapped: bool = True, **options: Any) -> Base:
    """The skeleton over the files, which are mapped, or fed; by `from_pretrained` if there is none."""
    source = Source(directory=directory, **options)
    try:
        return skeleton_of(source, model_class, stored_tensors(directory), LocalFeed(directory), is_mapped=is_mapped)
    except NoSkeletonError:
        return loaded_base.load_base(source, model_class)
