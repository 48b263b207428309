"""The whole flow of `merge-gate export` on one page: an adapter and its base ▶ a directory with a plain LoRA.

In: the names of adapter, base, and directory. Out: an `Export`. The directory appears whole, or not at all. Imports no
torch: only the worker process does.

1. Read the adapter's files, refuse what has no plain LoRA, and repair names.     export/plain_lora.py
2. Gate the adapter, and keep its merges.                                         run/flow.py, export/kept_merges.py
3. Make the plain LoRA.                                                           export/plain_lora.py
4. Gate it as the class that servers load, and compare its merges with those.     run/flow.py, export/kept_merges.py
5. Write the record, and give the directory its name.                             publish/partial.py
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge_gate import __version__
from merge_gate._internal.errors import GateError, NoPlainLoraError, UsageError
from merge_gate._internal.regular_file import read_regular_file
from merge_gate._internal.text import counted, quoted
from merge_gate.config.from_arguments import config_of
from merge_gate.export.kept_merges import KeptMerges
from merge_gate.export.plain_lora import (
    Array,
    PlainLora,
    array_of,
    plain_lora,
    refuse_by_config,
    refuse_by_tensors,
    repaired_names,
    weights_file,
)
from merge_gate.files import adapter_config, json_object
from merge_gate.files.headers import CorruptFileError, open_regular, parse_places
from merge_gate.files.identity import directory_identity
from merge_gate.files.resolve import Fetching, Inputs, digest_file
from merge_gate.judging.checks.pickle_refused import PICKLE_REFUSED
from merge_gate.publish.manifest import MOST_BYTES, is_regular, names_below, shared_fields, versions_of
from merge_gate.publish.partial import PartialDirectory
from merge_gate.records.config import Config
from merge_gate.records.files import CONFIG_NAME, EXPORT_NAME, WEIGHTS_NAME, Entry, FileIdentity, FileRecord
from merge_gate.records.measured import Evidence, ServedClass
from merge_gate.records.options import RunOptions
from merge_gate.records.publication import (
    EXPORT_VERSION,
    ExportRecord,
    PublishedAdapter,
    PublishedBase,
)
from merge_gate.records.report import TOOL, Report, Tool
from merge_gate.records.terms import Result, record
from merge_gate.report.formats.fields import UnreadableError, dump_record, load_document
from merge_gate.report.stored.output_directory import explained, made_directory, refuse_input
from merge_gate.report.wording.untrusted import one_line
from merge_gate.run.fed_bases import headers_limit_s
from merge_gate.run.flow import Run
from merge_gate.run.view import View
from merge_gate.worker.private_directory import private_directory

DTYPES = ("auto", "float32")
"""The dtypes in which the merges are compared: the base's own, and float32."""

DEVICE = "cpu"
"""Other devices may round otherwise."""

_SCRATCH = ".merge-gate-export-"


@record
class Export:
    """What became of an adapter.

    Attributes:
        report: the report on the adapter if it did not pass, and else on its export.
        record: the content of merge-gate-export.json; None if nothing was exported.
    """

    report: Report
    record: ExportRecord | None = None

    @property
    def sentences(self) -> tuple[str, ...]:
        """What to know about the export."""
        if self.record is None:
            return ()
        padded = f", with zeros in {counted(len(self.record.padding), 'module')}" if self.record.padding else ""
        return (
            f"{one_line(self.report.adapters[0].source)} is a plain LoRA{padded}",
            f"its scale is in {self.record.scale_in}, and its names are those of {one_line(self.record.model_class)}",
            *(
                f"{one.dtype}: {one.differing:,} of {counted(one.values, 'merged value')} differ, each by one rounding "
                f"(at most {one.largest:.2g})"
                if one.differing
                else f"{one.dtype}: the merge has the same bits as the adapter's"
                for one in self.record.comparisons
            ),
        )


