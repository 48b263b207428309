"""Builds a `Config` from a validated document: resolves names, directories, globs, and defaults.

A document goes in; a `Config` or a `ConfigError` with every problem comes out. The valid parts of an invalid file are
built, too, so that all problems are reported at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from merge_gate._internal.text import counted, has_hidden, listing, quoted, size_bytes
from merge_gate.config.model import MAX_NAME, METHODS_WITH, AdapterEntry, BaseEntry, CheckEntry, CombineEntry, FileEntry
from merge_gate.config.paths import InvalidName, ResolvedName, is_glob, resolve_name
from merge_gate.config.problems import read_models
from merge_gate.config.yaml_document import KEY, Loc, YamlDocument
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.policies import DEFAULT, POLICIES, Policy
from merge_gate.names.hub_names import is_commit
from merge_gate.names.suggestions import nearest
from merge_gate.records.config import (
    FILE_KEYS,
    AdapterSpec,
    BaseSpec,
    CheckSetting,
    Combine,
    Config,
    Expect,
    PublishSpec,
)
from merge_gate.records.features import WordKey, declared_keys
from merge_gate.records.terms import Quantization, Severity

_DEFAULT_ADAPTER = AdapterSpec(name="", source="", base=BaseSpec(), checks=(), line=1, column=1)
"""The built-in defaults. The file's own settings override them, and an entry's settings override the file's."""
_REVISION_OF_DIRECTORY = ("a directory has no revision", "remove it: only Hub ids have revisions")


def build_config(
    document: YamlDocument,
    sha256: str,
    *,
    path: str | None,
    directory: Path,
    output: str | None = None,
    policy: str | None = None,
) -> Config:
    """Validate a file's values and build its configuration. The arguments are explained in `Config` and `load_config`.

    Raises:
        ConfigError: with every problem, in the order of the file.
    """
    file = read_models(document, FileEntry)
    policy = policy or file.policy or DEFAULT
    adapters = _Build(document, file, directory, output, POLICIES[policy]).adapters(file.adapters or [])
    document.raise_problems()
    publish = None
    if entry := file.publish:
        largest = size_bytes(entry.max_shard_size) if entry.max_shard_size else None
        place = str(directory / entry.directory)
        publish = entry.record(PublishSpec, directory=place, label=entry.directory, max_shard_bytes=largest)
    return file.record(  # type: ignore[no-any-return] # as in model.py
        Config,
        path=path,
        directory=str(directory),
        sha256=sha256,
        adapters=adapters,
        baseline_path=str(Path(path or "").parent / file.baseline) if file.baseline else None,
        baseline=(),
        publish=publish,
        policy=policy,
    )


