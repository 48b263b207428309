"""The gate behind a company's proxy that wants a password, and a Hub whose certificate the company has signed."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from merge_gate.action.docker.container import ContainerRun
from merge_gate.action.docker.launcher import run_in_container
from tests.support.e2e.proxy import CREDENTIALS, HUB_NAME, PASSWORD, CompanyProxy, company

pytestmark = pytest.mark.e2e

CONFIG = "version: 1\nbase: {model: acme/base, dtype: float16}\nadapters: [acme/good]\n"


@pytest.fixture
def way_out(certificates: Path, demo: Path) -> Iterator[CompanyProxy]:
    folders = {"acme/base": demo / "base", "acme/good": demo / "adapters" / "good"}
    with company(certificates, folders) as (_, way_out):
        yield way_out


@pytest.mark.parametrize("authority", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", ""])
def test_models_come_through_proxy_and_companys_authority(
    engine: str, image: str, way_out: CompanyProxy, certificates: Path, tmp_path: Path, authority: str
) -> None:
    """And from none that nobody vouches for."""
    config = tmp_path / "workspace" / "gate.yml"
    config.parent.mkdir()
    config.write_text(CONFIG, encoding="utf-8")
    environ = {
        "DOCKER_HOST": engine, "RUNNER_TEMP": str(tmp_path), "HF_ENDPOINT": f"https://{HUB_NAME}",
        "HTTPS_PROXY": f"http://gate:{PASSWORD}@host.containers.internal:{way_out.port}",
        **({authority: str(certificates / "ca.pem")} if authority else {}),
    }  # fmt: skip
    run = ContainerRun(config=config, workspace=config.parent, output=tmp_path / "report", image=image, environ=environ)
    log = bytearray()
    code = run_in_container(run, log.extend)
    said, report = log.decode(), (run.output / "report.json").read_text(encoding="utf-8")
    assert PASSWORD not in said + report
    assert {credentials for _target, credentials in way_out.asked} == {CREDENTIALS}
    if authority:
        assert code == 0, said
        assert {target for target, _credentials in way_out.asked} == {f"{HUB_NAME}:443", f"cdn.{HUB_NAME}:443"}
    else:
        assert code == 3, said
        (finding,) = json.loads(report)["adapters"][0]["findings"]
        assert f"certificate of {HUB_NAME}" in finding["message"]
        assert "SSL_CERT_FILE" in finding["hint"]
        assert "trying again" not in said
