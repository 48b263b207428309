"""Judges an adapter by its files, without torch.

In: a hostile directory. Out: `AdapterFiles`, with findings of the `file-*`, `pickle-refused`, and `config-*` checks and
on incomplete tensors; it imports no torch and no PEFT.
"""

# The order of reading is fixed, and the first finding is the cause. The numbers are those of the sections below:
# 1. The listing: adapter_config.json and a weights file must be present.
# 2. adapter_config.json: not an LFS pointer, strict JSON, valid values, nothing that imports code.
# 3. The weights: the file that PEFT would load (safetensors before .bin), not an LFS pointer, complete.
# 4. The tensors in it: at least one, none of them an empty shard, with the ranks of the config.
# 5. For `merge-gate check`, their values: NaN and Inf. A run measures them in the worker.

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate._internal.errors import EngineError
from merge_gate._internal.tensor_names import ADAPTER_PREFIX
from merge_gate._internal.text import listing as in_a_sentence
from merge_gate.files import adapter_config, json_object
from merge_gate.files.file_values import has_rule, nonfinite
from merge_gate.files.headers import (
    CorruptFileError,
    PickleReader,
    lfs_pointer,
    open_regular,
    parse_file,
    parse_places,
    shown,
)
from merge_gate.files.identity import identity_of
from merge_gate.judging import foreign_formats
from merge_gate.judging.all_checks import refused
from merge_gate.judging.bounds import bounded
from merge_gate.judging.checks.adapter_nonfinite import of_file, values_unread
from merge_gate.judging.checks.file_corrupt import FILE_CORRUPT
from merge_gate.judging.checks.file_lfs_pointer import FILE_LFS_POINTER
from merge_gate.judging.checks.file_missing import FILE_MISSING
from merge_gate.judging.checks.keys_missing import keys_missing
from merge_gate.judging.checks.pickle_refused import PICKLE_REFUSED
from merge_gate.judging.checks.shape_mismatch import SHAPE_MISMATCH
from merge_gate.records.files import (
    CONFIG_NAME,
    EXPORT_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    AdapterConfig,
    AdapterFiles,
    HashedFile,
    StoredTensor,
)
from merge_gate.records.measured import FileTensor
from merge_gate.records.refusals import Refusal
from merge_gate.records.terms import Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from io import BufferedReader

_MOST_NAMES_SHOWN = 8
_MOST_MISNAMED = 3
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
_MAX_ENTRIES = 10_000
_MAX_FOLDERS = 200  # searched in a directory that is not itself an adapter
_LORA_FACTOR = re.compile(r"\.lora_(embedding_)?[AB](\.weight)?$")


def preflight(
    snapshot_directory: str,
    *,
    allow_pickle: bool,
    read_pickle: PickleReader | None = None,
    withheld: tuple[str, ...] = (),
    reads_values: bool = False,
) -> AdapterFiles:
    """Read and judge the files of one adapter.

    `read_pickle` lists the tensors of pickled weights; without it, they are not known. `withheld` names files of the
    adapter's repository that were not downloaded. `reads_values` looks for NaN and Inf. Raises `EngineError` if a file
    cannot be read at all (permissions, a failing disk), which says nothing about the adapter.
    """
    listing = _list(snapshot_directory, withheld)
    config = _read_config(snapshot_directory, listing)
    weights = _read_weights(snapshot_directory, listing, read_pickle, allow_pickle=allow_pickle)
    tensors = weights.content or ()
    judged = adapter_config.judge(config.content, tensors) if config.content is not None else ()
    recorded = adapter_config.recorded(config.content) if config.content is not None else AdapterConfig()
    values: Iterable[Finding] = ()
    if reads_values and weights.name == WEIGHTS_NAME and weights.content:
        values = _judge_values(snapshot_directory, config.content or {})
    export = _read(snapshot_directory, EXPORT_NAME, _object_in) if EXPORT_NAME in listing.present else _File()
    padding = (export.content or {}).get("padding")
    return AdapterFiles(
        directory=snapshot_directory,
        config=recorded,
        weights=weights.name,
        tensors=tensors,
        files=(*config.files, *weights.files, *export.files),
        findings=bounded(
            chain(config.findings, judged, weights.findings, _judge_tensors(recorded.peft_type, weights), values)
        ),
        padding=frozenset(key for key in padding if isinstance(key, str)) if isinstance(padding, list) else frozenset(),
    )


