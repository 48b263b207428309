"""Names into directories: a path is looked at, a Hub id is pinned to a commit and its needed files are fetched.

In: an `AdapterSpec`, or a base's name and revision. Out: `Resolved` (a `Snapshot`, and the names that were left out),
or `ResolveError` with what to do. huggingface_hub is imported (by `hub`) only when a Hub id is met; torch never.

Of a Hub repository only what is needed is fetched (`hub` does that): nothing from subdirectories, no second copy of the
weights, no pickle and no code unless allowed.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate.errors import ResolveError
from merge_gate.records.config import AdapterSpec
from merge_gate.records.files import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME, Snapshot
from merge_gate.sources import strict_json
from merge_gate.sources.headers import CorruptFileError, lfs_pointer, open_regular, parse_file, shown
from merge_gate.text import counted, listing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_MAX_INDEX_BYTES = 100_000_000
_LISTED = 6
_SHA256 = re.compile(r"[0-9a-f]{64}")

_MODEL, _MODEL_INDEX = "model.safetensors", "model.safetensors.index.json"
_BIN, _BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_SHARDS = {_MODEL_INDEX: re.compile(r"model-.*\.safetensors"), _BIN_INDEX: re.compile(r"pytorch_model-.*\.bin")}
_TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "vocab.json", "special_tokens_map.json", "added_tokens.json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A name that became files. `withheld` are the repository's files that were not fetched (with their folders)."""

    snapshot: Snapshot
    withheld: tuple[str, ...] = ()


def _ignore(_: str) -> None:
    """Whoever passes no `notify` does not want to be told."""


# --- the two names -------------------------------------------------------------------------------------------------


def resolve_adapter(
    spec: AdapterSpec,
    *,
    allow_pickle: bool = False,
    token: str | None = None,
    notify: Callable[[str], None] = _ignore,
) -> Resolved:
    """The directory of one adapter. A pickle that is not allowed is not fetched; `withheld` then names it."""
    if spec.path is not None:
        return _local(spec.path, "adapter", name=spec.source)
    if spec.hub_id is None:
        raise ValueError(f"adapter {spec.name!r} is a combination and has no files of its own")

    def choose(names: frozenset[str]) -> tuple[str, ...]:
        pickles = (PICKLE_NAME,) if allow_pickle and WEIGHTS_NAME not in names else ()
        return tuple(name for name in (CONFIG_NAME, WEIGHTS_NAME, *pickles) if name in names)

    return _fetch(
        spec.hub_id,
        spec.revision,
        choose,
        name=spec.source,
        token=token,
        notify=notify,
        needs=(CONFIG_NAME, WEIGHTS_NAME),
    )


def resolve_base(
    model: str,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    label: str | None = None,
    token: str | None = None,
    notify: Callable[[str], None] = _ignore,
) -> Resolved:
    """The directory of one base: an absolute `model` is a directory, anything else a Hub id.

    The files that transformers will load must be there and whole; `label` is the name for messages and the report.
    """
    name = label or model
    if Path(model).is_absolute():
        resolved = _local(model, "base", name=name)
    else:
        _refuse_local_name(model)

        def choose(names: frozenset[str]) -> tuple[str, ...]:
            return _choose_base(names, name=name, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)

        resolved = _fetch(model, revision, choose, name=name, token=token, notify=notify)
    _check_base(resolved.snapshot.directory, name=name, allow_pickle=allow_pickle)
    return resolved


def _local(path: str, what: str, *, name: str) -> Resolved:
    if Path(path).is_dir():
        return Resolved(snapshot=Snapshot(name=name, directory=path))
    found = "it is a file" if Path(path).exists() else "there is nothing at that path"
    place, start = (
        ("", "")
        if Path(name).is_absolute()
        else (f" ({path})", "relative paths start at the config file's directory; ")
    )
    raise ResolveError(
        f"the {what} {shown(name)} is not a directory here: {found}{place}",
        hint=f"{start}check that an earlier step has made or fetched it",
    )


