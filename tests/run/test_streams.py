"""The command's streams: closed, full, without a reader or in a poor encoding, none of which may end a run."""

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from merge_gate.run import streams
from tests.support.command import shell

CONTROL = "a\x1b[31mb\n::error::c"


def end_of(stream: io.TextIOWrapper) -> str:
    return str(Path(f"/proc/self/fd/{stream.fileno()}").readlink())


def broken_pipe() -> io.TextIOWrapper:
    """A stream whose reader has gone away."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", encoding="utf-8")


def test_lines_go_to_their_streams_and_are_inert(capsys: pytest.CaptureFixture[str]) -> None:
    streams.say(CONTROL)
    streams.tell("::error::d")
    out, err = capsys.readouterr()
    assert out == ": :error::d\n"
    assert err == "a\ufffd[31mb\n: :error::c\n"


def test_a_reader_who_went_away_ends_nothing() -> None:
    with broken_pipe() as stream:
        for _ in range(3):
            streams.write(stream, "verdict\n")
        assert end_of(stream) == os.devnull
    assert stream.closed, "closing it flushes once more, and finds /dev/null"


def test_a_full_disk_ends_nothing() -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as stream:
        streams.write(stream, "verdict\n")
        assert end_of(stream) == os.devnull


def test_a_closed_stream_ends_nothing() -> None:
    stream = io.StringIO()
    stream.close()
    streams.write(stream, "verdict\n")
    with pytest.raises(ValueError, match="closed"):
        stream.getvalue()


def test_what_is_flushed_at_the_end_may_fail() -> None:
    with broken_pipe() as out, redirect_stdout(out), redirect_stderr(io.StringIO()):
        out.write("never read")
        streams.flush_streams()
        assert end_of(out) == os.devnull


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_encoding_cannot_say_is_replaced(encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    streams.write(stream, "é✓")
    stream.seek(0)
    assert stream.read() == {"ascii": "??", "latin-1": "é?", "utf-8": "é✓"}[encoding]
    assert streams.is_ascii(stream) == (encoding != "utf-8")


def test_a_stream_without_an_encoding_takes_all() -> None:
    assert streams.encodable("é✓", io.StringIO()) == "é✓"


SHOW = """
import os, sys
from merge_gate.run.streams import mend_streams
mend_streams()
first = os.open(os.devnull, os.O_RDONLY)
print("lost", flush=True)
print("lost", file=sys.stderr, flush=True)
ends = [os.readlink(f"/proc/self/fd/{number}") for number in range(3)]
with open("seen", "w") as file:
    print(*ends, first > 2, repr(sys.stdin.read(1)), file=file)
"""


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "2>&-", ""])
def test_a_stream_that_the_caller_closed_takes_no_files_number(closed: str, tmp_path: Path) -> None:
    (tmp_path / "show.py").write_text(SHOW, encoding="utf-8")
    answer = shell(f'"{sys.executable}" show.py {closed}', cwd=tmp_path)
    assert answer.code == 0, answer.said
    *ends, is_free, read = (tmp_path / "seen").read_text(encoding="utf-8").split()
    assert (is_free, read) == ("True", "''")
    assert [end == os.devnull for end in ends] == [True, "1" in closed or closed.startswith("<"), bool(closed)]
