"""Compares a finished model with the merge of an adapter, tensor by tensor, while both have values.

In: merged tensors, and the finished model's files. Out: a `Comparison` in the evidence of the merge. Judges nothing.

1. The finished model is loaded as a skeleton of the same class, in its own dtype. Its values come from its files.
2. PEFT merges the adapter, and each merged tensor is compared as it passes, bit by bit.
3. The other tensors are compared with the base's, and then those that transformers does not load.
4. If a merged tensor differs, the adapter is merged again in PEFT's other order of rounding. A tensor that differs from
   both merges gets its figures: how far it is off, in units of the last place and as a multiple of the delta.
5. Such tensors are also compared with the merge in float64: does some order of rounding explain their values?
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any

import torch

from merge_gate._internal.errors import EngineError
from merge_gate.engine import adapter_evidence
from merge_gate.engine.adapter_evidence import MergeAttempt, MergeRequest
from merge_gate.engine.base.accounting import stale_buffers
from merge_gate.engine.base.loaded_base import Base, ModelClass, Source, load_base
from merge_gate.engine.base.skeleton import NoSkeletonError, skeleton_of
from merge_gate.engine.base.stored_spans import stored_bytes
from merge_gate.engine.base.tensor_map import NoMapError, TensorMap, tensor_map
from merge_gate.engine.consumer import Consumer, WholeTensors
from merge_gate.engine.tensors.measure import dtype_name, same_bits
from merge_gate.engine.tensors.threads import spread
from merge_gate.features.verify.comparison import Comparison, LoadedKeys, ReadSettings, SettingsFiles, TensorComparison
from merge_gate.features.verify.exact_merge import ExactRows, Fit, deviation, exact_merge, requantized
from merge_gate.features.verify.expected_differences import Expectation
from merge_gate.features.verify.finished_settings import read_settings
from merge_gate.files.feed import Feed
from merge_gate.records.files import StoredTensor
from merge_gate.records.measured import Evidence, MeasureOptions
from merge_gate.records.refusals import CannotJudge, Refusal
from merge_gate.records.terms import Quantization

MOST_PASSES = 3
"""How often tensors are compared if some code reads one that has no values. It has values in the next pass."""

MOST_REQUANTIZED = 4
"""The other quantization of a base is tried on so many tensors that differ from all else."""

MOST_VALUES_REQUANTIZED = 1 << 22
"""Of these tensors, so many values are quantized: whole rows from the first one on."""

_LOADED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """A directory's stored tensors, and the feed of their bytes.

    `is_streamed`: its files are stubs. `settings`: the files next to the weights that are compared; None compares none.
    """

    directory: str
    stored: tuple[StoredTensor, ...]
    feed: Feed
    is_streamed: bool = False
    settings: SettingsFiles | None = None


def comparing(
    files: Files,
    base_files: Files,
    *,
    base: Base,
    model_class: ModelClass,
    label: str,
    base_map: TensorMap | None,
) -> Consumer:
    """Load the finished model. If it cannot be loaded, the comparison says why.

    Raises:
        EngineError: the base is quantized.
    """
    try:
        merged = load_merged(files, label, model_class, base, base_files)
    except CannotJudge as error:
        return _Unloadable(error.refusal)
    if base.facts.quantization != Quantization.NONE:
        raise EngineError(
            f"base {base.source.label} is quantized ({base.facts.quantization}), and a merge into it is not compared",
            hint="name the original base with --base",
        )
    return ComparisonConsumer(base, merged, files, base_files, base_map)


class _Unloadable(Consumer):
    def __init__(self, refusal: Refusal) -> None:
        self._refusal = refusal

    def end(self, attempt: MergeAttempt) -> Evidence:
        return _with_comparison(attempt.evidence, Comparison(unloadable=self._refusal))


def _with_comparison(evidence: Evidence, comparison: Comparison) -> Evidence:
    return replace(evidence, facts=(*evidence.facts, ("verify", comparison)))


def load_merged(files: Files, label: str, model_class: ModelClass, base: Base, base_files: Files) -> Base:
    """Step 1. If no skeleton can be made, transformers loads the model itself.

    Raises:
        CannotJudge: the directory cannot be loaded as this class.
    """
    dtype = _dtype(files, base_files) or base.facts.dtype
    source = replace(base.source, directory=files.directory, label=label, revision=None, dtype=dtype, device="cpu")
    try:
        return skeleton_of(source, model_class, files.stored, files.feed)
    except NoSkeletonError as error:
        if files.is_streamed:
            raise EngineError(
                f"{label} cannot be streamed: {model_class.class_name} has to be loaded by transformers ({error})",
                hint="download it, and name its directory",
            ) from error
        return load_base(Source(directory=files.directory, label=label, dtype=dtype), model_class)


def _dtype(files: Files, base_files: Files) -> str | None:
    """The dtype of a finished model, if it is stored in another one than the base."""
    own, others = _main_dtype(files.stored), _main_dtype(base_files.stored)
    return _LOADED_DTYPES.get(own) if own != others else None


def _main_dtype(stored: Sequence[StoredTensor]) -> str:
    """The floating dtype of most values."""
    counts: dict[str, int] = defaultdict(int)
    for tensor in stored:
        if tensor.dtype in _LOADED_DTYPES:
            counts[tensor.dtype] += torch.Size(tensor.shape).numel()
    return max(counts, key=counts.__getitem__, default="")


class ComparisonConsumer(WholeTensors):
    """Steps 2 to 5. If the adapter could not be merged, the comparison is empty."""

    def __init__(self, base: Base, merged: Base, files: Files, base_files: Files, base_map: TensorMap | None) -> None:
        self._comparisons = _TensorComparisons(base=base, merged=merged)
        self._files, self._base_files, self._base_map = files, base_files, base_map
        super().__init__(self._comparisons.put)

    def end(self, attempt: MergeAttempt) -> Evidence:
        attempt.merge = None  # other merges follow, and its memory is of no use to them
        is_merged = attempt.evidence.refusal is None
        return _with_comparison(attempt.evidence, self._compare(attempt.request) if is_merged else Comparison())

    def _compare(self, request: MergeRequest) -> Comparison:
        """Steps 3 to 5."""
        comparisons, files, base_files, base_map = self._comparisons, self._files, self._base_files, self._base_map
        base, merged, request = comparisons.base, comparisons.merged, replace(request, consumers=(), progress=None)
        for name, first in self.untied:
            comparisons.untie(name, first)
        merged_names = {name for name, _ in comparisons.facts}
        names = [name for name in base.tensors if name not in merged_names | base.newly_initialized]
        for _ in range(MOST_PASSES):
            for _ in spread(comparisons.compare_untouched, names):
                pass
            if not (base.was_misread() or merged.was_misread()):
                break
        others = tuple(_unloaded(files, base_files, base_map))
        if any(fact.touched and not fact.same for fact in comparisons.facts.values()):
            again = replace(request, consumers=(WholeTensors(comparisons.put_again),), safe_merge=False)
            adapter_evidence.merge(replace(again, measure_options=MeasureOptions(estimates=True)))
            for name, blocks in groupby(exact_merge(request, comparisons.unlike()), key=lambda rows: rows.name):
                comparisons.fit(name, blocks)
        given = self.names | (base.tensors.keys() - base.newly_initialized)
        order = {name: number for number, name in enumerate(merged.tensors)}
        facts = [comparisons.facts[key] for key in sorted(comparisons.facts, key=lambda key: order[key[1]])]
        tensors = [
            fact for fact in (*facts, *others) if fact.touched or not fact.same or fact.shape != fact.expected_shape
        ]
        is_other_class = type(base.model).__name__ not in (_config(base).architectures or ())
        is_part = base.named is not None and base.named[1]  # of a multimodal base
        is_other_task = is_other_class and base.named is not None and not is_part
        return Comparison(
            tensors=tuple(tensors),
            compared=len(comparisons.facts) + len(others),
            absent=tuple(sorted(name for name in given if not comparisons.partners(name))),
            base_keys=_keys(base, base_map),
            merged_keys=_keys(merged, _map_of(merged, files)),
            is_other_class=is_other_class,
            lacked=tuple(base_map.unloaded) if base_map is not None and is_other_task else (),
            untied=tuple(name for name, _ in self.untied),
            settings=_settings(base, merged, files, base_files, is_untied=bool(self.untied)),
        )


@dataclass(slots=True, kw_only=True)
class _TensorComparisons:
    """Compares each merged tensor with the finished model's, and keeps the facts.

    `facts` are by the name of the merge's tensor, and by that of the finished model's.
    """

    base: Base
    merged: Base
    facts: dict[tuple[str, str], TensorComparison] = field(default_factory=dict)
    _partners: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    _untied: set[str] = field(default_factory=set)
    _fitted: set[str] = field(default_factory=set)
    _tries: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(MOST_REQUANTIZED))

    def __post_init__(self) -> None:
        for name in self.merged.tensors:
            if name not in self.merged.newly_initialized:
                self._partners[self.base.first_name(name)].append(name)
        for name in self.base.tensors:  # tied in the finished model only
            first = self.merged.first_name(name)
            if first != name and first in self.merged.tensors:
                self._partners[name].append(first)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """A merged tensor passes, in its final dtype. The last one of a name counts.

        If the merge unties a tensor, its own name is not one of the base's first names.
        """
        if name not in self.base.tensors:
            self._untied.add(name)
        self._compare(name, tensor, touched=True)

    def untie(self, name: str, first: str) -> None:
        """The merge separates a tensor from the first one. If it was not put, it has the base's values."""
        self._untied.add(name)
        self.facts.pop((first, name), None)
        if all(merged != name for merged, _ in self.facts):
            with torch.no_grad(), self.base.filled([first]):
                self._compare(name, self.base.tensors[first].detach(), touched=False)

    def put_again(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor of the merge in PEFT's other order of rounding."""
        for partner in self.partners(name):
            facts = self.facts.get((name, partner))
            if facts is None or facts.same:
                continue
            with torch.no_grad(), self.merged.filled([partner]):
                actual = self.merged.tensors[partner].detach()
                is_other = is_same(actual, tensor)
                self.facts[name, partner] = (
                    replace(facts, in_other_order=True) if is_other else self._with_figures(name, facts, actual, tensor)
                )

    def unlike(self) -> frozenset[str]:
        """The merged tensors that may be rounded in another order than PEFT rounds."""
        return frozenset(name for name, partner in self.facts if self._is_unlike(name, partner))

    def _is_unlike(self, name: str, partner: str) -> bool:
        fact = self.facts[name, partner]
        is_near = fact.is_along_delta and not (fact.is_base and fact.units > 2)  # noqa: PLR2004 - each order rounds twice
        is_comparable = fact.touched and fact.has_figures and fact.shape == fact.expected_shape
        return is_comparable and is_near and not fact.in_other_order

    def fit(self, name: str, blocks: Iterable[ExactRows]) -> None:
        """The merge of a tensor in float64, from the first row to the last. If it comes again, neither is the whole."""
        unlike = {
            partner: self.facts[name, partner] for partner in self.partners(name) if self._is_unlike(name, partner)
        }
        fits = {
            partner: Fit(getattr(torch, fact.expected_dtype), getattr(torch, fact.dtype), fact.factor)
            for partner, fact in unlike.items()
        }
        with torch.no_grad(), self.merged.filled([*fits]):
            for rows in blocks:
                for partner, fit in fits.items():
                    fit.add(self.merged.tensors[partner].detach()[rows.start : rows.start + len(rows.merged)], rows)
        for partner, fit in fits.items():
            outside, bias = fit.best()
            outside_of_whole = None if name in self._fitted else outside
            self.facts[name, partner] = replace(unlike[partner], outside=outside_of_whole, bias=bias, astray=fit.astray)
        self._fitted.add(name)

    def partners(self, name: str) -> tuple[str, ...]:
        """The tensors of the finished model that have to be like this one."""
        if name in self._untied:
            return (self.merged.first_name(name),)
        return tuple(partner for partner in self._partners.get(name, ()) if partner not in self._untied)

    def compare_untouched(self, name: str) -> None:
        with torch.no_grad(), self.base.filled([name]):
            self._compare(name, self.base.tensors[name].detach(), touched=False)

    def _compare(self, name: str, expected: torch.Tensor, *, touched: bool) -> None:
        for partner in self.partners(name):
            is_own = name in self._untied or self.base.first_name(partner) == name
            with torch.no_grad(), self.merged.filled([partner]):
                actual = self.merged.tensors[partner].detach()
                facts = outlined(partner if is_own else name, actual, expected, touched=touched)
                if not facts.same and not touched:  # a merged tensor may have the bits of the other order of rounding
                    facts = self._with_figures(name, facts, actual, expected)
            self.facts[name, partner] = facts

    def _with_figures(
        self, name: str, facts: TensorComparison, actual: torch.Tensor, expected: torch.Tensor
    ) -> TensorComparison:
        if actual.dim() != expected.dim():
            return facts
        actual, expected = in_common(actual, expected)
        first = self.base.first_name(name)
        own = self.base.tensors.get(first)
        if own is not None:
            own = in_common(own.detach(), actual)[0] if own.dim() == actual.dim() else None
        with self.base.filled([first]):
            own = own if own is not None and own.shape == actual.shape else None
            return self._requantized(figures(facts, actual, expected, own), actual, expected, own)

    def _requantized(
        self, facts: TensorComparison, actual: torch.Tensor, expected: torch.Tensor, base: torch.Tensor | None
    ) -> TensorComparison:
        """Try to explain a difference that is no factor of the delta by another quantization of the base."""
        is_explained = facts.same_as_base or facts.is_along_delta
        is_candidate = base is not None and base.dim() == 2 and facts.dtype == facts.expected_dtype  # noqa: PLR2004
        if base is None or is_explained or not is_candidate or not self._tries.acquire(blocking=False):
            return facts
        rows = slice(0, max(1, MOST_VALUES_REQUANTIZED // max(1, base.shape[1])))
        return replace(facts, requantized=requantized(actual[rows], expected[rows], base[rows]))


def in_common(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The part that two tensors of as many dimensions have in common."""
    part = tuple(slice(min(sizes)) for sizes in zip(first.shape, second.shape, strict=True))
    return first[part], second[part]


def is_same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors have the same bits in the part that they have in common."""
    if actual.dim() != expected.dim():
        return False
    actual, expected = in_common(actual, expected.detach())
    return same_bits(actual, expected.to(actual.device, actual.dtype))


def outlined(name: str, actual: torch.Tensor, expected: torch.Tensor, *, touched: bool) -> TensorComparison:
    """Whether two tensors have the same bits, and their outlines."""
    return TensorComparison(
        name=name,
        touched=touched,
        same=is_same(actual, expected),
        dtype=dtype_name(actual.dtype),
        expected_dtype=dtype_name(expected.dtype),
        shape=tuple(actual.shape),
        expected_shape=tuple(expected.shape),
        numel=actual.numel(),
    )


def figures(
    facts: TensorComparison, actual: torch.Tensor, expected: torch.Tensor, base: torch.Tensor | None
) -> TensorComparison:
    """The facts with the figures of tensors of one shape. Without a base, its values are taken as zeros."""
    is_base = base is not None and same_bits(actual, base.to(actual.dtype))
    expected = expected.detach().to(actual.device)
    measured = deviation(actual, expected, torch.zeros_like(expected) if base is None else base)
    return replace(facts, same_as_base=is_base, **asdict(measured))


# --- what transformers does not load ---------------------------------------------------------------------------------


def _unloaded(files: Files, base_files: Files, base_map: TensorMap | None) -> Iterator[TensorComparison]:
    """Stored tensors that the base's load leaves out, and that the finished directory stores too."""
    if base_map is None:
        return
    before, after = ({tensor.name: tensor for tensor in part.stored} for part in (base_files, files))
    names = [name for name in base_map.unloaded if name in after]
    theirs = stored_bytes(base_files.directory, {name: before[name] for name in names})
    ours = stored_bytes(files.directory, {name: after[name] for name in names})
    for name in names:
        expected, actual = theirs[name].read(base_files.feed), ours[name].read(files.feed)
        facts = outlined(name, actual, expected, touched=False)
        if not facts.same and actual.dim() == expected.dim():
            actual, expected = in_common(actual, expected)
            facts = figures(facts, actual, expected, expected)
        yield facts


# --- names and settings ----------------------------------------------------------------------------------------------


def _map_of(merged: Base, files: Files) -> TensorMap | None:
    try:
        return tensor_map(type(merged.model), files.directory, files.stored, dtype=_config(merged).dtype)
    except NoMapError:
        return None


def _keys(base: Base, mapping: TensorMap | None) -> LoadedKeys:
    return LoadedKeys(
        targets=tuple(mapping.targets().items()) if mapping is not None else (),
        stale_buffers=stale_buffers(mapping) if mapping is not None else (),
        without_source=tuple(sorted(base.newly_initialized)),
        ties=tuple(base.aliases.items()),
    )


def _settings(base: Base, merged: Base, files: Files, base_files: Files, *, is_untied: bool) -> ReadSettings:
    """The files next to the weights. If the adapter needs another class than the base's own, that class is expected."""
    if files.settings is None:
        return ReadSettings()
    expected, name = deepcopy(_config(base)), type(base.model).__name__
    if name not in (expected.architectures or ()):
        expected.architectures = [name]
    if is_untied and not merged.aliases:
        expected.tie_word_embeddings = False
    before, after = ({tensor.name: tensor.shape for tensor in part.stored} for part in (base_files, files))
    pairs = [(before[name], after[name]) for name in before.keys() & after.keys()]
    facts = Expectation(
        resized=frozenset((old[0], new[0]) for old, new in pairs if old and new and old[0] != new[0]),
        is_untied=is_untied,
        has_base_tensors_only=after.keys() <= before.keys(),
    )
    return read_settings(files.settings, files.directory, expected, _config(merged), facts)


def _config(base: Base) -> Any:
    return base.model.config
