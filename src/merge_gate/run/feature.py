"""The interface of a feature in the parent process: the places of a run at which it acts.

In: a `Run`. Out: the features that its configuration and its options ask for. They are reached only through the table
of features, so that a run imports no code of a feature that it does not use.

A module `feature` of the table has `join(run)`, which makes a `Feature`, or refuses the run by a `UsageError`. It may
change what the run has by then: its configuration and its adapters, for example to those of a shard. The module
`declared` has `is_requested(config, options)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from merge_gate.records.features import FEATURES, part

if TYPE_CHECKING:
    from merge_gate.files.resolve import Fetching
    from merge_gate.records.files import Entry
    from merge_gate.records.measured import Evidence
    from merge_gate.records.refusals import NotJudged
    from merge_gate.records.report import AdapterReport, BaseReport, Report
    from merge_gate.run.flow import Run
    from merge_gate.run.verdict_key import Json
    from merge_gate.worker.call_service import Service
    from merge_gate.worker.protocol import Event, Group, Job


class Feature:
    """What one feature does in one run. The methods have the order in which a run calls them, and do nothing here."""

    hashes_again = False
    """Whether digests of bases that earlier runs computed do not count."""

    def run_elsewhere(self) -> Report | None:
        """Run the entries on other machines. None if they are run here."""
        return None

    @property
    def may_decide_all(self) -> bool:
        """Whether `choose` may leave nothing to merge. The worker then starts only when it is known what is left."""
        return False

    def fetch(self, how: Fetching) -> Fetching:
        """Change how files are fetched from the Hub."""
        return how

    def choose(self, entries: dict[int, Entry]) -> None:
        """Report entries before the merge, or refuse the run. Removes those from `entries` that need no merge."""

    def needs_merge(self, index: int) -> bool:  # noqa: ARG002
        """Whether the feature needs the merged tensors of an entry, whatever is known of its verdict."""
        return False

    def schedule(self, groups: Sequence[Group]) -> Iterable[Group]:
        """Add to the groups what the worker has to know."""
        return groups

    def plan(self) -> Iterable[tuple[str, str]]:
        """What the run would write for the feature, in lines for `--plan`: labels and texts."""
        return ()

    def service(self, job: Job) -> Service | None:  # noqa: ARG002
        """What answers the calls of a worker process with this job."""
        return None

    def received(self, event: Event) -> None:
        """The worker sent an event, which the run has not handled yet."""

    def refusal(self, index: int, evidence: Evidence) -> NotJudged | None:  # noqa: ARG002
        """Why the evidence of an entry does not count. None if it does."""
        return None

    def judged(self, index: int, report: AdapterReport, evidence: Evidence | None) -> None:
        """An entry has its report. `evidence` is None if it could not be judged."""

    def decided(self, report: AdapterReport, base: BaseReport, material: Json) -> None:
        """A verdict has its key: `material` is everything that it depends on, and `base` is what it was judged on."""

    def complete(self) -> None:
        """The worker has ended. Verdicts may yet be withdrawn, if a base has changed."""

    def finish(self) -> None:
        """All verdicts are final. A further finding may change a report."""

    def add_to(self, report: Report) -> Report:
        """Add to a report, which may be provisional."""
        return report

    def close(self) -> None:
        """Release what the feature holds. The run may have failed, or may only have been planned."""


def requested(run: Run) -> Iterator[tuple[str, Feature]]:
    """The features that a run asks for, by name, in the order of the table.

    Raises:
        UsageError: a feature cannot do what the run asks for.
    """
    for name, modules in FEATURES.items():
        if "feature" in modules and part(name, "declared").is_requested(run.config, run.options):
            yield name, part(name, "feature").join(run)
