"""What safetensors refuses where the preflight has let it pass (another release of it, say) is said of the file."""

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
    state = methods.load_file(shelf.adapter("plain") / ADAPTER_WEIGHTS)
    files = preflight(str(methods.write_variant(shelf.adapter("plain"), tmp_path, state)), allow_pickle=False)
    assert set(read_weights(files)) == set(state)
    content = (tmp_path / ADAPTER_WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.dumps(json.loads(content[8 : 8 + size]) | {"__metadata__": {"step": 100}}).encode()
    (tmp_path / ADAPTER_WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
    with pytest.raises(Refused) as caught:
        read_weights(files)
    assert caught.value.refusal.check == "file-corrupt"
    assert "invalid type: integer `100`" in caught.value.refusal.message
