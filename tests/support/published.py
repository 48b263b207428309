"""A published directory without a merge: a few small files, and a merge-gate.json that lists them."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from merge_gate.features.publish.manifest import (
    Manifest,
    PublicationFacts,
    manifest_of,
    model_card,
    names_below,
    render,
)
from merge_gate.records.config import AdapterSpec, BaseSpec, Combine, Config, PublishSpec
from merge_gate.records.files import CARD_NAME, MANIFEST_NAME, AdapterFiles, Entry, HashedFile
from merge_gate.records.report import AdapterReport
from tests.support import reports

FILES = {"model.safetensors": b"\x00weights", "config.json": b"{}", "additional_chat_templates/x.jinja": b"x"}


def facts(adapter: AdapterReport | None = None, **more: object) -> PublicationFacts:
    """The facts of a publication of one adapter, or of a combination of two if `combine` is given."""
    adapter = adapter or reports.adapter()
    combine = more.pop("combine", None)
    assert combine is None or isinstance(combine, Combine)
    names = combine.adapters if combine else ()
    wanted = {key: more.pop(key) for key in ("dtype", "max_shard_bytes") if key in more}
    member = AdapterFiles(directory="/adapters/support", files=adapter.files)

    def spec(name: str, combine: Combine | None = None) -> AdapterSpec:
        return AdapterSpec(
            name=name, source=f"./{name}", path=None if combine else f"/{name}", combine=combine, base=BaseSpec(),
            checks=(), line=1, column=1,
        )  # fmt: skip

    own = spec(adapter.name, combine)
    values = {
        "entry": Entry(spec=own, dtype="auto", members=(member,) * (len(names) or 1), revision=adapter.revision),
        "report": adapter,
        "base": reports.report(adapter).bases[0],
        "base_identity": (),
        "environment": reports.ENVIRONMENT,
        "config": Config(
            path="merge-gate.yml", directory="/", sha256=reports.SHA256, adapters=(own, *map(spec, names))
        ),
        "spec": PublishSpec(directory="published", label="published", **wanted),  # type: ignore[arg-type]
        "tensors": (),
        "base_tensors": (),
        "settings": {},
    }
    return PublicationFacts(**(values | more))  # type: ignore[arg-type]


def manifest(of_merge: PublicationFacts, files: tuple[HashedFile, ...] = ()) -> Manifest:
    """The manifest of a model that was made of the merge's own inputs only."""
    return manifest_of(of_merge, [of_merge.base.files, *(one.files for one in of_merge.entry.members)], files)


def publish(folder: Path, **more: object) -> Manifest:
    """Write the files, and the manifest that lists them."""
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    of_merge = facts(**more)  # type: ignore[arg-type]
    (folder / CARD_NAME).unlink(missing_ok=True)
    (folder / CARD_NAME).write_bytes(model_card(manifest(of_merge, records(folder))))
    written = manifest(of_merge, records(folder))
    (folder / MANIFEST_NAME).write_bytes(render(written))
    return written


def records(folder: Path) -> tuple[HashedFile, ...]:
    return tuple(
        HashedFile(
            path=name,
            size_bytes=(folder / name).stat().st_size,
            sha256=hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        )
        for name in names_below(folder)
        if name != MANIFEST_NAME
    )


def flip(path: Path) -> None:
    """Change the last bit of a file."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def edit(path: Path, old: bytes, new: bytes) -> None:
    """Replace the first `old` by as many bytes."""
    content = path.read_bytes()
    assert old in content
    assert len(old) == len(new)
    path.write_bytes(content.replace(old, new, 1))


def link(path: Path) -> None:
    """Put a link to the same bytes, or to the same folder, in the place of a path."""
    path.rename(path.parents[1] / "elsewhere")
    path.symlink_to("../elsewhere")


CHANGES: dict[str, Callable[[Path], object]] = {
    "a byte of the config": lambda model: flip(model / "config.json"),
    "a byte of the card": lambda model: flip(model / CARD_NAME),
    "a longer card": lambda model: (model / CARD_NAME).write_bytes(b"longer" * 1000),
    "a value of the manifest": lambda model: edit(model / MANIFEST_NAME, b'"1.0"', b'"1.1"'),
    "another spelling of the manifest": lambda model: edit(model / MANIFEST_NAME, b"\n", b" "),
    "a file more": lambda model: (model / "modeling.py").touch(),
    "a hidden file more": lambda model: (model / ".x").touch(),
    "a name that is no UTF-8": lambda model: (model / os.fsdecode(b"\xff")).touch(),
    "a file less": lambda model: (model / "config.json").unlink(),
    "a link more": lambda model: (model / "link").symlink_to("config.json"),
    "a link to the same bytes": lambda model: link(model / "config.json"),
    "an empty folder more": lambda model: (model / "more").mkdir(),
    "a folder in a folder more": lambda model: (model / "a" / "b").mkdir(parents=True),
    "a pipe more": lambda model: os.mkfifo(model / "pipe"),
    "a hard link more": lambda model: os.link(model / "config.json", model / "other.json"),
}
"""Changes of any published directory: after each of them, it is not as it was published."""