def base_of(directory: str) -> str | None:
    """The base that an adapter's config names; None if it names none, or cannot be read."""
    try:
        config = _read(directory, CONFIG_NAME, _object_in)
    except EngineError:
        return None
    return adapter_config.recorded(config.content or {}).base_name


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
class _File:
    """One of the two files that PEFT reads. `content` is its object or its tensors; None if that is not known."""

    name: str | None = None
    content: Any = None
    files: tuple[HashedFile, ...] = ()
    findings: tuple[Finding, ...] = ()


def _read(directory: str, name: str, parse: Callable[[BufferedReader, int], Any]) -> _File:
    """Hash a file and parse it. `parse` gets its size in bytes."""
    path = str(Path(directory, name))
    files: tuple[HashedFile, ...] = ()
    try:
        with open_regular(path) as file:
            files = (_record(name, file),)
            size_bytes = files[0].size_bytes
            if (target := lfs_pointer(file)) is None:
                return _File(name=name, content=parse(file, size_bytes), files=files)
            finding = _lfs(name, size_bytes, target)
    except CorruptFileError as error:
        copy = (
            "copy or download the file again and compare its size; if the original is no larger, save the adapter again"
        )
        finding = FILE_CORRUPT.finding(f"{name} {error}", error.hint or copy)
    except json_object.InvalidObjectError as error:
        finding = adapter_config.invalid(f"{name} {error}", error.hint)
    except FileNotFoundError:
        finding = FILE_MISSING.finding(
            f"{name} is a symbolic link whose target does not exist",
            "restore the target, or copy the file itself into the directory",
        )
    except OSError as error:
        raise _unreadable(path, error) from error
    return _File(name=name, files=files, findings=(finding,))


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
    if not listing.everything and not listing.nested:
        return "check that an earlier step has created or downloaded it"
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


def _read_config(directory: str, listing: _Listing) -> _File:
    if CONFIG_NAME in listing.present:
        return _read(directory, CONFIG_NAME, _object_in)
    has_weights = {WEIGHTS_NAME, PICKLE_NAME} & (listing.present | listing.withheld)
    missing = f"is no {CONFIG_NAME}" if has_weights else f"is no {CONFIG_NAME} and no {WEIGHTS_NAME}"
    return _File(findings=(_missing(listing, missing),))


def _object_in(file: BufferedReader, size_bytes: int) -> dict[str, Any]:
    if not size_bytes:
        raise json_object.InvalidObjectError("is empty (0 bytes)")
    if size_bytes > adapter_config.MAX_BYTES:
        what = f"has {size_bytes:,} bytes, expected at most {adapter_config.MAX_BYTES:,}"
        raise json_object.InvalidObjectError(what)
    file.seek(0)
    return json_object.parse(file.read(adapter_config.MAX_BYTES + 1))


# --- 3. the weights ------------------------------------------------------------------------------------------------


