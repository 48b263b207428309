"""Resolves an adapter or a base to a directory. A Hub id is pinned to a commit, and its files are fetched.

`Snapshot` or a `ResolveError` comes out. huggingface_hub is imported (by `hub`) only for a Hub id; torch is never
imported. Only the files that a merge needs are fetched: no second copy of the weights, and no pickle or code unless
allowed.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate.companion_names import Companion, companion_kind, is_carried, is_harmless
from merge_gate.errors import ResolveError
from merge_gate.files import base_files, base_weights
from merge_gate.files.headers import shown
from merge_gate.names.hub_names import could_be_hub_id
from merge_gate.records.config import AdapterSpec
from merge_gate.records.files import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME, BaseFiles, Fetched, Snapshot
from merge_gate.records.terms import Access, record
from merge_gate.text import counted, listing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from io import BufferedReader

_LISTED = 6
_USUAL = re.compile(r"model\.safetensors(\.index\.json)?|model\b.*-of-\d+\.safetensors")

_TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "vocab.json", "special_tokens_map.json", "added_tokens.json"}


@record
class Fetching:
    """How files of adapters and bases are fetched from the Hub.

    Attributes:
        notify: receives a line about each slow step (a download).
        access: how the weights of bases are read; None as the configuration says, or by a download.
        lay_out: makes a directory with stubs of the weight files of a base, if `access` leaves them on the Hub. Without
            it, they are downloaded.
        allow_pickle: whether pickled weights are fetched if there are no other ones.
        trust_remote_code: whether the code of a base is fetched.
        with_companions: whether the files that a published model has next to its weights are fetched too.
        with_copies: whether the files that a model may copy from its base, such as code, are fetched too.
        is_plan: whether weights that are not in the Hub's cache stay where they are, with their headers.
    """

    notify: Callable[[str], None] = lambda _: None
    access: Access | None = None
    lay_out: Callable[[Fetched], str] | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    with_companions: bool = False
    with_copies: bool = False
    is_plan: bool = False


_USUALLY = Fetching()

# --- the two names -------------------------------------------------------------------------------------------------


def resolve_adapter(spec: AdapterSpec, how: Fetching = _USUALLY) -> Snapshot:
    """Resolve an adapter to its directory. A pickle that is not allowed is not fetched, and `withheld` names it."""
    if spec.path is not None:
        return _local(spec.path, "adapter", name=spec.source)
    if spec.hub_id is None:
        raise ValueError(f"adapter {spec.name!r} is a combination and has no files of its own")

    def choose(names: frozenset[str], path_of: Callable[[str], Path]) -> tuple[str, ...]:
        if how.is_plan and CONFIG_NAME in names:
            path_of(CONFIG_NAME)
        pickles = (PICKLE_NAME,) if how.allow_pickle and WEIGHTS_NAME not in names else ()
        more = companions(names) if how.with_companions else ()
        return tuple(name for name in (CONFIG_NAME, WEIGHTS_NAME, *pickles, *more) if name in names)

    needs = (CONFIG_NAME, WEIGHTS_NAME)
    how = replace(how, access=Access.DOWNLOAD)
    return _fetch(spec.hub_id, spec.revision, choose, how, name=spec.source, needs=needs)


def resolve_base(
    model: str, revision: str | None = None, how: Fetching = _USUALLY, *, label: str | None = None
) -> Snapshot:
    """Resolve a base to its directory. An absolute `model` is a directory, anything else is a Hub id.

    The files that transformers will load must exist and be complete. `label` is the name in messages and the report.
    """
    name = label or model
    if Path(model).is_absolute():
        snapshot = _local(model, "base", name=name)
    else:
        refuse_local_name(model)

        def choose(names: frozenset[str], path_of: Callable[[str], Path]) -> tuple[str, ...]:
            chosen = choose_base(names, path_of, how, name=name)
            more = companions(names) if how.with_companions else frozenset()
            copies = (
                {file for file in names if is_carried(file) and not is_harmless(file)} if how.with_copies else set()
            )
            return (*chosen, *sorted((more | copies) - {*chosen}))

        if how.lay_out is None:
            how = replace(how, access=Access.DOWNLOAD)
        snapshot = _fetch(model, revision, choose, how, name=name)
    fetched = snapshot.fetched
    if fetched is not None and fetched.absent:
        return replace(snapshot, base_files=_planned_files(fetched))
    has_values = fetched is None or not fetched.streamable
    if fetched is not None and fetched.streamable and how.lay_out is not None:
        snapshot = replace(snapshot, directory=how.lay_out(fetched))
    files = base_files.read_base(snapshot.directory, name=name, allow_pickle=how.allow_pickle, has_values=has_values)
    return replace(snapshot, base_files=files)


def _planned_files(fetched: Fetched) -> BaseFiles:
    weights = tuple(name for name in fetched.sizes if name.endswith((base_weights.SAFETENSORS_ENDING, ".bin")))
    return BaseFiles(
        directory=fetched.directory,
        weights=weights,
        weight_bytes=sum(fetched.sizes[name] for name in weights),
        is_streamed=bool(fetched.streamable),
        on_hub=fetched,
    )


def _local(path: str, what: str, *, name: str) -> Snapshot:
    if Path(path).is_dir():
        return Snapshot(name=name, directory=path)
    reason = "it is a file" if Path(path).exists() else "the path does not exist"
    place, start = (
        ("", "")
        if Path(name).is_absolute()
        else (f" ({path})", "relative paths start at the config file's directory; ")
    )
    raise ResolveError(
        f"the {what} {shown(name)} is not a directory here: {reason}{place}",
        hint=f"{start}check that an earlier step has created or downloaded it",
    )


def _fetch(
    repo_id: str,
    revision: str | None,
    choose: Callable[[frozenset[str], Callable[[str], Path]], tuple[str, ...]],
    how: Fetching,
    *,
    name: str,
    needs: tuple[str, ...] = (),
) -> Snapshot:
    """Fetch from the Hub. If the repository's files are unknown, the absence of `needs` is blamed on the cache."""
    from merge_gate.files import hub  # noqa: PLC0415 (a run without Hub ids does not pay for the import)

    access = how.access or Access.DOWNLOAD
    fetched = hub.Repository(
        repo_id=repo_id, revision=revision, notify=how.notify, access=access, is_plan=how.is_plan
    ).fetch(choose)
    absent = [needed for needed in needs if not Path(fetched.directory, needed).exists()]
    if absent and not fetched.is_listed:
        raise hub.incomplete(shown(repo_id), absent)
    return Snapshot(
        name=name,
        directory=fetched.directory,
        revision=fetched.commit,
        withheld=fetched.withheld,
        fetched=fetched,
    )


