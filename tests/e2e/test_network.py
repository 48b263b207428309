"""The gate behind a company's proxy that wants a password, and a Hub whose certificate the company has signed."""

from __future__ import annotations

import base64
import contextlib
import json
import ssl
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from merge_gate.action.docker.container import ContainerRun
from merge_gate.action.docker.launcher import run_in_container
from tests.support.e2e.act import free_port
from tests.support.e2e.engines import HUB_NAME
from tests.support.e2e.proxy import CompanyProxy, proxy
from tests.support.hub import LoopbackHub

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.e2e

PASSWORD = "onlyTheProxyMayKnow77"
CONFIG = "version: 1\nbase: {model: acme/base, dtype: float16}\nadapters: [acme/good]\n"


@pytest.fixture
def company(certificates: Path, demo: Path) -> Iterator[CompanyProxy]:
    """A Hub that speaks HTTPS and is reached through a proxy only, with the demo's base and good adapter."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server-key.pem")
    port = free_port()
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(LoopbackHub())
        hub.cdn_url = f"https://cdn.{HUB_NAME}"
        for name, folder in (("acme/base", demo / "base"), ("acme/good", demo / "adapters" / "good")):
            hub.add_repo(name, {path.name: path.read_bytes() for path in folder.iterdir()})
        stack.enter_context(proxy(int(urlsplit(hub.url).port or 0), port, tls=context))
        yield stack.enter_context(CompanyProxy(HUB_NAME, port))


@pytest.mark.parametrize("authority", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", ""])
def test_models_come_through_proxy_and_companys_authority(
    engine: str, image: str, company: CompanyProxy, certificates: Path, tmp_path: Path, authority: str
) -> None:
    """And from none that nobody vouches for."""
    config = tmp_path / "workspace" / "gate.yml"
    config.parent.mkdir()
    config.write_text(CONFIG, encoding="utf-8")
    environ = {
        "DOCKER_HOST": engine, "RUNNER_TEMP": str(tmp_path), "HF_ENDPOINT": f"https://{HUB_NAME}",
        "HTTPS_PROXY": f"http://gate:{PASSWORD}@host.containers.internal:{company.port}",
        **({authority: str(certificates / "ca.pem")} if authority else {}),
    }  # fmt: skip
    run = ContainerRun(config=config, workspace=config.parent, output=tmp_path / "report", image=image, environ=environ)
    log = bytearray()
    code = run_in_container(run, log.extend)
    said, report = log.decode(), (run.output / "report.json").read_text(encoding="utf-8")
    assert PASSWORD not in said + report
    assert {credentials for _target, credentials in company.asked} == {
        "Basic " + base64.b64encode(f"gate:{PASSWORD}".encode()).decode()
    }
    if authority:
        assert code == 0, said
        assert {target for target, _credentials in company.asked} == {f"{HUB_NAME}:443", f"cdn.{HUB_NAME}:443"}
    else:
        assert code == 3, said
        (finding,) = json.loads(report)["adapters"][0]["findings"]
        assert f"certificate of {HUB_NAME}" in finding["message"]
        assert "SSL_CERT_FILE" in finding["hint"]
        assert "trying again" not in said
