"""The recipes for clusters: the fields of their pods that matter, and the script for Hugging Face Jobs."""

import importlib.util
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from merge_gate.cli.parser import parsers

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
ENTRYPOINT = ["/opt/merge-gate/bin/python", "-I", "/opt/merge-gate/entrypoint.py"]


def documents(name: str) -> dict[str, dict[str, Any]]:
    """The documents of a file, by their kind."""
    every = list(yaml.safe_load_all((RECIPES / name).read_text(encoding="utf-8")))
    assert all({"apiVersion", "kind", "metadata", "spec"} <= one.keys() or one["kind"] == "ConfigMap" for one in every)
    return {one["kind"]: one for one in every}


JOB = documents("kubernetes-job.yaml")["Job"]
WORKFLOW = documents("argo-workflow.yaml")["Workflow"]
GATE = next(one for one in WORKFLOW["spec"]["templates"] if one["name"] == "gate")
PODS = {
    "kubernetes": (JOB["spec"]["template"]["spec"], JOB["spec"]["template"]["spec"]["containers"][0]),
    "argo": (WORKFLOW["spec"] | {"volumes": GATE["volumes"]}, GATE["container"]),
}


@pytest.mark.parametrize("name", PODS)
def test_a_pod_has_few_rights_and_limits_on_memory_and_disk(name: str) -> None:
    pod, container = PODS[name]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 10001,
        "fsGroup": 10001,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    limits, requests = container["resources"]["limits"], container["resources"]["requests"]
    assert limits.keys() == {"memory", "ephemeral-storage"}, "no GPU"
    assert limits.items() <= requests.items()
    scratch = next(one for one in pod["volumes"] if one["name"] == "scratch")
    assert scratch["emptyDir"]["sizeLimit"] == limits["ephemeral-storage"]


@pytest.mark.parametrize("name", PODS)
def test_each_mount_has_its_volume_and_outputs_are_mounted(name: str) -> None:
    pod, container = PODS[name]
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    written = [one["mountPath"] for one in container["volumeMounts"] if not one.get("readOnly")]
    assert sorted(written) == ["/report", "/tmp"]
    out = next(word for word in container["args"] if "/report" in word)
    assert out.removeprefix("--output=").startswith("/report/"), "the root of a volume may hold lost+found"


@pytest.mark.parametrize("name", PODS)
def test_the_command_is_of_this_version_and_secrets_are_named(name: str) -> None:
    _, container = PODS[name]
    (token,) = container["env"]
    assert token["valueFrom"]["secretKeyRef"] == {"name": "merge-gate-hub", "key": "token", "optional": True}
    assert container["envFrom"] == [{"secretRef": {"name": "merge-gate-network", "optional": True}}]
    given = parsers()[0].parse_args(container["args"])
    assert (given.command, given.access) == ("run", "stream")
    assert container.get("command", ENTRYPOINT) == ENTRYPOINT


def test_a_verdict_is_final_and_an_error_is_tried_again() -> None:
    (rule,) = JOB["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [1, 2])
    assert rule["onExitCodes"]["containerName"] == PODS["kubernetes"][1]["name"]
    assert PODS["kubernetes"][0]["restartPolicy"] == "Never", "a policy for failures needs it"
    assert JOB["spec"]["backoffLimit"] == int(GATE["retryStrategy"]["limit"]) == 2
    assert GATE["retryStrategy"]["expression"] == "lastRetry.exitCode == '3'"


def test_the_page_names_what_the_recipes_expect() -> None:
    page = (ROOT / "docs" / "guides" / "clusters.md").read_text(encoding="utf-8")
    for name in ("merge-gate-hub", "merge-gate-network", "merge-gate-authorities", "merge-gate-report", "hf_job.py"):
        assert name in page
    for variable in ("HTTPS_PROXY", "NO_PROXY", "HF_ENDPOINT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        assert variable in page


def recipe() -> Any:
    """The script as a module of its own."""
    spec = importlib.util.spec_from_file_location("hf_job", RECIPES / "hf_job.py")
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Jobs:
    """The part of huggingface_hub that the script calls, with the real signatures."""

    def __init__(self, stages: list[str]) -> None:
        self.stages, self.asked = stages, {}

    def run_job(self, **words: Any) -> Any:
        import inspect  # noqa: PLC0415

        from huggingface_hub import HfApi  # noqa: PLC0415

        inspect.signature(HfApi.run_job).bind(None, **words)
        self.asked = words
        return types.SimpleNamespace(id="1", url="https://hub.example/jobs/1")

    def fetch_job_logs(self, *, job_id: str, follow: bool) -> list[str]:
        return [f"log of {job_id}", str(follow)]

    def inspect_job(self, *, job_id: str) -> Any:
        from huggingface_hub import JobStage  # noqa: PLC0415

        assert job_id == "1"
        return types.SimpleNamespace(status=types.SimpleNamespace(stage=JobStage[self.stages.pop(0)]))


@pytest.mark.parametrize(("last", "code"), [("COMPLETED", 0), ("ERROR", 1), ("CANCELED", 3), ("DELETED", 3)])
def test_the_script_waits_for_the_job_and_ends_as_it_did(last, code, capsys) -> None:
    script, jobs = recipe(), Jobs(["RUNNING", last])
    script.WAIT_S = 0
    got = script.gate(jobs, "acme/base", "acme/lora", flavor="cpu-upgrade", timeout="1h", token="hf_secret")
    assert got == code
    assert jobs.asked["secrets"] == {"HF_TOKEN": "hf_secret"}
    assert "hf_secret" not in str({key: value for key, value in jobs.asked.items() if key != "secrets"})
    assert "hf_secret" not in capsys.readouterr().out
    assert jobs.asked["command"][:3] == ENTRYPOINT
    given = parsers()[0].parse_args(jobs.asked["command"][3:])
    assert (given.names, given.base) == (["acme/lora"], "acme/base")


def test_the_script_needs_a_token(variables) -> None:
    variables.pop("HF_TOKEN", None)
    with pytest.raises(SystemExit):
        recipe().main(["acme/base", "acme/lora"])
