"""Recognizes arguments of a command that were exchanged, and words the corrected command.

In: the arguments, which name hostile directories. Out: `UsageError`, or a command for a hint. Only names in directories
are read. A Hub id is not recognized here: its files are not known yet.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from merge_gate._internal.errors import UsageError
from merge_gate._internal.text import has_hidden, quoted
from merge_gate.records.files import CONFIG_NAME, WEIGHTS_NAME


def refuse_exchanged(merged: str, base: str | None, adapter: str | None, candidates: Sequence[str] = ()) -> None:
    """Refuse an adapter in the place of a model, or a model in the place of an adapter.

    Raises:
        UsageError: an argument is in the place of another one. The hint has the corrected command, if it is known.
    """
    no_model = is_adapter(merged)
    if no_model and adapter is not None and is_model(adapter):
        raise _exchanged("MERGED", "--adapter", command(adapter, base, merged, candidates))
    if base is not None and is_adapter(base) and adapter is not None and is_model(adapter):
        raise _exchanged("--base", "--adapter", command(merged, adapter, base, candidates))
    if no_model:
        corrected = command("MERGED", base or "BASE", adapter or merged)
        raise _misplaced("MERGED", merged, "an adapter and not a merged model", corrected)
    if base is not None and is_adapter(base):
        raise _misplaced("--base", base, "an adapter and not a model", command(merged, "BASE", adapter or base))
    for name, one in (("--adapter", adapter), *(("--candidate", one) for one in candidates)):
        if one is not None and is_model(one):
            raise _misplaced(name, one, "a model and not an adapter", command(merged, base or one, "ADAPTER"))


def refuse_exchanged_base(command_name: str, base: str | None, adapters: Sequence[str]) -> None:
    """Refuse the base in the place of the only adapter, and the adapter in the place of the base.

    Raises:
        UsageError: they are exchanged. The hint has the corrected command, if it can be typed.
    """
    if base is not None and len(adapters) == 1 and is_adapter(base) and is_model(adapters[0]):
        corrected = _typed(["merge-gate", command_name, base, "--base", adapters[0]])
        raise _exchanged("--base", "the adapter", corrected)


def is_adapter(name: str) -> bool:
    """Whether a name is a directory here with an adapter, and without a model."""
    return Path(name, CONFIG_NAME).is_file() and not (Path(name, "config.json").is_file() or _weights(name))


def is_model(name: str) -> bool:
    """Whether a name is a directory here with a model, and without an adapter."""
    has_adapter = Path(name, CONFIG_NAME).exists() or Path(name, WEIGHTS_NAME).exists()
    return not has_adapter and Path(name, "config.json").is_file() and _weights(name)


def _weights(name: str) -> bool:
    try:
        return any(path.name != WEIGHTS_NAME for path in Path(name).glob("*.safetensors"))
    except OSError:
        return False


def command(merged: str, base: str | None, adapter: str | None, candidates: Sequence[str] = ()) -> str:
    """The command with these arguments; empty if a name cannot be typed."""
    words = ["merge-gate", "verify", merged, *(["--base", base] if base is not None else [])]
    words += ["--adapter", adapter] if adapter is not None else []
    words += [word for one in candidates for word in ("--candidate", one)]
    return _typed(words)


def _typed(words: Sequence[str]) -> str:
    return "" if any(map(has_hidden, words)) or "`" in "".join(words) else shlex.join(words)


def _exchanged(first: str, second: str, corrected: str) -> UsageError:
    return UsageError(f"{first} and {second} are exchanged", hint=f"run: {corrected}" if corrected else "exchange them")


def _misplaced(place: str, name: str, what: str, corrected: str) -> UsageError:
    return UsageError(f"{place} {quoted(name, 200)} is {what}", hint=f"run: {corrected}" if corrected else "")
