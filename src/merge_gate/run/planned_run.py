"""What a run would read, download, and write (`--plan`), from the files' headers and the Hub's lists.

In: a configuration, and the options of a run. Out: text. Nothing is merged, torch is not imported, and the only
downloads are small files that name a base or its weight files.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate.cache.key import Circumstances
from merge_gate.cache.verdict_cache import Cache
from merge_gate.files import resolve
from merge_gate.files.base_watch import BaseWatch
from merge_gate.files.preflight import preflight
from merge_gate.files.prepare import Inputs
from merge_gate.judging import adapter_report
from merge_gate.output_files import OUTPUT_FILES
from merge_gate.publish.publications import one_of_each, unpublished_dtypes
from merge_gate.records.config import AdapterSpec, Config, PublishSpec
from merge_gate.records.files import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME, AdapterFiles, BaseFiles, Entry, Snapshot
from merge_gate.records.options import RunOptions
from merge_gate.records.terms import Access, Quantization, Read
from merge_gate.report.wording import words
from merge_gate.report.wording.columns import wrap
from merge_gate.report.wording.untrusted import inert, one_line
from merge_gate.run.fed_bases import FedBases, headers_limit_s, is_on_network
from merge_gate.run.flow import checked_options, select
from merge_gate.run.view import PLAIN_WIDTH
from merge_gate.shards.partition import part_of
from merge_gate.text import counted, listing
from merge_gate.worker.feed_service import window_bytes
from merge_gate.worker.grouping import group_by_base
from merge_gate.worker.memory import MemoryGroup, batches, factor_bytes, too_large

if TYPE_CHECKING:
    from merge_gate.files.hub import PlannedFetch
    from merge_gate.worker.protocol import Group, Task

_NAME_CHARACTERS = 120
_MOST_NAMES = 8
_LABEL_WIDTH = 10
_LEAST_WIDTH = 40


def plan_run(config: Config, options: RunOptions, notify: Callable[[str], None], *, width: int = PLAIN_WIDTH) -> str:
    """The plan of a run, as lines of text of at most `width` columns.

    Raises:
        UsageError: what `run_gate` refuses.
    """
    specs = select(config, options.only)
    publish = checked_options(config, specs, options)
    specs, _ = part_of(config, specs, options)
    circumstances = Circumstances(allow_pickle=config.allow_pickle, trust_remote_code=config.trust_remote_code)
    cache = Cache(options.cache, circumstances, device=options.device, environ=os.environ, notify=notify)
    with contextlib.closing(cache):
        plan = _Plan(config, options, specs, cache, notify, publish=publish)
        return "".join(f"{inert(line)}\n" for row in plan.lines() for line in _wrapped(row, max(width, _LEAST_WIDTH)))


class PlannedInputs(Inputs):
    """The same as `Inputs`, but what is on the Hub and not in the cache stays there.

    Attributes:
        bases: what would be fetched of each base on the Hub, by the directory that its snapshot names.
        adapters: the same for each adapter, by its name.
    """

    def __init__(self, config: Config, notify: Callable[[str], None], *, access: Access | None) -> None:
        super().__init__(config, notify, access=access, limit_s=headers_limit_s)
        self.bases: dict[str, PlannedFetch] = {}
        self.adapters: dict[str, PlannedFetch] = {}

    def _read_adapter(self, spec: AdapterSpec) -> tuple[AdapterFiles, str | None]:
        if spec.hub_id is None:
            return super()._read_adapter(spec)
        from merge_gate.files import hub  # noqa: PLC0415 - a run without Hub ids does not pay for the import

        directories: list[str] = []

        def choose(names: frozenset[str], path_of: Callable[[str], Path]) -> tuple[str, ...]:
            directories.extend([str(path_of(CONFIG_NAME).parent)] if CONFIG_NAME in names else [])
            weights = WEIGHTS_NAME if WEIGHTS_NAME in names else PICKLE_NAME
            return tuple(name for name in (CONFIG_NAME, weights) if name in names)

        fetch = hub.Repository(repo_id=spec.hub_id, revision=spec.revision, notify=self._notify).plan(choose)
        if not fetch.absent or not directories:
            return super()._read_adapter(spec)
        self.adapters[spec.name] = fetch
        found = preflight(directories[0], allow_pickle=False, withheld=fetch.absent)
        return AdapterFiles(directory=found.directory, config=found.config), fetch.commit

    def _resolve(self, model: str, revision: str | None, access: Access, label: str) -> Snapshot:
        if Path(model).is_absolute():
            return super()._resolve(model, revision, access, label)
        from merge_gate.files import hub  # noqa: PLC0415 - as above

        resolve.refuse_local_name(model)

        def choose(names: frozenset[str], path_of: Callable[[str], Path]) -> tuple[str, ...]:
            return resolve.choose_base(
                names,
                path_of,
                name=label,
                trust_remote_code=self._config.trust_remote_code,
                allow_pickle=self._config.allow_pickle,
            )

        repository = hub.Repository(repo_id=model, revision=revision, notify=self._notify, access=access)
        fetch = repository.plan(choose)
        if not fetch.absent:
            return super()._resolve(model, revision, access, label)
        weights = tuple(name for name in fetch.sizes if name.endswith((".safetensors", ".bin")))
        place = f"{model}@{fetch.commit}"
        self.bases[place] = fetch
        files = BaseFiles(
            directory=place,
            weights=weights,
            weight_bytes=sum(fetch.sizes[name] for name in weights),
            is_streamed=bool(fetch.streamable),
        )
        return Snapshot(name=label, directory=place, revision=fetch.commit, base_files=files)


class _Plan:
    def __init__(
        self,
        config: Config,
        options: RunOptions,
        specs: tuple[AdapterSpec, ...],
        cache: Cache,
        notify: Callable[[str], None],
        *,
        publish: PublishSpec | None,
    ) -> None:
        self._publish = publish
        self._config, self._options, self._specs = config, options, specs
        self._inputs = PlannedInputs(config, notify, access=options.access)
        self._fed = FedBases(BaseWatch(cache.seen_bases), notify, records=cache.base_records)
        self._free_bytes = MemoryGroup().free_bytes()
        self._entries: list[Entry] = []
        self._read_bytes = 0
        self._is_read_again = False

    def lines(self) -> Iterator[str]:
        for spec in self._specs:
            self._entries.extend(self._inputs.entries(spec))
        blocked = {
            index: report
            for index, entry in enumerate(self._entries)
            if (report := adapter_report.blocked_report(entry)) is not None
        }
        to_merge = [(index, entry) for index, entry in enumerate(self._entries) if index not in blocked]
        groups = group_by_base(to_merge)
        by_base = words.by(groups, lambda group: (group.directory, group.base.quantization))  # dtypes share passes
        yield (
            f"plan for {_shown(self._config.label)}: {counted(len(self._specs), 'adapter')}, "
            f"{counted(len(to_merge), 'merge')}, on {counted(len(by_base), 'base')}"
        )
        for same in by_base.values():
            yield ""
            yield from self._lines_of(same)
        yield from ["", "in all", *self._lines_of_bytes(to_merge), *self._lines_of_output(dict(to_merge), groups)]
        if blocked:
            yield ""
            entries = counted(len(blocked), "entry", "entries")
            yield f"{entries} without a merge, because the files alone decide the verdict:"
        for report in blocked.values():
            yield f"  {_shown(report.name)} ({_shown(report.base.dtype)}): {words.title(report)}, {report.cause}"

    def _lines_of(self, groups: list[Group]) -> Iterator[str]:
        group = replace(groups[0], tasks=tuple(task for one in groups for task in one.tasks))
        dtypes = ", ".join(one.base.dtype for one in groups)
        files = group.files or BaseFiles(directory=group.directory)
        base, fetch = group.base, self._inputs.bases.get(group.directory)
        revision = f" at {base.revision[:12]}" if base.revision else ""
        how = dtypes if base.quantization is Quantization.NONE else f"{dtypes}, {base.quantization}"
        yield f"base {_shown(base.name)}{revision} ({_shown(how)})"
        size, count = _shown_bytes(files.weight_bytes), counted(len(files.weights), "file")
        yield _row("weights", f"{size} in {count}, {_place_of(fetch)}")
        if fetch is not None:
            yield _row("access", _access_of(fetch))
        is_large = too_large(base.name, files.weight_bytes, self._free_bytes) is not None
        on_network = fetch is None and is_on_network([Path(group.directory, name) for name in files.weights])
        is_fed = files.is_streamed or is_large or on_network
        passes = sum(1 for _ in batches([(task, None) for task in group.tasks], one_pass=True)) if is_fed else 1
        self._read_bytes += files.weight_bytes * passes
        self._is_read_again |= passes > 1
        yield _row("read", self._read(group, groups, passes if is_fed else None, on_network=on_network))
        yield _row("memory", self._memory(group, is_fed=is_fed))
        names = dict.fromkeys(_shown(self._entries[task.index].spec.name) for task in group.tasks)
        yield _row("adapters", listing(names, _MOST_NAMES))

    def _read(self, group: Group, groups: list[Group], passes: int | None, *, on_network: bool) -> str:
        """How the base is read: in `passes`, or mapped if they are None."""
        asked = {self._options.read or self._entries[task.index].spec.base.read for task in group.tasks}
        read = next((one for one in (Read.WHOLE, Read.TOUCHED) if one in asked), Read.AUTO)
        if self._publish is not None:
            read = Read.WHOLE
        if group.directory in self._inputs.bases:
            what = "what adapters touch" if read is Read.TOUCHED else "whole"
            more = ", or what adapters touch if --cache has its record" if read is Read.AUTO else ""
        else:
            recorded = (passes is not None or read is Read.TOUCHED) and all(
                self._fed.recorded(one, read) for one in groups
            )
            what = "what adapters touch: --cache has its record" if recorded else "whole"
            more = ""
        if passes is None:
            return f"{what}{more}, mapped from its files"
        why = "it is streamed" if group.files is not None and group.files.is_streamed else ""
        why = why or ("it is on a network mount" if on_network else "it is larger than the free memory")
        return f"{what}{more}, in {counted(passes, 'pass', 'passes')} over its files, because {why}"

    def _memory(self, group: Group, *, is_fed: bool) -> str:
        sizes = [self._factor_bytes(task, in_pass=is_fed) for task in group.tasks]
        factors = sum(sizes) if is_fed else max(sizes, default=0)
        of_base = f"{_shown_bytes(window_bytes())} for the base's bytes and " if is_fed else ""
        for_what = "the adapters of a pass" if is_fed else "an adapter"
        free = f"; {_shown_bytes(self._free_bytes)} are free" if self._free_bytes is not None else ""
        return f"{of_base}{_shown_bytes(factors)} for {for_what}, plus torch and the largest layer{free}"

    def _factor_bytes(self, task: Task, *, in_pass: bool) -> int:
        """What an adapter takes once it is loaded. If it was not fetched, only the size of its file is known."""
        spec = self._entries[task.index].spec
        names = spec.combine.adapters if spec.combine is not None else (spec.name,)
        fetches = [self._inputs.adapters[name] for name in names if name in self._inputs.adapters]
        return factor_bytes(task, in_pass=in_pass) + sum(sum(fetch.sizes.values()) for fetch in fetches)

    def _lines_of_bytes(self, to_merge: list[tuple[int, Entry]]) -> Iterator[str]:
        adapters = self._adapter_bytes(to_merge)
        word = "at most " if self._is_read_again else ""  # a later pass reads only the weights that it merges
        yield _row("read", f"{word}{_shown_bytes(self._read_bytes)} of bases, {_shown_bytes(adapters)} of adapters")
        downloads = [(self._download_bytes(fetch), "base") for fetch in self._inputs.bases.values()]
        downloads += [(self._download_bytes(fetch), "adapter") for fetch in self._inputs.adapters.values()]
        if any(size for size, _ in downloads):
            kinds = Counter(kind for size, kind in downloads if size)
            of = " and ".join(counted(kinds[kind], kind) for kind in ("base", "adapter") if kinds[kind])
            yield _row(
                "download", f"{_shown_bytes(sum(size for size, _ in downloads))} to the disk, for {of} on the Hub"
            )

    def _download_bytes(self, fetch: PlannedFetch) -> int:
        """What is written to the Hub's cache: nothing of weights that are streamed."""
        return sum(fetch.sizes[name] for name in fetch.absent if name not in fetch.streamable)

    def _adapter_bytes(self, to_merge: list[tuple[int, Entry]]) -> int:
        """The bytes of adapters, each directory once."""
        files = {member.directory: member.files for _, entry in to_merge for member in entry.members}
        fetched = sum(sum(fetch.sizes.values()) for fetch in self._inputs.adapters.values())
        return fetched + sum(file.size_bytes for several in files.values() for file in several)

    def _lines_of_output(self, to_merge: dict[int, Entry], groups: tuple[Group, ...]) -> Iterator[str]:
        if self._options.output is not None:
            names = listing((one.name for one in OUTPUT_FILES), len(OUTPUT_FILES))
            yield _row("write", f"{_shown(self._options.output)}: {names}")
        if self._options.cache.directory is not None:
            yield _row("cache", f"{_shown(self._options.cache.directory)}: stored verdicts need no merge")
        if self._publish is not None:
            models = one_of_each(to_merge, self._publish.dtype)
            sizes = (len(group.tasks) * (group.files.weight_bytes if group.files else 0) for group in groups)
            size = _shown_bytes(sum(sizes))
            more = f"; {note}" if (note := unpublished_dtypes(to_merge, models)) else ""
            yield _row(
                "publish", f"{_shown(self._publish.label)}: {counted(len(models), 'model')} at most, about {size}{more}"
            )