class _Judged(Run):
    """A run that keeps what the worker knows of the class that servers load."""

    served: ServedClass | None = None

    def _judge(self, index: int, evidence: Evidence) -> None:
        self.served = evidence.served
        super()._judge(index, evidence)


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
        GateError: the merges could not be compared, or differ.
    """
    view, target = view or View(), Path(output).absolute()
    config = config_of([adapter], base=base, dtypes=DTYPES, revision=revision)
    if len(config.adapters) != 1:
        raise UsageError(f"{quoted(adapter, 200)} names {len(config.adapters)} adapters, expected one")
    _refuse_inputs(target, [config.adapters[0].path, config.adapters[0].base.model])
    earlier = _replaceable(target)
    with contextlib.ExitStack() as stack:
        stack.enter_context(made_directory(target.parent))
        stack.enter_context(explained(f"cannot export to {target}"))
        scratch = Path(stack.enter_context(private_directory(target.parent, _SCRATCH)))
        partial = PartialDirectory(target)
        stack.callback(partial.remove)
        options = RunOptions(device=DEVICE)
        # 1.
        entry = Inputs(config, Fetching(notify=view.note), limit_s=headers_limit_s).prepare(config.adapters[0])
        _refuse_inputs(target, [one.directory for one in (*entry.members, *([entry.base] if entry.base else []))])
        content, renamed = _read(entry), {}
        if content is not None:
            refuse_by_config(content)
            stored = [one.name for one in entry.base_files.tensors] if entry.base_files is not None else []
            renamed = repaired_names([one.name for one in entry.files.tensors], stored)
            refuse_by_tensors(replace(one, name=renamed.get(one.name, one.name)) for one in entry.files.tensors)
        if renamed:
            config = _repaired(config, entry, renamed, scratch, view)
        # 2.
        (scratch / "merges").mkdir()
        kept = KeptMerges(scratch / "merges")
        judged = _Judged(config, options, view, publications=kept)
        report = _run(judged)
        if report.result is not Result.PASS or content is None or judged.served is None:
            return Export(report=report)
        # 3.
        directory = config.adapters[0].path or entry.files.directory
        tensors = _tensors(directory, report.adapters[0].files)
        made = plain_lora(content, tensors, judged.served, fill=fill)
        _write(partial.model, made)
        facts = _record(entry, report, made, model_class=judged.served.name, renamed=renamed, directory=partial.model)
        (partial.model / EXPORT_NAME).write_bytes(_rendered(facts))
        # 4.
        sources = {one.name: one.sources for one in judged.served.modules}
        bounds = {source: bound for module, bound in made.bounds.items() for source in sources.get(module, ())}
        padding = {source for module in made.padding for source in sources.get(module, ())}
        again = KeptMerges(scratch / "merges", earlier=kept, bounds=bounds, rank=made.config["r"])
        exported = _config_of_export(partial.model, config, output)
        judged = _Judged(exported, options, view, publications=again)
        report = _run(judged)
        if report.result is not Result.PASS or judged.served is None:
            return Export(report=report)
        if judged.served.loaded != facts.model_class:
            raise GateError(f"the export was loaded as {judged.served.loaded}, expected {facts.model_class}")
        dtypes = [one.base.dtype for one in report.adapters]
        compared = [again.comparison(task, dtype, padding) for task, dtype in enumerate(dtypes)]
        # 5.
        facts = replace(facts, comparisons=tuple({one.dtype: one for one in compared}.values()))
        (partial.model / EXPORT_NAME).write_bytes(_rendered(facts))
        partial.publish(replaces=earlier)
        return Export(report=report, record=facts)


def _run(run: Run) -> Report:
    with contextlib.closing(run):
        return run.run()


# --- the directory ---------------------------------------------------------------------------------------------------


def _refuse_inputs(target: Path, inputs: Iterable[str | None]) -> None:
    """Refuse a directory that is an input, or is inside one."""
    named = [(one, f"an input, {quoted(one, 200)}") for one in inputs if one is not None]
    for place in (target, *target.parents):
        refuse_input(place, named)


def _replaceable(target: Path) -> tuple[FileIdentity, ...] | None:
    """The identity of an unchanged earlier export in a directory; None if nothing is there.

    Raises:
        UsageError: something else is there.
    """
    if not os.path.lexists(target):
        return None
    with contextlib.suppress(OSError, UnreadableError):
        identity = directory_identity(target)
        data = read_regular_file(target / EXPORT_NAME, MOST_BYTES)
        earlier: ExportRecord = load_document(ExportRecord, data, EXPORT_VERSION, TOOL)
        listed = {file.path: file.sha256 for file in earlier.files}
        is_same = set(names_below(target)) == {EXPORT_NAME, *listed} and all(
            is_regular(target / name) and digest_file(target / name) == sha256 for name, sha256 in listed.items()
        )
        if is_same and not target.is_symlink() and directory_identity(target) == identity:
            return identity
    raise UsageError(
        f"{quoted(str(target), 200)} exists, and is not an unchanged export of merge-gate",
        hint="move it away, or choose another directory with --output",
    )


# --- 1. --------------------------------------------------------------------------------------------------------------


def _read(entry: Entry) -> dict[str, Any] | None:
    """The adapter's config; None if its files are broken, which the gate reports."""
    if any(finding.check == PICKLE_REFUSED.id for member in entry.members for finding in member.findings):
        raise NoPlainLoraError(
            "the adapter's weights are a Python pickle, which export does not read",
            hint="save the adapter again as safetensors, PEFT's default",
        )
    if entry.problem is not None or entry.files.weights != WEIGHTS_NAME:
        return None
    try:
        data = read_all_of(Path(entry.files.directory, CONFIG_NAME), adapter_config.MAX_BYTES)
        return json_object.parse(data)
    except (json_object.InvalidObjectError, CorruptFileError, OSError):
        return None


