"""merge-gate.json and README.md of a published directory: written, read back, and compared with the directory's files.

In: the facts of a publication, or a directory of unknown origin. Out: a `Manifest`, its bytes, the model card, and the
differences between the manifest and the files. The manifest lists every file except itself, and the card has its
digest. Everything on the card follows from the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import fields, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate import __version__
from merge_gate._internal.errors import UsageError
from merge_gate._internal.regular_file import read_regular_file
from merge_gate._internal.strict_json import InvalidJsonError, parse_strictly
from merge_gate._internal.text import counted, is_inside, one_of
from merge_gate.files.resolve import digest_file
from merge_gate.judging.policies import DEFAULT, POLICIES
from merge_gate.records.config import CheckSetting, Combine, Config, PublishSpec
from merge_gate.records.files import CARD_NAME, MANIFEST_NAME, Entry, FileIdentity, HashedFile, StoredTensor
from merge_gate.records.report import TOOL, AdapterReport, BaseReport, ConfigFile, Environment, Tool
from merge_gate.records.terms import (
    DTYPES,
    PRESERVE,
    BaseKey,
    Finding,
    ForwardMode,
    Quantization,
    Severity,
    Verdict,
    record,
    reported,
)
from merge_gate.report.formats.fields import UnreadableError, dump_record, load_document
from merge_gate.report.wording.markdown import code
from merge_gate.report.wording.untrusted import one_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

MANIFEST_VERSION, LISTING = "1.0", MANIFEST_NAME
"""The file that lists the others of a directory (partial.py)."""
MOST_BYTES = 16 * 1024 * 1024
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


@record
class PublishedBase:
    """The base of a published merge."""

    model: str = reported("Directory or Hub id as written.")
    revision: str | None = reported("The commit of a Hub id; null for a directory.", default=None)
    dtype: str = reported("The dtype that it was loaded and merged in.")
    quantization: str = reported("How the loaded base is quantized; `none` if it is not.")
    requested_dtype: str = reported("The dtype that was asked for: `auto`, or a name.", default="auto")
    requested_quantization: Quantization = reported("The quantization that was asked for.", default=Quantization.NONE)
    names: tuple[str, ...] = reported("Other names for it, which the configuration accepts.", default=())
    sha256: str = reported("Digest of its weights, hex, as in report.json.")
    files: tuple[HashedFile, ...] = reported(
        "Its weight files; of a published model also its settings, tokenizer, and all other files that were copied.",
        default=(),
    )


@record
class PublishedAdapter:
    """An adapter of a published merge; a combination has several."""

    name: str = reported("Its name in the configuration.")
    source: str = reported("Its path as written, or its Hub id.")
    revision: str | None = reported("The commit of a Hub id; null for a directory.", default=None)
    files: tuple[HashedFile, ...] = reported(
        "The files that were merged; of a published model also its tokenizer and all other files that were copied."
    )


@record
class Versions:
    """The versions that made a merge. A version is null if the package was not used."""

    python: str = reported("Version of Python.")
    torch: str | None = reported("Version of torch.", default=None)
    peft: str | None = reported("Version of PEFT.", default=None)
    transformers: str | None = reported("Version of transformers.", default=None)
    bitsandbytes: str | None = reported("Version of bitsandbytes.", default=None)
    device: str = reported("Where the merge was computed: `cpu`, `cuda:0`, …", default="cpu")


@record
class Manifest:
    """merge-gate.json: what a published directory holds, and what it was made of. It has no time and no host name.

    `schema_version` follows from the version of merge-gate.
    """

    schema_version: str = reported("Version of this format. Readers accept any 1.x.", default=MANIFEST_VERSION)
    tool: Tool = reported("The program that published the merge.")
    name: str = reported("The adapter's name in the configuration.")
    verdict: Verdict = reported("Always `passed`.")
    warnings: tuple[str, ...] = reported("The checks with warnings, by id.", default=())
    parameters: int = reported("How many parameters of the merged model were checked: all of them.")
    peft_type: str | None = reported("PEFT's name of the method, such as `LORA`.", default=None)
    dtype: str = reported("`preserve` if every tensor has the dtype of the base's file; else the dtype of the cast.")
    max_shard_bytes: int | None = reported(
        "The largest size of a shard that was asked for; null if the shards are those of the base.", default=None
    )
    base: PublishedBase = reported("The base.")
    adapters: tuple[PublishedAdapter, ...] = reported("The adapter, or the members of a combination.")
    combination: Combine | None = reported("How the members were combined.", default=None)
    allow_pickle: bool = reported("Whether pickled weights were allowed.", default=False)
    trust_remote_code: bool = reported("Whether code of the base was allowed to run.", default=False)
    config: ConfigFile = reported("The configuration file.")
    versions: Versions = reported("The versions that made the merge.")
    forward: ForwardMode = reported("The setting `forward`, which decides some warnings.", default=ForwardMode.AUTO)
    checks: tuple[str, ...] = reported(
        "The checks that the configuration changed, with severity and limits: `keys-unexpected=off`.", default=()
    )
    files: tuple[HashedFile, ...] = reported("Every file of the directory except merge-gate.json itself.", default=())


class Difference(StrEnum):
    """How a file of a directory differs from the manifest."""

    MISSING = "missing"
    ADDED = "added"
    CHANGED = "changed"
    NO_FILE = "no regular file"
    NOT_ON_CARD = f"not the file that {CARD_NAME} has the digest of"


@record
class PublicationFacts:
    """What is known of a model when it is published: the source of its manifest and its other files.

    Attributes:
        entry: the adapter, its base, and their files.
        report: the verdict on the merge.
        base: the base as it was loaded, with the digest of its weights.
        base_identity: the files that the base was loaded from.
        environment: the versions and the device of the run.
        config: the run's configuration.
        spec: how it is published.
        tensors: every tensor as it is written.
        base_tensors: every tensor of the base's own files.
        settings: keys of config.json that other tensors than the base's change.
    """

    entry: Entry
    report: AdapterReport
    base: BaseReport
    base_identity: tuple[FileIdentity, ...]
    environment: Environment
    config: Config
    spec: PublishSpec
    tensors: tuple[StoredTensor, ...]
    base_tensors: tuple[StoredTensor, ...]
    settings: Mapping[str, Any]

    @property
    def is_dequantized(self) -> bool:
        """Whether the base's files are quantized, and the published tensors are not."""
        files = self.entry.base_files
        return self.spec.dtype != PRESERVE and files is not None and files.quantization is not None


