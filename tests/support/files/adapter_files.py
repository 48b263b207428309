"""The files of a sound adapter, whole or changed."""

import json
from pathlib import Path
from typing import Any

from merge_gate.files.preflight import preflight
from merge_gate.records.files import AdapterFiles
from merge_gate.records.terms import Severity
from tests.support.files.pickles import read_pickle

CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "acme/base", "revision": "v1",
    "r": 4, "lora_alpha": 8, "target_modules": ["q"], "bias": "none",
}  # fmt: skip
LORA_A, LORA_B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
SHAPES = {LORA_A: [4, 8], LORA_B: [8, 4]}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345678\n"


def pack(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def weights(shapes: dict[str, list[int]]) -> bytes:
    """A float32 file of zeros, written by hand so that shapes that the library would refuse to save are possible."""
    header, begin = {}, 0
    for name, shape in shapes.items():
        size = 4
        for dim in shape:
            size *= dim
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, begin + size]}
        begin += size
    return pack(json.dumps(header).encode(), bytes(begin))


def make(directory: Path, config: Any = None, shapes: dict[str, list[int]] | None = None, **files: bytes) -> Path:
    """An adapter that is sound, but for what is given; `files` are laid over it by name without the suffix."""
    directory.mkdir(parents=True, exist_ok=True)
    raw = config if isinstance(config, bytes) else json.dumps(CONFIG if config is None else config).encode()
    (directory / CONFIG_NAME).write_bytes(raw)
    (directory / WEIGHTS_NAME).write_bytes(files.get("weights", weights(SHAPES if shapes is None else shapes)))
    return directory


def look(directory: Path, *, allow_pickle: bool = False, withheld: tuple[str, ...] = ()) -> AdapterFiles:
    files = preflight(str(directory), allow_pickle=allow_pickle, read_pickle=read_pickle, withheld=withheld)
    for finding in files.findings:
        assert finding.severity is Severity.ERROR
        assert finding.message
        assert finding.hint
    return files