def refuse_local_name(model: str) -> None:
    """Refuse a path of the machine that trained the adapter: the Hub's answer to it would mislead."""
    if not could_be_hub_id(model, is_base=True):
        raise ResolveError(
            f"the base {shown(model)} is not a directory here or a Hub id (owner/name)",
            hint="a base is a directory such as ./path/to/base, or a Hub id",
        )


# --- a base's files ------------------------------------------------------------------------------------------------


def choose_base(names: frozenset[str], path_of: Callable[[str], Path], how: Fetching, *, name: str) -> tuple[str, ...]:
    """Choose the files of a base. An index is fetched first, since it names the shards."""
    explicit = _explicit(names, path_of, name)
    chosen = base_weights.choose(names, path_of, name=name, allow_pickle=how.allow_pickle, explicit=explicit)
    if chosen.index and (absent := sorted(set(chosen.files) - names)):
        raise ResolveError(
            f"the base {shown(name)} is incomplete: {chosen.index} names {counted(len(absent), 'shard')} that the "
            f"repository does not have ({listing(map(shown, absent), _LISTED)})",
            hint="use a revision that has all shards, or contact the owner of the repository",
            check=base_weights.INCOMPLETE,
        )
    configs = {n for n in names if n.endswith(".json") and "/" not in n and not n.endswith(".index.json")}
    code = {n for n in names if n.endswith(".py") and "/" not in n} if how.trust_remote_code else set()
    return tuple(sorted({*chosen.all_files, *(configs - _TOKENIZER), *code}))


def companions(names: frozenset[str]) -> frozenset[str]:
    """The files of a repository that a published model has next to its weights, without config.json."""
    return frozenset(name for name in names if companion_kind(name) not in {None, Companion.CONFIG})


def _explicit(names: frozenset[str], path_of: Callable[[str], Path], name: str) -> str | None:
    """The weights that config.json names. It is fetched only if it could name one of the files."""
    safetensors = {n for n in names if n.endswith((".safetensors", ".safetensors.index.json"))}
    if "config.json" not in names or all(map(_USUAL.fullmatch, safetensors)):
        return None
    return base_weights.explicit_file(base_weights.read_config(str(path_of("config.json").parent), name))


def base_weight_files(directory: str) -> tuple[str, ...]:
    """The weight files in a base's directory that transformers will load, with the index first if there is one."""
    return base_files.loaded_files(directory).all_files


def base_setting_files(directory: str) -> tuple[str, ...]:
    """The files other than weights that transformers may read: configurations, and code in and below the directory."""
    names = os.listdir(directory)  # noqa: PTH208 (names are all that is wanted)
    configs = {n for n in names if n.endswith(".json") and not n.endswith(".index.json")} - _TOKENIZER
    code = {path.relative_to(directory).as_posix() for path in Path(directory).rglob("*.py")}
    return tuple(sorted(n for n in {*configs, *code} if Path(directory, n).is_file()))


# --- digests -------------------------------------------------------------------------------------------------------


def digest_directory(directory: str, names: Iterable[str]) -> str:
    """SHA-256 over one line per file, sorted by name: "<sha256 of the file>  <name>", as sha256sum writes them.

    Every file is read. The Hub's cache names a Git LFS file by its SHA-256, but its bytes may have changed since.
    """
    return digest_of_digests(digest_files(directory, names))


def digest_files(directory: str, names: Iterable[str], on_read: Callable[[], object] = lambda: None) -> dict[str, str]:
    """The SHA-256 of each file, by name. `on_read` is called before each read of some bytes."""
    return {name: digest_file(Path(directory, name), on_read) for name in names}


def digest_of_digests(files: Mapping[str, str]) -> str:
    """The same, if the digests of the files are known."""
    lines = sorted(files.items())
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in lines).encode()).hexdigest()


def digest_file(path: Path, on_read: Callable[[], object] = lambda: None) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(_Observed(file, on_read), "sha256").hexdigest()


class _Observed:
    """A file that calls `on_read` before each read, so that another thread can tell a slow read from one that hangs."""

    def __init__(self, file: BufferedReader, on_read: Callable[[], object]) -> None:
        self._file, self._on_read = file, on_read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        self._on_read()
        return self._file.readinto(buffer)