# --- written ---------------------------------------------------------------------------------------------------------


def manifest_of(
    facts: PublicationFacts,
    inputs: Sequence[tuple[HashedFile, ...]],
    files: Iterable[HashedFile] = (),
    findings: Iterable[Finding] = (),
) -> Manifest:
    """The manifest of a publication.

    Args:
        facts: the merge, and what it was made of.
        inputs: all files of the base, and those of each adapter.
        files: all files of the directory, with their digests.
        findings: what there is to say about the files next to the weights.
    """
    adapter, base, spec = facts.report, facts.base, facts.entry.spec
    return Manifest(
        tool=Tool(name=TOOL, version=__version__),
        name=adapter.name,
        verdict=adapter.verdict,
        warnings=warnings_in((*adapter.findings, *findings)),
        parameters=adapter.coverage.parameters_checked,
        peft_type=adapter.peft_type,
        dtype=facts.spec.dtype,
        max_shard_bytes=facts.spec.max_shard_bytes,
        base=PublishedBase(
            model=base.model,
            revision=base.revision,
            dtype=base.dtype,
            quantization=base.quantization,
            requested_dtype=facts.entry.dtype,
            requested_quantization=spec.base.quantization,
            names=spec.base.names,
            sha256=base.sha256 or "",
            files=inputs[0],
        ),
        adapters=_adapters(facts, inputs[1:]),
        combination=spec.combine and replace(spec.combine, adapters=()),
        allow_pickle=facts.config.allow_pickle,
        trust_remote_code=facts.config.trust_remote_code,
        config=ConfigFile(path=facts.config.label, sha256=facts.config.sha256),
        versions=versions_of(facts.environment, adapter.base),
        forward=spec.forward,
        checks=tuple(
            _written(setting)
            for setting in spec.checks
            if replace(setting, of_base=None) != POLICIES[DEFAULT].setting(setting.check)
        ),
        files=tuple(sorted(files, key=lambda file: file.path)),
    )


def shared_fields(kind: type, source: Any) -> dict[str, Any]:
    """The values that `source` has for the fields of a record, by name."""
    return {field.name: getattr(source, field.name) for field in fields(kind) if hasattr(source, field.name)}


def versions_of(environment: Environment, base: BaseKey) -> Versions:
    """The versions that made a merge into this base."""
    used = Versions(**shared_fields(Versions, environment))
    return used if base.is_quantized else replace(used, bitsandbytes=None)


