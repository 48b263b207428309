"""Collects a run's results, builds a `Report` from them at any time, and writes it while the run continues.

In: entries, their verdicts as they are reached, bases as they are loaded, and the device. Out: counts, a `Report`, and
its files, at a bounded share of the run's time. So a killed run leaves a true report.

A base is listed once for each class that it was loaded as, because one without a head has fewer parameters. Its
position is that of the first entry merged into it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import platform
import re
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from merge_gate import __version__
from merge_gate._internal.errors import GateError
from merge_gate.judging.baseline import accept, digests_of
from merge_gate.records.report import TOOL, AdapterReport, BaseReport, ConfigFile, Environment, Report, Sandbox, Tool
from merge_gate.records.terms import BaseKey, Result
from merge_gate.report.formats.json_report import RenderedAdapters
from merge_gate.report.stored.report_files import FORMATS, write_report
from merge_gate.report.wording.explanations import linked
from merge_gate.run.verdict_key import libraries

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from merge_gate.files.base_watch import BaseWatch
    from merge_gate.records.config import Config
    from merge_gate.records.files import Entry
    from merge_gate.run.view import View


_Use = tuple[int, str]


def in_order(uses: Iterable[tuple[BaseReport, _Use]]) -> dict[BaseReport, _Use]:
    """The bases, each with the position and the name of the first entry that was merged into it.

    A base comes before another if its first use does. The classes that one base was loaded as stay together.
    """
    first: dict[BaseReport, _Use] = {}
    for base, use in uses:
        first[base] = min(use, first.get(base, use))
    first_of_key: dict[BaseKey, _Use] = {}
    for base, use in first.items():
        first_of_key[base.key] = min(use, first_of_key.get(base.key, use))
    return dict(sorted(first.items(), key=lambda item: (first_of_key[item[0].key], item[1])))


class Tally:
    """The results of one run. The digests of its bases come from `watch`, as soon as they are known.

    Attributes:
        entries: what is merged.
        reports: the report of each entry that has one, by its position in `entries`.
        environment: where the run merges.
    """

    def __init__(self, config: Config, *, device: str, watch: BaseWatch) -> None:
        self._config, self._watch = config, watch
        self._today = dt.datetime.now(dt.UTC).date()
        self._config_file = config_file(config, os.environ)
        self.environment = environment_of(device)
        self.reports: dict[int, AdapterReport] = {}
        self._bases: dict[tuple[str, BaseReport], tuple[int, str]] = {}
        self.entries: list[Entry] = []

    def merged_on(self, device: str, name: str, sandbox: Sandbox | None = None) -> None:
        """Set the device of the report, and with a worker its sandbox."""
        self.environment = replace(
            self.environment, device=device, device_name=name, sandbox=sandbox or self.environment.sandbox
        )

    def set_report(self, index: int, report: AdapterReport) -> None:
        """Set or replace the report of an entry."""
        self.reports[index] = linked(report)

    def use(self, directory: str, base: BaseReport, index: int) -> None:
        """List a base, which this entry is merged into."""
        base = linked(base)
        use = (index, self.entries[index].spec.name if self.entries else "")
        self._bases[directory, base] = min(use, self._bases.get((directory, base), use))

    def forget(self, bases: Collection[BaseKey]) -> None:
        """List these bases no more."""
        self._bases = {place: use for place, use in self._bases.items() if place[1].key not in bases}

    def _with_digests(self, directory: str, base: BaseReport) -> BaseReport:
        return replace(base, sha256=self._watch.digest(directory), files=self._watch.files(directory))

    def _in_order(self) -> dict[BaseReport, _Use]:
        return in_order((self._with_digests(directory, base), use) for (directory, base), use in self._bases.items())

    def first_entries(self) -> tuple[int, ...]:
        """The position of the first entry that was merged into each base of the report, in their order."""
        return tuple(index for index, _ in self._in_order().values())

    def report(self, *, complete: bool = False) -> Report:
        """The report so far; `complete` at the end of the run."""
        bases = self._in_order()
        adapters = tuple(self.reports[index] for index in sorted(self.reports))
        adapters, baseline = accept(adapters, self._config.baseline, self._today, digests_of(bases))
        return Report(
            complete=complete,
            tool=Tool(name=TOOL, version=__version__),
            environment=self.environment,
            config=self._config_file,
            bases=tuple(replace(base, first_adapter=name) for base, (_, name) in bases.items()),
            adapters=adapters,
            baseline=baseline,
        )


COMMIT_VARIABLES = ("MERGE_GATE_COMMIT", "GITHUB_SHA", "CI_COMMIT_SHA", "GIT_COMMIT", "BUILD_SOURCEVERSION")
"""Variables that name the commit: the action's, GitHub's (and Gitea's), GitLab's, Jenkins', and Azure's."""
_COMMIT = re.compile(r"[0-9a-fA-F]{7,64}")


def config_file(config: Config, environ: Mapping[str, str]) -> ConfigFile:
    """The configuration of a run that starts now."""
    commits = (environ.get(name, "") for name in COMMIT_VARIABLES)
    return ConfigFile(
        path=config.label,
        sha256=config.sha256,
        read_at=dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=next((commit for commit in commits if _COMMIT.fullmatch(commit)), None),
        policy=config.policy,
    )


def environment_of(device: str) -> Environment:
    versions = libraries()
    return Environment(
        python=platform.python_version(),
        torch=versions["torch"],
        peft=versions["peft"],
        transformers=versions["transformers"],
        bitsandbytes=versions["bitsandbytes"],
        device=device,
    )


# --- files -----------------------------------------------------------------------------------------------------------

PROVISIONAL_FORMATS = ("report.json",)
"""The formats that are written while a run continues. The other formats exist from its start and say that the run is
not complete. They are written again when the run first waits. They contain the cached verdicts by then, so the last
report takes less time."""

PAUSE_RATIO = 4.0
"""After a provisional report, the next one waits this many times as long as it took. With a thousand adapters, a report
after each would take longer than the merges."""

SENT_EVERY_S = 10.0
"""The pause of a run that sends its reports: another machine receives those of many runs."""


class ReportWriter:
    """Writes to one directory. If it is None, the view gets the reports, if it wants them (`View.report_made`).

    Only the first and the last report must reach it. A failure in between is reported once, and the next report tries
    again. Each report reuses the texts of adapters that the last report had.
    """

    def __init__(self, directory: str | None, view: View, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory, self._view, self._send, self._clock = directory, view, view.report_made, clock
        self._rendered = RenderedAdapters()
        self._has_notified = self._is_finished = self._pending = False
        self._has_waited = False
        self._next_write_s = 0.0

    def write_first(self, report: Report) -> None:
        """Write every format, before anything is judged.

        Raises:
            UsageError: the directory cannot be used.
        """
        self._write(report, FORMATS)

    @contextlib.contextmanager
    def guarding(self, current: Callable[[], Report]) -> Iterator[None]:
        """Write the first report; and if something ends the run in this block, one that says what was judged."""
        self.write_first(current())
        try:
            yield
        except BaseException:
            if not self._is_finished:
                with contextlib.suppress(GateError):
                    self._write(current(), FORMATS)
            raise

    def finish(self, report: Report) -> Report:
        """Write every format at the end, and show the result.

        Raises:
            GateError: the directory can no longer be used. It could at the start, so this is not a usage error.
        """
        try:
            self._write(report, FORMATS)
        except GateError as error:
            self._view.finish(report, "")  # the terminal is all that is left
            raise GateError(f"the report is lost: {error.message}", hint=error.hint) from error
        self._is_finished = True
        if not self._view.more_follows or report.result is not Result.PASS:
            self._view.finish(report, self._directory or "")
        return report

    def changed(self) -> None:
        """Note that the report on disk is out of date."""
        self._pending = self._directory is not None or self._send is not None

    def catch_up(self, current: Callable[[], Report], *, at_once: bool = False) -> None:
        """Write a provisional report if something changed, unless the last one was a moment ago.

        Args:
            current: makes the report.
            at_once: write it without a pause, because the run waits anyway.
        """
        began_s = self._clock()
        if not self._pending or (began_s < self._next_write_s and not at_once):
            return
        formats = FORMATS if at_once and not self._has_waited else PROVISIONAL_FORMATS
        self._has_waited |= at_once
        try:
            self._write(current(), formats)
        except GateError as error:
            self._notify_once(error)
        ended_s = self._clock()
        pause_s = PAUSE_RATIO * (ended_s - began_s) if self._directory is not None else SENT_EVERY_S
        self._next_write_s = ended_s + pause_s

    def _write(self, report: Report, formats: Collection[str]) -> None:
        if self._directory is not None:
            write_report(report, self._directory, formats=formats, rendered=self._rendered)
        elif self._send is not None:
            self._send(report)
        self._pending = False

    def _notify_once(self, error: GateError) -> None:
        if not self._has_notified:
            self._view.note(f"{error.message}; the run continues and writes the report again later")
        self._has_notified = True
