"""report.json: strict, complete, and as its schema says."""

import json
import math
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_gate._internal.errors import UsageError
from merge_gate.records.measured import TensorMerge, TensorStats
from merge_gate.records.report import Report
from merge_gate.report.formats.json_report import read, render
from tests.support.reports import EMPTY, FAIL, PASS, PASSED, UNDECIDED, adapter, hostile_reports, report
from tests.support.schemas import report_schema, stored
from tests.support.wording import Wording

VALIDATOR = jsonschema.Draft202012Validator(report_schema())


def _refuse(constant: str) -> None:
    raise AssertionError(f"bare {constant} in report.json")


def parse(text: str) -> dict[str, Any]:
    document = json.loads(text.encode("utf-8"), parse_constant=_refuse)
    VALIDATOR.validate(document)
    return document


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(report_schema())


def test_the_schema_file_is_what_the_code_says() -> None:
    assert stored("report", report_schema()) == report_schema(), "look at the difference, then run make schemas"


@pytest.mark.parametrize(
    ("run", "result"),
    [
        (PASS, "pass"),
        (FAIL, "fail"),
        (UNDECIDED, "error"),
        (EMPTY, "error"),
        (report(), "error"),
        (report(PASSED, complete=False), "error"),
    ],
)
def test_result(run: Report, result: str) -> None:
    assert parse(render(run))["result"] == result


def test_figures_that_json_cannot_say_are_strings() -> None:
    measured = parse(render(FAIL))["adapters"][3]["findings"][0]["measured"]
    assert measured == {"largest": 65504.0, "headroom": "Infinity"}
    text = render(report(adapter(seconds=float("nan"))))
    assert parse(text)["adapters"][0]["seconds"] is None
    assert math.isnan(read(text.encode(), "report.json").adapters[0].seconds)


def test_a_name_that_is_not_utf8_is_still_told_apart() -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert parse(render(report(adapter(name))))["adapters"][0]["name"] == "caf\\udce9"


def test_names_come_through_unchanged_and_harmless() -> None:
    name = "##[error]x \u202e\x85\u200b\x1b[31m 名前"
    text = render(report(adapter(name)))
    assert "##[" not in text
    assert not {"\u202e", "\x85", "\u200b", "\x1b"} & set(text)
    assert "名前" in text
    assert parse(text)["adapters"][0]["name"] == name


def test_the_schema_refuses_what_is_wrong() -> None:
    for key, value in (("result", "passed"), ("complete", 1), ("schema_version", "2.0"), ("adapters", {})):
        document = json.loads(render(FAIL)) | {key: value}
        assert not VALIDATOR.is_valid(document), key
    passed_with_cause = json.loads(render(PASS))
    passed_with_cause["adapters"][0]["cause"] = "no-effect"
    assert not VALIDATOR.is_valid(passed_with_cause)
    assert VALIDATOR.is_valid(json.loads(render(PASS)) | {"added_later": 1})


def test_the_tensors_are_a_table_with_a_line_for_each() -> None:
    stats = TensorStats(
        name="a.weight", dtype="float16", shape=(2, 3), numel=6, minimum=-1 / 3, maximum=None, nan=1, first_index=(0, 1)
    )
    merge = TensorMerge(module="a", stats=stats, dtype_max=65504.0, changed=True, delta_norm=float("inf"))
    text = render(report(adapter(tensors=(merge, merge))))
    (row, _) = [line for line in text.splitlines() if '"a.weight"' in line]
    table = parse(text)["adapters"][0]["tensors"]
    assert json.loads(row.strip().rstrip(",")) == table["rows"][0]
    assert dict(zip(table["columns"], table["rows"][0], strict=True)) == {
        "module": "a", "name": "a.weight", "dtype": "float16", "shape": [2, 3], "numel": 6, "minimum": -0.333333,
        "maximum": None, "nan": 1, "posinf": 0, "neginf": 0, "first_index": [0, 1], "dtype_max": 65504.0,
        "changed": True, "base_norm": None, "delta_norm": None, "lost_norm": None, "unchanged_fraction": None,
        "estimated": False,
    }  # fmt: skip


# --- back ----------------------------------------------------------------------------------------------------------


@given(hostile_reports())
def test_a_report_comes_back_as_it_was_written(run: Report) -> None:
    text = render(run)
    assert render(read(text.encode(), "report.json")) == text


def test_keys_of_a_later_version_are_ignored() -> None:
    document = json.loads(render(FAIL)) | {"schema_version": "1.7", "later": 1}
    for judged in document["adapters"]:
        del judged["tensors"]
    bare = tuple(replace(judged, tensors=()) for judged in FAIL.adapters)
    assert read(json.dumps(document).encode(), "r") == replace(FAIL, adapters=bare)