class _Build:
    def __init__(
        self, document: YamlDocument, file: FileEntry, directory: Path, output: str | None, policy: Policy
    ) -> None:
        self.document, self.report = document, document.report
        self.directory, self.output, self.policy = directory, output, policy
        self.sources: dict[str, str] = {}  # by the adapter's name
        self.base_keys = declared_keys("BASE_KEYS")
        default = replace(_DEFAULT_ADAPTER, **_words(FILE_KEYS, file, _DEFAULT_ADAPTER))
        self.default = self._override((), file, replace(default, checks=tuple(map(policy.setting, CHECKS))))

    def adapters(self, entries: list[AdapterEntry]) -> tuple[AdapterSpec, ...]:
        """Build all entries in the order of the file. Combinations are resolved last, since they name other entries."""
        built = [list(self._entry(("adapters", index), entry)) if entry else [] for index, entry in enumerate(entries)]
        named = {spec.name: spec for specs in built for spec in specs}
        for index, specs in enumerate(built):
            if specs and specs[0].combine:
                loc = ("adapters", index)
                specs[0] = self._combination(loc, entries[index], specs[0], named, complete=all(built))
        return tuple(spec for specs in built for spec in specs)

    def _override(self, loc: Loc, entry: FileEntry | AdapterEntry, default: AdapterSpec) -> AdapterSpec:
        """Override the defaults with the base, checks, and limits of a file or an entry."""
        checks = default.checks
        if entry.checks:
            checks = tuple(self._setting((*loc, "checks", row.check), entry.checks, row) for row in checks)
        base = self._base((*loc, "base"), entry.base, default.base)
        seconds = (entry.limits and entry.limits.seconds) or default.timeout_seconds
        return replace(default, base=base, checks=checks, timeout_seconds=seconds)

    # --- one entry -------------------------------------------------------------------------------------------------

    def _entry(self, loc: Loc, entry: AdapterEntry) -> Iterator[AdapterSpec]:
        """Yield the entry's adapters: one, or one per directory of a glob. Yield none if its source is invalid."""
        given = entry.model_fields_set
        line, column = self.document.place(loc)
        draft = replace(self._override(loc, entry, self.default), line=line, column=column)
        draft = replace(draft, name=entry.name or "", revision=entry.revision or None)
        if entry.expect:
            draft = replace(draft, expect=entry.expect.record(Expect))
        if given >= {"path", "combine"}:
            self.report((*loc, "combine", KEY), 'an entry cannot have both "path" and "combine"', "remove one of them")
        elif "combine" in given:
            yield from self._from_combine(loc, entry, draft)
        elif entry.path:
            yield from self._from_path(loc, draft, entry.path)
        elif "path" not in given and loc not in self.document.has_unknown_keys:
            self.report(loc, 'an adapter needs "path" or "combine"', "a path is a directory or a Hub id")

    def _from_path(self, loc: Loc, draft: AdapterSpec, written: str) -> Iterator[AdapterSpec]:
        globbed = is_glob(written, self.directory)
        if globbed and draft.name:
            hint = "remove it: each adapter is named after its directory"
            self.report((*loc, "name", KEY), f'the glob {quoted(written)} cannot have a "name"', hint)
        naming = (*loc, "name" if draft.name else "path")
        for source, path, hub_id in self._resolved((*loc, "path"), written, on_hub=bool(draft.revision)):
            if path and draft.revision:
                self.report((*loc, "revision", KEY), *_REVISION_OF_DIRECTORY)
            self._refuse_unpinned((*loc, "path"), "adapter", hub_id, draft.revision)
            name = (not globbed and draft.name) or (path or source).rsplit("/", 1)[-1]
            if not _can_be_name(name):
                message = f"{quoted(source)} gives the adapter the name {quoted(name)}, expected"
                hint = 'rename the directory, or add a "name" if this is no glob'
                self.report((*loc, "path"), f"{message} up to {MAX_NAME} visible characters", hint)
            yield self._with_unique_name(naming, replace(draft, name=name, source=source, path=path, hub_id=hub_id))

    def _from_combine(self, loc: Loc, entry: AdapterEntry, draft: AdapterSpec) -> Iterator[AdapterSpec]:
        """Build a combination, without its members: `_combination` looks them up later."""
        for key, hint in (
            ("revision", "remove it: a combination has no files of its own"),
            ("expect", "move it to the members"),
        ):
            if key in entry.model_fields_set:
                self.report((*loc, key, KEY), f'a combination cannot have "{key}"', hint)
        if "name" not in entry.model_fields_set:
            self.report((*loc, "combine", KEY), 'a combination needs a "name"', "the report uses it")
        if entry.combine:
            self._check_combine((*loc, "combine"), entry.combine)
        if entry.combine and entry.combine.adapters and draft.name:
            source = f"{entry.combine.method or '?'}({', '.join(entry.combine.adapters)})"
            spec = replace(draft, source=source, combine=entry.combine.record(Combine))
            yield self._with_unique_name((*loc, "name"), spec)

    def _check_combine(self, loc: Loc, entry: CombineEntry) -> None:
        if entry.weights and entry.adapters and len(entry.weights) != len(entry.adapters):
            message = f"{counted(len(entry.weights), 'weight')} for {counted(len(entry.adapters), 'adapter')}"
            self.report((*loc, "weights"), message, "give one weight per adapter, in the same order")
        if entry.method in METHODS_WITH["density"] and "density" not in entry.model_fields_set:
            hint = "the share of values that pruning keeps, such as 0.5"
            self.report((*loc, "method"), f'the method {entry.method} needs "density"', hint)
        self._refuse_repeated((*loc, "adapters"), entry.adapters)
        for key, methods in METHODS_WITH.items():
            if key in entry.model_fields_set and entry.method and entry.method not in methods:
                hint = f"methods that take it: {', '.join(methods)}"
                self.report((*loc, key, KEY), f'the method {entry.method} does not take "{key}"', hint)

    def _combination(
        self, loc: Loc, entry: AdapterEntry, spec: AdapterSpec, named: Mapping[str, AdapterSpec], *, complete: bool
    ) -> AdapterSpec:
        """Look up the members, and put the combination on their base unless it names its own.

        An unknown name is reported only if all entries are valid. Otherwise an invalid entry may have that name.
        """
        names = spec.combine.adapters if spec.combine else ()
        bases = [*(named[name].base for name in names if name in named), self.default.base]
        base = self._base((*loc, "base"), entry.base, bases[0])
        for index, name in enumerate(names):
            member, place = named.get(name), (*loc, "combine", "adapters", index)
            if member is None and complete:
                self.report(place, f"no adapter is named {quoted(name)}", partial(_listed, name, named))
            elif member and member.combine:
                self.report(place, f"{quoted(name)} is itself a combination", "combine its members instead")
            elif member and not member.base.key().is_same_model(base.key()):
                message = f"{quoted(name)} is on another base: {_shown(member.base)}, not {_shown(base)}"
                self.report(place, message, "only adapters of one base can be combined")
        return replace(spec, base=base)

    def _resolved(self, loc: Loc, written: str, *, on_hub: bool, is_base: bool = False) -> list[ResolvedName]:
        """Resolve the name at `loc`. Report a problem and return an empty list if it is invalid."""
        try:
            return resolve_name(written, self.directory, on_hub=on_hub, is_base=is_base, output=self.output)
        except InvalidName as problem:
            self.report(loc, *problem.args)
            return []

    def _with_unique_name(self, loc: Loc, spec: AdapterSpec) -> AdapterSpec:
        """Return the adapter, and report a problem if its name is taken. `loc` is the place of the name."""
        if spec.name in self.sources:
            both = f"{quoted(self.sources[spec.name])} and {quoted(spec.source)}"
            hint = 'list each adapter once, or give one of them another "name" in a configuration file'
            self.report(loc, f"the name {quoted(spec.name)} is used twice: for {both}", hint)
        self.sources.setdefault(spec.name, spec.source)
        return spec

    # --- base, checks, expect --------------------------------------------------------------------------------------

    def _base(self, loc: Loc, entry: BaseEntry | None, spec: BaseSpec) -> BaseSpec:
        """Override `spec` with the keys given at `loc`. A new model drops revision, names, and digests of the old."""
        if not entry:
            return spec
        if entry.model and entry.model != spec.label:
            resolved = self._resolved((*loc, "model"), entry.model, on_hub=bool(entry.revision), is_base=True)
            for label, path, hub_id in resolved or [(entry.model, None, entry.model)]:
                if (model := path or hub_id) != spec.model:
                    spec = replace(spec, model=model, label=label, revision=None, names=(), sha256=())
        if entry.revision:
            spec = replace(spec, revision=entry.revision)
            if spec.model and Path(spec.model).is_absolute():
                self.report((*loc, "revision", KEY), *_REVISION_OF_DIRECTORY)
            elif spec.model is None and "model" not in entry.model_fields_set:
                hint = "name the base that has this revision"
                self.report((*loc, "revision", KEY), '"revision" needs "model"', hint)
        is_on_hub = spec.model is not None and not Path(spec.model).is_absolute()
        self._refuse_unpinned(loc, "base", spec.label if is_on_hub else None, spec.revision)
        self._refuse_repeated((*loc, "dtype"), entry.dtype)
        self._refuse_repeated((*loc, "names"), entry.names)
        return replace(
            spec,
            sha256=tuple((entry.sha256 or {}).items()) or spec.sha256,
            dtypes=tuple(entry.dtype or spec.dtypes),
            quantization=Quantization(entry.quantization or spec.quantization),
            names=tuple(entry.names or spec.names),
            **_words(self.base_keys, entry, spec),
        )

    def _refuse_repeated(self, loc: Loc, values: list[Any] | None) -> None:
        first: dict[str, int] = {}
        for index, value in enumerate(values or []):
            if first.setdefault(value, index) != index:
                self.report((*loc, index), f"{quoted(value)} is listed twice", "list it once")

    def _refuse_unpinned(self, loc: Loc, what: str, hub_id: str | None, revision: str | None) -> None:
        """Report names on the Hub without a full commit if the policy needs one. A branch or tag may move."""
        if hub_id is not None and self.policy.needs_pins and not is_commit(revision):
            message = f"the {what} {quoted(hub_id)} is not pinned, which policy: release asks for"
            self.report(loc, message, "add its revision, as a commit of 40 hexadecimal digits")

    def _setting(self, loc: Loc, checks: Any, default: CheckSetting) -> CheckSetting:
        entry: CheckEntry | None = getattr(checks, default.check)
        if not entry:
            return default
        if entry.severity == "on":
            on = self.policy.setting(default.check)
            default = replace(on, limit=default.limit, error_limit=default.error_limit, wiped=default.wiped)
        elif entry.severity:
            default = replace(default, severity=Severity(entry.severity), of_base=None)
        limit = getattr(entry, "limit", None) or default.limit
        own_error_limit = getattr(entry, "error_limit", None)
        if own_error_limit and limit and own_error_limit < limit:
            message = f"the error-limit {own_error_limit:g} is below the limit {limit:g}"
            hint = "above its limit a check warns, and above its error-limit it fails the adapter"
            self.report((*loc, "error-limit", KEY), message, hint)
        wiped = Severity(word) if (word := getattr(entry, "wiped", None)) else default.wiped
        return replace(default, limit=limit, error_limit=own_error_limit or default.error_limit, wiped=wiped)


def _words(keys: Mapping[str, WordKey], entry: object, default: object) -> dict[str, Any]:
    return {key: row.words(getattr(entry, key) or getattr(default, key)) for key, row in keys.items()}


def _listed(name: str, named: Mapping[str, AdapterSpec]) -> str:
    known = [other.name for other in named.values() if not other.combine]
    return nearest(name, known) or f"the listed adapters are {listing(map(quoted, known))}"


def _can_be_name(name: str) -> bool:
    readable = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # a name on disk may be any bytes
    return 0 < len(name.strip()) <= len(name) <= MAX_NAME and not has_hidden(readable)


def _shown(base: BaseSpec) -> str:
    if base.label is None:
        return "the base that its adapter_config.json names"
    return quoted(base.label + (f"@{base.revision}" if base.revision else ""))
