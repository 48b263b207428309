"""Judges an adapter by its files, without loading a tensor.

In: a hostile directory. Out: `AdapterFiles`, with findings of the `file-*`, `pickle-refused`, and `config-*` checks and
on incomplete tensors; it imports no torch and no PEFT.
"""

# The order of reading is fixed, and the first finding is the cause. The numbers are those of the sections below:
# 1. The listing: adapter_config.json and a weights file must be present.
# 2. adapter_config.json: not an LFS pointer, strict JSON, valid values, nothing that imports code.
# 3. The weights: the file that PEFT would load (safetensors before .bin), not an LFS pointer, complete.
# 4. The tensors in it: at least one, none of them an empty shard, with the ranks of the config.

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate.errors import EngineError
from merge_gate.files import adapter_config, json_object
from merge_gate.files.headers import CorruptFileError, lfs_pointer, open_regular, parse_file, shown
from merge_gate.files.identity import identity_of
from merge_gate.files.pickle_scan import UnsafePickleError, read_pickled
from merge_gate.judging import foreign_formats
from merge_gate.judging.checks.file_corrupt import FILE_CORRUPT
from merge_gate.judging.checks.file_lfs_pointer import FILE_LFS_POINTER
from merge_gate.judging.checks.file_missing import FILE_MISSING
from merge_gate.judging.checks.keys_missing import keys_missing
from merge_gate.judging.checks.pickle_refused import PICKLE_REFUSED
from merge_gate.judging.checks.shape_mismatch import SHAPE_MISMATCH
from merge_gate.judging.limits import bounded
from merge_gate.records.files import (
    CONFIG_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    AdapterConfig,
    AdapterFiles,
    FileRecord,
    StoredTensor,
)
from merge_gate.records.terms import Finding
from merge_gate.tensor_names import ADAPTER_PREFIX
from merge_gate.text import counted
from merge_gate.text import listing as in_a_sentence

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from io import BufferedReader

_MOST_NAMES_SHOWN = 8
_MOST_MISNAMED = 3
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
_MAX_ENTRIES = 10_000
_MAX_FOLDERS = 200  # searched in a directory that is not itself an adapter
_LORA_FACTOR = re.compile(r"\.lora_(embedding_)?[AB](\.weight)?$")


def preflight(snapshot_directory: str, *, allow_pickle: bool, withheld: tuple[str, ...] = ()) -> AdapterFiles:
    """Read and judge the files of one adapter.

    `withheld` names files of the adapter's repository that were not downloaded. Raises `EngineError` if a file cannot
    be read at all (permissions, a failing disk), which says nothing about the adapter.
    """
    listing = _list(snapshot_directory, withheld)
    config = _read_config(snapshot_directory, listing)
    weights = _read_weights(snapshot_directory, listing, allow_pickle=allow_pickle)
    judged = adapter_config.judge(config.parsed, weights.tensors) if config.parsed is not None else ()
    recorded = adapter_config.recorded(config.parsed) if config.parsed is not None else AdapterConfig()
    return AdapterFiles(
        directory=snapshot_directory,
        config=recorded,
        weights=weights.name,
        tensors=weights.tensors,
        files=(*config.files, *weights.files),
        findings=bounded(chain(config.findings, judged, weights.findings, _judge_tensors(recorded.peft_type, weights))),
    )


def base_of(directory: str) -> str | None:
    """The base that an adapter's config names; None if it names none, or cannot be read."""
    present = frozenset({CONFIG_NAME})
    try:
        config = _read_config(directory, _Listing(present=present, withheld=frozenset(), nested=()))
    except EngineError:
        return None
    return adapter_config.recorded(config.parsed or {}).base_name


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listing:
    """Names in the directory, and names (with folders) of the repository's files that are not on disk."""

    present: frozenset[str]
    withheld: frozenset[str]
    nested: tuple[str, ...]

    @property
    def everything(self) -> frozenset[str]:
        return self.present | {name for name in self.withheld if "/" not in name}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Config:
    parsed: dict[str, Any] | None = None
    files: tuple[FileRecord, ...] = ()
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """`is_listed`: the file lists its tensors."""

    name: str | None = None
    tensors: tuple[StoredTensor, ...] = ()
    is_listed: bool = False
    files: tuple[FileRecord, ...] = ()
    findings: tuple[Finding, ...] = ()