def test_a_column_that_an_earlier_version_lacked_has_its_default() -> None:
    document = json.loads(render(FAIL))
    columns = ["module", "name", "dtype", "shape", "numel", "dtype_max", "changed"]
    for judged in document["adapters"]:
        judged["tensors"] = {"columns": columns, "rows": [["m", "m.weight", "float32", [2, 3], 6, 3.4e38, True]]}
    merge = TensorMerge(
        module="m",
        stats=TensorStats(name="m.weight", dtype="float32", shape=(2, 3), numel=6),
        dtype_max=3.4e38,
        changed=True,
    )
    assert read(json.dumps(document).encode(), "r").adapters[0].tensors == (merge,)


def _edited(path: str, value: Any) -> bytes:
    document = json.loads(render(FAIL))
    *above, last = path.split(".")
    place = document
    for key in above:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[last] = value
    return json.dumps(document).encode()


def _forged() -> bytes:
    """A failed adapter passes, and counts and result follow. Its errors stay."""
    document = json.loads(_edited("adapters.2.verdict", "passed"))
    failed = document["adapters"][2]
    failed["cause"] = None
    verdicts = [adapter["verdict"] for adapter in document["adapters"]]
    document["counts"] = {verdict: verdicts.count(verdict) for verdict in ("passed", "failed", "error")}
    document["result"] = "fail" if "failed" in verdicts else "error" if "error" in verdicts else "pass"
    document["accepted"] = 0
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b"", "JSON"),
        (b"[]", "array"),
        (b"{}", "schema_version"),
        (_edited("schema_version", "2.0"), "schema_version is 2.0"),
        (_edited("tool.name", "other"), "tool.name"),
        (_edited("result", "pass"), "result"),
        (_edited("counts.passed", 5), "counts"),
        (_edited("adapters.0.verdict", "<script>"), "adapters[0].verdict"),
        (_edited("adapters.0.line", -1), "adapters[0].line is -1"),
        (_edited("adapters.0.line", True), "adapters[0].line is True"),
        (_edited("adapters.0.cause", "no-effect"), "adapters[0]"),
        (_edited("adapters.2.cause", "headroom"), "adapters[2]"),
        (_edited("adapters.0.accepted", {"reason": "r", "owner": "o", "until": "2026-01-01"}), "adapters[0]"),
        (_forged(), "adapters[2]"),
        (_edited("adapters.2.findings", {}), "adapters[2].findings"),
        (_edited("adapters.2.findings.0.measured", {"x": "inf"}), "measured.x"),
        (_edited("adapters.0.tensors", {"columns": ["name"], "rows": [[]]}), "rows[0]"),
        (_edited("adapters.0.tensors", {"columns": ["name"], "rows": [["x"]]}), "rows[0].module"),
        (_edited("adapters.0.tensors", []), "adapters[0].tensors"),
        (_edited("adapters.0.tensors", {"columns": "name", "rows": []}), "columns is 'name'"),
        (_edited("adapters.0.tensors", {"columns": [7], "rows": []}), "tensors.columns[0]"),
        (_edited("adapters.0.tensors", {"columns": ["module"], "rows": [[3]]}), "rows[0].module"),
        (_edited("adapters.0.name", ["\u202e"]), "adapters[0].name"),
        (_edited("adapters.2.cause", None), "adapters[2] failed and has no cause"),
    ],
)  # fmt: skip
def test_what_is_no_report_is_refused_with_its_place(data: bytes, place: str, wording: Wording) -> None:
    with pytest.raises(UsageError) as caught:
        read(data, "r\u202e.json")
    assert place in caught.value.message
    assert caught.value.message.isprintable()
    wording(caught.value)


def stood(data: bytes) -> None:
    """A sentence, or a report that is written and read again as the same."""
    try:
        text = render(read(data, "report.json"))
    except UsageError as error:
        refused = error
    else:
        assert render(read(text.encode(), "report.json")) == text
        return
    assert refused.message.isprintable()
    assert refused.hint


@given(hostile_reports(), st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3), st.integers(0, 9)), min_size=1))
def test_other_bytes_in_a_report_are_a_sentence_or_a_report(run: Report, edits: list[tuple[float, bytes, int]]) -> None:
    data = render(run).encode()
    for share, insert, removed in edits:
        place = int(share * len(data))
        data = data[:place] + insert + data[place + removed :]
    stood(data)


_OTHERS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just([]) | st.just({})


@given(hostile_reports(), st.data())
def test_another_value_anywhere_is_a_sentence_or_another_report(run: Report, data: st.DataObject) -> None:
    document = json.loads(render(run))
    inside: Any = document
    while True:
        key = data.draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside))))
        if not inside[key] or not isinstance(inside[key], (dict, list)) or data.draw(st.booleans()):
            break
        inside = inside[key]
    if isinstance(inside, dict) and data.draw(st.booleans()):
        del inside[key]
    else:
        inside[key] = data.draw(_OTHERS)
    stood(json.dumps(document).encode())


@given(hostile_reports())
def test_every_report_is_strict_json_and_valid(run: Report) -> None:
    text = render(run)
    document = parse(text)
    assert document["counts"] == {
        name: sum(a["verdict"] == name for a in document["adapters"]) for name in document["counts"]
    }
    assert "##[" not in text
    assert not any(line.lstrip().startswith("::") for line in text.splitlines())
