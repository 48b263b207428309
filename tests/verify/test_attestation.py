"""`merge-gate verify --attestation`, without a merge: the directory against its own record, and the attestation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from merge_gate.cli.dispatch import main
from merge_gate.records.terms import Verdict
from merge_gate.verify.attestation import UNKNOWN, attested_report, read_attestation
from tests.support import published, reports

KEY = ed25519.Ed25519PrivateKey.generate()
OTHER = ed25519.Ed25519PrivateKey.generate()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Path:
    """The current directory, with a published model, two public keys, and an attestation of the model."""
    monkeypatch.chdir(tmp_path)
    published.publish(tmp_path / "model")
    pem, info = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "key.pem").write_bytes(
        KEY.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (tmp_path / "key.pub").write_bytes(KEY.public_key().public_bytes(pem, info))
    (tmp_path / "other.pub").write_bytes(OTHER.public_key().public_bytes(pem, info))
    assert main(["attest", "model", "--key", "key.pem"]) == 0
    (tmp_path / "attestation.json").write_bytes(capfdbinary.readouterr().out)
    return tmp_path


def verify(*words: str, key: str = "key.pub") -> int:
    return main(["verify", "model", "--attestation", "attestation.json", "--key", key, *words])


def entry(place: Path) -> dict[str, Any]:
    (adapter,) = json.loads((place / "merge-gate-verify" / "report.json").read_text())["adapters"]
    return adapter  # type: ignore[no-any-return]


def test_a_good_attestation_passes(place: Path) -> None:
    assert verify("--max-age", "1") == 0
    assert "attested" in {found["check"] for found in entry(place)["findings"]}


def test_another_signer_fails(place: Path) -> None:
    assert verify(key="other.pub") == 1
    assert (entry(place)["verdict"], entry(place)["cause"]) == ("failed", "attestation")


def test_a_changed_file_fails_although_its_record_was_changed_too(place: Path) -> None:
    (place / "model" / "config.json").write_bytes(b"[]")
    (place / "model" / "merge-gate.json").unlink()
    saved, published.FILES["config.json"] = published.FILES["config.json"], b"[]"
    try:
        published.publish(place / "model")
    finally:
        published.FILES["config.json"] = saved
    assert main(["verify", "model"]) == 0, "the record alone proves nothing about its writer"
    assert verify() == 1


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, marks=pytest.mark.attempt(f"Y59{row}", f"verify {' '.join(words)}", "earlier report stale"))
        for row, words in zip(
            "abcdefgh",
            (
                ("model", "--key", "key.pub"),
                ("model", "--max-age", "3"),
                ("model", "--attestation", "attestation.json"),
                ("model", "--attestation", "nowhere", "--key", "key.pub"),
                ("model", "--attestation", "attestation.json", "--key", "key.pem"),
                ("model", "--base", "model"),
                ("merge-gate-verify",),
                ("adapter", "--base", "model", "--adapter", "model"),
            ),
            strict=True,
        )
    ],
)
def test_a_mistake_is_refused_and_marks_the_earlier_report(place: Path, words: tuple[str, ...]) -> None:
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").touch()
    assert main(["verify", "model"]) == 0
    assert main(["verify", *words]) == 2
    assert json.loads((place / "merge-gate-verify" / "report.json").read_text())["stale"] == "pass"


@pytest.mark.parametrize("days", ["0", "-1", "x", "1e9", "inf", ""])
def test_an_age_is_a_number_of_days(place: Path, days: str) -> None:
    with pytest.raises(SystemExit) as ended:
        verify("--max-age", days)
    assert ended.value.code == 2


def test_the_base_must_be_the_one_of_the_attestation(place: Path) -> None:
    attestation = read_attestation("attestation.json", "key.pub", None)
    report = reports.adapter("model")
    base = reports.report(reports.adapter()).bases[0].sha256
    assert attested_report(report, "model", attestation, base).verdict is Verdict.PASSED
    for digest in ("0" * 64, UNKNOWN):
        assert attested_report(report, "model", attestation, digest).cause == "attestation"


def test_an_error_stays_an_error_and_a_bad_attestation_is_a_failure(place: Path) -> None:
    attestation = read_attestation("attestation.json", "key.pub", None)
    crashed = reports.adapter("model", Verdict.ERROR, findings=(reports.CRASH,), cause="not-judged")
    assert attested_report(crashed, "model", attestation, None) == crashed
    (place / "model" / "more").write_bytes(b"")
    assert attested_report(crashed, "model", attestation, None).verdict is Verdict.FAILED
