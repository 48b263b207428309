"""What the worker says of an exception that kept it from judging an adapter."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import pytest

from merge_gate._internal.errors import EngineError
from merge_gate.judging.all_checks import refused
from merge_gate.records.refusals import MOST_OF_LOG, NotJudged
from merge_gate.worker.protocol import refusal_of

if TYPE_CHECKING:
    from pathlib import Path


BUG = refused(refusal_of(ValueError("x"))).hint
"""What is to be done about an exception that nothing explains. The sentences are in the golden of tests/judging."""


def test_the_log_of_an_exception_is_bounded_in_the_worker() -> None:
    """A message can name every tensor of a file, and the log goes through the channel."""
    error = refusal_of(ValueError("x" * 1_000_000)).fields["error"]
    assert len(error.log) == MOST_OF_LOG


def test_an_exception_becomes_a_sentence() -> None:
    finding = refused(refusal_of(ValueError("\n  first line\nsecond line")))
    assert "ValueError: first line" in finding.message
    assert "second" not in finding.message
    assert finding.hint == BUG
    assert "ValueError" in refused(refusal_of(ValueError())).message
    assert len(refused(refusal_of(ValueError("x" * 9000))).message) < 600


def test_our_own_errors_keep_their_hint() -> None:
    assert refusal_of(EngineError("what", hint="what next")) == NotJudged(message="what", hint="what next")


def test_out_of_memory_is_told_from_a_bug() -> None:
    import torch  # noqa: PLC0415 - see conftest

    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(1 << 60, dtype=torch.uint8)
    refusal = refused(refusal_of(MemoryError()))
    assert refusal.hint not in {"", BUG}
    for error in (of_torch.value, torch.OutOfMemoryError("CUDA out of memory")):
        assert refused(refusal_of(error)) == refusal


def test_a_file_that_went_away_is_told_from_a_bug() -> None:
    refusal = refused(refusal_of(FileNotFoundError(2, "No such file or directory", "model.safetensors")))
    assert "model.safetensors" in refusal.message
    assert refusal.hint not in {"", BUG}


def test_a_library_that_cannot_be_imported_is_told_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared object that is not there is an OSError, as torch raises it; one of a Python module an ImportError."""
    (tmp_path / "broken_library.py").write_text("import ctypes\nctypes.CDLL('libnowhere.so.1')\n")
    (tmp_path / "broken_extension.py").write_text("from os import no_such_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    hints = set()
    for name, words in (("broken_library", "libnowhere.so.1"), ("broken_extension", "no_such_name")):
        with pytest.raises((OSError, ImportError)) as caught:
            importlib.import_module(name)
        refusal = refused(refusal_of(caught.value))
        assert words in refusal.message
        assert refusal.hint not in {"", BUG}
        hints.add(refusal.hint)
    assert len(hints) == 1
    assert refused(refusal_of(FileNotFoundError(2, "No such file or directory", "x"))).hint not in hints
