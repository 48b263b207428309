"""The lists of `tests.support.schedule` name files that exist, and all files that share an expensive fixture."""

import re
import subprocess
import sys
from pathlib import Path

from tests.support.schedule import FIRST, ONE_BY_ONE, TOGETHER

ROOT = Path(__file__).resolve().parents[1]


def is_gone(file: str) -> bool:
    """Whether a folder of tests has no such file. The folder of a feature may be absent."""
    return (ROOT / file).parent.is_dir() and not (ROOT / file).is_file()


def test_every_listed_file_exists() -> None:
    assert [file for file in (*TOGETHER, *ONE_BY_ONE) if is_gone(file)] == []
    assert not ONE_BY_ONE & TOGETHER.keys()
    assert [unit for unit in FIRST if unit not in TOGETHER.values() and is_gone(unit)] == []
    assert not {*ONE_BY_ONE, *TOGETHER} & {*FIRST}, "no such unit of work"


def test_every_file_that_needs_the_judged_cases_is_grouped() -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"\bjudged: Judged\b", path.read_text(encoding="utf-8"))
    }
    assert users == {file for file, group in TOGETHER.items() if group == "judged"}


def test_the_sweeps_have_what_make_test_leaves_out_or_shortens() -> None:
    """Tests that are marked `slow`, and properties, which pytest's plugin of hypothesis marks."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    left_out, swept = (
        re.search(rf"^{name}:.*\n.*-m \"([^\"]+)\"", makefile, re.MULTILINE) for name in ("test", "sweeps")
    )
    assert swept is not None
    assert left_out[1] == "not slow and not nightly"
    file = ROOT / "tests" / "internal" / "test_strict_json.py"
    properties = re.findall(r"^@given\(.*\n(?:@.*\n)*def (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--collect-only", "-m", swept[1], str(file)]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert sorted(re.findall(r"::(\w+)$", listed, re.MULTILINE)) == sorted(properties) != []
    assert swept[1] == "(slow or hypothesis) and not nightly"
