"""Resolves and reads the files of each adapter and base of a config. A Hub id is pinned to a commit, and fetched.

A `Config` and its `AdapterSpec`s go in; `Entry` comes out. A problem becomes a finding of that adapter alone.
huggingface_hub is imported (by `hub`) only for a Hub id; torch is never imported. Only the files that a merge needs are
fetched: no second copy of the weights, and no pickle or code unless allowed.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate._internal.companion_names import Companion, companion_kind, is_carried, is_harmless
from merge_gate._internal.errors import GateError, ResolveError
from merge_gate._internal.text import counted, foreign, listing, quoted
from merge_gate.files import base_files, named_base
from merge_gate.files.headers import PickleReader, shown
from merge_gate.files.preflight import preflight
from merge_gate.judging.not_judged import accident, not_judged
from merge_gate.judging.policies import POLICIES
from merge_gate.limits.timeout import within
from merge_gate.names.hub_names import HUB, close_directory, could_be_hub_id, is_commit
from merge_gate.records.config import AdapterSpec, Config
from merge_gate.records.files import (
    CONFIG_NAME,
    EXPORT_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    AdapterFiles,
    BaseFiles,
    Entry,
    Fetched,
    Snapshot,
)
from merge_gate.records.terms import Access, Finding, Origin, Severity, record

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
        read_pickle: lists the tensors of pickled weights. Without it, they are not known.
        trust_remote_code: whether the code of a base is fetched.
        tokenizer_files: whether the files that a published model has next to its weights are fetched too.
        code_files: whether the files that a model may copy from its base, such as code, are fetched too.
        reads_values: whether the values of adapters are searched for NaN and Inf.
        is_plan: whether weights that are not in the Hub's cache stay where they are, with their headers.
        known_digests: the digests of the weight files in a directory, if an earlier run hashed them.
    """

    notify: Callable[[str], None] = lambda _: None
    access: Access | None = None
    lay_out: Callable[[Fetched], str] | None = None
    allow_pickle: bool = False
    read_pickle: PickleReader | None = None
    trust_remote_code: bool = False
    tokenizer_files: bool = False
    code_files: bool = False
    reads_values: bool = False
    is_plan: bool = False
    known_digests: named_base.KnownDigests = lambda _: None


_USUALLY = Fetching()

# --- the adapters and bases of a config ---------------------------------------------------------------------------

_BaseRequest = tuple[str, str | None, Access]
"""The model, the revision, and how its weights are read."""


