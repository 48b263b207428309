"""Makes a published model again, from its merge-gate.json, and compares every byte with it.

In: a merge-gate.json of unknown origin, and a directory. Out: the model in that directory, or what differs. No code of
the base runs, whatever the file says.

1. Make the configuration that the file describes.              _config
2. Compare every file of base and adapters with it.             publish/one_publication.py
3. Merge and publish into a directory of its own.               run/flow.py
4. Compare every fact in the file with this run's, and write the card and the file, which follow from them.
5. Compare every file. Only then the model gets its name.       publish/manifest.py
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate._internal.errors import GateError, UsageError
from merge_gate._internal.regular_file import read_regular_file
from merge_gate._internal.text import listing, quoted
from merge_gate.config.paths import resolve_argument
from merge_gate.files.resolve import Fetching, Inputs
from merge_gate.publish.manifest import (
    MANIFEST_NAME,
    MOST_BYTES,
    differences,
    model_card,
    parse_manifest,
    read_manifest,
    settings_of,
)
from merge_gate.publish.one_publication import inputs_of
from merge_gate.publish.publications import model_name
from merge_gate.records.config import AdapterSpec, BaseSpec, Config, PublishSpec
from merge_gate.records.options import RunOptions
from merge_gate.records.publication import CARD_NAME
from merge_gate.records.terms import Verdict
from merge_gate.report.formats.fields import dump_record
from merge_gate.report.stored.output_directory import explained, made_directory
from merge_gate.report.wording.untrusted import one_line
from merge_gate.run.flow import run_gate
from merge_gate.run.streams import say, tell
from merge_gate.verify.exchanged import is_adapter, is_model
from merge_gate.worker.private_directory import private_directory

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from merge_gate.records.files import FileRecord
    from merge_gate.records.publication import Manifest
    from merge_gate.records.report import Report
    from merge_gate.run.view import View

_SCRATCH = ".merge-gate-rebuild-"
_LISTED = 20
_OTHER_MODEL = "the model has other bytes or facts than merge-gate.json describes; it was not kept"
_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?", re.ASCII)


def rebuild(
    file: str,
    output: str,
    view: View,
    *,
    base: str | None = None,
    adapters: Sequence[str] = (),
    allow_pickle: bool = False,
) -> bool:
    """Make the model again that a merge-gate.json describes, as a folder of `output`, and say how that ended.

    The result is whether the model is there. If it is not, every file and fact that differs was named.

    Args:
        file: the merge-gate.json, or its directory.
        output: the directory of the model's folder.
        view: shows the progress.
        base: the base's place here; None for the name in merge-gate.json.
        adapters: the places of the adapters here, in the order of merge-gate.json; empty for the names there.
        allow_pickle: whether pickled weights may be read.

    Raises:
        UsageError: the file cannot be used, a name stands for no directory or Hub id, or the model's folder exists.
        GateError: the merge was not judged, or did not pass.
    """
    place = Path(file, MANIFEST_NAME) if Path(file).is_dir() else Path(file)
    with explained(f"cannot read {one_line(str(place))}", "name a published model, or its merge-gate.json"):
        data = read_regular_file(place, MOST_BYTES)
    manifest = parse_manifest(data, str(place))
    target = Path(output, model_name(manifest.name, manifest.dtype)).absolute()
    if target.parent != Path(output).absolute():
        raise UsageError(f"{one_line(str(place))} has the name {quoted(manifest.name)}, expected the name of a folder")
    if os.path.lexists(target):
        raise UsageError(f"{target} is there already", hint="remove it, or choose another directory with --output")
    _refuse_inside(target.parent.resolve())
    # 1. and 2.
    config = replace(_config(manifest, base, adapters), allow_pickle=allow_pickle)
    if other := [*_other_inputs(manifest, config, view)]:
        return _say_differences(other, "the model was made of other files than these; nothing was merged")
    with _scratch(target.parent) as folder:
        # 3.
        wanted = PublishSpec(
            directory=str(folder), label=str(folder), dtype=manifest.dtype, max_shard_bytes=manifest.max_shard_bytes
        )
        device = manifest.versions.device if _DEVICE.fullmatch(manifest.versions.device) else "auto"
        run_options = RunOptions(device=device, only=(manifest.name,))
        report = run_gate(replace(config, publish=wanted), run_options, view=view)
        model = folder / target.name
        if not model.is_dir():
            raise _not_published(report)
        # 4. and 5.
        problems = list(_other_facts(manifest, read_manifest(model)))
        with explained(f"cannot write {target}"):
            (model / CARD_NAME).write_bytes(model_card(manifest))
            (model / MANIFEST_NAME).write_bytes(data)
            problems += [f"{one_line(name, 200)}: {how}" for name, how in differences(model, manifest).items()]
            if problems:
                return _say_differences(problems, _OTHER_MODEL)
            model.rename(target)
    changed = f"; judged with changed checks: {one_line(listing(manifest.checks), 400)}" if manifest.checks else ""
    tell(f"{one_line(str(target))} has the bytes and the facts of merge-gate.json{changed}")
    tell(
        "Not compared: its config, revisions of what is a directory here, and allow_pickle and trust_remote_code where "
        "they are off here"
    )
    return True


def _say_differences(problems: Sequence[str], conclusion: str) -> bool:
    more = [f"{len(problems) - _LISTED:,} more differences"] if len(problems) > _LISTED else []
    for sentence in (*problems[:_LISTED], *more, conclusion):
        say(f"merge-gate: {sentence}")
    return False


def _refuse_inside(folder: Path) -> None:
    """Refuse to write into a model or an adapter, which would have one more file."""
    for place in (folder, *folder.parents):
        if os.path.lexists(place / MANIFEST_NAME) or is_model(str(place)) or is_adapter(str(place)):
            raise UsageError(
                f"{folder} is in a model or an adapter: {place}", hint="choose another directory with --output"
            )


@contextlib.contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A directory of this run in `parent`, removed at its end. Those of killed runs are removed as well."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(made_directory(parent))
        with explained(f"cannot use the directory {parent}"):
            folder = stack.enter_context(private_directory(parent, _SCRATCH))
        yield Path(folder)


# --- 1. --------------------------------------------------------------------------------------------------------------


def _config(manifest: Manifest, base: str | None, adapters: Sequence[str]) -> Config:
    if adapters and len(adapters) != len(manifest.adapters):
        raise UsageError(
            f"--adapter is given {len(adapters)} times, and the model has {len(manifest.adapters)} adapters",
            hint="give it once for each adapter, in the order of merge-gate.json",
        )
    here = adapters or [adapter.source for adapter in manifest.adapters]
    settings: dict[str, Any] = {"checks": settings_of(manifest), "forward": manifest.forward}
    spec = partial(AdapterSpec, base=_base(manifest, base), **settings, line=1, column=1)
    specs = []
    for adapter, name in zip(manifest.adapters, here, strict=True):
        path, hub_id = _resolved(name, None if adapters else adapter.revision, is_base=False)
        revision = None if path else adapter.revision
        specs.append(spec(name=adapter.name, source=adapter.source, path=path, hub_id=hub_id, revision=revision))
    if manifest.combination is not None:
        names = tuple(adapter.name for adapter in manifest.adapters)
        combine = replace(manifest.combination, adapters=names)
        specs.append(spec(name=manifest.name, source=manifest.name, combine=combine))
    return Config(
        path=manifest.config.path,
        directory=str(Path.cwd()),
        sha256=manifest.config.sha256,
        adapters=tuple(specs),
    )


def _base(manifest: Manifest, named: str | None) -> BaseSpec:
    written = named or manifest.base.model
    path, hub_id = _resolved(written, None if named else manifest.base.revision, is_base=True)
    return BaseSpec(
        model=path or hub_id,
        label=manifest.base.model,
        revision=None if path else manifest.base.revision,
        dtypes=(manifest.base.requested_dtype,),
        quantization=manifest.base.requested_quantization,
        names=manifest.base.names,
    )


def _resolved(name: str, revision: str | None, *, is_base: bool) -> tuple[str | None, str | None]:
    """The directory, or the Hub id."""
    try:
        _, path, hub_id = resolve_argument(name, on_hub=revision is not None, is_base=is_base)
    except UsageError as error:
        hint = f"name its place here with {'--base' if is_base else '--adapter'}"
        raise UsageError(error.message, hint="; ".join(filter(None, [error.hint, hint]))) from None
    return path, hub_id


# --- 2. --------------------------------------------------------------------------------------------------------------


def _other_inputs(manifest: Manifest, config: Config, view: View) -> Iterator[str]:
    """The files of base and adapters that are not those of the first run."""
    entry = Inputs(config, Fetching(notify=view.note, with_companions=True)).prepare(config.adapters[-1])
    if entry.problem is not None:
        return  # the run reports it
    view.note("the files of base and adapter are compared with merge-gate.json")
    with explained("cannot read the files of base and adapter", "check that they are there and can be read"):
        base, *adapters = inputs_of(entry)
    yield from _different_files(base, manifest.base.files, "the base")
    for adapter, files in zip(manifest.adapters, adapters, strict=True):
        yield from _different_files(files, adapter.files, f"the adapter {quoted(adapter.name, 200)}")


def _different_files(got: Iterable[FileRecord], expected: Iterable[FileRecord], owner: str) -> Iterator[str]:
    """One sentence for each file that differs. `owner` is what they call the directory, such as `the base`."""
    here, listed = ({file.path: file for file in files} for files in (got, expected))
    for name in sorted({*here, *listed}):
        one, other = here.get(name), listed.get(name)
        if one != other:
            has = f"has {_shown(one)}" if one else "is missing"
            yield f"{one_line(name, 200)} of {owner} {has}, expected {_shown(other) if other else 'no such file'}"


def _shown(file: FileRecord) -> str:
    return f"{file.size_bytes:,} bytes with SHA-256 {one_line(file.sha256, 64)}"


# --- the outcome -----------------------------------------------------------------------------------------------------


_PERMISSIONS = frozenset({"allow_pickle", "trust_remote_code"})
"""Settings that a rebuild need not have. One that it has is a fact."""


def _other_facts(manifest: Manifest, made: Manifest) -> Iterator[str]:
    """The facts that this run did not reproduce. A directory has no revision, and a rebuild has no configuration."""
    listed, got = (dict(_facts(dump_record(replace(one, files=())))) for one in (manifest, made))
    for name in sorted({*listed, *got}):
        is_given = name.startswith("config.") or (name.endswith("revision") and got.get(name) is None)
        if listed.get(name) != got.get(name) and not is_given and (name not in _PERMISSIONS or got[name]):
            here, there = (one_line(json.dumps(facts.get(name)), 80) for facts in (got, listed))
            yield f"{one_line(name, 120)} is {here}, and merge-gate.json has {there}"


def _facts(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every single value of a document, by its place."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inside is None:
        yield name, value
        return
    for key, one in inside:
        yield from _facts(one, f"{name}.{key}" if name else str(key))


def _not_published(report: Report) -> GateError:
    """The error of a model that could not be made."""
    said = [
        finding.message
        for adapter in report.adapters
        if adapter.verdict is not Verdict.PASSED
        for finding in adapter.findings[:1]
    ]
    return GateError(
        "the model could not be made: " + "; ".join(one_line(text, 400) for text in said),
        hint="rebuild it from the same base and adapter, with the versions in merge-gate.json",
    )
