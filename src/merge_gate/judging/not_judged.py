"""The finding of an adapter that has no verdict, and why.

In: a sentence, an exception, or the facts of a refusal. Out: a `Finding` of `not-judged`.
"""

from __future__ import annotations

from collections.abc import Callable

from merge_gate._internal.text import foreign
from merge_gate.records.config import A_FILE
from merge_gate.records.refusals import Caught, log_of
from merge_gate.records.terms import Finding, Origin, Severity

NOT_JUDGED = "not-judged"
_EVIDENCE = "the adapter's config if you can, and the traceback, which --verbose prints and report.json has"
INSTALL = "install the package that the message names in the environment that runs the gate"


def not_judged(message: str, hint: str = "", *, origin: Origin = Origin.RUNTIME, log: str | None = None) -> Finding:
    """The finding of an adapter that could not be judged: it did not pass, and it did not fail."""
    return Finding(check=NOT_JUDGED, severity=Severity.ERROR, message=message, hint=hint, origin=origin, log=log)


def accident(what: str, error: Exception) -> Finding:
    """The finding of an unexpected exception."""
    if isinstance(error, MemoryError):
        return not_judged(f"{what}: out of memory", "use a larger runner, or gate this adapter alone")
    return not_judged(
        f"{what}: unexpected {type(error).__name__}: {str(error)[:200]}",
        f"this is a bug of merge-gate: please report it, with {_EVIDENCE}",
        log=log_of(error),
    )


def unknown_method(name: str, peft: str, known_as: str | None = None) -> Finding:
    """PEFT has no adapter type of this name; `known_as` is the same name as PEFT writes it, if there is one."""
    return not_judged(
        f"PEFT {peft} does not know the adapter type {foreign(name)}, so it cannot be merged here",
        f"PEFT writes it {known_as!r}: correct peft_type in adapter_config.json"
        if known_as
        else "upgrade PEFT in the environment that runs the gate, or correct peft_type in adapter_config.json",
        origin=Origin.CONFIG,
    )


def config_unreadable(error: Caught) -> Finding:
    return not_judged(
        f"the base's config.json cannot be read: {error}",
        "the base must be a directory saved by save_pretrained, of a model type that transformers knows",
    )


def base_raised(error: Caught, base: str, class_name: str) -> Finding:
    if error.is_a("MemoryError", "OutOfMemoryError"):
        return not_judged(
            f"base {base}: out of memory while loading it", "use a machine with more memory, or a smaller dtype"
        )
    if error.is_a("ImportError"):
        return not_judged(f"base {base} needs a package that is not installed: {error.text}", INSTALL)
    return not_judged(
        f"base {base} cannot be loaded as {class_name}: {error}",
        "check that the directory holds a complete model that transformers can load",
    )


def remote_code_needed(base: str | None = None) -> Finding:
    """`base` is None if its config.json asks for code."""
    what = f"base {base}" if base else "the base's config.json"
    return not_judged(
        f"{what} needs Python code that comes with the base, and the gate's config does not allow it to run",
        "read that code, pin base.revision to the commit that you have read, and set trust-remote-code: true, in "
        f"{A_FILE}",
    )


def base_of_another_class(base: str, class_name: str) -> Finding:
    return not_judged(
        f"base {base} holds none of the tensors of {class_name}: transformers would fill all of them with random "
        "values",
        "name the base that the adapter was trained on: this one has another class (for text and images, if the "
        "adapter is for text alone), or other names in its files",
    )


def tensor_without_values(name: str) -> Finding:
    return not_judged(f"tensor {name} has no values (it is on the meta device), so it cannot be checked")


def not_measured(module: str, error: Caught) -> Finding:
    return not_judged(f"{module} could not be measured: {error}")


def worker_raised(error: Caught, in_import: bool = False) -> Finding:
    """An exception that no one expected, or a lack of memory. `in_import`: Python was importing a module."""
    # torch has no class of its own for a lack of memory on the CPU: a RuntimeError that names its allocator
    if error.is_a("MemoryError", "OutOfMemoryError") or "DefaultCPUAllocator" in error.text:
        return not_judged(
            "out of memory while judging this adapter",
            "use a machine (or a GPU) with more memory, or gate the adapter in a smaller dtype",
        )
    if in_import and error.is_a("OSError", "ImportError"):
        return not_judged(
            f"a library of the gate could not be imported: {error.text}",
            "the environment that runs the gate is damaged, or changes during the run: install it again",
        )
    if error.is_a("OSError"):
        return not_judged(
            f"a file of the adapter or its base could not be read when it was to be merged: {error.text}",
            "check that nothing changes these files during a run, and that the disk is sound",
        )
    return not_judged(
        f"the gate could not judge this adapter: {error}",
        "if the adapter loads and merges with PEFT itself, this is a bug of merge-gate: please report it, with "
        f"{_EVIDENCE}",
        log=error.log,
    )


REFUSALS: tuple[Callable[..., Finding], ...] = (
    unknown_method, config_unreadable, base_raised, remote_code_needed, base_of_another_class, tensor_without_values,
    not_measured, worker_raised,
)  # fmt: skip