def _fetch(
    repo_id: str,
    revision: str | None,
    choose: Callable[[frozenset[str]], tuple[str, ...]],
    *,
    name: str,
    token: str | None,
    notify: Callable[[str], None],
    needs: tuple[str, ...] = (),
) -> Resolved:
    """`needs`: files whose absence is the cache's fault, not the repository's, where nothing says what that holds."""
    from merge_gate.sources import hub  # noqa: PLC0415 (a run without Hub ids does not pay for the import)

    fetched = hub.fetch(repo_id, revision, choose, token=token, notify=notify)
    absent = [needed for needed in needs if not Path(fetched.directory, needed).exists()]
    if absent and not fetched.is_listed:
        raise hub.incomplete(shown(repo_id), absent)
    snapshot = Snapshot(name=name, directory=fetched.directory, revision=fetched.commit)
    return Resolved(snapshot=snapshot, withheld=fetched.withheld)


def _refuse_local_name(model: str) -> None:
    """A path of the machine that trained the adapter (./out, a drive letter) is no Hub id; asking would mislead."""
    if model.startswith((".", "~")) or "\\" in model or model.endswith("/") or model.count("/") > 1:
        raise ResolveError(
            f"the base {shown(model)} is neither a directory here nor a Hub id (owner/name)",
            hint="name the base in the gate's config: base: {model: ./path/to/base} or a Hub id",
        )


# --- which files a base needs --------------------------------------------------------------------------------------


def _choose_base(names: frozenset[str], *, name: str, trust_remote_code: bool, allow_pickle: bool) -> tuple[str, ...]:
    weights = _choose_weights(names, name=name, allow_pickle=allow_pickle)
    configs = {n for n in names if n.endswith(".json") and "/" not in n and not n.endswith(".index.json")}
    code = {n for n in names if n.endswith(".py") and "/" not in n} if trust_remote_code else set()
    return tuple(sorted({*weights, *(configs - _TOKENIZER), *code}))


def _choose_weights(names: Iterable[str], *, name: str, allow_pickle: bool) -> tuple[str, ...]:
    """The weights that transformers loads, by its own order: one file before shards, safetensors before pickle."""
    plain = {n for n in names if "/" not in n}
    if chosen := _choose_format(plain, _MODEL, _MODEL_INDEX):
        return chosen
    pickles = _choose_format(plain, _BIN, _BIN_INDEX)
    if pickles and allow_pickle:
        return pickles
    if pickles:
        raise ResolveError(
            f"the base {shown(name)} has pickled weights only ({pickles[-1]}), which can run code when they are loaded",
            hint="use a revision or a copy with safetensors weights, or, if you trust it, set allow-pickle: true in "
            "the gate's config",
        )
    raise ResolveError(_describe_no_weights(plain, name), hint=_advise_no_weights(plain))


def _choose_format(plain: set[str], single: str, index: str) -> tuple[str, ...]:
    if single in plain:
        return (single,)
    if index not in plain:
        return ()
    return (index, *sorted(n for n in plain if _SHARDS[index].fullmatch(n)))


def _describe_no_weights(plain: set[str], name: str) -> str:
    some = listing(map(shown, sorted(plain)), _LISTED) or "nothing"
    return f"the base {shown(name)} has no {_MODEL} and no {_MODEL_INDEX}; it holds {some}"


def _advise_no_weights(plain: set[str]) -> str:
    if CONFIG_NAME in plain:
        return "this is an adapter, not a full model: name the base that it was trained on"
    if any(n.endswith(".gguf") for n in plain):
        return "GGUF weights cannot be merged into: name the original model in safetensors format"
    return "name a directory or repository in the format that transformers' save_pretrained writes"


# --- whether a base's files are whole ------------------------------------------------------------------------------


def base_weight_files(directory: str) -> tuple[str, ...]:
    """The weight files in a base's directory that transformers will load, with the index first if there is one."""
    return _choose_weights(_list(directory, name=directory), name=directory, allow_pickle=True)


def base_setting_files(directory: str) -> tuple[str, ...]:
    """What transformers may read of a base beside its weights: configurations, and code in and below the directory."""
    names = _list(directory, name=directory)
    configs = {n for n in names if n.endswith(".json") and not n.endswith(".index.json")} - _TOKENIZER
    code = {path.relative_to(directory).as_posix() for path in Path(directory).rglob("*.py")}
    return tuple(sorted(n for n in {*configs, *code} if Path(directory, n).is_file()))


