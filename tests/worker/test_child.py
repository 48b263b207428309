"""What the child says of an exception that kept it from judging an adapter."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import pytest

from merge_gate.errors import EngineError
from merge_gate.worker import child

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.wording import Wording


def test_an_exception_becomes_a_sentence(wording: Wording) -> None:
    refusal = child._refusal(ValueError("\n  first line\nsecond line"))
    assert "ValueError: first line" in refusal.message
    assert "second" not in refusal.message
    wording(refusal, child._refusal(ValueError()))
    assert len(child._refusal(ValueError("x" * 9000)).message) < 600


def test_our_own_errors_keep_their_hint() -> None:
    refusal = child._refusal(EngineError("what", hint="what next"))
    assert (refusal.check, refusal.message, refusal.hint) == (None, "what", "what next")


def test_out_of_memory_is_told_from_a_bug(wording: Wording) -> None:
    import torch  # noqa: PLC0415 - see conftest

    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(1 << 60, dtype=torch.uint8)
    refusal = child._refusal(MemoryError())
    for error in (of_torch.value, torch.OutOfMemoryError("CUDA out of memory")):
        assert child._refusal(error) == refusal
    wording(refusal)


def test_a_file_that_went_away_is_told_from_a_bug(wording: Wording) -> None:
    refusal = child._refusal(FileNotFoundError(2, "No such file or directory", "model.safetensors"))
    assert "model.safetensors" in refusal.message
    wording(refusal)


def test_a_library_that_cannot_be_imported_is_told_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wording: Wording
) -> None:
    """A shared object that is not there is an OSError, as torch raises it; one of a Python module an ImportError."""
    (tmp_path / "broken_library.py").write_text("import ctypes\nctypes.CDLL('libnowhere.so.1')\n")
    (tmp_path / "broken_extension.py").write_text("from os import no_such_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, words in (("broken_library", "libnowhere.so.1"), ("broken_extension", "no_such_name")):
        with pytest.raises((OSError, ImportError)) as caught:
            importlib.import_module(name)
        refusal = child._refusal(caught.value)
        assert words in refusal.message
        wording(refusal.message.partition(": ")[0], refusal.hint)