def warnings_in(findings: Iterable[Finding]) -> tuple[str, ...]:
    """The checks with warnings, by id."""
    return tuple(dict.fromkeys(finding.check for finding in findings if finding.severity is Severity.WARNING))


def _adapters(facts: PublicationFacts, files: Sequence[tuple[HashedFile, ...]]) -> tuple[PublishedAdapter, ...]:
    spec = facts.entry.spec
    listed = {adapter.name: adapter for adapter in facts.config.adapters}
    members = [replace(spec, revision=facts.entry.revision)]
    if spec.combine is not None:
        members = [listed[name] for name in spec.combine.adapters]
    return tuple(
        PublishedAdapter(name=member.name, source=member.source, revision=member.revision, files=own)
        for member, own in zip(members, files, strict=True)
    )


def render(manifest: Manifest) -> bytes:
    """The bytes of merge-gate.json."""
    return rendered(dump_record(manifest))


def rendered(document: object) -> bytes:
    """The bytes of a document. They are ASCII, so no name in it hides or reorders text."""
    return (json.dumps(document, allow_nan=False, indent=2) + "\n").encode("ascii")


def digest_on_card(data: bytes) -> str | None:
    """The digest of merge-gate.json that the card has: of everything except the card's own entry.

    None if `render` does not write these bytes: another spelling is another file.
    """
    try:
        document = parse_strictly(data)
        if rendered(document) != data:
            return None
        document["files"] = [file for file in document["files"] if file["path"] != CARD_NAME]
    except (InvalidJsonError, LookupError, TypeError, ValueError, RecursionError):
        return None
    return hashlib.sha256(rendered(document)).hexdigest()


# --- the card --------------------------------------------------------------------------------------------------------


def model_card(manifest: Manifest) -> bytes:
    """The bytes of the model card."""
    return f"{_front(manifest)}\n{_text(manifest)}".encode()


def _front(manifest: Manifest) -> str:
    """The metadata that the Hub reads. A local path is no base model there."""
    lines = ["---", "library_name: transformers", "tags: [merge-gate, peft]"]
    if _HUB_ID.fullmatch(manifest.base.model) and manifest.base.revision:
        lines += [f"base_model: {json.dumps(manifest.base.model)}", "base_model_relation: merge"]
    return "\n".join([*lines, "---", ""])


def _text(manifest: Manifest) -> str:
    base = manifest.base
    rows = [("base", _named(base.model, base.revision))]
    rows += [("adapter", _named(adapter.source, adapter.revision)) for adapter in manifest.adapters]
    if manifest.combination is not None:
        rows.append(("combination", code(manifest.combination.method)))
    rows += [
        ("method", code(manifest.peft_type or "unknown")),
        (
            "dtype",
            "as in the base" if manifest.dtype == PRESERVE else f"all floating tensors cast to {code(manifest.dtype)}",
        ),
        ("checks", f"passed; all {counted(manifest.parameters, 'parameter')} of the merged model checked"),
        ("warnings", ", ".join(map(code, manifest.warnings)) or "none"),
    ]
    if manifest.checks:
        rows.append(("changed checks", ", ".join(map(code, manifest.checks))))
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    return f"""# {code(manifest.name)}, merged into its base

merge-gate merged this adapter into its base, checked every parameter of the result, and wrote the tensors that it
checked. All other tensors are copies of the base's.

{table}

`merge-gate.json` has the digests of all files, of the base, and of the adapter. `merge-gate verify` compares this
directory with them.

The SHA-256 of `merge-gate.json` without the entry of this card is `{digest_on_card(render(manifest))}`.
"""


def _named(name: str, revision: str | None) -> str:
    return f"{code(name)} at {code(revision)}" if revision else code(name)


# --- read back -------------------------------------------------------------------------------------------------------


def read_manifest(path: str | Path) -> Manifest:
    """Read a merge-gate.json of unknown origin, or the one in a directory.

    Raises:
        UsageError: it cannot be read, is not a manifest of version 1, or contradicts itself.
    """
    place = Path(path, MANIFEST_NAME) if Path(path).is_dir() else Path(path)
    try:
        return parse_manifest(read_regular_file(place, MOST_BYTES), str(place))
    except OSError as error:
        raise UsageError(
            f"{one_line(str(place))} cannot be read: {error.strerror or error}",
            hint=f"name a directory that `merge-gate run --publish` made, or its {MANIFEST_NAME}",
        ) from error


