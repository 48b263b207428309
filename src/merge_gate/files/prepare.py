"""Resolves and reads the files of each adapter and base of a config, each of them once.

A `Config` and its `AdapterSpec`s go in; `Entry` comes out. A problem becomes a finding of that adapter alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from merge_gate.errors import GateError, ResolveError
from merge_gate.files import resolve
from merge_gate.files.preflight import preflight
from merge_gate.files.resolve import Fetching
from merge_gate.judging.not_judged import accident, not_judged
from merge_gate.judging.policies import POLICIES
from merge_gate.limits.time_limit import within
from merge_gate.names.hub_names import HUB, close_directory, could_be_hub_id, is_commit
from merge_gate.records.config import AdapterSpec, Config
from merge_gate.records.files import CONFIG_NAME, AdapterFiles, Entry, Snapshot
from merge_gate.records.terms import Access, Finding, Origin, Severity
from merge_gate.text import quoted

_BaseRequest = tuple[str, str | None, Access]
"""The model, the revision, and how its weights are read."""


class Inputs:
    """The files of one config's adapters and bases.

    Args:
        config: the adapters and their bases.
        how: how files are fetched. The config says what may be fetched, and `access` replaces what it says.
        limit_s: the seconds that reading the headers of a base in a directory may take. None has no limit.
    """

    def __init__(
        self, config: Config, how: Fetching, *, limit_s: Callable[[str], float | None] = lambda _: None
    ) -> None:
        self._config, self._limit_s = config, limit_s
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
        snapshot = resolve.resolve_adapter(spec, self._how)
        allow = self._config.allow_pickle
        files = preflight(snapshot.directory, allow_pickle=allow, withheld=snapshot.withheld)
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
        return self._named_by_adapter(config.base_name), spec.revision or config.base_revision, config.base_name

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
        return replace(entry, base=base)

    def _named_by_adapter(self, name: str) -> str:
        """A base from adapter_config.json: a directory relative to the gate's config if it exists, or a Hub id."""
        path = str(Path(self._config.directory, name))
        return path if os.path.isdir(path) else name  # noqa: PTH112 (pathlib raises for an invalid name)

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
            return resolve.resolve_base(model, revision, replace(self._how, access=access), label=label)

        limit_s = self._limit_s(model) if Path(model).is_absolute() else None
        try:
            return read() if limit_s is None else within(limit_s, read)
        except GateError as error:
            return error
        except Exception as error:  # noqa: BLE001 - the name comes from an adapter and may be anything
            if limit_s is not None and isinstance(error, TimeoutError):
                return ResolveError(
                    f"the headers of base {quoted(label, 200)} could not be read in {limit_s:g} s: its mount does not "
                    "answer",
                    hint="check the network file system that holds the base, then run again",
                )
            return ResolveError(
                f"the base {label[:80]!r} cannot be resolved: {type(error).__name__}",
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
