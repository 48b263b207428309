"""Attestations from end to end: a statement is made, signed, and checked; and everything that it must not survive."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from merge_gate._internal.earlier_reports import mark_stale
from merge_gate._internal.errors import UsageError
from merge_gate.attest import statement
from merge_gate.attest.envelope import opened, read_key, signed
from merge_gate.attest.statement import InvalidStatementError, statements_of
from merge_gate.cli.dispatch import main
from merge_gate.publish.manifest import MANIFEST_NAME
from merge_gate.records.publication import CARD_NAME
from merge_gate.records.terms import Verdict
from merge_gate.report.formats import json_report
from merge_gate.verify.attestation import Attestation, attestation_problems
from tests.support import published, reports
from tests.support.tried import tried

if TYPE_CHECKING:
    from collections.abc import Callable

NOW = datetime(2026, 11, 27, 20, 15, tzinfo=UTC)
KEYS = {
    "ed25519": ed25519.Ed25519PrivateKey.generate(),
    "P-256": ec.generate_private_key(ec.SECP256R1()),
    "P-384": ec.generate_private_key(ec.SECP384R1()),
    "P-521": ec.generate_private_key(ec.SECP521R1()),
}


def private(key: Any) -> bytes:
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    return bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))


def public(key: Any) -> bytes:
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    return bytes(key.public_key().public_bytes(serialization.Encoding.PEM, info))


SIGNER = KEYS["ed25519"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    published.publish(tmp_path / "model")
    return tmp_path / "model"


def envelope_of(model: Path, key: Any = SIGNER, now: datetime = NOW) -> bytes:
    (statement_bytes,) = statements_of(str(model), (), now)
    return signed(statement_bytes, private(key))


def problems(envelope: bytes, model: Path, key: Any = SIGNER, **more: Any) -> tuple[str, ...]:
    attestation = Attestation(envelope=envelope, public_key=public(key), max_age_days=more.pop("max_age_days", None))
    return attestation_problems(attestation, model, **({"now": NOW} | more))


@pytest.mark.attempt("T00", "attest and verify with ed25519, P-256, P-384, and P-521 (control)", "accepted")
@pytest.mark.parametrize("kind", KEYS)
def test_what_is_signed_is_accepted_with_its_key_and_no_other(model: Path, kind: str) -> None:
    envelope = envelope_of(model, KEYS[kind])
    assert problems(envelope, model, KEYS[kind]) == ()
    for other, key in KEYS.items():
        if other != kind:
            assert problems(envelope, model, key), f"{kind} is accepted with a key of {other}"
    assert problems(envelope, model, ed25519.Ed25519PrivateKey.generate())


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


# --- what an attestation must not survive ----------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def other_folder(model: Path) -> None:
    (model / "additional_chat_templates").rename(model.parent / "elsewhere")
    (model / "additional_chat_templates").symlink_to(model.parent / "elsewhere")


def link(model: Path) -> None:
    (model / "config.json").rename(model.parent / "elsewhere")
    (model / "config.json").symlink_to(model.parent / "elsewhere")


def empty(model: Path) -> None:
    model.rename(model.parent / "elsewhere")
    model.mkdir()


CHANGES: dict[str, Callable[[Path], object]] = {
    "a byte of a weight": lambda model: flip(model / "model.safetensors"),
    "a byte of the config": lambda model: flip(model / "config.json"),
    "a byte of the manifest": lambda model: flip(model / MANIFEST_NAME),
    "a file more": lambda model: (model / "modeling.py").write_bytes(b""),
    "a hidden file more": lambda model: (model / ".x").write_bytes(b""),
    "a file less": lambda model: (model / "config.json").unlink(),
    "a link to the same bytes": link,
    "a folder behind a link": other_folder,
    "an empty directory": empty,
    "an empty folder more": lambda model: (model / "more").mkdir(),
    "a folder in a folder more": lambda model: (model / "a" / "b").mkdir(parents=True),
    "a pipe more": lambda model: os.mkfifo(model / "pipe"),
    "a hard link more": lambda model: os.link(model / "config.json", model / "other.json"),
}


@pytest.mark.parametrize("change", tried("T05", "attested directory", "refused", CHANGES))
def test_a_changed_directory_is_refused(model: Path, change: Callable[[Path], object]) -> None:
    envelope = envelope_of(model)
    change(model)
    assert problems(envelope, model)


@pytest.mark.attempt("T02a", "flipped bytes of an envelope, except the id of the key", "refused")
def test_no_flipped_byte_of_an_envelope_is_accepted(model: Path) -> None:
    envelope = envelope_of(model)
    accepted = []
    for place in range(0, len(envelope), 7):
        changed = bytearray(envelope)
        changed[place] ^= 1
        if not problems(bytes(changed), model):
            accepted.append(place)
    keyid = envelope.index(b"keyid")  # a hint, which nothing reads, and its name
    end = envelope.index(b'"sig"')
    assert [place for place in accepted if not keyid <= place < end] == []


@pytest.mark.attempt("T04", "replay of an old attestation, and one of the future", "refused")
def test_an_old_attestation_and_one_of_the_future_are_refused(model: Path) -> None:
    envelope = envelope_of(model)
    assert problems(envelope, model, now=NOW + timedelta(days=6.9), max_age_days=7) == ()
    assert problems(envelope, model, now=NOW + timedelta(days=7.1), max_age_days=7)
    assert problems(envelope, model, now=NOW + timedelta(days=900)) == ()
    assert problems(envelope, model, now=NOW - timedelta(minutes=5), max_age_days=7) == ()
    assert problems(envelope, model, now=NOW - timedelta(hours=1))


def test_another_base_is_refused(model: Path) -> None:
    envelope = envelope_of(model)
    base = reports.report(reports.adapter()).bases[0].sha256
    assert problems(envelope, model, base_sha256=base) == ()
    assert problems(envelope, model, base_sha256="0" * 64)


def changed_statement(model: Path, **predicate: Any) -> bytes:
    document = json.loads(statements_of(str(model), (), NOW)[0])
    document["predicate"] |= predicate
    return signed(json.dumps(document).encode(), private(SIGNER))


@pytest.mark.parametrize("verdict", tried("T03c", "signed verdict", "refused", {"failed": "failed", "error": "error"}))
def test_a_signed_verdict_that_is_not_passed_is_refused(model: Path, verdict: str) -> None:
    assert problems(changed_statement(model, verdict=verdict), model)


@pytest.mark.parametrize(
    "predicate",
    tried(
        "T03b",
        "signed predicate",
        "refused",
        {
            "an adapter's own files": {"published": False},
            "a verdict that is none": {"verdict": "good"},
            "a time that is none": {"attested_at": "yesterday"},
            "no base": {"base": None},
            "no time": {"attested_at": None},
        },
    ),
)
def test_a_signed_predicate_that_says_something_else_is_refused(model: Path, predicate: dict[str, Any]) -> None:
    assert problems(changed_statement(model, **predicate), model)


def test_an_attestation_of_an_adapters_files_is_none_of_a_model(model: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text(json_report.render(reports.report(reports.adapter())))
    (statement_bytes,) = statements_of(str(report), (), NOW)
    assert problems(signed(statement_bytes, private(SIGNER)), model)


@pytest.mark.parametrize(
    "subjects",
    tried(
        "T03d",
        "signed subjects",
        "refused",
        {
            "an empty list": [],
            "none": None,
            "a name outside": [{"name": "../outside", "digest": {"sha256": "0" * 64}}],
            "an absolute name": [{"name": "/etc/passwd", "digest": {"sha256": "0" * 64}}],
            "no digest": [{"name": "config.json"}],
            "SHA-1": [{"name": "config.json", "digest": {"sha1": "0" * 40}}],
            "a name twice": [{"name": "config.json", "digest": {"sha256": "0" * 64}}] * 2,
            "1,025 names": [{"name": f"{n}", "digest": {"sha256": "0" * 64}} for n in range(1025)],
            "a text": ["config.json"],
        },
    ),
)
def test_a_statement_with_other_subjects_is_refused(model: Path, subjects: Any) -> None:
    document = json.loads(statements_of(str(model), (), NOW)[0]) | {"subject": subjects}
    with pytest.raises(InvalidStatementError):
        statement.read(json.dumps(document).encode())
    assert problems(signed(json.dumps(document).encode(), private(SIGNER)), model)


@pytest.mark.parametrize("key", ["_type", "predicateType"])
def test_a_statement_of_another_type_is_refused(model: Path, key: str) -> None:
    document = json.loads(statements_of(str(model), (), NOW)[0]) | {key: "https://slsa.dev/provenance/v1"}
    assert problems(signed(json.dumps(document).encode(), private(SIGNER)), model)


@pytest.mark.parametrize(
    "change",
    tried(
        "T02c",
        "envelope",
        "refused",
        {
            "another payload type": {"payloadType": "text/plain"},
            "a payload that is no base64": {"payload": "!"},
            "no payload": {"payload": None},
            "no signatures": {"signatures": []},
            "no list of signatures": {"signatures": None},
            "65 signatures": {"signatures": [{"sig": "AAAA"}] * 65},
            "a signature that is a number": {"signatures": [3]},
            "a signature of 3 bytes": {"signatures": [{"sig": "AAAA"}]},
            "another payload": {"payload": base64.b64encode(b"{}").decode()},
            "a line break in base64": {"payload": "AA\nAA"},
            "the other alphabet of base64": {"payload": "-_AA"},
        },
    ),
)
def test_another_envelope_is_refused(model: Path, change: dict[str, Any]) -> None:
    envelope = json.dumps(json.loads(envelope_of(model)) | change).encode()
    assert problems(envelope, model)


@pytest.mark.parametrize(
    "envelope",
    tried(
        "T02d",
        "envelope",
        "refused",
        {
            "empty": b"",
            "a list": b"[]",
            "cut off": b"{",
            "no UTF-8": b"\xff",
            "a key twice": b'{"payloadType": 1, "payloadType": 2}',
            "NaN": b'{"payloadType": NaN}',
            "nested 100,000 deep": b"[" * 100_000,
        },
    ),
)
def test_bytes_that_are_no_envelope_are_refused(model: Path, envelope: bytes) -> None:
    assert problems(envelope, model)


def test_one_good_signature_among_others_is_enough(model: Path) -> None:
    document = json.loads(envelope_of(model))
    document["signatures"].insert(0, {"keyid": "x", "sig": "AAAA"})
    assert problems(json.dumps(document).encode(), model) == ()


def test_an_envelope_holds_what_openssl_verifies(model: Path) -> None:
    """The signed bytes are DSSE's, written out: a second implementation would sign the same."""
    payload = statements_of(str(model), (), NOW)[0]
    document = json.loads(signed(payload, private(SIGNER)))
    kind = b"application/vnd.in-toto+json"
    signature = base64.b64decode(document["signatures"][0]["sig"])
    SIGNER.public_key().verify(signature, b"DSSEv1 28 " + kind + b" " + str(len(payload)).encode() + b" " + payload)
    assert opened(json.dumps(document).encode(), public(SIGNER)) == payload


