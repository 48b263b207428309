"""The whole flow of `merge-gate export` on one page: an adapter and its base ▶ a directory with a plain LoRA.

In: the names of adapter, base, and directory. Out: an `Export`. The directory appears whole, or not at all. Imports no
torch: only the worker process does.

1. Read the adapter's files, refuse what has no plain LoRA, and repair names.     plain_lora.py
2. Gate the adapter, and keep its merges.                                         run/flow.py, kept_merges.py
3. Make the plain LoRA.                                                           plain_lora.py
4. Gate it as the class that its users load, and compare its merges with those.   run/flow.py, kept_merges.py
5. Write the record, and give the directory its name.                             features/publish/partial.py
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge_gate import __version__
from merge_gate._internal.errors import GateError, UsageError
from merge_gate._internal.private_directory import private_directory
from merge_gate._internal.regular_file import read_all
from merge_gate._internal.text import quoted
from merge_gate._internal.whole_file import whole_file
from merge_gate.config.from_arguments import config_of
from merge_gate.features.export.export_record import Export, ExportRecord, render
from merge_gate.features.export.kept_merges import KeptMerges, compared
from merge_gate.features.export.plain_lora import Array, array_of, plain_lora, refuse, repaired_names
from merge_gate.features.publish.manifest import PublishedAdapter, PublishedBase, shared_fields, versions_of
from merge_gate.features.publish.partial import PartialDirectory, partial_name, unchanged
from merge_gate.features.publish.planned_files import PlannedFiles
from merge_gate.features.publish.weight_files import ModelLayout, ModelWriter, new_file
from merge_gate.files import adapter_config, json_object
from merge_gate.files.headers import CorruptFileError, open_regular, parse_places
from merge_gate.files.resolve import Fetching, Inputs, digest_file
from merge_gate.records.config import AdapterSpec, Config
from merge_gate.records.files import (
    CONFIG_NAME,
    EXPORT_NAME,
    WEIGHTS_NAME,
    Entry,
    FileIdentity,
    HashedFile,
    StoredTensor,
)
from merge_gate.records.options import RunOptions
from merge_gate.records.report import TOOL, Report, Tool
from merge_gate.records.terms import Result
from merge_gate.report.stored.output_directory import explained, made_directory, refuse_input
from merge_gate.run.flow import Run
from merge_gate.run.groups import headers_timeout_s
from merge_gate.run.view import View

DTYPES = ("auto", "float32")
"""The dtypes in which merges are compared: the base's own, and float32."""

OPTIONS = RunOptions(device="cpu")
"""Other devices may round otherwise."""

MOST_NOTES = 100
"""So many renames are printed. The record lists all."""

_SCRATCH = ".merge-gate-export-"


def export(
    adapter: str,
    output: str,
    *,
    base: str | None = None,
    revision: str | None = None,
    fill: bool = True,
    view: View | None = None,
) -> Export:
    """Write a plain LoRA that merges as the adapter does. `fill`: add pairs of zeros where servers expect a module.

    Raises:
        UsageError: a name is wrong, or the directory cannot be used.
        NoPlainLoraError: no plain LoRA has the effect of the adapter.
        GateError: the merges cannot be compared, or differ.
    """
    view, target = view or View(), Path(output).absolute()
    config = config_of([adapter], base=base, dtypes=DTYPES, revision=revision)
    spec = config.adapters[0]
    if len(config.adapters) > 1:
        raise UsageError(f"{quoted(adapter, 200)} names {len(config.adapters)} adapters, expected one")
    _refuse_inputs(target, [spec.path, spec.base.model])
    _replaceable(target)
    with contextlib.ExitStack() as stack:
        stack.enter_context(made_directory(target.parent))
        stack.enter_context(explained(f"cannot export to {target}"))
        scratch = Path(stack.enter_context(private_directory(target.parent, _SCRATCH)))
        partial = PartialDirectory(target)
        stack.callback(partial.remove)
        earlier = _replaceable(target)  # again: a killed run may have taken it away
        # 1.
        entry = Inputs(config, Fetching(), timeout_s=headers_timeout_s).checked(spec)  # fetches no base
        _refuse_inputs(
            target, [name for member in entry.members for name in (member.directory, member.config.base_name)]
        )
        if entry.base_files is not None and entry.base_files.is_float32:
            spec = replace(spec, base=replace(spec.base, dtypes=("float32",)))
            config = replace(config, adapters=(spec,))
        content = _content(entry)
        renamed = _renamed(entry, content, view) if content is not None else {}
        if renamed:
            tensors = _tensors(entry.files.directory, entry.files.files)
            tensors = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
            write_adapter(scratch / "repaired", content, tensors)
            config = _config_of(scratch / "repaired", config, spec)
        # 2.
        kept, view.more_follows = KeptMerges(scratch / "merges"), True
        report = _gated(config, view, kept)
        if report.result is not Result.PASS or kept.served is None or content is None:
            return Export(report=report)
        # 3.
        tensors = _tensors(config.adapters[0].path or entry.files.directory, report.adapters[0].files)
        made = plain_lora(content, tensors, kept.served, fill=fill)
        base_report = replace(report.bases[0], sha256=report.bases[0].sha256 or "")
        facts = ExportRecord(
            tool=Tool(name=TOOL, version=__version__),
            adapter=PublishedAdapter(
                name=spec.name, source=spec.source, revision=entry.revision, files=entry.files.files
            ),
            base=PublishedBase(**shared_fields(PublishedBase, base_report)),
            versions=versions_of(report.environment, report.adapters[0].base),
            model_class=kept.served.name,
            renamed=tuple(sorted(renamed)),
            padding=tuple(
                sorted({*made.padding, *(name for name in entry.files.padding if made.bounds.get(name) == 0)})
            ),
            scale_in="lora_B" if made.is_folded else "lora_alpha",
            files=write_adapter(partial.model, made.config, made.tensors),
        )
        _write_record(partial.model, facts)
        # 4.
        again, view.more_follows = KeptMerges(scratch / "again"), False
        config = _config_of(partial.model, config, replace(spec, name=target.name, source=output))
        report = _gated(config, view, again)
        if report.result is not Result.PASS:
            return Export(report=report)
        if again.served is None or again.served.loaded != facts.model_class:
            raise GateError(f"the export was not loaded as {facts.model_class}")
        comparisons = [
            compared(task, judged.base.dtype, kept, again, made) for task, judged in enumerate(report.adapters)
        ]
        # 5.
        facts = replace(facts, comparisons=tuple({comparison.dtype: comparison for comparison in comparisons}.values()))
        _write_record(partial.model, facts)
        partial.publish(replaces=earlier)
        return Export(report=report, record=facts)