# --- 1. the listing ------------------------------------------------------------------------------------------------


def _list(directory: str, withheld: tuple[str, ...]) -> _Listing:
    present: set[str] = set()
    nested = {name.rpartition("/")[0] for name in withheld if name.endswith(f"/{CONFIG_NAME}")}
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                present.add(entry.name)
                if len(present) >= _MAX_ENTRIES:
                    break
    except OSError as error:
        raise _unreadable(directory, error) from error
    # PEFT looks for its two files by name, so a large directory does not hide them.
    present |= {name for name in (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME) if _is_there(directory, name)}
    if CONFIG_NAME not in present:
        nested |= set(_below(directory, present))
    return _Listing(present=frozenset(present), withheld=frozenset(withheld), nested=tuple(sorted(nested)))


def _below(directory: str, names: set[str]) -> Iterator[str]:
    """Folders with a config: a checkpoint, or the checkpoints of a training run."""
    for name in sorted(names)[:_MAX_FOLDERS]:
        if _is_there(directory, f"{name}/{CONFIG_NAME}"):
            yield name
        else:
            yield from (f"{name}/{inner}" for inner in _folders(directory, name))


def _folders(directory: str, name: str) -> Iterator[str]:
    """Folders with a config in the folder `name`. Empty for a file, and for a folder that cannot be listed."""
    with suppress(OSError), os.scandir(Path(directory, name)) as entries:
        for entry in islice(entries, _MAX_FOLDERS):
            if _is_there(directory, f"{name}/{entry.name}/{CONFIG_NAME}"):
                yield entry.name


def _is_there(directory: str, name: str) -> bool:
    return os.path.lexists(Path(directory, name))


def _misnamed_weights(directory: str, listing: _Listing) -> str:
    """The hint if a file with another name has an adapter's tensors; else empty. A shard has only some of them."""
    whole = (name for name in listing.present if name.endswith(".safetensors") and not _SHARD.search(name))
    for name in sorted(whole)[:_MOST_MISNAMED]:
        with suppress(CorruptFileError, OSError), open_regular(str(Path(directory, name))) as file:
            if any(tensor.name.startswith(ADAPTER_PREFIX) for tensor in parse_file(file)):
                return f"{shown(name)} has the tensors of a PEFT adapter: rename it to {WEIGHTS_NAME}"
    return ""


def _missing(listing: _Listing, is_missing: str, hint: str = "") -> Finding:
    names = listing.everything
    some = in_a_sentence(map(shown, sorted(names)), _MOST_NAMES_SHOWN)
    present = f"the directory contains {some}" if names else "the directory is empty"
    return FILE_MISSING.finding(f"there {is_missing}: {present}", hint or _advise_missing(listing))


def _advise_missing(listing: _Listing) -> str:
    if listing.nested:
        *_, latest = ordered = sorted(listing.nested, key=_checkpoint_order)
        if _checkpoint_order(latest)[0] < 0 and len(ordered) > 1:
            some = in_a_sentence(map(shown, ordered), _MOST_NAMES_SHOWN)
            return f"{len(ordered)} adapters are in subdirectories ({some}): list the path of each adapter to check"
        return f"the adapter seems to be in the subdirectory {shown(latest)}: list that path instead"
    foreign_names = listing.everything - {CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME}
    format_hint = foreign_formats.by_files(foreign_names, has_config=CONFIG_NAME in listing.present)
    return (
        format_hint or f"name the directory that save_pretrained wrote, which contains {CONFIG_NAME} and {WEIGHTS_NAME}"
    )


def _checkpoint_order(name: str) -> tuple[int, str]:
    number = re.search(r"(\d{1,18})$", name)
    return (int(number[1]) if number else -1, name)


# --- 2. adapter_config.json ----------------------------------------------------------------------------------------


