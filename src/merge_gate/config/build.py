"""Validated values → `Config`: names, directories, globs and defaults; what types cannot say.

In: a document with the problems of stage 3. Out: a `Config`, or a `ConfigError` with every problem. Knows which
directories exist (through `paths`), and neither YAML nor what the checks do.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from merge_gate.config.load import MAX_NAME
from merge_gate.config.model import (
    PRUNING,
    SIGN_ELECTING,
    AdapterEntry,
    BaseEntry,
    CheckEntry,
    CombineEntry,
    ExpectEntry,
    LimitsEntry,
)
from merge_gate.config.nearest import nearest
from merge_gate.config.paths import Unusable, find, find_all, is_glob, last_name
from merge_gate.config.positions import Document, Loc
from merge_gate.config.problems import Problems
from merge_gate.judging.table import CHECKS
from merge_gate.records.config import AdapterSpec, BaseSpec, CheckSetting, Combine, Config, Expect
from merge_gate.records.terms import Quantization, Severity
from merge_gate.text import has_hidden, listing, quoted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def build_config(document: Document, sha256: str) -> Config:
    """Validate the values of a file and build its configuration. `sha256` is the digest of the file's bytes.

    Raises:
        ConfigError: with every problem, in the order of the file.
    """
    problems = Problems(document)
    adapters = _Build(problems, Path(document.path).absolute().parent).adapters()
    problems.raise_any()
    return Config(
        path=document.path,
        sha256=sha256,
        adapters=adapters,
        allow_pickle=document.get(("allow-pickle",)) is True,
        trust_remote_code=document.get(("trust-remote-code",)) is True,
    )


class _Build:
    def __init__(self, problems: Problems, directory: Path) -> None:
        self.problems, self.directory, self.report = problems, directory, problems.report
        self.claimed: dict[str, tuple[int, str]] = {}
        self.default_base = self._base(("base",), BaseSpec())
        defaults = {
            check: CheckSetting(check=check, severity=default.severity, limit=default.limit)
            for check, default in CHECKS.items()
        }
        self.default_checks = self._checks(("checks",), defaults)
        self.default_limit = self._limit_seconds(("limits",), None)

    def adapters(self) -> tuple[AdapterSpec, ...]:
        """Build all entries; combinations last, since they refer to the others. The order is the file's."""
        built: list[list[AdapterSpec]] = []
        for index in range(len(self._inside(("adapters",), list))):
            entry = self.problems.part(AdapterEntry, ("adapters", index))
            built.append(list(self._entry(("adapters", index), entry)) if entry else [])
        named = {spec.name: spec for specs in built for spec in specs}
        complete = all(built)
        for index, specs in enumerate(built):
            if specs and specs[0].combine:
                specs[0] = self._combination(("adapters", index), specs[0], named, complete=complete)
        return tuple(spec for specs in built for spec in specs)

    # --- one entry -------------------------------------------------------------------------------------------------

    def _entry(self, loc: Loc, entry: AdapterEntry) -> Iterator[AdapterSpec]:
        """Yield the entry's adapters: one, or one per directory of a glob. None where its source is wrong."""
        value = self.problems.document.get(loc)
        keys = set(value) if isinstance(value, dict) else {"path"}
        line, column = self.problems.document.line(loc)
        if keys >= {"path", "combine"}:
            self.report(loc, '"path" and "combine" exclude each other', "remove one of them", key="combine")
        elif not keys & {"path", "combine"} and keys <= set(AdapterEntry.model_fields):
            self.report(loc, 'an adapter needs "path" or "combine"', "path is a directory or a Hub id")
        draft = AdapterSpec(
            name=entry.name or "",
            source="",
            revision=entry.revision,
            base=self.default_base if "combine" in keys else self._base((*loc, "base"), self.default_base),
            checks=tuple(self._checks((*loc, "checks"), self.default_checks).values()),
            expect=self._expect((*loc, "expect"), entry.expect) if entry.expect else None,
            limit_seconds=self._limit_seconds((*loc, "limits"), self.default_limit),
            line=line,
            column=column,
        )
        if entry.path and "combine" not in keys:
            yield from self._from_path(loc, draft, entry.path)
        elif "combine" in keys and "path" not in keys:
            yield from self._from_combine(loc, draft, entry.combine)

    def _from_path(self, loc: Loc, draft: AdapterSpec, written: str) -> Iterator[AdapterSpec]:
        try:
            if is_glob(written, self.directory):
                yield from self._from_glob(loc, draft, written)
                return
            found, hub_id = find(written, self.directory, on_hub=draft.revision is not None, owner_needed=True)
        except Unusable as problem:
            self.report((*loc, "path"), problem.message, problem.hint)
            return
        if found:
            self._refuse_revision(loc, draft.revision)
        name = draft.name or last_name(written, found)
        if reason := _bad_name(name):
            self.report((*loc, "path"), f"the adapter's name would be {quoted(name)}, which {reason}", 'add a "name"')
        spec = replace(draft, name=name, source=written, path=found, hub_id=hub_id)
        self._claim(loc, spec)
        yield spec

    def _from_glob(self, loc: Loc, draft: AdapterSpec, pattern: str) -> Iterator[AdapterSpec]:
        self._refuse_revision(loc, draft.revision)
        if draft.name:
            hint = "its adapters are named after their directories: remove it"
            self.report(loc, f'"name" has no meaning for the glob {quoted(pattern)}', hint, key="name")
        for written, found in find_all(pattern, self.directory):
            name = last_name(written, found)
            if reason := _bad_name(name):
                self.report((*loc, "path"), f"the directory {quoted(written)} has a name that {reason}", "rename it")
            spec = replace(draft, name=name, source=written, path=found)
            self._claim(loc, spec)
            yield spec

    def _from_combine(self, loc: Loc, draft: AdapterSpec, entry: CombineEntry | None) -> Iterator[AdapterSpec]:
        """The members are looked up later, in `_combination`."""
        for key, why in (("revision", "it has no files of its own"), ("expect", "state it of the members")):
            if self.problems.is_there((*loc, key)):
                self.report(loc, f'"{key}" has no meaning for a combination', why, key=key)
        if not self.problems.is_there((*loc, "name")):
            self.report(loc, 'a combination needs a "name"', "it is what the report calls it", key="combine")
        if entry is None:
            return
        self._check_combine((*loc, "combine"), entry)
        combine = Combine(
            method=entry.method,
            adapters=tuple(entry.adapters),
            weights=tuple(map(float, entry.weights)),
            density=entry.density,
            majority_sign_method=entry.majority_sign_method,
            seed=entry.seed,
        )
        spec = replace(draft, source=f"{entry.method}({', '.join(entry.adapters)})", combine=combine)
        if spec.name:
            self._claim(loc, spec)
            yield spec

    def _check_combine(self, loc: Loc, entry: CombineEntry) -> None:
        if len(entry.weights) != len(entry.adapters):
            message = f"{len(entry.weights)} weights for {len(entry.adapters)} adapters"
            self.report((*loc, "weights"), message, "give one weight per adapter, in the same order")
        if entry.density is None and entry.method in PRUNING:
            hint = "the share of values that pruning keeps, such as 0.5"
            self.report((*loc, "method"), f'the method {entry.method} needs "density"', hint)
        if entry.density is not None and entry.method not in PRUNING:
            hint = f"methods with it: {', '.join(PRUNING)}"
            self.report(loc, f'"density" has no meaning for the method {entry.method}', hint, key="density")
        if entry.majority_sign_method and entry.method not in SIGN_ELECTING:
            message = f'"majority_sign_method" has no meaning for the method {entry.method}'
            self.report(loc, message, f"methods with it: {', '.join(SIGN_ELECTING)}", key="majority_sign_method")
        for index, name in enumerate(entry.adapters):
            if name in entry.adapters[:index]:
                self.report((*loc, "adapters", index), f"{quoted(name)} is named twice", "add up its weights")

    def _combination(
        self, loc: Loc, spec: AdapterSpec, named: Mapping[str, AdapterSpec], *, complete: bool
    ) -> AdapterSpec:
        """Look up the members, and put the combination on their base unless it names its own.

        Names that are unknown are a problem only where all entries could be read: it may be one of the others.
        """
        names = spec.combine.adapters if spec.combine else ()
        members = [named[name] for name in names if name in named]
        base = self._base((*loc, "base"), members[0].base if members else self.default_base)
        for index, name in enumerate(names):
            member, place = named.get(name), (*loc, "combine", "adapters", index)
            if member is None and complete:
                known = [other.name for other in named.values() if not other.combine]
                hint = nearest(name, known) or f"listed are: {listing(map(quoted, known))}"
                self.report(place, f"no adapter is named {quoted(name)}", hint)
            elif member and member.combine:
                self.report(place, f"{quoted(name)} is a combination itself", "combine its members instead")
            elif member and (member.base.model, member.base.revision) != (base.model, base.revision):
                message = f"{quoted(name)} is on another base: {_shown(member.base)}, not {_shown(base)}"
                self.report(place, message, "only adapters of one base can be combined")
        return replace(spec, base=base)

    def _refuse_revision(self, loc: Loc, revision: str | None) -> None:
        if revision is not None:
            self.report(loc, "revision has no meaning for a directory", "only Hub ids have one", key="revision")

    def _claim(self, loc: Loc, spec: AdapterSpec) -> None:
        """Every name once."""
        given = "name" if self.problems.is_there((*loc, "name")) and spec.name else "path"
        line, _ = self.problems.document.line((*loc, given))
        if spec.name not in self.claimed:
            self.claimed[spec.name] = (line, spec.source)
            return
        first, source = self.claimed[spec.name]
        where = f"in line {line}" if line == first else f"in line {first} and in line {line}"
        message = f"the name {quoted(spec.name)} is given twice, {where}: to {quoted(source)} and {quoted(spec.source)}"
        self.report((*loc, given), message, 'names must be unique: give one of them another "name"')

    # --- base, checks, expect --------------------------------------------------------------------------------------

    def _base(self, loc: Loc, default: BaseSpec) -> BaseSpec:
        """Lay the keys given at `loc` over `default`. A revision stays with its model."""
        entry = self.problems.part(BaseEntry, loc)
        if entry is None:
            return default
        spec = default
        if entry.model is not None and entry.model != default.label:
            spec = replace(spec, model=self._base_model(loc, entry), label=entry.model, revision=None)
        if entry.revision is not None:
            spec = replace(spec, revision=entry.revision)
            if spec.model and Path(spec.model).is_absolute():
                self._refuse_revision(loc, entry.revision)
            elif spec.model is None and not self.problems.is_there((*loc, "model")):
                self.report(loc, '"revision" needs "model"', "name the base that it is a revision of", key="revision")
        if entry.dtype is not None:
            spec = replace(spec, dtypes=tuple(entry.dtype))
            for index, dtype in enumerate(entry.dtype):
                if dtype in entry.dtype[:index]:
                    self.report((*loc, "dtype", index), f"the dtype {dtype} is given twice", "remove one")
        if entry.quantization is not None:
            spec = replace(spec, quantization=Quantization(entry.quantization))
        return spec

    def _base_model(self, loc: Loc, entry: BaseEntry) -> str:
        model = entry.model or ""
        try:
            found, hub_id = find(model, self.directory, on_hub=entry.revision is not None, owner_needed=False)
        except Unusable as problem:
            self.report((*loc, "model"), problem.message, problem.hint)
            return model
        return found or hub_id or model

    def _checks(self, loc: Loc, below: Mapping[str, CheckSetting]) -> dict[str, CheckSetting]:
        """Lay the settings at `loc` over those `below`."""
        settings = dict(below)
        for check in self._inside(loc, dict):
            if check not in CHECKS:
                self.problems.report_unknown(loc, check, CHECKS, "check")
            elif entry := self.problems.part(CheckEntry, (*loc, check)):
                settings[check] = self._setting((*loc, check), entry, settings[check])
        return settings

    def _setting(self, loc: Loc, entry: CheckEntry, below: CheckSetting) -> CheckSetting:
        default = CHECKS[below.check]
        severity = below.severity
        if entry.severity is not None:
            severity = default.severity if entry.severity == "on" else Severity(entry.severity)
        if not default.can_be_off and severity is not default.severity:
            what = "switched off" if severity is Severity.OFF else f"lowered to {severity}"
            hint = "a model that is not finite never passes"
            self.report((*loc, "severity"), f"{quoted(below.check)} cannot be {what}", hint)
        if entry.limit is not None and default.limit is None:
            limited = [check for check, row in CHECKS.items() if row.limit is not None]
            self.report(
                loc, f"{quoted(below.check)} has no limit", f"checks with one: {', '.join(limited)}", key="limit"
            )
        if self.problems.document.get(loc) == {}:
            self.report(loc, f"{quoted(below.check)} is empty", "give it a severity or a limit")
        return replace(below, severity=severity, limit=below.limit if entry.limit is None else float(entry.limit))

    def _limit_seconds(self, loc: Loc, below: float | None) -> float | None:
        entry = self.problems.part(LimitsEntry, loc)
        if self.problems.is_there(loc) and self.problems.document.get(loc) == {}:
            self.report(loc, '"limits" is empty', "give it seconds, or remove it")
        return float(entry.seconds) if entry and entry.seconds is not None else below

    def _expect(self, loc: Loc, entry: ExpectEntry) -> Expect:
        if self.problems.document.get(loc) == {}:
            self.report(loc, '"expect" is empty', "state something, or remove it")
        digests: dict[str, str] = entry.sha256 or {}
        for name in digests:
            if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
                hint = "write it relative to the adapter's directory, with /"
                self.report((*loc, "sha256"), f"{quoted(name)} is not a file inside the adapter", hint, key=name)
        return Expect(
            peft_type=entry.peft_type.upper() if entry.peft_type else None,
            r=entry.r,
            lora_alpha=None if entry.lora_alpha is None else float(entry.lora_alpha),
            base=entry.base,
            sha256=tuple((name, digest.lower()) for name, digest in digests.items()),
        )

    # --- parts of the file -----------------------------------------------------------------------------------------

    def _inside(self, loc: Loc, kind: type[list[Any] | dict[str, Any]]) -> Any:
        """The list or mapping at `loc`; an empty one where there is none."""
        value = self.problems.document.get(loc) if self.problems.is_there(loc) else None
        return value if isinstance(value, kind) else kind()


def _bad_name(name: str) -> str:
    """Say why a name that was not written but derived will not do."""
    if not name.strip():
        return "is empty"
    if len(name) > MAX_NAME:
        return f"is longer than {MAX_NAME} characters"
    readable = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # a name on disk may be any bytes
    return "holds a control character" if has_hidden(readable) else ""


def _shown(base: BaseSpec) -> str:
    if base.label is None:
        return "the one that its adapter_config.json names"
    return quoted(base.label + (f"@{base.revision}" if base.revision else ""))
