"""Changes of a finished directory: each is a function of it. Knows nothing of merge_gate."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[Path], object]

CONFIG, GENERATION, PROCESSOR = "config.json", "generation_config.json", "preprocessor_config.json"
TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=2), encoding="utf-8")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def edited(name: str, **changes: Any) -> Change:
    """Keys of a JSON file set, or removed with `...`. A key with two underscores is inside of an object."""

    def change(out: Path) -> None:
        values = read(out / name) if (out / name).exists() else {}
        for key, value in changes.items():
            *outer, last = key.split("__")
            place = values
            for part in outer:
                place = place[part] if isinstance(place, dict) else place[int(part)]
            if value is ...:
                del place[last]
            else:
                place[last] = value
        write(out / name, values)

    return change


def added(name: str, content: str | bytes = b"x") -> Change:
    def change(out: Path) -> None:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def removed(*names: str) -> Change:
    return lambda out: [(out / name).unlink() for name in names]


def both(*changes: Change) -> Change:
    return lambda out: [change(out) for change in changes]


def copies(base: Path, place: Path, *changes: Change) -> tuple[Path, Path]:
    """A changed copy of the base, and a copy of that."""
    of_base = shutil.copytree(base, place / "base")
    both(*changes)(of_base)
    return of_base, shutil.copytree(of_base, place / "merged")


def replaced(name: str, old: str, new: str) -> Change:
    return lambda out: (out / name).write_text((out / name).read_text().replace(old, new, 1))


def swapped(out: Path) -> None:
    form = read(out / TOKENIZER)
    vocab = form["model"]["vocab"]
    first, second = list(vocab)[100:102]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    write(out / TOKENIZER, form)


def reordered(out: Path) -> None:
    for path in out.glob("*.json"):
        path.write_text(json.dumps(dict(reversed(read(path).items())), separators=(",", ":")))


def older_config(out: Path) -> None:
    """As transformers 4 writes it: the older names, and no defaults."""
    older = {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": read(out / CONFIG)["dtype"]}
    newer = ("rope_parameters", "dtype", "head_dim", "mlp_bias", "attention_bias", "pretraining_tp")
    edited(CONFIG, **older, **dict.fromkeys(newer, ...), transformers_version="4.46.0")(out)