def _read_config(directory: str, listing: _Listing) -> _Config:
    if CONFIG_NAME not in listing.present:
        has_weights = {WEIGHTS_NAME, PICKLE_NAME} & (listing.present | listing.withheld)
        missing = f"is no {CONFIG_NAME}" if has_weights else f"is no {CONFIG_NAME} and no {WEIGHTS_NAME}"
        return _Config(findings=(_missing(listing, missing),))
    path = str(Path(directory, CONFIG_NAME))
    try:
        with open_regular(path) as file:
            record = _record(CONFIG_NAME, file)
            return _judge_config_file(file, record)
    except CorruptFileError as error:
        return _Config(findings=(_corrupt(CONFIG_NAME, error),))
    except FileNotFoundError:
        return _Config(findings=(_dangling(CONFIG_NAME),))
    except OSError as error:
        raise _unreadable(path, error) from error


def _judge_config_file(file: BufferedReader, record: FileRecord) -> _Config:
    if pointer := lfs_pointer(file):
        finding = _lfs(CONFIG_NAME, record.size_bytes, pointer.size_bytes)
        return _Config(files=(record,), findings=(finding,))
    if not record.size_bytes:
        return _Config(files=(record,), findings=(adapter_config.invalid(f"{CONFIG_NAME} is empty (0 bytes)"),))
    if record.size_bytes > adapter_config.MAX_BYTES:
        message = f"{CONFIG_NAME} has {record.size_bytes:,} bytes, expected at most {adapter_config.MAX_BYTES:,}"
        return _Config(files=(record,), findings=(adapter_config.invalid(message),))
    file.seek(0)
    try:
        return _Config(files=(record,), parsed=json_object.parse(file.read(adapter_config.MAX_BYTES + 1)))
    except json_object.InvalidObjectError as error:
        return _Config(files=(record,), findings=(adapter_config.invalid(f"{CONFIG_NAME} {error}", error.hint),))


# --- 3. the weights ------------------------------------------------------------------------------------------------


def _read_weights(directory: str, listing: _Listing, *, allow_pickle: bool) -> _Weights:
    name = next((name for name in (WEIGHTS_NAME, PICKLE_NAME) if name in listing.present), None)
    is_pickle_only = name == PICKLE_NAME or (name is None and PICKLE_NAME in listing.withheld)
    if is_pickle_only and not allow_pickle:
        return _Weights(findings=_refuse_pickle(directory, name))
    if name is None:
        if CONFIG_NAME not in listing.present:  # _read_config has reported that
            return _Weights()
        hint = _misnamed_weights(directory, listing)
        return _Weights(findings=(_missing(listing, f"are no weights ({WEIGHTS_NAME})", hint),))
    path = str(Path(directory, name))
    try:
        with open_regular(path) as file:
            return _judge_weights_file(file, name)
    except CorruptFileError as error:
        return _Weights(name=name, findings=(_corrupt(name, error),))
    except FileNotFoundError:
        return _Weights(name=name, findings=(_dangling(name),))
    except OSError as error:
        raise _unreadable(path, error) from error


def _judge_weights_file(file: BufferedReader, name: str) -> _Weights:
    record = _record(name, file)
    if pointer := lfs_pointer(file):
        return _Weights(name=name, files=(record,), findings=(_lfs(name, record.size_bytes, pointer.size_bytes),))
    try:
        tensors = parse_file(file) if name == WEIGHTS_NAME else read_pickled(file, record.size_bytes)
    except CorruptFileError as error:
        return _Weights(name=name, files=(record,), findings=(_corrupt(name, error),))
    return _Weights(name=name, tensors=tensors or (), is_listed=tensors is not None, files=(record,))


def _record(name: str, file: BufferedReader) -> FileRecord:
    identity = identity_of(name, os.fstat(file.fileno()))  # before the hash, so that a write during it is noticed
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path=name, size_bytes=file.tell(), sha256=digest, identity=identity)


