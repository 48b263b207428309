"""Names → files: each adapter and each base of a config is resolved and read once, however often it is asked for.

In: a `Config` and its `AdapterSpec`s. Out: `Entry`, in which whatever went wrong is a finding of that adapter alone.
Knows nothing of merging.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from merge_gate.errors import GateError, ResolveError
from merge_gate.files import resolve
from merge_gate.files.preflight import preflight
from merge_gate.files.resolve import Resolved
from merge_gate.judging.undecided import accident, undecided
from merge_gate.records.config import AdapterSpec, Config
from merge_gate.records.files import CONFIG_NAME, AdapterFiles, Entry
from merge_gate.records.terms import Finding, Origin, Severity
from merge_gate.text import quoted


class Inputs:
    """The files of one config's adapters and bases. `notify` is told what takes long (a download)."""

    def __init__(self, config: Config, notify: Callable[[str], None]) -> None:
        self._config = config
        self._notify = notify
        self._specs = {spec.name: spec for spec in config.adapters}
        self._read: dict[str, tuple[AdapterFiles, str | None]] = {}
        self._left_out: set[str] = set()
        self._bases: dict[tuple[str, str | None], Resolved | GateError] = {}

    def entries(self, spec: AdapterSpec) -> tuple[Entry, ...]:
        """The adapter's files and its base, once for each dtype."""
        entry = self.prepare(spec)
        return tuple(replace(entry, dtype=dtype) for dtype in spec.base.dtypes)

    def prepare(self, spec: AdapterSpec) -> Entry:
        """The adapter's files and its base, in the first of its dtypes."""
        entry = self.adapter(spec)
        return entry if entry.problem is not None else self._with_base(entry)

    def adapter(self, spec: AdapterSpec) -> Entry:
        """The adapter's files alone; of a combination, its members'."""
        names = spec.combine.adapters if spec.combine is not None else (spec.name,)
        members, revision, dtype = [], None, spec.base.dtypes[0]
        for name in names:
            try:
                files, revision = self._files(self._specs[name])
            except GateError as error:
                return Entry(spec=spec, dtype=spec.base.dtypes[0], problem=undecided(error.message, error.hint))
            except Exception as error:  # noqa: BLE001 - input that nobody thought of costs its own adapter
                problem = accident("its files could not be read", error)
                return Entry(spec=spec, dtype=spec.base.dtypes[0], problem=problem)
            members.append(files)
        return Entry(spec=spec, dtype=dtype, members=tuple(members), revision=None if spec.combine else revision)

    def _files(self, spec: AdapterSpec) -> tuple[AdapterFiles, str | None]:
        if spec.name not in self._read:
            allow = self._config.allow_pickle
            found = resolve.resolve_adapter(spec, allow_pickle=allow, notify=self._notify)
            files = preflight(found.snapshot.directory, allow_pickle=allow, withheld=found.withheld)
            self._read[spec.name] = files, found.snapshot.revision
        return self._read[spec.name]

    def checked(self, spec: AdapterSpec) -> Entry:
        """The adapter's files, and its base if that is a directory here. A base on the Hub is not fetched."""
        entry = self.adapter(spec)
        wanted = None if entry.problem is not None else self._wanted(entry)
        if wanted is None:
            return entry
        model, _, label = wanted
        if not resolve.reads_as_path(model):
            self._leave_out(label)
            return entry
        return self._with_base(entry)

    def _leave_out(self, label: str) -> None:
        if label not in self._left_out:
            self._left_out.add(label)
            name = quoted(label, 200)
            self._notify(f"base {name} was not checked: no directory here has that name, and `check` fetches no bases")

    def _wanted(self, entry: Entry) -> tuple[str, str | None, str] | None:
        """The base's place, revision and name: the config's, else what adapter_config.json names; None for neither."""
        wanted, config = entry.spec.base, entry.files.config
        if wanted.model is not None:
            return wanted.model, wanted.revision, wanted.label or wanted.model
        if not config.base_name:
            return None
        return self._named_by_adapter(config.base_name), wanted.revision or config.base_revision, config.base_name

    def _with_base(self, entry: Entry) -> Entry:
        """Add the base, and what its files say."""
        wanted = self._wanted(entry)
        if wanted is None:
            return replace(entry, problem=_no_base(entry.files))
        found = self._base(*wanted)
        if isinstance(found, GateError):
            is_of_config = entry.spec.base.model is not None
            hint = found.hint if is_of_config else f"{_NAMED_BY_ADAPTER}; {found.hint}"
            return replace(entry, problem=_refused(found, hint))
        return replace(entry, base=found.snapshot, base_files=found.base)

    def _named_by_adapter(self, named: str) -> str:
        """A base named by adapter_config.json is a directory where one exists, beside the config, else a Hub id."""
        path = str(Path(self._config.directory, named))
        return path if os.path.isdir(path) else named  # noqa: PTH112 (pathlib raises for a name that no system takes)

    def _base(self, model: str, revision: str | None, label: str) -> Resolved | GateError:
        key = (model, revision)
        if key not in self._bases:
            self._bases[key] = self._resolved_base(model, revision, label)
        return self._bases[key]

    def _resolved_base(self, model: str, revision: str | None, label: str) -> Resolved | GateError:
        try:
            return resolve.resolve_base(
                model,
                revision,
                trust_remote_code=self._config.trust_remote_code,
                allow_pickle=self._config.allow_pickle,
                label=label,
                notify=self._notify,
            )
        except GateError as error:
            return error
        except Exception as error:  # noqa: BLE001 - the name comes from an adapter and may be anything
            return ResolveError(
                f"the base {label[:80]!r} cannot be looked up: {type(error).__name__}",
                hint="set base.model in the config, or correct base_model_name_or_path in adapter_config.json",
            )


_NAMED_BY_ADAPTER = (
    "adapter_config.json names this base, as the machine that trained the adapter called it; base.model in the gate's "
    "config (or --base) overrides it"
)


def _refused(error: GateError, hint: str) -> Finding:
    """Why a base cannot be used, as the finding of the check of bases that says so, if one does."""
    check = error.check if isinstance(error, ResolveError) else None
    if check is None:
        return undecided(error.message, hint)
    return Finding(check=check, severity=Severity.ERROR, message=error.message, hint=hint, origin=Origin.BASE)


def _no_base(files: AdapterFiles) -> Finding:
    is_there = any(file.path == CONFIG_NAME for file in files.files)
    names_none = f"{CONFIG_NAME} names none" if is_there else f"there is no {CONFIG_NAME} to name one"
    return undecided(
        f"no base to merge into: the config sets no base.model, and {names_none}",
        "set base: {model: …} in the gate's config, for the file or for this adapter, or give --base",
    )