def _list(directory: str, *, name: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(directory))  # noqa: PTH208 (names are all that is wanted)
    except OSError as error:
        raise ResolveError(
            f"the base {shown(name)} cannot be read: {error.strerror or error}",
            hint="check that the user who runs the gate may read it",
        ) from error


def _check_base(directory: str, *, name: str, allow_pickle: bool) -> None:
    names = _list(directory, name=name)
    if CONFIG_NAME in names and {_MODEL, _MODEL_INDEX, _BIN, _BIN_INDEX} & names:
        raise ResolveError(
            f"the base {shown(name)} has an {CONFIG_NAME} beside its weights: transformers would load that adapter "
            "into it before anything is merged",
            hint=f"remove {CONFIG_NAME} from the base (save_pretrained of a merged model leaves it behind)",
        )
    weights = _choose_weights(names, name=name, allow_pickle=allow_pickle)
    if "config.json" not in names:
        raise ResolveError(
            f"the base {shown(name)} has weights but no config.json, so nothing says which architecture it is",
            hint="name a directory or repository in the format that transformers' save_pretrained writes",
        )
    if weights[0] in _SHARDS:
        _check_index(directory, weights, name=name)
    for file_name in ("config.json", *weights):
        _check_base_file(directory, file_name, name=name)


def _check_index(directory: str, weights: Sequence[str], *, name: str) -> None:
    path = Path(directory, weights[0])
    try:
        with open_regular(str(path)) as file:
            mapping = strict_json.parse(file.read(_MAX_INDEX_BYTES)).get("weight_map")
    except (CorruptFileError, strict_json.InvalidJsonError) as error:
        raise ResolveError(f"the base {shown(name)} is broken: {weights[0]} {error}", hint=_FETCH_AGAIN) from error
    files = set(mapping.values()) if isinstance(mapping, dict) and all(map(_is_text, mapping.values())) else None
    if not files:
        raise ResolveError(f"the base {shown(name)} is broken: {weights[0]} has no weight_map", hint=_FETCH_AGAIN)
    if absent := sorted(files - set(weights)):
        raise ResolveError(
            f"the base {shown(name)} is incomplete: {weights[0]} names {counted(len(absent), 'shard')} that "
            f"{'is' if len(absent) == 1 else 'are'} not beside it "
            f"({', '.join(shown(shard) for shard in absent[:_LISTED])})",
            hint=_FETCH_AGAIN,
        )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_FETCH_AGAIN = "fetch or copy the base again and compare the sizes of its files"


def _check_base_file(directory: str, file_name: str, *, name: str) -> None:
    try:
        with open_regular(str(Path(directory, file_name))) as file:
            if pointer := lfs_pointer(file):
                size = f", expected {counted(pointer.size_bytes, 'byte')}" if pointer.size_bytes is not None else ""
                raise ResolveError(
                    f"the base {shown(name)} has a Git LFS pointer where {file_name} should be{size}",
                    hint="fetch it with `git lfs pull`; in a workflow give actions/checkout `lfs: true`",
                )
            if file_name.endswith(".safetensors"):
                parse_file(file)
    except CorruptFileError as error:
        raise ResolveError(f"the base {shown(name)} is broken: {file_name} {error}", hint=_FETCH_AGAIN) from error
    except OSError as error:
        raise ResolveError(
            f"the base {shown(name)} cannot be read: {file_name}: {error.strerror or error}",
            hint="check that the user who runs the gate may read it",
        ) from error


# --- digests -------------------------------------------------------------------------------------------------------


def digest_directory(directory: str, names: Iterable[str]) -> str:
    """SHA-256 over one line per file, sorted by name: "<sha256 of the file>  <name>", as sha256sum writes them.

    A file in the Hub's cache is a link to a blob that is named by its SHA-256 (Git LFS files only; others are named by
    a Git hash). That name is taken without reading the file, as the download verified it; so the digest of a base of
    many gigabytes costs nothing. This holds only for links inside one `models--*` folder of a cache.
    """
    lines = sorted((name, _digest_file(Path(directory, name))) for name in names)
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in lines).encode()).hexdigest()


def _digest_file(path: Path) -> str:
    repository = path.parent.parent.parent
    if path.is_symlink() and path.parent.parent.name == "snapshots" and repository.name.startswith("models--"):
        target = path.resolve()
        if target.parent == (repository / "blobs").resolve() and _SHA256.fullmatch(target.name):
            return target.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