def _gated(config: Config, view: View, merges: KeptMerges) -> Report:
    with contextlib.closing(Run(config, OPTIONS, view, features={"export": merges})) as run:
        return run.run()


# --- the directory ---------------------------------------------------------------------------------------------------


def _refuse_inputs(target: Path, inputs: Iterable[str | None]) -> None:
    """Refuse a directory that is an input, or is inside one, and one whose leftover, which is removed, has an input."""
    named = [(path, quoted(path, 200)) for path in inputs if path is not None]
    above = [(str(folder), owner) for path, owner in named for folder in Path(path).absolute().parents]
    refuse_input(target.parent / partial_name(target.name), above)
    for place in (target, *(target.parent.resolve() / target.name).parents):
        refuse_input(place, named)


def _replaceable(target: Path) -> tuple[FileIdentity, ...] | None:
    """The identity of an unchanged earlier export in a directory; None if nothing is there.

    Raises:
        UsageError: something else is there.
    """
    if not os.path.lexists(target):
        return None
    if (identity := unchanged(target, made_by="export")) is None:
        raise UsageError(
            f"{quoted(str(target), 200)} exists, and is not an unchanged export of merge-gate",
            hint="move it away, or choose another directory with --output",
        )
    return identity


def write_adapter(
    directory: Path, config: Mapping[str, Any] | None, tensors: Mapping[str, Array]
) -> tuple[HashedFile, ...]:
    """Write both files of an adapter, and read them back. Their bytes depend on the config and the tensors only."""
    directory.mkdir(exist_ok=True)
    stored = [
        StoredTensor(name=name, dtype=tensor.dtype, shape=tensor.values.shape, file=WEIGHTS_NAME)
        for name, tensor in tensors.items()
    ]
    writer = ModelWriter(directory, ModelLayout(files=(new_file(WEIGHTS_NAME, stored, {"format": "pt"}),)))
    with contextlib.closing(PlannedFiles(writer.make_files())) as files:
        for name, tensor in tensors.items():
            files.write(name, 0, memoryview(tensor.values.tobytes()))
        writer.checksums = files.checksums
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return writer.add_file(CONFIG_NAME, text.encode("ascii")), *writer.read_back()


def _write_record(directory: Path, facts: ExportRecord) -> None:
    with whole_file(directory / EXPORT_NAME, lasts=True) as file:
        file.write(render(facts))


# --- the adapter -----------------------------------------------------------------------------------------------------


def _content(entry: Entry) -> dict[str, Any] | None:
    """The adapter's config; None if its files are missing, broken, or a pickle, which the gate reports."""
    if entry.problem is not None or entry.files.weights != WEIGHTS_NAME:
        return None
    try:
        with open_regular(str(Path(entry.files.directory, CONFIG_NAME))) as file:
            return json_object.parse(read_all(file, adapter_config.MAX_BYTES))
    except (json_object.InvalidObjectError, CorruptFileError, FileNotFoundError):
        return None


def _renamed(entry: Entry, content: Mapping[str, Any], view: View) -> dict[str, str]:
    """The names of tensors that have to be repaired. Refuses what has no plain LoRA."""
    names, stored = (
        [tensor.name for tensor in files.tensors] if files else [] for files in (entry.files, entry.base_files)
    )
    renamed = repaired_names(names, stored)
    refuse(content, [replace(tensor, name=renamed.get(tensor.name, tensor.name)) for tensor in entry.files.tensors])
    for old, new in sorted(renamed.items())[:MOST_NOTES]:
        view.note(f"renamed: {quoted(old, 200)} -> {quoted(new, 200)}")
    if len(renamed) > MOST_NOTES:
        view.note(f"renamed: {len(renamed) - MOST_NOTES:,} more tensors, which {EXPORT_NAME} lists")
    return renamed


def _tensors(directory: str, files: Iterable[HashedFile]) -> dict[str, Array]:
    """The tensors in an adapter's files, which have to be the same as before."""
    try:
        with open_regular(str(Path(directory, WEIGHTS_NAME))) as file:
            read = [(tensor, file.seek(begin), file.read(end - begin)) for tensor, begin, end in parse_places(file)]
            tensors = {tensor.name: array_of(tensor.dtype, tensor.shape, data) for tensor, _, data in read}
    except (CorruptFileError, ValueError, KeyError):
        tensors = {}
    if not tensors or any(digest_file(Path(directory, file.path)) != file.sha256 for file in files):
        raise GateError(
            "the adapter's files changed during the export", hint="let nothing write to them, and try again"
        )
    return tensors


def _config_of(directory: Path, config: Config, spec: AdapterSpec) -> Config:
    """The configuration with another directory in the place of the adapter."""
    return replace(config, adapters=(replace(spec, path=str(directory), hub_id=None, revision=None),))