class Inputs:
    """The files of one config's adapters and bases.

    Args:
        config: the adapters and their bases.
        how: how files are fetched. The config says what may be fetched, and `access` replaces what it says.
        timeout_s: the seconds that reading the headers of a base in a directory may take. None has no limit.
    """

    def __init__(
        self, config: Config, how: Fetching, *, timeout_s: Callable[[str], float | None] = lambda _: None
    ) -> None:
        self._config, self._timeout_s = config, timeout_s
        self._how = replace(how, allow_pickle=config.allow_pickle, trust_remote_code=config.trust_remote_code)
        self._specs = {spec.name: spec for spec in config.adapters}
        self._read: dict[str, tuple[AdapterFiles, str | None]] = {}
        self._left_out: set[str] = set()
        self._close: dict[str, str] = {}
        self._bases: dict[_BaseRequest, Snapshot | GateError] = {}

    def entries(self, spec: AdapterSpec) -> tuple[Entry, ...]:
        """The adapter's files and its base, once for each dtype."""
        entry = self.prepare(spec)
        return tuple(replace(entry, dtype=dtype) for dtype in spec.base.dtypes)

    def prepare(self, spec: AdapterSpec) -> Entry:
        """The adapter's files and its base, in the first of its dtypes."""
        entry = self.adapter(spec)
        return entry if entry.problem is not None else self._with_base(entry)

    def adapter(self, spec: AdapterSpec) -> Entry:
        """The adapter's files alone; for a combination, the files of its members."""
        names = spec.combine.adapters if spec.combine is not None else (spec.name,)
        members, revision, dtype = [], None, spec.base.dtypes[0]
        for name in names:
            try:
                files, revision = self._files(self._specs[name])
            except GateError as error:
                return Entry(spec=spec, dtype=dtype, problem=not_judged(error.message, error.hint))
            except Exception as error:  # noqa: BLE001 - unexpected input costs only its own adapter
                return Entry(spec=spec, dtype=dtype, problem=accident("its files could not be read", error))
            members.append(files)
        return Entry(spec=spec, dtype=dtype, members=tuple(members), revision=None if spec.combine else revision)

    def _files(self, spec: AdapterSpec) -> tuple[AdapterFiles, str | None]:
        if spec.name not in self._read:
            self._read[spec.name] = self._read_adapter(spec)
        return self._read[spec.name]

    def _read_adapter(self, spec: AdapterSpec) -> tuple[AdapterFiles, str | None]:
        snapshot = resolve_adapter(spec, self._how)
        files = preflight(
            snapshot.directory,
            allow_pickle=self._how.allow_pickle,
            read_pickle=self._how.read_pickle,
            withheld=snapshot.withheld,
            reads_values=self._how.reads_values,
        )
        if files.weights == PICKLE_NAME and self._how.read_pickle is None:
            self._how.notify(f"{spec.name}: {PICKLE_NAME} is a pickle, so its tensors are not read here")
        if snapshot.fetched is not None and snapshot.fetched.absent:  # for a plan: the weights are not here
            files = AdapterFiles(directory=files.directory, config=files.config, on_hub=snapshot.fetched)
        return files, snapshot.revision

    def checked(self, spec: AdapterSpec) -> Entry:
        """The adapter's files, and its base if that is a directory here. A base on the Hub is not fetched."""
        entry = self.adapter(spec)
        requested = None if entry.problem is not None else self._requested_base(entry)
        if requested is None:
            return entry
        model, revision, label = requested
        if could_be_hub_id(model, is_base=True) and self._not_fetched(entry, model, revision) is None:
            if label not in self._left_out:
                self._left_out.add(label)
                why = "no directory here has that name, and `check` fetches no bases"
                self._how.notify(f"base {quoted(label, 200)} was not checked: {why}")
            return entry
        return self._with_base(entry)

    def _requested_base(self, entry: Entry) -> tuple[str, str | None, str] | None:
        """The base's model, revision, and name: from the config, or else from adapter_config.json; None for neither."""
        spec, config = entry.spec.base, entry.files.config
        if spec.model is not None:
            return spec.model, spec.revision, spec.label or spec.model
        if not config.base_name:
            return None
        path = str(Path(self._config.directory, config.base_name))  # relative to the gate's config, if it exists
        model = path if os.path.isdir(path) else config.base_name  # noqa: PTH112 (pathlib raises for an invalid name)
        return model, spec.revision or config.base_revision, config.base_name

    def _with_base(self, entry: Entry) -> Entry:
        requested = self._requested_base(entry)
        if requested is None:
            return replace(entry, problem=_no_base(entry.files))
        model, revision, label = requested
        access = self._how.access or entry.spec.base.access
        base = self._not_fetched(entry, model, revision) or self._base((model, revision, access), label)
        if isinstance(base, GateError):
            is_of_config = entry.spec.base.model is not None
            hint = base.hint if is_of_config else "; ".join(filter(None, (_NAMED_BY_ADAPTER, base.hint)))
            return replace(entry, problem=_refused(base, hint))
        files = base.base_files
        if entry.spec.base.model is None or files is None:
            return replace(entry, base=base)
        members = (
            replace(member, named_base=named_base.compare(member, files, self._how.known_digests))
            for member in entry.members
        )
        return replace(entry, base=base, members=tuple(members))

    def _not_fetched(self, entry: Entry, model: str, revision: str | None) -> ResolveError | None:
        """Why the base that adapter_config.json names must not be fetched: it is not pinned, or may be a directory."""
        base = entry.spec.base
        if base.model is not None or not could_be_hub_id(model, is_base=True):
            return None
        if POLICIES[self._config.policy].needs_pins and not is_commit(revision):
            return ResolveError(
                f"base_model_name_or_path is {quoted(model, 200)}, and no commit pins it, which policy: "
                f"{self._config.policy} asks for",
                hint="add base.model and base.revision, as a full commit, to merge-gate.yml",
            )
        if base.revision is not None or is_commit(revision):
            return None
        if model not in self._close:
            self._close[model] = close_directory(model, self._config.directory, is_base=True)
        if not (close := self._close[model]):
            return None
        return ResolveError(
            f"base_model_name_or_path is {quoted(model, 200)}, which is not a directory here, and was not fetched from "
            "the Hub because the name is close to a path here",
            hint=f"did you mean {quoted(close, 200)}? If it is on the Hub, name it as {quoted(HUB + model, 200)}",
        )

    def _base(self, request: _BaseRequest, label: str) -> Snapshot | GateError:
        if request not in self._bases:
            self._bases[request] = self._resolved_base(*request, label)
        return self._bases[request]

    def _resolved_base(self, model: str, revision: str | None, access: Access, label: str) -> Snapshot | GateError:
        def read() -> Snapshot:
            return resolve_base(model, revision, replace(self._how, access=access), label=label)

        timeout_s = self._timeout_s(model) if Path(model).is_absolute() else None
        try:
            return read() if timeout_s is None else within(timeout_s, read)
        except GateError as error:
            return error
        except Exception as error:  # noqa: BLE001 - the name comes from an adapter and may be anything
            if timeout_s is not None and isinstance(error, TimeoutError):
                return ResolveError(
                    f"the headers of base {quoted(label, 200)} could not be read in {timeout_s:g} s: its mount does "
                    "not answer",
                    hint="check the network file system that holds the base, then run again",
                )
            return ResolveError(
                f"the base {foreign(label)} cannot be resolved: {type(error).__name__}",
                hint="set base.model in the config, or correct base_model_name_or_path in adapter_config.json",
            )


