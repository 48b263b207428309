"""Checks of the adapter's files, whose findings come with the files or with a refusal of the engine.

In: the facts of a refusal. Out: findings, and the rows of the checks, which have no function.
"""

from __future__ import annotations

from collections.abc import Callable

from merge_gate.judging.checks.check import ERROR, Check, Symptom
from merge_gate.judging.checks.phrases import describe_pattern
from merge_gate.judging.not_judged import not_judged
from merge_gate.records.files import Pattern
from merge_gate.records.terms import FailureKind, Finding, Origin
from merge_gate.text import quoted

_SETTINGS = 6
"""Ignored settings that one message lists."""

_MOST_DIGITS = 10

FILE_MISSING = Check(
    id="file-missing",
    severity=ERROR,
    origin=Origin.FILE,
    summary="There is no adapter_config.json, or no weights file.",
    symptom=Symptom.BAD_FILE,
)
FILE_LFS_POINTER = Check(
    id="file-lfs-pointer",
    severity=ERROR,
    origin=Origin.FILE,
    summary="The weights file is a Git LFS pointer, not the weights.",
    symptom=Symptom.BAD_FILE,
)
FILE_CORRUPT = Check(
    id="file-corrupt",
    severity=ERROR,
    origin=Origin.FILE,
    summary="A file is empty, truncated, or not in the format that it claims.",
    symptom=Symptom.BAD_FILE,
)
PICKLE_REFUSED = Check(
    id="pickle-refused",
    severity=ERROR,
    origin=Origin.FILE,
    summary="There are only pickled weights (.bin), and allow-pickle is false.",
    symptom=Symptom.BAD_FILE,
    failure=FailureKind.REFUSED,
)
CONFIG_INVALID = Check(
    id="config-invalid",
    severity=ERROR,
    origin=Origin.CONFIG,
    summary="adapter_config.json is not valid, or contradicts the tensors.",
    symptom=Symptom.BAD_CONFIG,
    allows_loading=True,  # PEFT reads the values itself, and what it rejects is a finding again
)
CONFIG_UNSAFE = Check(
    id="config-unsafe",
    severity=ERROR,
    origin=Origin.CONFIG,
    summary="adapter_config.json would make PEFT import code.",
    symptom=Symptom.BAD_CONFIG,
    failure=FailureKind.REFUSED,
)


def pattern_refused(pattern: Pattern | None, names: int, seconds: float, problem: str | None = None) -> Finding:
    """A regular expression is not valid, or did not end within `seconds` on `names` names; `pattern` may be unknown.

    `problem` says why it is not valid; None for an endless one.
    """
    if problem is not None:
        what = describe_pattern(pattern) if pattern else "adapter_config.json holds an expression"
        message = f"{what}, which is not a valid regular expression: {problem}"
        return CONFIG_INVALID.finding(message, "use plain names")
    what = f"{describe_pattern(pattern)}, a" if pattern else "adapter_config.json holds a"
    return CONFIG_INVALID.finding(
        f"{what} regular expression that was not matched against the {names:,} module names of the base within "
        f"{seconds:g} s of computing; PEFT would not finish",
        "write it without a repetition inside of a repetition, or use a list of names",
    )


def ignored_settings(
    settings: tuple[str, ...], peft: str, saved_by: str, near: tuple[tuple[str, str], ...] = ()
) -> Finding:
    """PEFT drops keys that it does not know with a warning; one that is set may change what the adapter computes.

    `settings` are `key=value`. `near` has pairs of such a key and the key of PEFT's that it is probably a misspelling
    of, which is not set.
    """
    listed = ", ".join(settings[:_SETTINGS])
    message = f"adapter_config.json sets {listed}, which PEFT {peft} does not know and would ignore"
    if _release(saved_by) > _release(peft):
        hint = f"the adapter was saved by PEFT {saved_by}: run the gate with that version or newer"
        return not_judged(message, hint, origin=Origin.CONFIG)
    hints = [f"did you mean {quoted(known)}? then rename {quoted(key)}" for key, known in near[:_SETTINGS]]
    if len(near) < len(settings):
        remove = "for any other key: remove it" if hints else "remove the key"
        hints.append(
            f"{remove} if it is a mistake or another trainer's own; if it changes what is computed, "
            "merge with the program that wrote it: the gate needs PEFT 0.21 or newer"
        )
    return CONFIG_INVALID.finding(message, "; ".join(hints))


def _release(text: str) -> tuple[int, ...]:
    """The numbers of a release, none for other text. The adapter states it, and `int` raises on "²" or many digits."""
    parts = text.split(".")[:3]
    return tuple(map(int, parts)) if all(part.isdecimal() and len(part) < _MOST_DIGITS for part in parts) else ()


def tensor_unreadable(name: str | None = None, is_meta: bool = False, dtype: str = "", text: str = "") -> Finding:
    """It is on the meta device, has such a dtype, or `text` is torch's reason, which may not say which tensor it is."""
    why = "it is without values (meta device)" if is_meta else f"it is of {dtype}" if dtype else text
    return FILE_CORRUPT.finding(
        f"{name or 'a tensor'} in the adapter's file cannot be read as numbers by torch, or loaded by PEFT: {why}",
        "save the adapter with its values, as float32, bfloat16 or float16",
        tensor=name,
    )


def pickle_unreadable(error: str, names: str | None = None) -> Finding:
    """The restricted unpickler of torch refuses the weights; `names` is what they would import, if it says so."""
    what = f"torch refuses {quoted(names)} in them" if names else error
    return FILE_CORRUPT.finding(
        f"the pickled weights are damaged, or hold something other than tensors ({what})",
        "do not load this file; ask who made it, and have the adapter saved as safetensors",
    )


REFUSALS: tuple[Callable[..., Finding], ...] = (pattern_refused, ignored_settings, tensor_unreadable, pickle_unreadable)
