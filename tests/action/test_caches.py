"""Which caches a run restores and saves: a trusted run gets nothing from a fork, and a fork nothing private."""

import json
import os
from pathlib import Path

import pytest

from merge_gate.action import caches, step
from merge_gate.action.docker.container import ContainerRun
from merge_gate.action.workflow import read_event
from tests.support.wording import Wording

OWN, FORK = "acme/adapters", "stranger/adapters"


def pull_request(head: str) -> dict:
    return {"pull_request": {"number": 5, "head": {"repo": {"full_name": head}}}}


def run_of(tmp_path: Path, event: str, payload: object = None, *, private: bool = False, **more: str) -> dict[str, str]:
    """The environment of a run with both caches."""
    known = payload if payload is not None else {}
    if isinstance(known, dict):
        known = {"repository": {"private": private}, **known}
    (tmp_path / "event.json").write_text(json.dumps(known), encoding="utf-8")
    return {
        "HOME": str(tmp_path / "home"),
        "RUNNER_TEMP": str(tmp_path),
        "GITHUB_REPOSITORY": OWN,
        "GITHUB_EVENT_NAME": event,
        "GITHUB_EVENT_PATH": str(tmp_path / "event.json"),
        "MERGE_GATE_INPUT_CACHE": "true",
        "MERGE_GATE_INPUT_HF_CACHE": "true",
        **more,
    }


def fill(environ: dict[str, str]) -> None:
    """What a run leaves in both directories."""
    for cache in (caches.verdicts(environ), caches.hub(environ)):
        (cache.directory / "models--a--b").mkdir(parents=True)
        (cache.directory / "models--a--b" / "blob").write_bytes(b"x")


@pytest.mark.parametrize(
    ("event", "payload", "saves"),
    [
        ("push", {}, True),
        ("schedule", {}, True),
        ("workflow_dispatch", {}, True),
        ("pull_request", pull_request(OWN), True),
        ("pull_request", pull_request(FORK), False),
        ("pull_request", {"pull_request": {"number": 5, "head": {"repo": None}}}, False),
        ("pull_request", [], False),
        ("pull_request_target", pull_request(OWN), False),
        ("pull_request_target", pull_request(FORK), False),
        ("workflow_run", {}, False),
        ("issue_comment", {}, False),
        ("", {}, False),
    ],
)
def test_only_a_run_that_no_fork_influences_saves(tmp_path: Path, event: str, payload: object, saves: bool) -> None:
    environ = run_of(tmp_path, event, payload)
    fill(environ)
    keys = caches.key_outputs(environ)
    assert [bool(key) for key in keys.values()] == [saves, saves]
    prepared = caches.outputs(environ)
    for kind in ("verdicts", "hub"):
        assert prepared[f"{kind}-prefix"], "it may restore what a trusted run has saved"
        assert keys[f"{kind}-cache-key"].startswith(prepared[f"{kind}-prefix"] if saves else "")


def test_a_key_is_that_of_the_files(tmp_path: Path) -> None:
    environ = run_of(tmp_path, "push")
    assert set(caches.key_outputs(environ).values()) == {""}, "an empty directory is not saved"
    fill(environ)
    first = caches.key_outputs(environ)
    assert caches.key_outputs(environ) == first
    (tmp_path / "merge-gate-verdicts" / "more").touch()
    second = caches.key_outputs(environ)
    assert second["verdicts-cache-key"] != first["verdicts-cache-key"]
    assert second["hub-cache-key"] == first["hub-cache-key"]
    other = caches.outputs({**environ, "MERGE_GATE_INPUT_CONFIG": "other.yml"})
    assert other["verdicts-prefix"] != caches.outputs(environ)["verdicts-prefix"]
    assert other["verdicts-path"] == caches.outputs(environ)["verdicts-path"]


def test_a_cache_that_github_would_not_keep_is_not_saved(tmp_path: Path) -> None:
    environ = run_of(tmp_path, "push")
    fill(environ)
    for cache in (caches.verdicts(environ), caches.hub(environ)):
        os.truncate(cache.directory / "models--a--b" / "blob", caches.MOST_BYTES + 1)
    assert set(caches.key_outputs(environ).values()) == {""}


def test_no_cache_unless_asked_for(tmp_path: Path) -> None:
    environ = run_of(tmp_path, "push", MERGE_GATE_INPUT_CACHE="false", MERGE_GATE_INPUT_HF_CACHE="")
    prepared = caches.outputs(environ)
    assert {prepared[f"{kind}-{part}"] for kind in ("verdicts", "hub") for part in ("path", "prefix")} == {""}
    assert set(caches.key_outputs(environ).values()) == {""}


