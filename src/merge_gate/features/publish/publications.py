"""Publishes the models of one run, one for each adapter, from the plan of the run to the directories.

In: the entries of a run, and what the worker says about them. Out: directories of models, or why there is none.

1. `choose` decides which entries are published, and checks directory and disk before the first merge.
2. `planned` makes the files of a model, and passes them to the worker open. `written` gets the checksums.
3. `complete` copies the rest and reads everything back, when the last worker has ended.
4. `publish` gives a model its name. The caller knows by then that the base has not changed.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from merge_gate._internal.errors import GateError, NotPublishedError, UsageError
from merge_gate._internal.output_files import PUBLISH_WITHIN
from merge_gate._internal.text import has_hidden, listing, quoted
from merge_gate.features.publish.calls import PublicationService, PublicationWritten
from merge_gate.features.publish.companions import companion_identities
from merge_gate.features.publish.manifest import PublicationFacts
from merge_gate.features.publish.one_publication import Publication, publishing
from merge_gate.features.publish.partial import PartialDirectory, partial_name, remove_leftovers, unchanged, waiting
from merge_gate.features.publish.weight_files import FLOATING, ModelLayout, base_layout
from merge_gate.files.base_watch import base_directory
from merge_gate.records.config import A_FILE, AdapterSpec, PublishSpec
from merge_gate.records.files import MANIFEST_NAME, Entry, FileIdentity, StoredTensor
from merge_gate.records.measured import Evidence
from merge_gate.records.report import PublishedModel
from merge_gate.records.terms import PRESERVE, Finding
from merge_gate.report.stored.output_directory import explained, made_directory
from merge_gate.worker.protocol import ConsumerSpec, Job

_NONE_FITS = 10
"""More than there are dtypes."""

MODELS_AT_A_TIME = 4
"""So many are copied and read back at a time, when the worker has ended and its cores are free."""

_CHOSEN_BY = " with --publish"
_MOST_NAME_BYTES = 255
_MIB, _GIB = 1 << 20, 1 << 30


def model_name(adapter: str, dtype: str) -> str:
    """The directory of an adapter's model."""
    return adapter if dtype == PRESERVE else f"{adapter}-{dtype}"


