"""In-toto statements about published directories and reports: what they say, and what is not attested."""

import base64
import json
import re
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from merge_gate._internal.errors import UsageError
from merge_gate.cli.dispatch import main
from merge_gate.features.attest import statement
from merge_gate.features.attest.statement import Predicate, statements_of
from merge_gate.features.publish.manifest import Manifest
from merge_gate.records.files import CARD_NAME, MANIFEST_NAME, HashedFile
from merge_gate.records.terms import Verdict
from merge_gate.report.formats import json_report
from tests.support import published, reports
from tests.support.field_tables import field_table, held_table
from tests.support.tried import tried

NOW = datetime(2026, 11, 27, 20, 15, tzinfo=UTC)
GUIDE = Path(__file__).resolve().parents[3] / "docs" / "guides" / "attestations.md"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    published.publish(tmp_path / "model")
    return tmp_path / "model"


def test_the_tables_of_fields_are_what_the_records_say() -> None:
    manifest = field_table(Manifest)
    held_table("guides/attestations.md", "fields of Manifest", manifest)
    held_table("guides/attestations.md", "fields of Predicate", field_table(Predicate, explained=manifest))


def test_a_statement_is_in_toto_and_lists_every_file(model: Path) -> None:
    document = json.loads(statements_of(str(model), (), NOW)[0])
    assert document["_type"] == "https://in-toto.io/Statement/v1"
    assert document["predicateType"] == "urn:merge-gate:verdict:1"
    assert [subject["name"] for subject in document["subject"]] == [
        *sorted((*published.FILES, CARD_NAME)),
        MANIFEST_NAME,
    ]
    assert document["predicate"]["verdict"] == "passed"
    assert document["predicate"]["attested_at"] == "2026-11-27T20:15:00Z"
    assert document["predicate"]["base"]["sha256"] == reports.report(reports.adapter()).bases[0].sha256


@pytest.mark.attempt("T10", "attest a hand-made directory that fits its own merge-gate.json", "the statement says so")
def test_a_statement_says_where_its_verdict_is_from(model: Path, tmp_path: Path) -> None:
    (of_directory,) = statements_of(str(model), (), NOW)
    assert json.loads(of_directory)["predicate"]["verdict_from"] == MANIFEST_NAME
    (tmp_path / "report.json").write_text(json_report.render(reports.report(reports.adapter())))
    (of_report,) = statements_of(str(tmp_path), (), NOW)
    assert json.loads(of_report)["predicate"]["verdict_from"] == "report.json"


def test_each_adapter_of_a_report_has_its_own_statement(tmp_path: Path) -> None:
    adapters = (reports.adapter("a"), reports.adapter("b", Verdict.FAILED, findings=(reports.NAN,)))
    (tmp_path / "report.json").write_text(json_report.render(reports.report(*adapters)))
    documents = [json.loads(one) for one in statements_of(str(tmp_path), (), NOW)]
    assert [(one["predicate"]["name"], one["predicate"]["verdict"]) for one in documents] == [
        ("a", "passed"),
        ("b", "failed"),
    ]
    assert documents[0]["subject"] == [{"name": "adapter_model.safetensors", "digest": {"sha256": reports.SHA256}}]
    assert [json.loads(one)["predicate"]["name"] for one in statements_of(str(tmp_path), ["b"], NOW)] == ["b"]


# --- what is not attested --------------------------------------------------------------------------------------------


CHANGES = published.CHANGES | {
    "a byte of a weight": lambda model: published.flip(model / "model.safetensors"),
    "a byte of the manifest": lambda model: published.flip(model / MANIFEST_NAME),
    "a folder behind a link": lambda model: published.link(model / "additional_chat_templates"),
    "an empty directory": lambda model: (model.rename(model.with_name("elsewhere")), model.mkdir()),
}


@pytest.mark.parametrize("change", tried("T05", "attested directory", "refused", CHANGES))
def test_a_changed_directory_is_not_attested(model: Path, change: Callable[[Path], object]) -> None:
    change(model)
    with pytest.raises(UsageError):
        statements_of(str(model), (), NOW)


MANY_FILES = tuple(
    HashedFile(path=f"{n}.bin", size_bytes=1, sha256="0" * 64) for n in range(statement.MOST_SUBJECTS + 1)
)


@pytest.mark.parametrize(
    ("adapters", "fields", "only"),
    [
        ((), {}, ()),
        ((reports.adapter(),), {"complete": False}, ()),
        ((reports.adapter(),), {"files_only": True}, ()),
        ((reports.adapter(),), {"is_comparison": True}, ()),
        ((reports.adapter(),), {}, ("other",)),
        ((reports.adapter(files=()),), {}, ()),
        ((reports.adapter(files=MANY_FILES),), {}, ()),
    ],
)
def test_a_report_without_anything_to_attest_is_refused(
    tmp_path: Path, adapters: Any, fields: dict[str, bool], only: tuple[str, ...]
) -> None:
    (tmp_path / "report.json").write_text(json_report.render(reports.report(*adapters, **fields)))
    with pytest.raises(UsageError):
        statements_of(str(tmp_path), only, NOW)


# --- the command, and the guide --------------------------------------------------------------------------------------


def test_the_command_prints_a_line_for_each_statement(model: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["attest", str(model)]) == 0
    (line,) = capfdbinary.readouterr().out.splitlines()
    assert json.loads(line)["predicate"]["published"] is True
    assert main(["attest", str(model), "--only", "x"]) == 2
    published.flip(model / "config.json")
    assert main(["attest", str(model)]) == 2
    assert capfdbinary.readouterr().out == b""


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, ()),
        ({"verdict": "failed"}, ("verdict",)),
        ({"base": {"sha256": "0" * 64}}, ("base",)),
        ({"attested_at": "2026-01-01T00:00:00Z"}, ("attested_at",)),
        ({"attested_at": "2999-01-01T00:00:00Z"}, ("attested_at",)),
        ({"attested_at": "yesterday"}, ("attested_at",)),
    ],
)
def test_the_guide_checks_verdict_base_and_age_in_a_bundle(
    model: Path, tmp_path: Path, changes: dict[str, Any], failing: tuple[str, ...]
) -> None:
    """A Sigstore bundle is JSON with a DSSE envelope, whose payload is a statement in base64."""
    document = json.loads(statements_of(str(model), (), datetime.now(UTC))[0])
    digest = document["predicate"]["base"]["sha256"]
    document["predicate"] |= changes
    payload = base64.b64encode(json.dumps(document).encode()).decode()
    (tmp_path / "support.sigstore.json").write_text(json.dumps({"dsseEnvelope": {"payload": payload}}))
    guide = GUIDE.read_text(encoding="utf-8").partition("## Check a signature")[2].replace("SHA256", digest)
    extract, *checks = re.findall(r"^jq .*$", guide, re.MULTILINE)
    subprocess.run(["bash", "-ec", extract], cwd=tmp_path, check=True)
    assert len(checks) == 3
    for name, check in zip(("verdict", "base", "attested_at"), checks, strict=True):
        assert name in check
        ended = subprocess.run(["bash", "-c", check], cwd=tmp_path, capture_output=True, check=False)
        assert (ended.returncode != 0) == (name in failing), ended.stderr
