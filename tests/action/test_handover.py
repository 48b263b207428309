"""A token by standard input: what goes in comes out, and a line that does not come is an error."""

from __future__ import annotations

import io

import pytest

from merge_gate.action.docker import handover
from merge_gate.errors import LauncherError
from tests.support.wording import Wording


def test_what_is_written_is_read() -> None:
    variables = {"HF_TOKEN": "hf_x", "HTTPS_PROXY": "http://user:pässword\n@proxy"}
    line = handover.written(variables)
    assert line.count(b"\n") == 1
    stream = io.BytesIO(line + b"more")
    assert handover.read({handover.MARKER: "1"}, stream) == variables
    assert stream.read() == b"more"


def test_nothing_promised_nothing_read() -> None:
    stream = io.BytesIO(b'{"HF_TOKEN": "x"}\n')
    assert handover.read({}, stream) == {}
    assert stream.tell() == 0


@pytest.mark.parametrize("data", [b"", b'{"HF_TO', b"[]\n", b"\xff\n"])
def test_a_line_that_does_not_come_is_an_error(data: bytes, wording: Wording) -> None:
    with pytest.raises(LauncherError) as raised:
        handover.read({handover.MARKER: "1"}, io.BytesIO(data))
    wording(raised.value)
    assert raised.value.hint


def test_a_line_that_would_not_fit_is_not_sent(wording: Wording) -> None:
    with pytest.raises(LauncherError) as caught:
        handover.written({"HF_TOKEN": "x" * 100_000})
    wording(caught.value)
