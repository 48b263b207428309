"""The interface of a feature in the parent process: the places of a run at which it acts.

In: a `Run`. Out: the features that its configuration and its options ask for. They are reached only through the table
of features, so that a run imports no code of a feature that it does not use.

A module `feature` of the table has `join(run)`, which makes a `Feature`, or refuses the run by a `UsageError`. The
module `declared` has `is_requested(config, options)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from merge_gate.records.features import FEATURES, part

if TYPE_CHECKING:
    from merge_gate.records.files import Entry
    from merge_gate.records.report import AdapterReport, BaseReport
    from merge_gate.records.terms import Read
    from merge_gate.run.flow import Run
    from merge_gate.run.verdict_key import Json
    from merge_gate.worker.protocol import Event, Group


class Feature:
    """What one feature does in one run. The methods have the order in which a run calls them, and do nothing here."""

    @property
    def may_decide_all(self) -> bool:
        """Whether `choose` may leave nothing to merge. The worker then starts only when it is known what is left."""
        return False

    def choose(self, entries: dict[int, Entry]) -> None:
        """Report entries before the merge, or refuse the run. Removes those from `entries` that need no merge."""

    def schedule(self, group: Group, read: Read) -> Group:  # noqa: ARG002 - a feature may need it
        """Add to a group what the worker has to know. As much of the base is read as `read` says."""
        return group

    def received(self, event: Event) -> None:
        """The worker sent an event, which the run has not handled yet."""

    def decided(self, report: AdapterReport, base: BaseReport, material: Json) -> None:
        """A verdict has its key: `material` is everything that it depends on, and `base` is what it was judged on."""

    def finish(self) -> None:
        """All verdicts are final."""

    def close(self) -> None:
        """Release what the feature holds. The run may have failed, or may only have been planned."""


def requested(run: Run) -> Iterator[Feature]:
    """The features that a run asks for, in the order of the table.

    Raises:
        UsageError: a feature cannot do what the run asks for.
    """
    for name, modules in FEATURES.items():
        if "feature" in modules and part(name, "declared").is_requested(run.config, run.options):
            yield part(name, "feature").join(run)