_NAMED_BY_ADAPTER = (
    "adapter_config.json names this base by its path or id during training: name the base with --base, or with "
    "base.model in merge-gate.yml"
)


def _refused(error: GateError, hint: str) -> Finding:
    """The finding for a base that cannot be used: of a check of bases, or `not-judged`."""
    check = error.check if isinstance(error, ResolveError) else None
    if check is None:
        return not_judged(error.message, hint)
    return Finding(check=check, severity=Severity.ERROR, message=error.message, hint=hint, origin=Origin.BASE)


def _no_base(files: AdapterFiles) -> Finding:
    is_there = any(file.path == CONFIG_NAME for file in files.files)
    unnamed = f"{CONFIG_NAME} names no base" if is_there else f"there is no {CONFIG_NAME}"
    return not_judged(
        f"no base to merge into: the config sets no base.model, and {unnamed}",
        "name the base with --base, or with base: {model: …} in merge-gate.yml, for all adapters or for this one",
    )


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
        more = companions(names) if how.tokenizer_files else ()
        return tuple(name for name in (CONFIG_NAME, WEIGHTS_NAME, EXPORT_NAME, *pickles, *more) if name in names)

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
            more = companions(names) if how.tokenizer_files else frozenset()
            copies = {file for file in names if is_carried(file) and not is_harmless(file)} if how.code_files else set()
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
    files = base_files.read_base(
        snapshot.directory,
        name=name,
        allow_pickle=how.allow_pickle,
        read_pickle=how.read_pickle,
        has_values=has_values,
    )
    return replace(snapshot, base_files=files)


def _planned_files(fetched: Fetched) -> BaseFiles:
    weights = tuple(name for name in fetched.sizes if name.endswith((base_files.SAFETENSORS_ENDING, ".bin")))
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
    config = _config(names, path_of, name)
    chosen = base_files.choose(names, path_of, config, name=name, allow_pickle=how.allow_pickle)
    if chosen.index and (absent := sorted(set(chosen.files) - names)):
        raise ResolveError(
            f"the base {shown(name)} is incomplete: {chosen.index} names {counted(len(absent), 'shard')} that the "
            f"repository does not have ({listing(map(shown, absent), _LISTED)})",
            hint="use a revision that has all shards, or contact the owner of the repository",
            check=base_files.INCOMPLETE,
        )
    configs = {n for n in names if n.endswith(".json") and "/" not in n and not n.endswith(".index.json")}
    code = {n for n in names if n.endswith(".py") and "/" not in n} if how.trust_remote_code else set()
    return tuple(sorted({*chosen.all_files, *(configs - _TOKENIZER), *code}))


def companions(names: frozenset[str]) -> frozenset[str]:
    """The files of a repository that a published model has next to its weights, without config.json."""
    return frozenset(name for name in names if companion_kind(name) not in {None, Companion.CONFIG})


def _config(names: frozenset[str], path_of: Callable[[str], Path], name: str) -> dict[str, Any]:
    """config.json, which is fetched first only if it could name one of the weight files."""
    safetensors = {n for n in names if n.endswith((".safetensors", ".safetensors.index.json"))}
    if "config.json" not in names or all(map(_USUAL.fullmatch, safetensors)):
        return {}
    return base_files.read_config(str(path_of("config.json").parent), name)


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
