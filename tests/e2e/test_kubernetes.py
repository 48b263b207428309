"""The pod of recipes/kubernetes-job.yaml, played by podman behind a company's proxy, mirror, and authority.

podman takes the place of a cluster: it knows the pod's rights, secrets, and volumes, and not the Job's failure policy.
"""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.e2e.act import ROOT
from tests.support.e2e.proxy import CREDENTIALS, HUB_NAME, PASSWORD, CompanyProxy, company

pytestmark = pytest.mark.e2e

TOKEN = "hf_loopback"
NAME = "merge-gate-e2e"


@pytest.fixture
def way_out(certificates: Path, demo: Path) -> Iterator[CompanyProxy]:
    adapters = {f"acme/{path.name}": path for path in (demo / "adapters").iterdir() if path.is_dir()}
    with company(certificates, {"acme/base": demo / "base"} | adapters, TOKEN) as (_, way_out):
        yield way_out


def played(recipe: str, image: str, out: Path, authority: str, port: int, adapters: list[str]) -> str:
    """The recipe's documents as podman plays them: a Pod instead of the Job, and a directory for the claim."""
    config, _, job = yaml.safe_load_all(recipe)
    config["data"]["merge-gate.yml"] = yaml.safe_dump(
        {"version": 1, "base": {"model": "acme/base", "dtype": "float16"}, "adapters": adapters}
    )
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    container |= {"image": image, "imagePullPolicy": "Never"}
    report = next(one for one in pod["volumes"] if one["name"] == "report")
    del report["persistentVolumeClaim"]
    report["hostPath"] = {"path": str(out), "type": "Directory"}
    network = {
        "HTTPS_PROXY": f"http://gate:{PASSWORD}@host.containers.internal:{port}",
        "NO_PROXY": "localhost",
        "HF_ENDPOINT": f"https://{HUB_NAME}",
        "SSL_CERT_FILE": "/authorities/ca.pem",
    }
    documents: list[dict[str, Any]] = [
        config,
        _of("Secret", "merge-gate-hub", {"token": TOKEN}),
        _of("Secret", "merge-gate-network", network),
        _of("ConfigMap", "merge-gate-authorities", {"ca.pem": authority}),
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": NAME}, "spec": pod},
    ]
    return yaml.safe_dump_all(documents)


def _of(kind: str, name: str, data: dict[str, str]) -> dict[str, Any]:
    if kind == "Secret":
        data = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}, "data": data}


def test_the_pod_gates_through_proxy_mirror_and_authority(
    podman, image: str, way_out: CompanyProxy, certificates: Path, tmp_path: Path
) -> None:
    """One good and one broken adapter: exit code 1, a whole report, and a base that was never on a disk."""
    recipe = (ROOT / "recipes" / "kubernetes-job.yaml").read_text(encoding="utf-8")
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o777)  # what fsGroup does in a cluster
    file = tmp_path / "pod.yaml"
    authority = (certificates / "ca.pem").read_text(encoding="utf-8")
    adapters = ["acme/good", "acme/overflow"]
    file.write_text(played(recipe, image, out, authority, way_out.port, adapters), encoding="utf-8")
    container = f"{NAME}-merge-gate"
    try:
        podman("kube", "play", file)
        code = podman("wait", container).strip()
        log = podman("logs", container)
        (inspected,) = json.loads(podman("inspect", container))
    finally:
        podman("kube", "down", "--force", file, check=False)
    assert code == "1", log
    assert inspected["HostConfig"]["ReadonlyRootfs"]
    assert inspected["Config"]["User"] == "10001:10001"
    assert not inspected["EffectiveCaps"]
    assert inspected["HostConfig"]["Memory"] == 8 << 30
    report = json.loads((out / "merge-gate-report" / "report.json").read_text(encoding="utf-8"))
    assert [one["verdict"] for one in report["adapters"]] == ["passed", "failed"], log
    assert report["bases"][0]["sha256"]
    assert {path.stat().st_uid for path in (out / "merge-gate-report").iterdir()} == {10001}
    assert {*way_out.asked} == {(f"{name}{HUB_NAME}:443", CREDENTIALS) for name in ("", "cdn.")}
    assert PASSWORD not in log + json.dumps(report)
    assert TOKEN not in log + json.dumps(report)