UNUSED_BITS = {"A": "B", "Q": "R", "g": "h", "w": "x"}
"""The last letters of base64 before `==`, and others with the same bits of the value."""


@pytest.mark.attempt("T02b", "unused bits of base64 flipped, in payload and signature", "refused")
@pytest.mark.parametrize("field", ["payload", "sig"])
def test_another_spelling_of_base64_is_refused(model: Path, field: str) -> None:
    (content,) = statements_of(str(model), (), NOW)
    document = json.loads(signed(content + b" " * ((1 - len(content)) % 3), private(SIGNER)))
    assert problems(json.dumps(document).encode(), model) == ()
    holder = document if field == "payload" else document["signatures"][0]
    text = holder[field]
    holder[field] = f"{text[:-3]}{UNUSED_BITS[text[-3]]}=="
    assert base64.b64decode(holder[field]) == base64.b64decode(text)
    assert any("base64" in problem for problem in problems(json.dumps(document).encode(), model))


@pytest.mark.attempt("T03a", "the date in digits of another script", "refused")
def test_a_date_in_other_digits_is_refused(model: Path) -> None:
    whole = statement.read(statements_of(str(model), (), NOW)[0])
    other = replace(whole.predicate, attested_at=whole.predicate.attested_at.replace("2", "\N{ARABIC-INDIC DIGIT TWO}"))
    envelope = signed(statement.render(replace(whole, predicate=other)), private(SIGNER))
    assert any("time" in problem for problem in problems(envelope, model))


