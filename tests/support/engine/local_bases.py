"""A base on a local disk, loaded as the worker loads it (worker/group_bases.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from merge_gate.engine.base.loaded_base import load_base, source_of
from merge_gate.engine.base.skeleton import NoSkeletonError, skeleton_of
from merge_gate.records.terms import Quantization
from merge_gate.sources.feed import LocalFeed
from tests.support.engine.base_headers import stored_tensors

if TYPE_CHECKING:
    from merge_gate.engine.base.loaded_base import Base, ModelClass


def load_local(directory: str, *, model_class: ModelClass, **options: Any) -> Base:
    """The skeleton over the mapped files; by `from_pretrained` if there is none."""
    defaults = {
        "revision": None,
        "dtype": "auto",
        "quantization": Quantization.NONE,
        "device": "cpu",
        "trust_remote_code": False,
        "allow_pickle": False,
    }
    source = source_of(directory, **{**defaults, **options})
    try:
        return skeleton_of(source, model_class, stored_tensors(directory), LocalFeed(directory), is_mapped=True)
    except NoSkeletonError:
        return load_base(directory, model_class=model_class, **options)
