"""merge-gate-export.json: a killed run's leftover of an earlier export is recognized by it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from merge_gate.features.export.export_record import ExportRecord, render
from merge_gate.features.publish.manifest import PublishedAdapter, PublishedBase, Versions
from merge_gate.features.publish.partial import PartialDirectory
from merge_gate.records.files import EXPORT_NAME, HashedFile
from merge_gate.records.report import TOOL, Tool
from tests.support.publish_kills import KILLED_BEFORE_A_LOOK


def names(parent: Path) -> set[str]:
    return {path.name for path in parent.iterdir()}


def test_a_kill_before_the_look_leaves_an_export_to_remove(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "adapter_config.json").write_bytes(b"{}")
    tool, base = Tool(name=TOOL, version="1"), PublishedBase(model="b", dtype="float32", quantization="none", sha256="")
    facts = ExportRecord(
        tool=tool,
        adapter=PublishedAdapter(name="a", source="a", files=()),
        base=base,
        versions=Versions(python="3"),
        model_class="A",
        scale_in="lora_B",
        files=(HashedFile(path="adapter_config.json", size_bytes=2, sha256=hashlib.sha256(b"{}").hexdigest()),),
    )
    (tmp_path / "one" / EXPORT_NAME).write_bytes(render(facts))
    untouched = KILLED_BEFORE_A_LOOK.replace('(place / "one" / "precious.txt").touch()', "")
    subprocess.run([sys.executable, "-c", untouched, str(tmp_path)], check=False)
    assert names(tmp_path / ".one.partial" / "model") == {"adapter_config.json", EXPORT_NAME}
    PartialDirectory(tmp_path / "one").remove()
    assert names(tmp_path) == {"one"}
    assert names(tmp_path / "one") == {"model.safetensors"}