def read_all_of(path: Path, limit_bytes: int) -> bytes:
    """The bytes of a file, also through a link: a snapshot of the Hub has links."""
    with open_regular(str(path)) as file:
        return file.read(limit_bytes)


def _repaired(config: Config, entry: Entry, renamed: Mapping[str, str], scratch: Path, view: View) -> Config:
    """The configuration with a copy of the adapter that has PEFT's names."""
    names = [renamed.get(one.name, one.name) for one in entry.files.tensors]
    if len(set(names)) < len(names):
        raise NoPlainLoraError(
            "the adapter has several tensors for one name without wrappers' parts",
            hint="save the inner model with save_pretrained",
        )
    for old, new in sorted(renamed.items()):
        view.note(f"renamed: {old} -> {new}")
    directory = scratch / "repaired"
    directory.mkdir()
    tensors = _tensors(entry.files.directory, entry.files.files)
    shutil.copyfile(Path(entry.files.directory, CONFIG_NAME), directory / CONFIG_NAME)
    with (directory / WEIGHTS_NAME).open("wb") as file:
        file.writelines(weights_file({renamed.get(name, name): array for name, array in tensors.items()}))
    return replace(config, adapters=(replace(config.adapters[0], path=str(directory), hub_id=None, revision=None),))


# --- 3. --------------------------------------------------------------------------------------------------------------


def _stored(directory: str) -> dict[str, Array]:
    try:
        with open_regular(str(Path(directory, WEIGHTS_NAME))) as file:
            tensors = {}
            for tensor, begin, end in parse_places(file):
                file.seek(begin)
                tensors[tensor.name] = array_of(tensor.dtype, tensor.shape, file.read(end - begin))
            return tensors
    except (CorruptFileError, ValueError) as error:
        raise GateError(f"{WEIGHTS_NAME} changed while it was exported: {error}") from error


def _tensors(directory: str, files: Iterable[FileRecord]) -> dict[str, Array]:
    """The tensors in an adapter's files, which have to be the same as before."""
    tensors = _stored(directory)
    if any(digest_file(Path(directory, file.path)) != file.sha256 for file in files):
        raise GateError(
            "the adapter's files changed while it was exported", hint="let nothing write to them, and run again"
        )
    return tensors


def _write(directory: Path, made: PlainLora) -> None:
    (directory / CONFIG_NAME).write_text(json.dumps(made.config, indent=2, sort_keys=True) + "\n", encoding="ascii")
    with (directory / WEIGHTS_NAME).open("wb") as file:
        file.writelines(weights_file(made.tensors))
        file.flush()
        os.fsync(file.fileno())


# --- 4. and 5. -------------------------------------------------------------------------------------------------------


def _config_of_export(directory: Path, config: Config, output: str) -> Config:
    """The configuration of the export, with the base and the checks of the adapter."""
    spec = replace(config.adapters[0], path=str(directory), hub_id=None, revision=None)
    return replace(config, adapters=(replace(spec, name=Path(output).name or spec.name, source=output),))


def _record(
    entry: Entry, report: Report, made: PlainLora, *, model_class: str, renamed: Iterable[str], directory: Path
) -> ExportRecord:
    base, spec, key = report.bases[0], entry.spec, report.adapters[0].base
    return ExportRecord(
        tool=Tool(name=TOOL, version=__version__),
        adapter=PublishedAdapter(name=spec.name, source=spec.source, revision=entry.revision, files=entry.files.files),
        base=PublishedBase(**shared_fields(PublishedBase, replace(base, sha256=base.sha256 or ""))),
        versions=versions_of(report.environment, key),
        model_class=model_class,
        renamed=tuple(sorted(renamed)),
        padding=made.padding,
        scale_in="lora_B" if made.folded else "lora_alpha",
        files=tuple(
            FileRecord(path=name, size_bytes=(directory / name).stat().st_size, sha256=digest_file(directory / name))
            for name in (CONFIG_NAME, WEIGHTS_NAME)
        ),
    )


def _rendered(facts: ExportRecord) -> bytes:
    return (json.dumps(dump_record(facts), allow_nan=False, indent=2) + "\n").encode("ascii")
