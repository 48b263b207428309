"""docs/guides/attestations.md: its table, and its conditions on a bundle, as a reader types them."""

import base64
import hashlib
import json
import re
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from merge_gate.features.publish.manifest import Manifest
from merge_gate.records.files import MANIFEST_NAME
from merge_gate.records.terms import Verdict
from merge_gate.report.formats import json_report
from tests.support import published, reports
from tests.support.field_tables import field_table, held_table

PAGE = Path(__file__).resolve().parents[3] / "docs" / "guides" / "attestations.md"
WEIGHTS = b"weights"
DAY = 86400


def test_the_tables_of_fields_are_what_the_records_say() -> None:
    held_table("guides/attestations.md", "fields of Manifest", field_table(Manifest))


def commands(word: str) -> list[str]:
    """The page's commands on bundles that contain this word."""
    text = PAGE.read_text(encoding="utf-8").partition("## Check a signature")[2]
    return [line for line in re.findall(r"^ *((?:jq|weights=).*)$", text, re.MULTILINE) if word in line]


def bundle(path: Path, predicate: object, signed_at: float) -> None:
    """A Sigstore bundle is JSON with a DSSE envelope, whose payload is a statement in base64."""
    payload = base64.b64encode(json.dumps({"predicate": predicate}).encode()).decode()
    entries = [{"logIndex": "7", "integratedTime": str(int(signed_at))}]
    path.write_text(
        json.dumps({"verificationMaterial": {"tlogEntries": entries}, "dsseEnvelope": {"payload": payload}})
    )


def ends(folder: Path, *lines: str) -> int:
    return subprocess.run(["bash", "-ec", "\n".join(lines)], cwd=folder, capture_output=True, check=False).returncode


@pytest.mark.parametrize(
    ("changes", "age", "failing"),
    [
        ({}, 0, set()),
        ({"verdict": "failed"}, 0, {"verdict"}),
        ({"base": {"sha256": "0" * 64}}, 0, {"base"}),
        ({}, 31 * DAY, {"integratedTime"}),
    ],
)
def test_the_page_checks_a_model_in_a_bundle(
    tmp_path: Path, changes: dict[str, Any], age: float, failing: set[str]
) -> None:
    published.publish(tmp_path / "model")
    manifest = json.loads((tmp_path / "model" / MANIFEST_NAME).read_text())
    bundle(tmp_path / "support.sigstore.json", manifest | changes, time.time() - age)
    conditions = {
        "verdict": commands('.verdict == "passed"'),
        "base": [line.replace("SHA256", manifest["base"]["sha256"]) for line in commands(".base.sha256")],
        "integratedTime": commands("integratedTime"),
    }
    (extract,) = commands("payload support.sigstore.json")
    for name, (condition,) in conditions.items():
        assert (ends(tmp_path, extract, condition) != 0) == (name in failing), name


@pytest.mark.parametrize(
    ("fields", "verdict", "failing"),
    [
        ({}, Verdict.PASSED, set()),
        ({"complete": False}, Verdict.PASSED, {"complete"}),
        ({"files_only": True}, Verdict.PASSED, {"complete"}),
        ({"is_comparison": True}, Verdict.PASSED, {"complete"}),
        ({}, Verdict.FAILED, {"weights"}),
        ({"other weights": True}, Verdict.PASSED, {"weights"}),
        ({"another base": True}, Verdict.PASSED, {"base"}),
        ({"judged": "2026-01-01T00:00:00Z"}, Verdict.PASSED, {"date"}),
        ({"judged": "2999-01-01T00:00:00Z"}, Verdict.PASSED, {"date"}),
    ],
)
def test_the_page_checks_an_adapter_in_a_bundle(
    tmp_path: Path, fields: dict[str, Any], verdict: Verdict, failing: set[str]
) -> None:
    weights = tmp_path / "adapters" / "support" / "adapter_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(WEIGHTS)
    document = json.loads(json_report.render(reports.report(reports.adapter(verdict=verdict))))
    (entry,), digest = document["adapters"], document["bases"][0]["sha256"]
    if "other weights" not in fields:
        entry["files"][0]["sha256"] = hashlib.sha256(WEIGHTS).hexdigest()
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    entry["judged"] = (entry["judged"] or {}) | {"at": fields.get("judged", now)}
    document |= {key: value for key, value in fields.items() if key in document}
    bundle(tmp_path / "adapter.sigstore.json", document, time.time())
    conditions = {
        "complete": commands("files_only"),
        "weights": commands("$sha256"),
        "base": [
            line.replace("SHA256", "0" * 64 if "another base" in fields else digest) for line in commands("all(.bases")
        ],
        "date": commands("judged.at"),
    }
    (extract,), (digest_of_weights,) = commands("payload adapter.sigstore.json"), commands("weights=")
    for name, (condition,) in conditions.items():
        assert (ends(tmp_path, extract, digest_of_weights, condition) != 0) == (name in failing), name
