"""Random changes of a published directory: one key of a JSON file, one byte, or one file more.

In: a seed. Out: what was changed, and whether `verify` may be silent about it. A change may be green only if the file
still has the same meaning by a rule that is written down: a row of the expected differences, JSON with the same value,
or a file that no loader reads.
"""

import json
import random
import shutil
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_gate._internal.companion_names import is_harmless
from merge_gate._internal.strict_json import InvalidJsonError, parse_strictly
from merge_gate.features.verify.comparison import ReadSettings
from merge_gate.features.verify.expected_differences import same
from merge_gate.features.verify.finished_settings import _normal
from merge_gate.records.files import MANIFEST_NAME
from merge_gate.records.terms import Severity
from tests.support.verify.accounting import account, rich_base, saved_by_transformers_4, saved_by_transformers_5
from tests.support.verify.file_changes import write

WEIGHTS = "model.safetensors"
VALUES = (None, True, False, 0, 1, -1, 7, 0.5, 1e30, "", "evil", "</s>", "float16", [], [1], {}, {"a": 1}, "x" * 50)
STEMS = (
    "model", "tokenizer", "config", "README", "adapter_model", "pytorch_model", "chat_template", "vocab", "merges", "x",
    "generate", "preprocessor_config", "processor_config", "added_tokens", "special_tokens_map", "LICENSE", "notes",
    "modeling_own2", "configuration", "consolidated.00", "model-00001-of-00002", "quant_config", "tokenizer.model",
    "generation_config", "modules", "params", "spiece", "tekken", "training_args", "optimizer", "default", ".hidden",
)  # fmt: skip
ENDINGS = (
    "", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".onnx", ".gguf", ".msgpack", ".safetensors", ".py", ".json", ".txt",
    ".model", ".jinja", ".md", ".png", ".log", ".yml", ".yaml", ".npz", ".pkl", ".so", ".sh", ".index.json",
    ".zip", ".tgz", ".ot", ".tflite", ".BIN", ".Json",
)  # fmt: skip
FOLDERS = (
    "", "", "", "sub/", "additional_chat_templates/", "custom_generate/", "original/", ".cache/", "onnx/", "1_Pooling/",
    ".git/", ".cache/huggingface/download/",
)  # fmt: skip


@dataclass
class Place:
    """A base, and a directory that was published from it."""

    base: Path
    merged: Path


def places(root: Path) -> list[Place]:
    """Three layouts: of transformers 5, of transformers 4, and of a base that transformers 5 has saved again."""
    made = []
    for name, of_base, of_merged in (
        ("plain", None, None),
        ("older", saved_by_transformers_4, None),
        ("again", saved_by_transformers_4, saved_by_transformers_5),
    ):
        base = rich_base(root / name / "base")
        if of_base is not None:
            of_base(base)
        merged = shutil.copytree(base, root / name / "merged")
        if of_merged is not None:
            of_merged(merged)
        write(merged / MANIFEST_NAME, {"tool": "merge-gate"})
        made.append(Place(base, merged))
    return made


def failures(place: Place, seeds: range) -> Iterator[str]:
    """The changes that nothing names."""
    for seed in seeds:
        chosen = random.Random(seed)
        what, name, before = _change(place.merged, chosen)
        try:
            found, seen = account(place.merged, place.base)
            is_green = not any(one.severity is Severity.ERROR for one in found)
        except Exception as error:
            is_green, seen = False, None
            if "config.json" not in name:
                raise AssertionError((seed, what)) from error
        if is_green and not _is_named(place, name, before, seen):
            yield f"seed {seed}: {what}"
        _restore(place.merged / name, before)


def _is_named(place: Place, name: str, before: bytes | None, seen: ReadSettings | None) -> bool:
    """Whether a rule says why the change may be green."""
    if is_harmless(name) or name == MANIFEST_NAME or name.startswith(".git/"):
        return True
    of_base = place.base / name
    equal = {before, of_base.read_bytes() if of_base.exists() else None} - {None}
    after = _value((place.merged / name).read_bytes())
    if after == {} and before is None:  # a file without keys says nothing
        return True
    if after is not None and any(same(_normal(_value(one), {}, name), _normal(after, {}, name)) for one in equal):
        return True
    return seen is not None and any(one.row and one.file == name for one in seen.differences)


def _value(content: Any) -> Any:
    try:
        return parse_strictly(content, constant=float)
    except InvalidJsonError:
        return None


def _restore(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


# --- the changes -----------------------------------------------------------------------------------------------------


def _change(merged: Path, chosen: random.Random) -> tuple[str, str, bytes | None]:
    """Change something. Returns what, the file, and its content before; None for a new file."""
    ways: list[Callable[[Path, random.Random], tuple[str, str, bytes | None]]] = [_key, _byte, _file]
    return chosen.choice(ways)(merged, chosen)


def _files(merged: Path) -> list[Path]:
    return sorted(path for path in merged.rglob("*") if path.is_file() and path.name != WEIGHTS)


def _key(merged: Path, chosen: random.Random) -> tuple[str, str, bytes | None]:
    path = chosen.choice([one for one in _files(merged) if one.suffix == ".json"])
    before = path.read_bytes()
    value = json.loads(before)
    spots = list(_spots(value))
    holder, key = chosen.choice(spots) if spots and chosen.random() > 0.1 else (value, None)
    if key is None or (isinstance(holder, dict) and chosen.random() < 0.2):
        key = "".join(chosen.choices(string.ascii_lowercase, k=6))
        holder[key] = chosen.choice(VALUES)
        what = f"added {key} = {holder[key]!r}"
    elif chosen.random() < 0.4:
        what = f"removed {key} = {holder[key]!r}"
        del holder[key]
    else:
        old, new = holder[key], chosen.choice(VALUES)
        if chosen.random() < 0.4 and type(old) in {int, float}:
            new = old + chosen.choice([1, -1, 0.25])
        holder[key] = new
        what = f"{key} = {old!r} to {new!r}"
    path.write_text(json.dumps(value, indent=chosen.choice([None, 2])), encoding="utf-8")
    return f"{path.name}: {what}"[:200], path.relative_to(merged).as_posix(), before


def _spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Places of an object and its parts. Of a long part, a few are enough: else all changes are in the vocabulary."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    keys = list(keys)
    for key in keys[:: max(1, len(keys) // 40)]:
        yield value, key
        yield from _spots(value[key])


def _byte(merged: Path, chosen: random.Random) -> tuple[str, str, bytes | None]:
    path = chosen.choice(_files(merged))
    before = path.read_bytes()
    place = chosen.randrange(len(before))
    new = bytes([before[place] ^ (1 << chosen.randrange(8))]) if chosen.random() < 0.7 else b""
    path.write_bytes(before[:place] + new + before[place + 1 :])
    return f"byte {place} of {path.name}", path.relative_to(merged).as_posix(), before


def _file(merged: Path, chosen: random.Random) -> tuple[str, str, bytes | None]:
    while True:
        name = chosen.choice(FOLDERS) + chosen.choice(STEMS) + chosen.choice(ENDINGS)
        path = merged / name
        if not path.exists():
            break
    path.parent.mkdir(parents=True, exist_ok=True)
    content = chosen.choice([b"", b"x", b"{}", b'{"a": 1}', b"import os\n", bytes(chosen.randbytes(20))])
    path.write_bytes(content)
    return f"added {name}: {content!r}", name, None
