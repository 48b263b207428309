"""Recognizes a base and an adapter that were exchanged on the command line, and words the corrected command.

In: the arguments, which name hostile directories. Out: `UsageError`. Only names in directories are read. A Hub id is
not recognized here: its files are not known yet.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from merge_gate._internal.errors import UsageError
from merge_gate._internal.text import has_hidden
from merge_gate.records.files import CONFIG_NAME, WEIGHTS_NAME


def refuse_exchanged_base(command_name: str, base: str | None, adapters: Sequence[str]) -> None:
    """Refuse the base in the place of the only adapter, and the adapter in the place of the base.

    Raises:
        UsageError: they are exchanged. The hint has the corrected command, if it can be typed.
    """
    if base is not None and len(adapters) == 1 and is_adapter(base) and is_model(adapters[0]):
        corrected = typed(["merge-gate", command_name, base, "--base", adapters[0]])
        raise exchanged("--base", "the adapter", corrected)


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


def typed(words: Sequence[str]) -> str:
    """The command with these words; empty if one cannot be typed."""
    return "" if any(map(has_hidden, words)) or "`" in "".join(words) else shlex.join(words)


def exchanged(first: str, second: str, corrected: str) -> UsageError:
    """The error for two exchanged arguments."""
    return UsageError(f"{first} and {second} are exchanged", hint=f"run: {corrected}" if corrected else "exchange them")