# --- what the statement rests on -------------------------------------------------------------------------------------


@pytest.mark.attempt("T10", "attest a hand-made directory that fits its own merge-gate.json", "the statement says so")
def test_a_statement_says_where_its_verdict_is_from(model: Path, tmp_path: Path) -> None:
    (of_directory,) = statements_of(str(model), (), NOW)
    assert json.loads(of_directory)["predicate"]["verdict_from"] == MANIFEST_NAME
    (tmp_path / "report.json").write_text(json_report.render(reports.report(reports.adapter())))
    (of_report,) = statements_of(str(tmp_path), (), NOW)
    assert json.loads(of_report)["predicate"]["verdict_from"] == "report.json"
    mark_stale(tmp_path)
    with pytest.raises(UsageError, match="judged nothing"):
        statements_of(str(tmp_path), (), NOW)


# --- what is not attested --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [name for name in CHANGES if name not in {"an empty directory", "a byte of the manifest"}]
)
def test_a_directory_that_is_not_as_listed_is_not_attested(model: Path, change: str) -> None:
    CHANGES[change](model)
    with pytest.raises(UsageError):
        statements_of(str(model), (), NOW)


def test_an_empty_directory_is_not_attested(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        statements_of(str(tmp_path), (), NOW)


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


@pytest.mark.parametrize(
    ("adapters", "fields", "only"),
    [
        ((), {}, ()),
        ((reports.adapter(),), {"complete": False}, ()),
        ((reports.adapter(),), {"files_only": True}, ()),
        ((reports.adapter(),), {"is_comparison": True}, ()),
        ((reports.adapter(),), {}, ("other",)),
        ((reports.adapter(files=()),), {}, ()),
    ],
)
def test_a_report_without_anything_to_attest_is_refused(
    tmp_path: Path, adapters: Any, fields: dict[str, bool], only: tuple[str, ...]
) -> None:
    (tmp_path / "report.json").write_text(json_report.render(reports.report(*adapters, **fields)))
    with pytest.raises(UsageError):
        statements_of(str(tmp_path), only, NOW)


def test_a_statement_has_limits(model: Path) -> None:
    whole = statement.read(statements_of(str(model), (), NOW)[0])
    many = {str(n): "0" * 64 for n in range(1024)}
    assert statement.render(replace(whole, subjects=many))
    with pytest.raises(UsageError, match="1,024"):
        statement.render(replace(whole, subjects=many | {"1024": "0" * 64}))
    with pytest.raises(UsageError, match="bytes"):
        statement.render(replace(whole, predicate=replace(whole.predicate, name="x" * (16 << 20))))
    with pytest.raises(InvalidStatementError):
        statement.read(b" " * (16 << 20) + b"{}x")


# --- keys and the command --------------------------------------------------------------------------------------------


@pytest.mark.attempt("T01a", "keys: RSA, secp256k1, a private key as a public one, no key", "exit 2")
def test_keys_of_other_kinds_are_refused(model: Path) -> None:
    envelope = envelope_of(model)
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    curve = ec.generate_private_key(ec.SECP256K1())
    for key in (b"", b"no key", private(weak), private(curve), public(SIGNER)):
        with pytest.raises(UsageError):
            signed(b"{}", key)
    for key in (b"", b"no key", public(weak), public(curve), private(SIGNER)):
        with pytest.raises(UsageError):
            attestation_problems(Attestation(envelope=envelope, public_key=key), model, now=NOW)


@pytest.mark.attempt("T01b", "a private key with a password", "exit 2")
def test_a_key_with_a_password_is_refused(model: Path) -> None:
    locked = SIGNER.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    with pytest.raises(UsageError):
        signed(b"{}", locked)


@pytest.mark.attempt("T01c", "a key that is a pipe, 100 KB, absent, or a directory", "exit 2")
def test_a_key_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * 100_000)
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "large", "none", ".", "zero"):
        with pytest.raises(UsageError):
            read_key(str(tmp_path / name))


def test_the_command_prints_a_signed_line_for_each_statement(
    model: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    (tmp_path / "key.pem").write_bytes(private(SIGNER))
    assert main(["attest", str(model), "--key", str(tmp_path / "key.pem")]) == 0
    (line,) = capfdbinary.readouterr().out.splitlines()
    assert attestation_problems(Attestation(envelope=line, public_key=public(SIGNER)), model) == ()
    assert main(["attest", str(model)]) == 0
    assert json.loads(capfdbinary.readouterr().out)["predicate"]["published"] is True
    assert main(["attest", str(model), "--only", "x"]) == 2
    flip(model / "config.json")
    assert main(["attest", str(model)]) == 2
    assert capfdbinary.readouterr().out == b""
