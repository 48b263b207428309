"""A model type that transformers converts while it loads, published after a change, against a load of the result.

In: a model type. Out: `Checked`. A tiny model is saved by transformers, in the layout of the files that people share.
Every second weight gets other values, and these are written as a publication writes them: under the stored names,
through transformers' reverse conversion. `from_pretrained` of the result must give exactly these values, and those of
the base for all other tensors.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import conversion_mapping

from merge_gate._internal.errors import GateError, NotPublishedError
from merge_gate.engine.base.loaded_base import Base, ModelClass, loads_as_usual, named_tensors
from merge_gate.engine.base.tensor_map import RENAMED, NoMapError, tensor_map
from merge_gate.engine.tensors.measure import same_bits
from merge_gate.features.publish.consumer import PublicationConsumer
from merge_gate.features.publish.stored_layout import StoredLayout, layout_of
from merge_gate.files.feed import LocalFeed
from merge_gate.records.measured import Evidence
from tests.support import methods
from tests.support.engine import architectures
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.local_bases import load_base
from tests.support.engine.published import Sent, write_model
from tests.support.engine.tensor_maps import COMPUTED


@dataclass(frozen=True, kw_only=True)
class Checked:
    """`skipped` says why nothing was written, before anything was tried; `refused`, why the change was not published.

    `changed` and `converted` count the changed tensors, and those that were not only renamed. `conversions` are
    transformers' operations. `wrong` names tensors that have other values than they should.
    """

    model_type: str
    changed: int = 0
    converted: int = 0
    conversions: frozenset[str] = frozenset()
    skipped: str = ""
    refused: str = ""
    wrong: tuple[str, ...] = ()

    @property
    def is_compared(self) -> bool:
        return not self.skipped and not self.refused and self.model_type not in COMPUTED


def converted_types() -> list[str]:
    """The types that transformers has a conversion for: of their own, of one of their classes, or of one inside."""
    return [one for one in architectures.model_types() if any(map(_converts, _identifiers(one)))]


def _converts(identifier: str) -> bool:
    return bool(conversion_mapping.get_checkpoint_conversion_mapping(identifier))


def _identifiers(model_type: str) -> Iterator[str]:
    yield model_type
    yield from (model_class.__name__ for model_class, _ in architectures.model_classes(model_type))
    kind = transformers.CONFIG_MAPPING[model_type]
    for inside in getattr(kind, "sub_configs", {}).values():
        if isinstance(inside_type := getattr(inside, "model_type", None), str) and inside_type:
            yield inside_type


def publish(layout: StoredLayout, changed: Mapping[str, torch.Tensor], sent: Sent) -> None:
    """Write the changed tensors as a merge does."""
    connection: Any = sent
    consumer = PublicationConsumer(layout, connection, 0)
    consumer.expect({name: (values.shape, values.dtype) for name, values in changed.items()})
    for name, values in changed.items():
        consumer.put(name, values)
    consumer.complete(changed, ())
    consumer.finish(Evidence(base=layout.base.facts))
    if sent.refusal is not None:
        raise NotPublishedError(sent.refusal.message)


def check(model_type: str, directory: Path, publish: Callable[..., None] = publish) -> Checked:
    """Publish a change of a tiny model of this type, and compare what transformers loads."""
    try:
        architecture = architectures.build(model_type, directory / "base", torch.float32)
    except architectures.CannotBuildError as error:
        return Checked(model_type=model_type, skipped=f"no tiny model: {error}"[:200])
    if not loads_as_usual(architecture.model_class):
        return Checked(model_type=model_type, skipped="the class has a from_pretrained of its own")
    model_class = ModelClass(class_name=architecture.model_class.__name__)
    with methods.quiet():
        base = load_base(str(directory / "base"), model_class=model_class, label="base")
    sent = Sent()
    changed: dict[str, torch.Tensor] = {}
    try:
        with methods.quiet():
            layout = _layout(base, architecture.model_class)
            changed = _changed(base, layout)
            publish(layout, changed, sent)
    except (GateError, NoMapError) as error:
        return Checked(model_type=model_type, changed=len(changed), refused=str(error)[:300])
    write_model(directory / "base", directory / "published", sent)
    converted = [group for name in changed for group in layout.groups(name) if group.conversion != RENAMED]
    return Checked(
        model_type=model_type,
        changed=len(changed),
        converted=sum(len(group.targets) for group in converted),
        conversions=frozenset(group.conversion for group in converted),
        wrong=()
        if model_type in COMPUTED
        else tuple(_wrong(base, changed, architecture.model_class, directory / "published")),
    )


def _layout(base: Base, model_class: Any) -> StoredLayout:
    directory = base.source.directory
    found = tensor_map(model_class, directory, stored_tensors(directory), dtype=base.source.options["dtype"])
    return layout_of(base, found, LocalFeed(directory))


def _changed(base: Base, layout: StoredLayout) -> dict[str, torch.Tensor]:
    """Other values for every second stored weight, a tied one once."""
    generator = torch.Generator().manual_seed(2)
    stored = {name: tensor.detach() for name, tensor in base.tensors.items() if layout.groups(name)}
    weights = [name for name, tensor in stored.items() if tensor.is_floating_point() and tensor.dim() > 1]
    return {name: stored[name] + torch.rand(stored[name].shape, generator=generator) + 1 for name in weights[::2]}


def _wrong(base: Base, changed: dict[str, torch.Tensor], model_class: Any, published: Path) -> Iterator[str]:
    """Tensors of the published model that have other bits than they should."""
    with methods.quiet():
        model, info = model_class.from_pretrained(published, dtype="auto", output_loading_info=True)
    missing = set(info["missing_keys"]) - base.newly_initialized
    yield from (f"missing: {name}" for name in sorted(missing))
    yield from (f"unexpected: {name}" for name in sorted(set(info["unexpected_keys"]) - base.unexpected))
    for name, _, tensor in named_tensors(model):
        if name in base.tensors and name not in base.newly_initialized:
            expected = changed.get(name, base.tensors[name])
            if not same_bits(tensor.detach(), expected.detach()):
                yield name