class Publications:
    """`close` removes every model that has no name yet. For a plan, nothing is created or removed.

    Attributes:
        spec: where models are published; None publishes none.
    """

    def __init__(
        self,
        wanted: PublishSpec | None,
        specs: Iterable[AdapterSpec],
        *,
        inputs: Iterable[tuple[str, str]] = (),
        within: str | None = None,
        notify: Callable[[str], None] = lambda _: None,
        is_plan: bool = False,
    ) -> None:
        self.spec, specs, self._notify, self._is_plan = wanted, tuple(specs), notify, is_plan
        self._parent, self._made = Path(), contextlib.ExitStack()
        if wanted is not None:
            _refuse_inputs(Path(wanted.directory).resolve(), inputs)
            names = [model_name(spec.name, wanted.dtype) for spec in specs]
            self._parent = _prepared(wanted.directory, names, within, self._made, is_plan=is_plan)
        self._specs = tuple(spec.name for spec in specs)
        self._chosen: dict[int, Entry] = {}
        self._models: dict[int, Publication] = {}
        self._refused: dict[int, NotPublishedError] = {}
        self._bases: dict[str, ModelLayout] = {}
        self._seen: dict[str, dict[str, FileIdentity]] = {}
        self._lock = threading.Lock()  # threads of the service plan models, and this one discards them

    def close(self) -> None:
        for index in self._models:
            self.discard(index)
        self._made.close()

    # --- 1 ---------------------------------------------------------------------------------------------------------

    def choose(self, entries: Mapping[int, Entry]) -> dict[int, ConsumerSpec]:
        """Decide which of the entries to merge are published, and how.

        An adapter has one model. If it is merged in several dtypes, the one that is published is the named one, or the
        one that the base is stored in.

        Raises:
            UsageError: the directory of a model is inside a base, or would replace an input; or none of the dtypes that
                an adapter is merged in can be published.
            GateError: the disk is too small.
        """
        if self.spec is None:
            return {}
        self._chosen = one_of_each(entries, self.spec.dtype)
        for index, entry in () if self._is_plan else self._chosen.items():
            self._add(index, entry, self.spec)
        _refuse_inputs(self._parent, _inputs(entries.values()), {model.directory for model in self._models.values()})
        if self._is_plan:
            return dict.fromkeys(self._chosen, publishing(self.spec.dtype))
        refuse_small_disk(
            self._parent,
            sum(model.expected.size_bytes for model in self._models.values()),
            "the models to publish",
            "free some space, choose another disk with --publish, or publish fewer adapters with --only",
        )
        return {index: model.publishing for index, model in self._models.items()}

    def _add(self, index: int, entry: Entry, wanted: PublishSpec) -> None:
        directory = base_directory(entry)
        try:
            if directory not in self._bases:
                self._bases[directory] = base_layout(directory)
            for seen in (directory, *(member.directory for member in entry.members)):
                self._seen.setdefault(seen, companion_identities(seen))
            target = self._parent / model_name(entry.spec.name, wanted.dtype)
            is_streamed = entry.base_files is not None and entry.base_files.is_streamed
            layout = self._bases[directory]
            self._models[index] = Publication(target, wanted, layout, directory, is_streamed=is_streamed)
        except NotPublishedError as error:
            self._refused[index] = error

    # --- 2: the worker ---------------------------------------------------------------------------------------------

    def service(self, job: Job) -> PublicationService | None:
        """What answers a process with this job; None if it publishes nothing."""
        tasks = [task.index for group in job.groups for task in group.tasks if task.model_files]
        return PublicationService(self, tasks) if tasks else None

    def planned(self, task: int, tensors: tuple[StoredTensor, ...]) -> tuple[int, ...]:
        """A merge begins, perhaps again. Returns the new files of its model, open; the caller closes them."""
        if self._models[task].is_accepted:
            raise NotPublishedError("the merge was judged before")
        self._refused.pop(task, None)
        with self._lock, self._one(task) as model:
            return model.plan(tensors)

    def written(self, message: PublicationWritten) -> None:
        """The worker has written all tensors of a task."""
        if not self._models[message.task].is_accepted:
            with self._lock, self._one(message.task) as model:
                model.written(message)

    def ended(self) -> None:
        """A worker process has ended. What it wrote of tasks without a verdict is of no use."""
        for index, model in self._models.items():
            if not model.is_accepted:
                self.discard(index)

    @contextlib.contextmanager
    def _one(self, index: int) -> Iterator[Publication]:
        """Whatever goes wrong in the block costs this model, and not the run: the first error counts."""
        model = self._models[index]
        try:
            yield model
        except Exception as error:
            model.discard()
            raise self._refused.setdefault(index, _explained(error, model.directory)) from error

    # --- 3 and 4: the verdict --------------------------------------------------------------------------------------

    def passed(self, index: int, evidence: Evidence) -> None:  # noqa: ARG002 - a subclass keeps it
        """The adapter passed: what the worker plans or writes from now on does not count."""
        if index in self._models:
            self._models[index].is_accepted = True

    def discard(self, index: int) -> None:
        """The adapter did not pass."""
        if index in self._models:
            with self._lock:
                self._models[index].discard()

    def complete(self) -> None:
        """Complete the models of the adapters that passed. No worker may be alive."""
        passed = [index for index, one in self._models.items() if one.is_accepted and index not in self._refused]
        with ThreadPoolExecutor(MODELS_AT_A_TIME) as pool:
            try:
                for _ in pool.map(self._complete, passed):
                    pass
            finally:  # a signal ends the run
                for index in passed:
                    self._models[index].stop()

    def _complete(self, index: int) -> None:
        with contextlib.suppress(NotPublishedError), self._one(index) as model:
            model.complete()

    @property
    def wanted(self) -> tuple[int, ...]:
        """The entries that are to be published, in their order."""
        return tuple(sorted(self._chosen))

    def publish(
        self, index: int, facts_of: Callable[[Publication], PublicationFacts]
    ) -> tuple[PublishedModel, tuple[Finding, ...]]:
        """Give a model its name. The findings are what there is to say about its files."""
        assert self.spec is not None  # noqa: S101 - there is an entry to publish
        if index in self._refused:
            raise self._refused[index]
        with self._one(index) as model:
            earlier = replaceable(model.directory, self._notify)
            files, findings = model.publish(facts_of(model), self._seen, replaces=earlier)
        directory = str(Path(self.spec.label, model.directory.name))
        return PublishedModel(directory=directory, dtype=self.spec.dtype, files=files), findings

    def earlier(self, published: Collection[str]) -> Iterator[tuple[str, str]]:
        """The adapters without a new model that have one of an earlier run, and its directory as it was named.

        `published` are the adapters with a new one.
        """
        if self.spec is not None:
            for adapter in self._specs:
                name = model_name(adapter, self.spec.dtype)
                if adapter not in published and unchanged(self._parent / name, weights=False):
                    yield adapter, str(Path(self.spec.label, name))


