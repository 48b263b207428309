"""Bases and adapters through a company's proxy that wants a password, from a Hub whose certificate the company signed.

Without a container: the environment of a self-hosted runner. Bases are downloaded, and streamed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import Answer, merge_gate, strict_json
from tests.support.e2e import proxy
from tests.support.e2e.proxy import CREDENTIALS, HUB_NAME, PASSWORD, CompanyProxy
from tests.support.hub import LoopbackHub

pytestmark = pytest.mark.e2e

TOKEN = "hf_loopback"
CONFIG = "version: 1\nbase: {model: acme/base, dtype: float16}\nadapters: [acme/good]\n"


@dataclass
class Company:
    hub: LoopbackHub
    proxy: CompanyProxy
    place: Path
    authority: Path

    def run(self, *words: str, **changes: str) -> tuple[Answer, dict[str, Any]]:
        (self.place / "gate.yml").write_text(CONFIG, encoding="utf-8")
        settings = {
            "HF_ENDPOINT": f"https://{HUB_NAME}",
            "HF_HOME": str(self.place / "cache"),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "HTTPS_PROXY": f"http://gate:{PASSWORD}@127.0.0.1:{self.proxy.port}",
            "NO_PROXY": "",
            "SSL_CERT_FILE": str(self.authority),
        }
        answer = merge_gate("run", "gate.yml", *words, cwd=self.place, **settings | changes)
        report = strict_json(self.place / "merge-gate-report" / "report.json")
        assert PASSWORD not in answer.said + json.dumps(report)
        assert TOKEN not in answer.said + json.dumps(report)
        return answer, report


@pytest.fixture
def company(certificates: Path, demo: Path, tmp_path: Path) -> Iterator[Company]:
    folders = {"acme/base": demo / "base", "acme/good": demo / "adapters" / "good"}
    with proxy.company(certificates, folders, TOKEN) as (hub, way_out):
        yield Company(hub=hub, proxy=way_out, place=tmp_path, authority=certificates / "ca.pem")


@pytest.mark.parametrize("access", ["download", "stream"])
def test_a_base_comes_through_proxy_and_companys_authority(access: str, company: Company) -> None:
    answer, report = company.run("--access", access)
    assert answer.code == 0, answer.said
    assert {*company.proxy.asked} == {(f"{name}{HUB_NAME}:443", CREDENTIALS) for name in ("", "cdn.")}
    assert {one.token for one in company.hub.requests if one.path.startswith("/cdn/")} == {None}
    on_hub = [one for one in company.hub.requests if one.path.startswith(("/api/models/", "/acme/"))]
    assert {one.token for one in on_hub} == {TOKEN}
    weights = [path for path in (company.place / "cache").rglob("*.safetensors") if "acme--base" in str(path)]
    assert bool(weights) == (access == "download")
    assert report["bases"][0]["sha256"]


@pytest.mark.parametrize("access", ["download", "stream"])
def test_an_untrusted_authority_and_a_refusing_proxy_are_errors(access: str, company: Company) -> None:
    answer, report = company.run("--access", access, SSL_CERT_FILE=str(company.place / "none.pem"))
    assert answer.code == 3, answer.said
    assert report["adapters"][0]["verdict"] == "error"
    answer, report = company.run("--access", access, SSL_CERT_FILE="/etc/ssl/certs/ca-certificates.crt")
    assert answer.code == 3, answer.said
    (finding,) = report["adapters"][0]["findings"]
    assert f"certificate of {HUB_NAME}" in finding["message"]
    assert "SSL_CERT_FILE" in finding["hint"]
    company.proxy.name = "another.example"
    answer, report = company.run("--access", access)
    assert answer.code == 3, answer.said
    assert "Traceback" not in answer.said