def _refuse_pickle(directory: str, name: str | None) -> tuple[Finding, ...]:
    """The findings on a pickle. It may be absent (`name` is None), an LFS pointer, or one that calls unsafe code."""
    pointer = None
    try:
        if name is not None:
            with open_regular(str(Path(directory, name))) as file:
                size_bytes = os.fstat(file.fileno()).st_size
                pointer = lfs_pointer(file)
                read_pickled(file, size_bytes)
    except UnsafePickleError as error:
        return (_pickle_refused(f"which {error}", error.hint),)
    except (CorruptFileError, OSError):
        pass
    refused = _pickle_refused(
        f"which can run code when it is loaded; expected {WEIGHTS_NAME}",
        "save the adapter again as safetensors (PEFT's default); if you trust its author, allow the pickle with "
        "allow-pickle: true in merge-gate.yml, or with --allow-pickle",
    )
    return (_lfs(PICKLE_NAME, size_bytes, pointer.size_bytes), refused) if pointer else (refused,)


def _pickle_refused(does: str, hint: str) -> Finding:
    return PICKLE_REFUSED.finding(f"the only weights are {PICKLE_NAME}, a Python pickle, {does}", hint)


def _lfs(name: str, size_bytes: int, target_bytes: int | None) -> Finding:
    expected = f"file of {counted(target_bytes, 'byte')}" if target_bytes is not None else "file"
    return FILE_LFS_POINTER.finding(
        f"{name} is a Git LFS pointer of {size_bytes} bytes, expected the {expected} that it points to",
        "fetch the file with `git lfs pull`; in a workflow, set `lfs: true` for actions/checkout",
    )


def _corrupt(name: str, error: CorruptFileError) -> Finding:
    return FILE_CORRUPT.finding(
        f"{name} {error}",
        error.hint
        or "copy or download the file again and compare its size; if the original is no larger, save the adapter again",
    )


def _dangling(name: str) -> Finding:
    return FILE_MISSING.finding(
        f"{name} is a symbolic link whose target does not exist",
        "restore the target, or copy the file itself into the directory",
    )


def _unreadable(path: str, error: OSError) -> EngineError:
    return EngineError(
        f"{shown(Path(path).name)} cannot be read: {error.strerror or error}",
        hint="check that the gate's user may read it, and that the disk is healthy",
    )


# --- 4. the tensors ------------------------------------------------------------------------------------------------


def _judge_tensors(peft_type: str | None, weights: _Weights) -> Iterator[Finding]:
    if not weights.is_listed:
        return
    if not weights.tensors and peft_type != "XLORA":  # its experts are in other files; the merge refuses it
        yield keys_missing.finding(f"{weights.name} has no tensors, expected the adapter's weights", _SHARDS_HINT)
    if peft_type not in _MAY_BE_EMPTY:
        yield from _judge_shards(weights.tensors, is_lora=peft_type == "LORA")


_MAY_BE_EMPTY = ("OSF", "FROD")
"""Methods whose tensors are empty for a layer smaller than the rank. The load compares their shapes."""

_SHARDS_HINT = (
    "DeepSpeed ZeRO-3 and FSDP save empty or partial tensors unless the parameters are gathered first: save through "
    "Trainer or Accelerate (stage3_gather_16bit_weights_on_model_save, or a full state dict), or gather before "
    "save_pretrained"
)


def _judge_shards(tensors: Iterable[StoredTensor], *, is_lora: bool) -> Iterator[Finding]:
    """ZeRO-3 leaves tensors of shape [0], FSDP flat one-dimensional shards."""
    broken = [tensor for tensor in tensors if _is_shard(tensor, is_lora=is_lora)]
    if not broken:
        return
    first = broken[0]
    others = f" (and {len(broken) - 1} more like it)" if len(broken) > 1 else ""
    expected = "two or more dimensions" if len(first.shape) == 1 and first.shape[0] else "no dimension of size 0"
    message = f"{shown(first.name)} has shape {list(first.shape)}, expected {expected}{others}"
    yield SHAPE_MISMATCH.finding(message, _SHARDS_HINT, tensor=first.name)


def _is_shard(tensor: StoredTensor, *, is_lora: bool) -> bool:
    if tensor.shape == (0,):
        return True
    return is_lora and bool(_LORA_FACTOR.search(tensor.name)) and (len(tensor.shape) == 1 or 0 in tensor.shape)
