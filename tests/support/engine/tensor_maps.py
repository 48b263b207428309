"""A model type, saved tiny, and its tensor map and skeleton against a real load: which names agree, and which values.

In: a model type. Out: `Checked`. The map is right if filling it with the stored values gives every parameter of
`from_pretrained`, bit for bit: a renamed tensor as it is, a converted one by transformers' own operations. A skeleton
(engine/base/skeleton.py) has to give every tensor of the model, in the stored dtype and in another one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import core_model_loading

from merge_gate.engine.base.accounting import account_for
from merge_gate.engine.base.loaded_base import ModelClass, loads_as_usual, named_tensors
from merge_gate.engine.base.skeleton import NoSkeletonError, skeleton_of
from merge_gate.engine.base.tensor_map import RENAMED, TensorMap, traced
from merge_gate.engine.tensors.measure import same_bits
from merge_gate.files.feed import LocalFeed
from tests.support import methods
from tests.support.engine import architectures
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.fed_bases import source

COMPUTED = {
    "chinese_clip": "transformers sets the padding row of an embedding to zero after the load",
    "chinese_clip_text_model": "the same",
    "marian": "positions are computed, not stored",
}
"""Types whose parameters transformers changes after it has loaded them."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """`skipped` says why there is no map to check; `wrong` names what the map or the skeleton has otherwise.

    `loaded` says why there is no skeleton, and the base is loaded as usual.
    """

    model_type: str
    parameters: int = 0
    converted: int = 0
    conversions: frozenset[str] = frozenset()
    unloaded: tuple[str, ...] = ()
    skipped: str = ""
    loaded: str = ""
    wrong: tuple[str, ...] = ()


def check(model_type: str, directory: Path) -> Checked:
    """Compare the map of a tiny model of this type with what transformers loads."""
    try:
        architecture = architectures.build(model_type, directory)
    except architectures.CannotBuildError as error:
        return Checked(model_type=model_type, skipped=f"no tiny model: {error}"[:200])
    model_class = architecture.model_class
    if not loads_as_usual(model_class):
        return Checked(model_type=model_type, skipped="the class has a from_pretrained of its own")
    account = account_for(
        str(directory), ModelClass(class_name=model_class.__name__), "base", stored_tensors(directory)
    )
    if account.map is None:
        return Checked(model_type=model_type, skipped="no map")
    with methods.quiet():
        model, info = model_class.from_pretrained(directory, output_loading_info=True, dtype=torch.bfloat16)
    wrong = list(_names(account.map, model, info)) + list(_values(account.map, model, directory, model_class))
    loaded = ""
    try:
        wrong += [f"skeleton: {name}" for name in _of_skeleton(directory, model_class, model)]
    except NoSkeletonError as error:
        loaded = str(error)[:120]
    converted = [group for group in account.map.groups if group.conversion != RENAMED]
    return Checked(
        model_type=model_type,
        parameters=len(dict(model.named_parameters())),
        converted=sum(len(group.targets) for group in converted),
        conversions=frozenset(group.conversion for group in converted),
        unloaded=account.unloaded,
        loaded=loaded,
        wrong=tuple(wrong if model_type not in COMPUTED else [one for one in wrong if not one.startswith("values")])
        + tuple(f"incomplete: {name}" for name in account.incomplete if name not in info["missing_keys"]),
    )


def _of_skeleton(directory: Path, model_class: Any, model: Any) -> list[str]:
    """The tensors of a skeleton that differ from those of a load, in two dtypes. `model` is loaded in bfloat16."""
    with methods.quiet():
        reals = {"bfloat16": model, "float16": model_class.from_pretrained(directory, dtype=torch.float16)}
    wrong = []
    for dtype, real in reals.items():
        with methods.quiet():
            base = skeleton_of(
                source(directory, dtype),
                ModelClass(class_name=model_class.__name__),
                stored_tensors(directory),
                LocalFeed(str(directory)),
            )
        expected = {name: tensor for name, _, tensor in named_tensors(real)}
        if list(expected) != list(base.tensors):
            wrong.append(f"names in {dtype}")
            continue
        for name in expected.keys() - base.newly_initialized:
            with base.filled([name]):
                if not same_bits(base.tensors[name], expected[name]):
                    wrong.append(f"{name} in {dtype}")
        if base.was_misread():
            wrong.append(f"a read without values in {dtype}")
    return wrong


def _names(found: TensorMap, model: Any, info: Mapping[str, Any]) -> list[str]:
    """Both directions are complete, and agree with transformers' own report of the load."""
    loaded = {name for group in found.groups for name in group.sources}
    wrong = [f"lost: {name}" for name in found.stored if name not in loaded and name not in found.unloaded]
    if found.missing != set(info["missing_keys"]):
        wrong.append(f"missing: {sorted(found.missing ^ set(info['missing_keys']))[:3]}")
    first = {id(one): name for name, one in reversed(list(model.named_parameters(remove_duplicate=False)))}
    made = {id(dict(model.named_parameters(remove_duplicate=False)).get(name)) for name in found.sources}
    ignored = re.compile("|".join(model._keys_to_ignore_on_load_missing or ("(?!)",)))  # computed, never stored
    unmade = [name for key, name in first.items() if key not in made and name not in found.missing]
    return wrong + [f"no source: {name}" for name in unmade if not ignored.search(name)]


def _values(found: TensorMap, model: Any, directory: Path, model_class: Any) -> list[str]:
    """What the map's sources make has the bits of the loaded parameter."""
    made = _made(found, directory, model_class)
    loaded = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    wrong = []
    for name in found.sources:
        ours, theirs = made.get(name), loaded.get(name)
        if theirs is None or ours is None:
            wrong.append(f"names: {name}")
        elif ours.shape != theirs.shape or not torch.equal(ours.to(theirs.dtype), theirs.detach()):
            wrong.append(f"values: {name}")
    return wrong


def _made(found: TensorMap, directory: Path, model_class: Any) -> dict[str, torch.Tensor]:
    stored: dict[str, torch.Tensor] = {}
    for file in {one.file for one in found.stored.values()}:
        with safe_open(directory / file, framework="pt") as opened:
            stored |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    renamed = {
        group.targets[0]: stored[group.sources[0]]
        for group in found.groups
        if group.conversion == RENAMED and len(group.sources) == 1
    }
    converted = {name for group in found.groups if group.conversion != RENAMED for name in group.sources}
    if not converted:
        return renamed
    return renamed | _converted({name: stored[name] for name in converted}, directory, model_class)


def _converted(stored: dict[str, torch.Tensor], directory: Path, model_class: Any) -> dict[str, torch.Tensor]:
    """The converted tensors, made only of the sources that the map names for them."""
    realized: dict[str, torch.Tensor] = {}
    own = core_model_loading.WeightConverter.convert

    def convert(self: Any, layer_name: str, **options: Any) -> Any:
        result = own(self, layer_name, **options)
        realized.update({name: one[0] if isinstance(one, list) else one for name, one in result.items()})
        return result

    core_model_loading.WeightConverter.convert = convert
    try:
        config = model_class.config_class.from_pretrained(directory)
        with methods.quiet(), traced():
            model_class.from_pretrained(None, config=config, state_dict=stored, dtype=torch.bfloat16)
    finally:
        core_model_loading.WeightConverter.convert = own
    return realized