def _explained(error: Exception, target: Path) -> NotPublishedError:
    if isinstance(error, GateError):
        return NotPublishedError(error.message, hint=error.hint)
    if isinstance(error, OSError):
        return NotPublishedError(
            f"the model cannot be written to {quoted(str(target), 200)}: {error.strerror or error}",
            hint="free some space there, or publish to another disk",
        )
    return NotPublishedError(
        f"the model could not be written: unexpected {type(error).__name__}: {str(error)[:200]}",
        hint="this is a bug of merge-gate: please report it",
    )


def one_of_each(entries: Mapping[int, Entry], wanted: str) -> dict[int, Entry]:
    """The entries that are published with the dtype `wanted`: the one of each adapter that fits it best.

    Raises:
        UsageError: it is merged in no dtype that can be published. What `auto` loads is known only later.
    """
    chosen: dict[str, tuple[int, int, Entry]] = {}
    for index, entry in entries.items():
        fitting = ("auto", *_stored_dtypes(entry)) if wanted == PRESERVE else (wanted, "auto")
        rank = fitting.index(entry.dtype) if entry.dtype in fitting else _NONE_FITS
        if entry.spec.name not in chosen or rank < chosen[entry.spec.name][0]:
            chosen[entry.spec.name] = rank, index, entry
    for rank, _, entry in chosen.values():
        stored = _stored_dtypes(entry)
        if rank == _NONE_FITS and entry.dtype != "auto" and stored:
            expected, why = (
                (stored[0], f"`preserve` writes each tensor as its base stores it, in {stored[0]}")
                if wanted == PRESERVE
                else (wanted, f"publish.dtype is {wanted}")
            )
            raise UsageError(
                f"the merge of {quoted(entry.spec.name, 200)} in {entry.dtype} cannot be published: {why}",
                hint=f"add {expected} to --dtype (base.dtype), or set publish.dtype to {entry.dtype} in {A_FILE}",
            )
    return {index: entry for _, index, entry in chosen.values()}


def unpublished_dtypes(entries: Mapping[int, Entry], published: Collection[int]) -> str:
    """A note on the dtypes that adapters are only checked in; empty if there are none."""
    checked, shown = (
        listing(dict.fromkeys(entry.dtype for index, entry in entries.items() if (index in published) is is_published))
        for is_published in (False, True)
    )
    return f"the merge in {shown} is published, and the one in {checked} is only checked" if checked else ""


def _stored_dtypes(entry: Entry) -> tuple[str, ...]:
    """The dtypes of the floating tensors in the base's files, the most frequent one first."""
    names = {stored: name for name, stored in FLOATING.items()}
    tensors = entry.base_files.tensors if entry.base_files is not None else ()
    counts = Counter(names[tensor.dtype] for tensor in tensors if tensor.dtype in names)
    return tuple(name for name, _ in counts.most_common())


def _inputs(entries: Iterable[Entry]) -> Iterable[tuple[str, str]]:
    for entry in entries:
        yield base_directory(entry), f"the base {quoted(base_directory(entry), 200)}"
        for member in entry.members:
            yield member.directory, f"the adapter {quoted(entry.spec.name, 200)}"


# --- the directory, before anything is merged ------------------------------------------------------------------------


def _prepared(
    directory: str, names: Collection[str], within: str | None, made: contextlib.ExitStack, *, is_plan: bool
) -> Path:
    """Create the directory, and remove what killed runs left in it. With `within`, it must be in that directory.

    If it is empty in the end, `made` removes it. For a plan, nothing is created or removed.

    Raises:
        UsageError: the directory cannot be used, or one of the names cannot be a directory in it.
        GateError: the disk is full.
    """
    target = _without_link(directory)
    if within and not target.is_relative_to(Path(within).resolve()):
        raise UsageError(
            f"cannot publish to {quoted(directory, 200)}: it is outside of {quoted(within, 200)} ({PUBLISH_WITHIN})",
            hint=f"choose a directory inside of it{_CHOSEN_BY}",
        )
    for name in names:
        _refuse_name(name)
    if is_plan:
        return target
    with explained(f"cannot publish to {quoted(directory, 200)}", chosen_by=_CHOSEN_BY):
        made.enter_context(made_directory(target, lambda folder: folder.mkdir(parents=True, exist_ok=True)))
        if not os.access(target, os.W_OK | os.X_OK):
            raise UsageError(
                f"cannot publish to {quoted(directory, 200)}: it is not writable",
                hint=f"choose a directory that you may write to{_CHOSEN_BY}",
            )
        remove_leftovers(target)
        for name in names:
            _refuse_existing(target, name)
    return target


