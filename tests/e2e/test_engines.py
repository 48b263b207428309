"""Ways to an engine: a socket file, TLS with a client certificate, a docker context, and one that is rootless."""

from __future__ import annotations

import hashlib
import json
import ssl
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from merge_gate.action import handover
from merge_gate.action.container import ContainerRun, handed_over
from merge_gate.action.launcher import run_in_container
from merge_gate.errors import LauncherError
from tests.e2e.act import free_port
from tests.e2e.proxy import proxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.e2e


@pytest.fixture
def run(engine: str, rogue: str, tmp_path: Path) -> ContainerRun:
    """A container that prints the digest of what it was handed."""
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    (workspace / "gate.yml").write_text("digest", encoding="utf-8")
    environ = {
        "DOCKER_HOST": engine, "HF_HUB_OFFLINE": "1", "RUNNER_TEMP": str(tmp_path), "HOME": "/nowhere",
        "HF_TOKEN": "hf_x",
    }  # fmt: skip
    return ContainerRun(
        config=workspace / "gate.yml", output=tmp_path / "report", workspace=workspace, image=rogue, environ=environ
    )


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate authority, and what it has signed for an engine at 127.0.0.1 and for a client."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *curve, "-keyout", "ca-key.pem", "-out", "ca.pem", "-subj", "/CN=authority")
    for name, extension in (("server", "subjectAltName=IP:127.0.0.1"), ("client", "extendedKeyUsage=clientAuth")):
        openssl("req", *curve, "-keyout", f"{name}-key.pem", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / f"{name}.ext").write_text(extension, encoding="utf-8")
        openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca-key.pem", "-CAcreateserial",
            "-out", f"{name}.pem", "-extfile", f"{name}.ext",
        )  # fmt: skip
    return folder


@pytest.fixture
def tls_engine(engine: str, certificates: Path) -> Iterator[str]:
    """The engine behind TLS, for those who show a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server-key.pem")
    context.load_verify_locations(certificates / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    port = free_port()
    with proxy(engine, port, lambda _data: None, context):
        yield f"tcp://127.0.0.1:{port}"


def of_a_client(certificates: Path, folder: Path, *, with_certificate: bool = True) -> Path:
    """The files under the names that the docker command line reads."""
    folder.mkdir(parents=True)
    names = {
        "ca.pem": "ca.pem",
        **({"cert.pem": "client.pem", "key.pem": "client-key.pem"} if with_certificate else {}),
    }
    for name, source in names.items():
        (folder / name).write_bytes((certificates / source).read_bytes())
    return folder


def check_that_the_token_arrives(run: ContainerRun) -> None:
    log = bytearray()
    assert run_in_container(run, log.extend) == 3, log.decode()
    assert hashlib.sha256(handover.written(handed_over(run))).hexdigest() in log.decode()


def test_over_a_socket_file_the_token_arrives(run: ContainerRun) -> None:
    check_that_the_token_arrives(run)


def test_over_tls_with_a_client_certificate_it_arrives_too(
    run, tls_engine: str, certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a company's authorities stand in the environment: they are not the engine's."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates / "client.pem"))
    folder = of_a_client(certificates, tmp_path / "tls")
    tls = {"DOCKER_HOST": tls_engine, "DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(folder)}
    check_that_the_token_arrives(replace(run, environ={**run.environ, **tls}))


def test_in_a_docker_context_it_arrives_too(run, tls_engine: str, certificates: Path, tmp_path: Path) -> None:
    settings, name = tmp_path / "docker", "gpu-box"
    folder = hashlib.sha256(name.encode()).hexdigest()
    of_a_client(certificates, settings / "contexts" / "tls" / folder / "docker")
    meta = settings / "contexts" / "meta" / folder / "meta.json"
    meta.parent.mkdir(parents=True)
    endpoint = {"Host": tls_engine, "SkipTLSVerify": False}
    meta.write_text(json.dumps({"Name": name, "Endpoints": {"docker": endpoint}}), encoding="utf-8")
    (settings / "config.json").write_text(json.dumps({"currentContext": name}), encoding="utf-8")
    environ = {key: value for key, value in run.environ.items() if key != "DOCKER_HOST"}
    check_that_the_token_arrives(replace(run, environ={**environ, "DOCKER_CONFIG": str(settings)}))


@pytest.mark.parametrize("given", ["no certificate", "no authority", "no TLS"])
def test_tls_that_does_not_agree_is_a_sentence(
    run, tls_engine: str, certificates: Path, tmp_path: Path, given: str
) -> None:
    folder = of_a_client(certificates, tmp_path / "tls", with_certificate=given != "no certificate")
    if given == "no authority":
        (folder / "ca.pem").write_bytes((certificates / "client.pem").read_bytes())
    tls = {} if given == "no TLS" else {"DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(folder)}
    with pytest.raises(LauncherError, match=r"at tcp://.* \(DOCKER_HOST\) does not answer: ") as raised:
        run_in_container(replace(run, environ={**run.environ, "DOCKER_HOST": tls_engine, **tls}), print)
    assert raised.value.hint
