"""What `merge-gate verify` does with a quantized release: recognize it, ask the worker to measure it, name its kind.

In: the name of a finished model, or its headers. Out: groups for the worker, and findings. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from merge_gate._internal.errors import UsageError
from merge_gate._internal.text import counted, listing, quoted
from merge_gate.features.quantized.measurement import Measurement, ReleaseFiles
from merge_gate.features.quantized.strength_findings import strength_findings, tokenizer_findings
from merge_gate.features.verify.directory import adds_tokens, directory_findings, expected_files, settings_files
from merge_gate.judging.kinds import finding
from merge_gate.records.files import BaseFiles, DeclaredQuantization, Entry, Snapshot
from merge_gate.records.terms import Finding, Severity
from merge_gate.worker.protocol import ALONE, ConsumerSpec, Group

_SUFFIX, _LISTED = ".gguf", 4
_COMPANIONS = {"tokenizer-differs", "chat-template-differs"}
"""What is said of the files in a quantized directory that have no weights."""

_OF_IMAGES = "*mmproj*.gguf"
"""The files that llama.cpp's converter writes for a vision tower and its projector."""

_WEIGHTS = re.compile(r"[^/]+\.safetensors|(pytorch_model|consolidated)[^/]*\.(bin|pth?)")

GGUF = DeclaredQuantization(method="gguf", file="")
"""What a GGUF file declares by its name."""


def refuse_alone(name: str) -> None:
    """Raise `UsageError` for the name of a single file, which has no record that it could be compared with."""
    if Path(name).suffix == _SUFFIX and not Path(name).is_dir():
        raise UsageError(
            f"--adapter is missing: {quoted(name, 200)} is a single file, and has no merge-gate.json of its own",
            hint="add --base BASE --adapter ADAPTER, to compare it with their merge",
        )


def file_release(name: str) -> Snapshot | None:
    """A release that is a single file. Its directory is the file.

    Raises:
        UsageError: the name is that of a directory of GGUF files, or of a pipe or a device.
    """
    path = Path(name).absolute()
    if path.suffix == _SUFFIX and path.exists() and not path.is_dir() and not path.is_file():
        raise UsageError(
            f"{quoted(name, 200)} is a pipe or a device, or a link to one", hint="write it to a file, and name that"
        )
    if path.is_dir() and not any(path.glob("*.safetensors")) and (files := sorted(path.glob(f"*{_SUFFIX}"))):
        raise UsageError(
            f"{quoted(name, 200)} has {counted(len(files), 'GGUF file')} and no safetensors files",
            hint=f"name one file: {listing([quoted(str(Path(name, file.name)), 200) for file in files], _LISTED)}",
        )
    if path.suffix != _SUFFIX or not path.is_file():
        return None
    return Snapshot(name=name, directory=str(path), base_files=BaseFiles(directory=str(path), quantization=GGUF))


def is_release(merged: Snapshot) -> bool:
    """Whether a finished model is stored quantized, by its headers."""
    files = merged.base_files
    if files is not None and _is_mlx(files):
        return all(problem.check in {"base-format", "base-inconsistent"} for problem in files.findings)
    if files is None or files.quantization is None:
        return False
    is_whole = all(problem.check == "base-format" for problem in files.findings)
    return files.quantization.is_read and is_whole


def _is_mlx(files: BaseFiles) -> bool:
    """Whether MLX wrote them. Its settings have no method, so that transformers cannot read them."""
    names = {tensor.name for tensor in files.tensors}
    codes = (tensor.name for tensor in files.tensors if tensor.dtype == "U32" and tensor.name.endswith(".weight"))
    return any({f"{name.removesuffix('weight')}{part}" for part in ("scales", "biases")} <= names for name in codes)


def groups_of(merged: Snapshot, entry: Entry, groups: Sequence[Group], *, no_forward: str) -> Iterator[Group]:
    """The groups, with a measurement of each task in float32: the release may have been quantized from it.

    The files next to the weights are compared with those of the first task, whose adapter `entry` has.
    """
    files = tuple(settings_files(merged, entry, has_own_tokenizer=is_own) for is_own in _tokenizers(entry))
    for group in groups:
        tasks = [
            replace(
                task,
                turn=ALONE,
                no_forward=no_forward,
                consumers=(
                    *task.consumers,
                    ConsumerSpec(
                        feature="quantized",
                        settings=ReleaseFiles(release=merged, files=files if task.index == 0 else ()),
                    ),
                ),
            )
            for task in group.tasks
        ]
        yield replace(group, base=replace(group.base, dtype="float32"), tasks=tuple(tasks))


def _tokenizers(entry: Entry) -> tuple[bool, ...]:
    """Whose tokenizer the release may have: the adapter's own, and the base's if the adapter adds no token."""
    return (True,) if adds_tokens(entry) else (True, False)


def _companions(merged: Snapshot, entry: Entry, measurement: Measurement) -> tuple[Finding, ...]:
    """The findings on tokenizer and template: the fewest, if the release may have the base's tokenizer, too."""
    if measurement.files:
        expected = (expected_files(entry, has_own_tokenizer=is_own) for is_own in _tokenizers(entry))
        pairs = zip(expected, measurement.files, strict=True)
        found = (directory_findings(merged, files, read) for files, read in pairs)
        each = [tuple(one for one in findings if one.check in _COMPANIONS) for findings in found]
    else:
        each = [(*tokenizer_findings(settings),) for settings in measurement.tokenizers]
    return min(each, key=lambda found: sum(one.severity is Severity.ERROR for one in found), default=())


def findings_of(
    merged: Snapshot, entry: Entry, measurement: Measurement, candidates: Mapping[str, Measurement]
) -> tuple[Finding, ...]:
    """Every finding on a release."""
    path = Path(merged.directory)
    unread = sorted(file.name for file in path.parent.glob(_OF_IMAGES) if path.suffix == _SUFFIX and file != path)
    strengths = strength_findings(
        measurement, candidates, adapter=entry.spec.name, config=entry.files.config, unread=unread
    )
    return (*strengths, *_companions(merged, entry, measurement), *_other_weights(merged))


def never_allowed(measurement: Measurement) -> set[str]:
    """Kinds that `--allow` accepts, but not of this release: it lacks values that the merge changes."""
    is_short = any(tensor.touched and tensor.shape < tensor.expected_shape for tensor in measurement.tensors)
    return ({"not-carried"} if measurement.lost else set()) | ({"shape-changed"} if is_short else set())


def _other_weights(merged: Snapshot) -> Iterator[Finding]:
    """The weights next to those that were measured. vLLM loads them if no index leaves them out."""
    files, directory = merged.base_files, Path(merged.directory)
    if files is None or not directory.is_dir():
        return
    names = {*(path.name for path in directory.iterdir()), *merged.withheld} - {*files.weights}
    if others := sorted(filter(_WEIGHTS.fullmatch, names)):
        measured, listed = (listing([quoted(name, 120) for name in part], _LISTED) for part in (files.weights, others))
        what = f"{counted(len(others), 'file')} of weights next to those that were measured ({measured}): {listed}"
        yield finding("stale-shards", what)