def parse_manifest(data: bytes, name: str) -> Manifest:
    """The manifest in these bytes; `name` is the file's, for messages.

    Raises:
        UsageError: it is not a manifest of version 1, or contradicts itself.
    """
    try:
        manifest: Manifest = load_document(Manifest, data, MANIFEST_VERSION, TOOL)
        _refuse_contradictions(manifest)
    except UnreadableError as error:
        raise UsageError(
            f"{one_line(name)} is not a {MANIFEST_NAME} of merge-gate: {error}",
            hint="publish the adapter again with `merge-gate run --publish DIR`",
        ) from error
    return manifest


def _refuse_contradictions(manifest: Manifest) -> None:
    """Refuse what a run cannot have written."""
    names, members = [file.path for file in manifest.files], [adapter.name for adapter in manifest.adapters]
    outside = next((name for name in names if not is_inside(name) or name == MANIFEST_NAME), None)
    is_combination = manifest.combination is not None
    has_dtypes = manifest.dtype in {PRESERVE, *DTYPES} and manifest.base.requested_dtype in {"auto", *DTYPES}
    for is_wrong, sentence in (
        (manifest.verdict is not Verdict.PASSED, f"verdict is {manifest.verdict}, expected {Verdict.PASSED}"),
        (not has_dtypes, f"dtype is {one_line(manifest.dtype, 20)}, expected {PRESERVE} or {one_of(DTYPES)}"),
        (not names, "files is empty, expected every file of the directory"),
        (not members or (len(members) > 1) != is_combination, "adapters has the wrong number of entries"),
        (is_combination and len({manifest.name, *members}) <= len(members), "adapters names one adapter twice"),
        (outside is not None, f"files names {one_line(outside or '', 120)!r}, expected a file inside of the directory"),
        (len(set(names)) < len(names), "files names a file twice"),
    ):
        if is_wrong:
            raise UnreadableError(sentence)


def _written(setting: CheckSetting) -> str:
    limits = [repr(limit) for limit in (setting.limit, setting.error_limit) if limit is not None]
    wiped = [f"wiped={setting.wiped}"] if setting.wiped is not None else []
    return f"{setting.check}={':'.join([setting.severity, *limits, *wiped])}"


# --- compared with the files -----------------------------------------------------------------------------------------


def differences(directory: str | Path, manifest: Manifest, *, weights: bool = True) -> dict[str, Difference]:
    """The files of a directory that are not as the manifest lists them. Every byte is read.

    Without `weights`, only the size of a safetensors file is compared.
    """
    folder = Path(directory)
    by_path = dict(compared(folder, manifest.files, MANIFEST_NAME, weights=weights))
    has_card = CARD_NAME in {file.path for file in manifest.files}
    if not has_card or (CARD_NAME not in by_path and not _is_on_card(folder)):
        by_path[MANIFEST_NAME] = Difference.NOT_ON_CARD
    return dict(sorted(by_path.items()))


def is_unchanged(folder: Path, *, weights: bool) -> bool:
    """Whether a directory holds what its merge-gate.json lists, and nothing else."""
    return not differences(folder, read_manifest(folder), weights=weights)


def compared(
    folder: Path, files: Iterable[HashedFile], listing: str, *, weights: bool = True
) -> Iterator[tuple[str, Difference]]:
    """The files of a directory that are not as the file `listing` lists them."""
    names = set(names_below(folder)) - {listing}
    listed = {file.path: file for file in files}
    yield from ((name, Difference.ADDED) for name in names - set(listed))
    for name, file in listed.items():
        if name not in names:
            yield name, Difference.MISSING
        elif not (folder / name).is_file() or (folder / name).is_symlink():
            yield name, Difference.NO_FILE
        elif (folder / name).stat().st_size != file.size_bytes or (
            (weights or not name.endswith(".safetensors")) and digest_file(folder / name) != file.sha256
        ):
            yield name, Difference.CHANGED


def _is_on_card(folder: Path) -> bool:
    digest = digest_on_card(read_regular_file(folder / MANIFEST_NAME, MOST_BYTES))
    return digest is not None and digest.encode() in read_regular_file(folder / CARD_NAME, MOST_BYTES)


def names_below(directory: str | Path) -> list[str]:
    """Everything below a directory, by its relative name. Links are not followed, and only empty folders are listed."""
    names = []
    for place, folders, files in os.walk(directory, onerror=_raise):
        linked = [name for name in folders if Path(place, name).is_symlink()]
        is_empty = not folders and not files and Path(place) != Path(directory)
        names += [Path(place, name).relative_to(directory).as_posix() for name in (*files, *linked, *["."] * is_empty)]
    return sorted(names)


def _raise(error: OSError) -> None:
    raise error
