"""Signs and checks DSSE envelopes (https://github.com/secure-systems-lab/dsse), with ed25519 or ECDSA keys.

In: a payload or an envelope, and a key in PEM. Out: an envelope, or its payload if this key has signed it. Only this
module imports `cryptography`, which the extra `attest` installs.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
from typing import TYPE_CHECKING, Any

from merge_gate._internal.errors import UsageError
from merge_gate._internal.regular_file import open_regular_file, read_all
from merge_gate._internal.strict_json import InvalidJsonError, parse_strictly
from merge_gate.report.wording.untrusted import one_line

if TYPE_CHECKING:
    from types import ModuleType

PAYLOAD_TYPE = "application/vnd.in-toto+json"
_MOST_KEY_BYTES = 64 * 1024
_MOST_SIGNATURES = 64


class InvalidEnvelopeError(Exception):
    """An envelope that this key has not signed, or that is not one. The message continues a sentence with its name."""


def read_key(path: str) -> bytes:
    """The bytes of a key file.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        with open_regular_file(path, follow=True) as file:
            return read_all(file, _MOST_KEY_BYTES)
    except OSError as error:
        raise UsageError(
            f"cannot read the key {one_line(path)}: {error.strerror or error}", hint="name a key in PEM"
        ) from error


def signed(payload: bytes, private_key: bytes) -> bytes:
    """The envelope of a payload, signed by a private key without a password, on one line of ASCII.

    Raises:
        UsageError: the key cannot be used, or the extra is not installed.
    """
    serialization, exceptions = _library()
    try:
        key = serialization.load_pem_private_key(private_key, password=None)
    except (ValueError, TypeError, exceptions.UnsupportedAlgorithm) as error:
        raise UsageError(
            f"the key is not a private key in PEM without a password: {one_line(str(error), 120)}",
            hint="make one with: openssl genpkey -algorithm ed25519 -out key.pem",
        ) from error
    signature = key.sign(_pre_authentication(payload), *_scheme(key))
    public = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    document = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode("ascii"),
        "signatures": [
            {"keyid": hashlib.sha256(public).hexdigest(), "sig": base64.b64encode(signature).decode("ascii")}
        ],
    }
    return json.dumps(document).encode("ascii")


def opened(envelope: bytes, public_key: bytes) -> bytes:
    """The payload of an envelope that the owner of this key has signed.

    The id of a key in an envelope is only a hint, and is not read.

    Raises:
        InvalidEnvelopeError: it is not an envelope of a statement, or no signature is of this key.
        UsageError: the key cannot be used, or the extra is not installed.
    """
    serialization, exceptions = _library()
    try:
        key = serialization.load_pem_public_key(public_key)
    except (ValueError, exceptions.UnsupportedAlgorithm) as error:
        raise UsageError(
            f"the key is not a public key in PEM: {one_line(str(error), 120)}",
            hint="make it of the private key with: openssl pkey -in key.pem -pubout -out key.pub",
        ) from error
    scheme = _scheme(key)
    payload, signatures = _parsed(envelope)
    for signature in signatures:
        with contextlib.suppress(exceptions.InvalidSignature):
            key.verify(signature, _pre_authentication(payload), *scheme)
            return payload
    raise InvalidEnvelopeError("has no signature of this key")


def _parsed(envelope: bytes) -> tuple[bytes, list[bytes]]:
    """The payload and the signatures."""
    try:
        document = parse_strictly(envelope)
    except InvalidJsonError as error:
        raise InvalidEnvelopeError(str(error)) from error
    if not isinstance(document, dict) or document.get("payloadType") != PAYLOAD_TYPE:
        raise InvalidEnvelopeError(f"is not a DSSE envelope with the payload type {PAYLOAD_TYPE}")
    listed = document.get("signatures")
    if not isinstance(listed, list) or not 0 < len(listed) <= _MOST_SIGNATURES:
        raise InvalidEnvelopeError(f"has no list of 1 to {_MOST_SIGNATURES} signatures")
    signatures = [_decoded(one.get("sig") if isinstance(one, dict) else None) for one in listed]
    return _decoded(document.get("payload")), signatures


def _decoded(value: Any) -> bytes:
    try:
        if isinstance(value, str):
            decoded = base64.b64decode(value, validate=True)
            if base64.b64encode(decoded).decode("ascii") == value:  # unused bits can give one payload two spellings
                return decoded
    except (binascii.Error, ValueError):
        pass
    raise InvalidEnvelopeError("has a payload or a signature that is not canonical base64")


def _pre_authentication(payload: bytes) -> bytes:
    """What is signed: DSSE's PAE, protocol.md."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _scheme(key: Any) -> tuple[Any, ...]:
    """What `sign` and `verify` of the key need besides the data: for ECDSA the hash, as NIST pairs it with the curve.

    Raises:
        UsageError: the key is of another kind.
    """
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415 - the extra may be absent
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519  # noqa: PLC0415

    if isinstance(key, ed25519.Ed25519PrivateKey | ed25519.Ed25519PublicKey):
        return ()
    if not isinstance(key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey):
        raise UsageError(f"the key is a {type(key).__name__}, expected ed25519 or ECDSA")
    known = {"secp256r1": hashes.SHA256, "secp384r1": hashes.SHA384, "secp521r1": hashes.SHA512}
    if key.curve.name not in known:
        raise UsageError(f"the key is on the curve {key.curve.name}, expected P-256, P-384, or P-521")
    return (ec.ECDSA(known[key.curve.name]()),)


def _library() -> tuple[ModuleType, ModuleType]:
    """The functions that read keys, and the exceptions."""
    try:
        from cryptography import exceptions  # noqa: PLC0415 - the extra may be absent
        from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(
            "signatures need the package cryptography",
            hint="install merge-gate again with the extra `attest`: pip install '.[attest]' in its checkout",
        ) from error
    return serialization, exceptions