def _read_weights(directory: str, listing: _Listing, read_pickle: PickleReader | None, *, allow_pickle: bool) -> _File:
    name = next((name for name in (WEIGHTS_NAME, PICKLE_NAME) if name in listing.present), None)
    is_pickle_only = name == PICKLE_NAME or (name is None and PICKLE_NAME in listing.withheld)
    if is_pickle_only and not allow_pickle:
        return _File(findings=_refuse_pickle(directory, name))
    if name == PICKLE_NAME:
        pickled = _read(directory, name, lambda file, _: _pickled(file, str(Path(directory, name)), read_pickle))
        is_refused = isinstance(pickled.content, Refusal)
        return replace(pickled, content=None, findings=(refused(pickled.content),)) if is_refused else pickled
    if name is not None:
        return _read(directory, name, lambda file, _: parse_file(file))
    if CONFIG_NAME not in listing.present:  # _read_config has reported that
        return _File()
    hint = _misnamed_weights(directory, listing)
    return _File(findings=(_missing(listing, f"are no weights ({WEIGHTS_NAME})", hint),))


def _pickled(file: BufferedReader, path: str, read_pickle: PickleReader | None) -> Any:
    """What `read_pickle` says of the file."""
    file.seek(8)  # the length of a safetensors header
    if file.read(1) == b"{":
        raise CorruptFileError("is not torch's format but safetensors", f"give it the name {WEIGHTS_NAME}")
    return read_pickle and read_pickle(path)


def _record(name: str, file: BufferedReader) -> HashedFile:
    identity = identity_of(name, os.fstat(file.fileno()))  # before the hash, so that a write during it is noticed
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return HashedFile(path=name, size_bytes=file.tell(), sha256=digest, identity=identity)


def _refuse_pickle(directory: str, name: str | None) -> tuple[Finding, ...]:
    """The findings on a pickle. It may be absent (`name` is None), or an LFS pointer."""
    target = None
    if name is not None:
        with suppress(CorruptFileError, OSError), open_regular(str(Path(directory, name))) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            target = lfs_pointer(file)
    refused = PICKLE_REFUSED.finding(
        f"the only weights are {PICKLE_NAME}, a Python pickle, which can run code when it is loaded; expected "
        f"{WEIGHTS_NAME}",
        "save the adapter again as safetensors (PEFT's default); if you trust its author, allow the pickle with "
        "allow-pickle: true in merge-gate.yml, or with --allow-pickle",
    )
    return (_lfs(PICKLE_NAME, size_bytes, target), refused) if target is not None else (refused,)


def _lfs(name: str, size_bytes: int, target: str) -> Finding:
    expected = f"file of {target}" if target else "file"
    return FILE_LFS_POINTER.finding(
        f"{name} is a Git LFS pointer of {size_bytes} bytes, expected the {expected} that it points to",
        "fetch the file with `git lfs pull`; in a workflow, set `lfs: true` for actions/checkout",
    )


def _unreadable(path: str, error: OSError) -> EngineError:
    return EngineError(
        f"{shown(Path(path).name)} cannot be read: {error.strerror or error}",
        hint="check that the gate's user may read it, and that the disk is healthy",
    )


# --- 4. the tensors ------------------------------------------------------------------------------------------------


def _judge_tensors(peft_type: str | None, weights: _File) -> Iterator[Finding]:
    if weights.content is None:
        return
    if not weights.content and peft_type != "XLORA":  # its experts are in other files; the merge refuses it
        yield keys_missing.finding(f"{weights.name} has no tensors, expected the adapter's weights", _SHARDS_HINT)
    if peft_type not in _MAY_BE_EMPTY:
        yield from _judge_shards(weights.content, is_lora=peft_type == "LORA")


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


# --- 5. their values, for a check ------------------------------------------------------------------------------------


def _judge_values(directory: str, config: dict[str, Any]) -> Iterator[Finding]:
    path = str(Path(directory, WEIGHTS_NAME))
    try:
        with open_regular(path) as file:
            places = parse_places(file)
            for stats in nonfinite(file, places):
                is_used = adapter_config.is_used(config, stats.name)
                yield of_file(FileTensor(stats=stats, used=is_used), is_merged=False)
    except OSError as error:
        raise _unreadable(path, error) from error
    unread = sorted({tensor.dtype for tensor, _, _ in places if not has_rule(tensor.dtype)})
    if unread:
        yield values_unread(unread)
