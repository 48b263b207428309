"""Shards of a base that its index leaves out.

In: a base's directory. Out: names of files. Reads the index alone; knows nothing of torch.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

_NUMBERED = re.compile(r"(.*-)(\d{1,5})(-of-)(\d{1,5})(\.\w+)")
"""As transformers numbers them, with five digits; a stranger's file name may count to any number."""


def shards_left_out(directory: Path) -> list[str]:
    """Files that the numbers of others imply (`model-00002-of-00003.safetensors`) and that the index does not name.

    None where transformers reads no index: it prefers a single file.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return []
    named = set(json.loads(index.read_bytes())["weight_map"].values())  # transformers has read it
    found = [match for match in map(_NUMBERED.fullmatch, named) if match is not None]
    first = 0 if any(int(match[2]) == 0 for match in found) else 1  # some count from zero
    implied = {
        f"{match[1]}{number:0{len(match[2])}}{match[3]}{match[4]}{match[5]}"
        for match in found
        for number in range(first, first + int(match[4]))
    }
    return sorted(implied - named)
