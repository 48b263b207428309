"""A file that the preflight reads, and safetensors does not: what is wrong with it is said of the file."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

import pytest

from merge_gate.engine.weights import read_weights
from merge_gate.errors import Refused
from merge_gate.sources.preflight import preflight
from tests import methods
from tests.models import ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.models import Shelf


def test_a_header_that_safetensors_refuses_is_the_files(shelf: Shelf, tmp_path: Path) -> None:
    """A trainer's own number among the metadata, whose values are texts."""
    content = (shelf.adapter("plain") / ADAPTER_WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.dumps(json.loads(content[8 : 8 + size]) | {"__metadata__": {"step": 100}}).encode()
    broken = methods.write_variant(shelf.adapter("plain"), tmp_path, {})
    (broken / ADAPTER_WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
    with pytest.raises(Exception, match="invalid type: integer `100`"):
        methods.load_file(broken / ADAPTER_WEIGHTS)
    files = preflight(str(broken), allow_pickle=False)
    said = [(one.check, one.message) for one in files.findings]
    if not said:
        with pytest.raises(Refused) as caught:
            read_weights(files)
        said = [(str(caught.value.refusal.check), caught.value.refusal.message)]
    assert said[0][0] == "file-corrupt", said
