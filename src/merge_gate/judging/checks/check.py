"""What a check is: a row of the table, its page, and the functions that judge.

In: nothing. Out: `Check`, and the two cases that its functions judge: `FileCase` before a merge and `MergeCase` after
it. Imports no torch and opens no files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, replace
from enum import Enum, StrEnum

from merge_gate.records.config import AdapterSpec, CheckSetting
from merge_gate.records.files import AdapterFiles
from merge_gate.records.measured import Evidence, TensorStats
from merge_gate.records.terms import FailureKind, Finding, Origin, Severity, record

ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE

FOLLOWS = "this follows from"
"""A hint that begins so names the finding that this one follows from, and no action."""


class Symptom(StrEnum):
    """What a user sees; the rows of the table of checks, in its order."""

    NONFINITE = "NaN or Inf in the adapter, in its base, or only in the sum of the two"
    NO_EFFECT = "the merge changes nothing, or rounding takes it back"
    TENSORS_LOST = "tensors lost on saving or dropped on loading"
    BAD_BASE = "a base that is incomplete, contradicts itself, or has a format that cannot be judged"
    BAD_FILE = "a file that is missing, cut off, a Git LFS pointer, or a pickle"
    BAD_CONFIG = "a config that contradicts the weights, or would import code"
    WRONG_PAIR = "the wrong base, or the wrong adapter"
    UNTRAINED_MERGE = "a merge that is not what was trained"
    EXTREME_VALUES = "values close to the limit, deltas larger than the weight"


class Stage(Enum):
    """What shows that a check fires."""

    FILES, BASE, MERGE, FORWARD = range(4)


_OF_MERGES = (Symptom.NO_EFFECT, Symptom.UNTRAINED_MERGE, Symptom.EXTREME_VALUES)


@record
class Check:
    """One row of the table of checks, in a module of its name. `@Check(…).on_merge` above a function makes a row of it.

    A check may have neither function: its findings come with the adapter's files or with a refusal of the engine.

    Attributes:
        id: its name in configurations and reports.
        severity: the severity of its findings if the configuration sets none.
        origin: where the cause of most of its findings lies.
        symptom: what a user sees.
        blame: its place in the order of blame: the check with the lowest number that fires is the cause.
        page: the docstring of its module: one sentence that says when it fires, and its page in docs/checks as
            Markdown. None if Python drops docstrings (-OO).
        limit: the figure above which it fires by default; None: it has none.
        limit_is_share: whether its limits are shares between 0 and 1.
        error_limit: the second limit by default, above which its warning is an error; infinite: it has none until a
            configuration sets it; None: a configuration cannot set it.
        wiped: the severity of a weight matrix that becomes zeros, by default; None: it does not look.
        can_be_off: whether a configuration may switch it off or lower it to a warning.
        failure: what a failure by it means.
        is_of_base: its errors are not the adapter's fault: the verdict is `error`, not `failed`.
        allows_merging: the adapter is merged and judged further although this check found an error in its files.
        allows_loading: PEFT may load the adapter although its files have this finding, if the configuration makes it
            less than an error. The default is False, because PEFT must not see what is unsafe.
        of_files: yields the findings before a merge.
        of_merge: yields the findings after a merge, the ones of the files included.
    """

    id: str = field(kw_only=False)
    severity: Severity = field(kw_only=False)
    origin: Origin = field(kw_only=False)
    symptom: Symptom = field(kw_only=False)
    blame: int
    page: str | None
    limit: float | None = None
    limit_is_share: bool = False
    error_limit: float | None = None
    wiped: Severity | None = None
    can_be_off: bool = True
    failure: FailureKind = FailureKind.BROKEN
    is_of_base: bool = False
    allows_merging: bool = False
    allows_loading: bool = False
    of_files: Callable[[FileCase], Iterator[Finding]] = lambda _: iter(())
    of_merge: Callable[[MergeCase], Iterator[Finding]] = lambda _: iter(())

    @property
    def shown_by(self) -> Stage:
        if self.id.startswith("activation-"):
            return Stage.FORWARD
        if self.origin is Origin.BASE:
            return Stage.BASE
        return Stage.MERGE if self.origin is Origin.MERGE or self.symptom in _OF_MERGES else Stage.FILES

    @property
    def summary(self) -> str:
        """One sentence that says when it fires."""
        return (self.page or self.id).partition("\n")[0]

    @property
    def explanation(self) -> str:
        """Its page without the heading."""
        limit = "no limit" if self.limit is None else f"limit {self.limit:g}"
        if self.error_limit is not None:
            limit += f", `error-limit` {self.error_limit:,g}" if self.error_limit < math.inf else ", no `error-limit`"
        default = f"Default `{self.severity}`, {limit}, {'can' if self.can_be_off else 'cannot'} be switched off."
        _, _, page = (self.page or "").partition("\n")
        return f"{default}\n{page.rstrip()}"

    def limits(self, settings: Mapping[str, CheckSetting]) -> tuple[float, float]:
        """The figure above which it fires, and the one above which its warning is an error; infinite if there is none.

        A default of the second counts only above the first: a configuration that allows more means what it says.
        """
        setting = settings.get(self.id)
        limit, error_limit = (setting.limit, setting.error_limit) if setting else (None, None)
        if limit is None:
            limit = math.inf if self.limit is None else self.limit
        if error_limit is None:
            default = self.error_limit or 0.0
            error_limit = default if default > limit else math.inf
        return limit, error_limit

    def on_files(self, judge: Callable[[FileCase], Iterator[Finding]]) -> Check:
        """The row of a check of files: it judges before the merge, and the same files again after it."""
        return replace(self, of_files=judge, of_merge=judge)

    def on_merge(self, judge: Callable[[MergeCase], Iterator[Finding]]) -> Check:
        """The row of a check of merges; before the merge it judges only if it has `of_files`."""
        return replace(self, of_merge=judge)

    def finding(
        self,
        message: str,
        hint: str = "",
        *,
        origin: Origin | None = None,
        severity: Severity | None = None,
        is_lesser: bool = False,
        module: str | None = None,
        tensor: str | None = None,
        stats: TensorStats | None = None,
        **measured: float | None,
    ) -> Finding:
        """A finding of this check.

        Args:
            message: what is wrong, where, got and expected.
            hint: what to do about it; may be empty.
            origin: where the cause lies, if not where it mostly does.
            severity: the severity of a lesser case: a warning of a check that is an error.
            is_lesser: keep a warning a warning if a policy or the configuration makes the check an error.
            module: module of the base.
            tensor: name of the tensor.
            stats: the tensor, if the report needs its counts of NaN and infinities; replaces `tensor`.
            measured: the figures behind the finding; None: there is no such figure.
        """
        finding = Finding(
            check=self.id,
            severity=severity or self.severity,
            message=message,
            hint=hint,
            origin=origin or self.origin,
            module=module,
            tensor=tensor,
            measured=tuple((name, float(figure)) for name, figure in measured.items() if figure is not None),
            is_lesser=is_lesser,
        )
        if stats is None:
            return finding
        return replace(
            finding,
            tensor=stats.name,
            nan=stats.nan,
            posinf=stats.posinf,
            neginf=stats.neginf,
            numel=stats.numel,
            first_index=stats.first_index,
        )


@record
class FileCase:
    """An adapter before its merge: its entry in the configuration, and its files."""

    spec: AdapterSpec
    files: AdapterFiles


@record
class MergeCase(FileCase):
    """An adapter after its merge, with what was measured and the configured limits."""

    evidence: Evidence
    settings: Mapping[str, CheckSetting]