SOURCES = {
    "the input": {"MERGE_GATE_INPUT_HF_TOKEN": "hf"},
    "HF_TOKEN": {"HF_TOKEN": "hf"},
    "HUGGING_FACE_HUB_TOKEN": {"HUGGING_FACE_HUB_TOKEN": "hf"},
    "HF_TOKEN_PATH": {"HF_TOKEN_PATH": "/token"},
    "another Hub": {"HF_ENDPOINT": "https://hub.acme.example"},
    "a stored token": {},
    "a stored token in HF_HOME": {"HF_HOME": "HOME/elsewhere"},
    "a stored token in XDG_CACHE_HOME": {"XDG_CACHE_HOME": "HOME/xdg"},
    "several stored tokens": {},
}
FILES = {
    "a stored token": ".cache/huggingface/token",
    "a stored token in HF_HOME": "elsewhere/token",
    "a stored token in XDG_CACHE_HOME": "xdg/huggingface/token",
    "several stored tokens": ".cache/huggingface/stored_tokens",
}
INTO_CONTAINERS = {"the input", "HF_TOKEN", "another Hub"}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("runtime", ["auto", "native", "docker"])
def test_what_a_token_may_have_read_is_not_kept_in_public(tmp_path: Path, source: str, runtime: str) -> None:
    home = tmp_path / "home"
    given = {name: value.replace("HOME", str(home)) for name, value in SOURCES[source].items()}
    if source in FILES:
        (home / FILES[source]).parent.mkdir(parents=True)
        (home / FILES[source]).write_text("hf", encoding="utf-8")
    environ = run_of(tmp_path, "push", MERGE_GATE_INPUT_RUNTIME=runtime, **given)
    fill(environ)
    is_private = runtime != "docker" or source in INTO_CONTAINERS
    assert bool(caches.private_access(environ)) is is_private
    kept = (caches.outputs(environ)["hub-prefix"], caches.key_outputs(environ)["hub-cache-key"])
    assert (kept == ("", "")) is is_private
    assert bool(caches.why_not_saved(environ)) is is_private
    assert caches.key_outputs(environ)["verdicts-cache-key"]


def test_the_runs_with_and_without_a_token_share_nothing(tmp_path: Path, wording: Wording) -> None:
    """Also in one job, where both have the same temporary directory."""
    open_, closed = run_of(tmp_path, "push", private=True), run_of(tmp_path, "push", private=True, HF_TOKEN="hf")
    one, other = caches.outputs(open_), caches.outputs(closed)
    assert one["hub-path"] != other["hub-path"]
    assert one["hub-prefix"] != other["hub-prefix"] != ""
    assert not caches.why_not_saved(closed)
    fork = run_of(tmp_path, "pull_request", pull_request(FORK), private=True)
    assert caches.outputs(fork)["hub-prefix"] == one["hub-prefix"], "a fork has no token"
    mirror = {"HF_ENDPOINT": "https://hub.acme.example"}
    prefixes = {caches.outputs({**run, **mirror})["hub-prefix"] for run in (fork, closed)}
    assert len(prefixes | {one["hub-prefix"], ""}) == 4, "also on a mirror"
    wording(caches.why_not_saved(run_of(tmp_path, "push", HF_TOKEN="hf")))


def test_an_unreadable_payload_is_that_of_a_public_fork(tmp_path: Path) -> None:
    environ = run_of(tmp_path, "pull_request", HF_TOKEN="hf")
    (tmp_path / "event.json").write_text("[" * 100_000, encoding="utf-8")
    event = read_event(environ)
    assert (event.is_trusted, event.is_fork, event.is_private, event.pull_request) == (False, True, False, 0)
    assert caches.outputs(environ)["hub-prefix"] == ""


def test_names_for_code_scanning_are_the_same_in_each_run(tmp_path: Path) -> None:
    environ = run_of(tmp_path, "push", GITHUB_JOB="gate", MERGE_GATE_INPUT_CONFIG="gate/a b.yml")
    first = caches.outputs(environ)
    assert first["category"] == "merge-gate-gate-a-b.yml"
    assert caches.outputs(environ) == first
    assert caches.outputs({**environ, "MERGE_GATE_JOB_INDEX": "1"})["comment-id"] != first["comment-id"]
    shard = caches.outputs({**environ, "MERGE_GATE_INPUT_ADAPTERS": "./a", "MERGE_GATE_INPUT_SHARD": "1/2"})
    assert shard["category"] == "merge-gate-adapters-1-2"


def test_the_hubs_cache_of_a_native_run_is_in_its_directory(tmp_path: Path) -> None:
    environ = {"HF_HUB_CACHE": "/elsewhere", "HUGGINGFACE_HUB_CACHE": "/elsewhere", "XDG_CACHE_HOME": str(tmp_path)}
    run = ContainerRun(None, tmp_path, tmp_path, hf_cache=tmp_path / "hub", environ=environ, gpus="none")
    given, _ = step.gpus_and_device(run)
    assert given["HF_HOME"] == str(tmp_path / "hub")
    assert given["HF_TOKEN_PATH"] == str(tmp_path / "huggingface" / "token")
    assert not {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"} & set(given)
