"""Recognizes arguments of `merge-gate verify` that were exchanged, and words the corrected command."""

from __future__ import annotations

from collections.abc import Sequence

from merge_gate._internal.errors import UsageError
from merge_gate._internal.text import quoted
from merge_gate.config.exchanged import exchanged, is_adapter, is_model, typed


def refuse_exchanged(merged: str, base: str | None, adapter: str | None, candidates: Sequence[str] = ()) -> None:
    """Refuse an adapter in the place of a model, or a model in the place of an adapter.

    Raises:
        UsageError: an argument is in the place of another one. The hint has the corrected command, if it is known.
    """
    no_model = is_adapter(merged)
    if no_model and adapter is not None and is_model(adapter):
        raise exchanged("MERGED", "--adapter", command(adapter, base, merged, candidates))
    if base is not None and is_adapter(base) and adapter is not None and is_model(adapter):
        raise exchanged("--base", "--adapter", command(merged, adapter, base, candidates))
    if no_model:
        corrected = command("MERGED", base or "BASE", adapter or merged)
        raise _misplaced("MERGED", merged, "an adapter and not a merged model", corrected)
    if base is not None and is_adapter(base):
        raise _misplaced("--base", base, "an adapter and not a model", command(merged, "BASE", adapter or base))
    for name, path in (("--adapter", adapter), *(("--candidate", path) for path in candidates)):
        if path is not None and is_model(path):
            raise _misplaced(name, path, "a model and not an adapter", command(merged, base or path, "ADAPTER"))


def command(merged: str, base: str | None, adapter: str | None, candidates: Sequence[str] = ()) -> str:
    """The command with these arguments; empty if a name cannot be typed."""
    words = ["merge-gate", "verify", merged, *(["--base", base] if base is not None else [])]
    words += ["--adapter", adapter] if adapter is not None else []
    words += [word for path in candidates for word in ("--candidate", path)]
    return typed(words)


def _misplaced(place: str, name: str, what: str, corrected: str) -> UsageError:
    return UsageError(f"{place} {quoted(name, 200)} is {what}", hint=f"run: {corrected}" if corrected else "")
