"""Changes of an input that a parser does not refuse at its first byte.

In: bytes, and dice. Out: other bytes. Half of the changes are made in the tree of a JSON text (every target reads
JSON; YAML takes it as it is), the others by whatever changes single bytes.
"""

import json
import random
from collections.abc import Callable
from typing import Any

from tests.support.fuzz.targets import FRAMED

NUMBERS = (0, 1, -1, 8, 255, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e-9, 1e308, -0.0)
TEXTS = (
    "", "a", "\0", "\ud800", "\u202e", "é" * 40, "x" * 5000, "::error::", "##[add]", "<script>", "((a+)+)+$", "[", "*",
    "../a", "LORA", "F32", "float16", "none", "pass", "passed", "failed", "error", "off", "merged-nonfinite", "NaN",
    "Infinity", "1.0", "<<", "./adapters/support", "acme/a", "trust_remote_code", "torch", "__metadata__", "all",
)  # fmt: skip
TOKENS = (
    b"\xff", b"\x00", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r\n", b"\t", b"1e999", b"NaN", b"-", b"&a ", b"*a",
    b"<<: ", b"!!python/object:os.system ", b"!!binary ", b"? ", b"- ", b": ", b"|\n", b"---\n", b"...\n",
    b"%YAML 1.2\n", b"{", b"}", b"[", b"]", b'"', b"'", b"\\ud800", b"PK\x03\x04", b"\x80\x02",
)  # fmt: skip
_MOST_CHANGES, _DEEPEST = 4, 40


def changed(
    data: bytes, dice: random.Random, most_bytes: int, by_bytes: Callable[[bytes], bytes] | None = None
) -> bytes:
    """Another input like `data`. `by_bytes` is what a fuzzer has of its own for the other half."""
    frame, body = (data[:2], data[2:]) if data.startswith(FRAMED + data[1:2]) and data[2:3] == b"{" else (b"", data)
    if dice.random() < 0.5:
        try:
            tree = json.loads(body)
        except (ValueError, RecursionError):
            pass
        else:
            for _ in range(dice.randint(1, _MOST_CHANGES)):
                tree = _changed_tree(tree, dice, 0)
            return (frame + json.dumps(tree, ensure_ascii=dice.random() < 0.8).encode("utf-8", "surrogatepass"))[
                :most_bytes
            ]
    if by_bytes and dice.random() < 0.7:
        return by_bytes(data)
    return _changed_bytes(data, dice)[:most_bytes]


def _changed_tree(value: Any, dice: random.Random, depth: int) -> Any:
    """One place of the tree changed; the way down is drawn."""
    if isinstance(value, dict | list) and value and depth < _DEEPEST and dice.random() < 0.8:
        return _changed_inside(value, dice, depth)
    return dice.choice((_scalar, _scalar, _scalar, _wrapped, _grown))(value, dice)


def _changed_inside(value: dict[str, Any] | list[Any], dice: random.Random, depth: int) -> Any:
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    place = dice.randrange(len(items))
    key, inner = items[place]
    what = dice.random()
    if what < 0.1:
        del items[place]
    elif what < 0.2:
        items.insert(place, (dice.choice(TEXTS), dice.choice(items)[1]))
    elif what < 0.25:
        items[place] = (dice.choice(TEXTS), inner)
    else:
        items[place] = (key, _changed_tree(inner, dice, depth + 1))
    return dict(items) if isinstance(value, dict) else [one for _, one in items]


def _scalar(_: Any, dice: random.Random) -> Any:
    return dice.choice((None, True, False, [], {}, dice.choice(NUMBERS), dice.choice(TEXTS)))


def _wrapped(value: Any, dice: random.Random) -> Any:
    return [value] if dice.random() < 0.5 else {dice.choice(TEXTS): value}


def _grown(value: Any, dice: random.Random) -> Any:
    times = dice.randint(2, 50)
    if isinstance(value, str):
        return value[:1000] * times
    return [value] * times if len(str(value)) < 100 else value


def _changed_bytes(data: bytes, dice: random.Random) -> bytes:
    body = bytearray(data)
    for _ in range(dice.randint(1, _MOST_CHANGES)):
        start = dice.randint(0, len(body))
        end = min(len(body), start + dice.choice((0, 1, 1, 2, 8, 64)))
        what = dice.random()
        if what < 0.3:
            body[start:end] = dice.choice(TOKENS)
        elif what < 0.5:
            body[start:end] = dice.randbytes(end - start)
        elif what < 0.6:
            body[start:end] = b""
        elif what < 0.7:
            body[start:start] = body[start:end] * dice.randint(1, 100)
        elif start < len(body):
            body[start] ^= 1 << dice.randrange(8)
    return bytes(body)