def _place_of(fetch: PlannedFetch | None) -> str:
    if fetch is None:
        return "on this machine"
    present = len(fetch.sizes) - len(fetch.absent)
    return "on the Hub" if not present else "on the Hub, a part of them in the cache"


def _access_of(fetch: PlannedFetch) -> str:
    if fetch.streamable:
        size = sum(fetch.sizes[name] for name in fetch.streamable)
        return f"stream: {_shown_bytes(size)} by ranges, not written to disk"
    size = sum(fetch.sizes[name] for name in fetch.absent)
    free = fetch.free_bytes
    warning = ", which is not enough" if free is not None and free < size else ""
    rest = f"; the disk has {_shown_bytes(free)} free{warning}" if free is not None else ""
    return f"download: {_shown_bytes(size)} to the Hub's cache{rest}"


def _row(label: str, text: str) -> str:
    return f"{label}\t{text}"


def _wrapped(row: str, width: int) -> Iterator[str]:
    """The lines of a row, with all of its text to the right of its label."""
    label, tab, text = row.partition("\t")
    head = f"  {label:<{_LABEL_WIDTH}}" if tab else " " * (len(row) - len(row.lstrip()))
    indent = head if tab else f"{head}  "
    first, *rest = wrap(text if tab else row, width - len(indent))
    yield head + first
    yield from (f"{'':<{len(indent)}}{line}" for line in rest)


def _shown(text: str) -> str:
    return one_line(text, _NAME_CHARACTERS)


def _shown_bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB" if count >= 1000 else counted(count, "byte")  # noqa: PLR2004
