"""The finding of an adapter that has no verdict, and why.

In: a sentence, or an exception. Out: a `Finding` of `not-judged`.
"""

from __future__ import annotations

from merge_gate.records.terms import Finding, Origin, Severity

NOT_JUDGED = "not-judged"


def not_judged(message: str, hint: str = "", *, origin: Origin = Origin.RUNTIME) -> Finding:
    """The finding of an adapter that could not be judged: it did not pass, and it did not fail."""
    return Finding(check=NOT_JUDGED, severity=Severity.ERROR, message=message, hint=hint, origin=origin)


def accident(what: str, error: Exception) -> Finding:
    """The finding of an unexpected exception."""
    if isinstance(error, MemoryError):
        return not_judged(f"{what}: out of memory", "use a larger runner, or gate this adapter alone")
    return not_judged(
        f"{what}: unexpected {type(error).__name__}: {str(error)[:200]}",
        "this is a bug of merge-gate: please report it, with the adapter's config if you can",
    )