def _without_link(directory: str) -> Path:
    """The directory, resolved. It may not be a link, and nothing between it and the current directory may be one."""
    place, here = Path(directory).absolute(), Path.cwd()
    for part in (place, *place.parents):
        if part.is_symlink() and (part == place or part.is_relative_to(here)):
            raise UsageError(
                f"cannot publish to {quoted(directory, 200)}: {quoted(str(part), 200)} is a symbolic link, expected a "
                "directory",
                hint=f"remove the link, or name the directory that it points to{_CHOSEN_BY}",
            )
    return place.resolve()


def _refuse_inputs(target: Path, inputs: Iterable[tuple[str, str]], models: Collection[Path] = ()) -> None:
    """Refuse to publish inside of an input, or to put a model in the place of one, or of a directory that holds one.

    `inputs` pairs directories and what they belong to.
    """
    for directory, owner in inputs:
        if not os.path.isdir(directory):  # noqa: PTH112 - a name with a zero byte is no directory
            continue
        own = Path(directory).resolve()
        weights = {path.resolve().parent for path in own.glob("*.safetensors")}  # a snapshot has links to its files
        if not {target, *target.parents}.isdisjoint({own, *weights}):
            raise UsageError(
                f"the directory to publish to, {quoted(str(target), 200)}, is inside {owner}",
                hint=f"choose a directory elsewhere{_CHOSEN_BY}",
            )
        for place in {own, *own.parents}.intersection(models):
            raise UsageError(
                f"{owner} is in {quoted(str(place), 200)}, and this run would publish a model there",
                hint=f"choose another directory{_CHOSEN_BY}",
            )


def refuse_small_disk(target: Path, needed_bytes: int, what: str, hint: str) -> None:
    """Refuse a disk that cannot hold so many bytes, by a `GateError`. `what` needs them."""
    with explained(f"cannot write to {quoted(str(target), 200)}", hint=hint):
        disk = os.statvfs(target)
    free_bytes = disk.f_bavail * disk.f_frsize
    if free_bytes < needed_bytes:
        raise GateError(
            f"{what} need {_size(needed_bytes)} in {quoted(str(target), 200)}, and {_size(free_bytes)} are free",
            hint=hint,
        )


def _size(count: int) -> str:
    return f"{count / _GIB:,.1f} GiB" if count >= _GIB else f"{count / _MIB:,.1f} MiB"


def _refuse_name(name: str) -> None:
    bad = "/" in name or has_hidden(name) or name.startswith(".") or name != name.strip()
    if bad or len(os.fsencode(partial_name(name))) > _MOST_NAME_BYTES:
        raise UsageError(
            f"a model cannot be published as {quoted(name, 200)}, which is not a valid directory name",
            hint='give the adapter a "name" of at most 200 bytes, without / and without a dot at its start',
        )


def _refuse_existing(target: Path, name: str) -> None:
    place = target / name
    if os.path.lexists(place) and not unchanged(place, weights=False):
        raise _changed(UsageError, place)
    if os.path.lexists(target / partial_name(name)):
        try:
            PartialDirectory(place).remove()
        except NotPublishedError as error:
            raise UsageError(error.message, hint=error.hint) from error


def replaceable(place: Path, notify: Callable[[str], None]) -> tuple[FileIdentity, ...] | None:
    """The identity of the earlier model in a directory; None if there is none. Every byte must be as published."""
    if not os.path.lexists(place):
        return None
    notify(f"{place} is compared with its {MANIFEST_NAME} before it is replaced")
    if (identity := unchanged(place)) is None:
        raise _changed(NotPublishedError, place)
    return identity


def _changed(kind: type[GateError], place: Path) -> GateError:
    return kind(
        f"{quoted(str(place), 200)} exists, and is not an unchanged directory that merge-gate published",
        hint=f"move it away, or choose another directory{_CHOSEN_BY}; `merge-gate verify` names the files that differ"
        + waiting(place.with_name(partial_name(place.name))),
    )
