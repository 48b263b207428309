"""Names become directories: local paths as they are, Hub ids through a loopback Hub and the cache that it fills.

Everything that touches the Hub runs in a process of its own in a scrubbed environment, since huggingface_hub reads
HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE once, when it is imported.
"""

import errno
import hashlib
import json
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from merge_gate._internal.errors import ResolveError
from merge_gate.files.hub import _DOWNLOAD_TIMEOUT_S, _REQUEST_TIMEOUT_S, PAUSES_S, Repository, translate
from merge_gate.files.resolve import (
    base_setting_files,
    base_weight_files,
    digest_directory,
    resolve_adapter,
    resolve_base,
)
from merge_gate.records.config import AdapterSpec, BaseSpec
from tests.support.command import PATIENCE_S, wait_until
from tests.support.files.pickles import packed
from tests.support.hub import LoopbackHub
from tests.support.wording import Wording

CLIENT = """
import json, sys, time
wait = time.sleep
time.sleep = lambda seconds: wait(min(seconds, 0.02))  # huggingface_hub waits a second before it tries again
from merge_gate._internal.errors import ResolveError
from merge_gate.records.config import AdapterSpec, BaseSpec
from merge_gate.files.resolve import Fetching, digest_directory, resolve_adapter, resolve_base

def adapter(id, revision=None, **options):
    spec = AdapterSpec(name="a", source=id, hub_id=id, revision=revision, base=BaseSpec(), checks=(), line=1, column=1)
    return resolve_adapter(spec, Fetching(notify=notes.append, **options))

def base(id, revision=None, **options):
    return resolve_base(id, revision, Fetching(notify=notes.append, **options))

answers = []
for call in json.load(sys.stdin):
    notes = []
    try:
        from merge_gate.files import hub
        hub.PAUSES_S = (0.01, 0.02)
        hub._REQUEST_TIMEOUT_S = call.pop("timeout_s", 20.0)  # more than a busy machine takes
        if call.pop("keeps_no_listing", False):
            hub.huggingface_hub = object()  # huggingface_hub 1 cannot be asked what a repository holds
        got = {"adapter": adapter, "base": base}[call.pop("kind")](**call)
        directory = got.directory
        import os
        names = sorted(os.path.relpath(os.path.join(place, file), directory)
                       for place, _, files in os.walk(directory) for file in files)
        answers.append({"directory": directory, "commit": got.revision, "withheld": got.withheld,
                        "names": names, "digest": digest_directory(directory, names), "notes": notes})
    except ResolveError as error:
        answers.append({"error": error.message, "hint": error.hint, "notes": notes})
print(json.dumps(answers))
"""

TENSORS = b"\x02\0\0\0\0\0\0\0{}"
CONFIG = b'{"peft_type": "LORA"}'
ADAPTER = {"adapter_config.json": CONFIG, "adapter_model.safetensors": TENSORS, "README.md": b"hello"}
BASE = {"config.json": b'{"model_type": "llama"}', "model.safetensors": TENSORS}
KEEPS_LISTING = hasattr(huggingface_hub, "get_cached_repo_tree")
"""Since huggingface_hub 2 the cache knows what a repository holds beside what was fetched."""
SECRET = "hf_TopSecretTokenValue"


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        yield server


class Client:
    """Calls resolve in a fresh process; what it downloads stays in `home`."""

    def __init__(self, url: str, home: Path) -> None:
        self.home = home
        kept = {name: value for name, value in os.environ.items() if name == "PATH" or name.startswith("COVERAGE_")}
        self.env = kept | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_ETAG_TIMEOUT": "20"}

    def ask(self, *calls: dict[str, Any], **env: str) -> list[dict[str, Any]]:
        process = subprocess.run(
            [sys.executable, "-P", "-c", CLIENT],
            input=json.dumps(calls), env=self.env | env, cwd=self.home.parent,
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        assert SECRET not in process.stdout + process.stderr
        return json.loads(process.stdout)

    def adapter(self, repo_id: str, revision: str | None = None, **env: str) -> dict[str, Any]:
        return self.ask({"kind": "adapter", "id": repo_id, "revision": revision}, **env)[0]


@pytest.fixture
def client(hub: LoopbackHub, tmp_path: Path) -> Client:
    return Client(hub.url, tmp_path / "home")


def make_directory(path: Path, files: Mapping[str, bytes]) -> Path:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def spec(path: Path | None) -> AdapterSpec:
    where = None if path is None else str(path)
    return AdapterSpec(name="a", source="./a", path=where, base=BaseSpec(), checks=(), line=1, column=1)


# --- directories ---------------------------------------------------------------------------------------------------


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    resolved = resolve_adapter(spec(tmp_path))
    assert resolved.directory == str(tmp_path)
    assert resolved.name == "./a"
    assert resolved.revision is None
    assert resolved.withheld == ()


def test_a_missing_directory_and_a_file_say_so(tmp_path: Path, wording: Wording) -> None:
    with wording.of(ResolveError):
        resolve_adapter(spec(tmp_path / "absent"))
    (tmp_path / "file").touch()
    with wording.of(ResolveError):
        resolve_adapter(spec(tmp_path / "file"))


def test_a_combination_is_no_directory() -> None:
    with pytest.raises(ValueError, match="files"):
        resolve_adapter(spec(None))


def test_a_local_base_is_checked_and_kept(tmp_path: Path) -> None:
    resolved = resolve_base(str(make_directory(tmp_path / "base", BASE)), label="./base")
    assert resolved.name == "./base"
    assert resolved.base_files.weights == base_weight_files(resolved.directory) == ("model.safetensors",)


SHARDS = {
    "config.json": b"{}",
    "model.safetensors.index.json": b'{"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}',
    "model-00001-of-00002.safetensors": TENSORS,
}
PICKLED_BASE = {"config.json": b"{}", "pytorch_model.bin": packed(b"\x80\x02}.")}


def test_a_pipe_in_a_base_does_not_hang(tmp_path: Path, wording: Wording) -> None:
    directory = make_directory(tmp_path / "base", {"config.json": b"{}"})
    os.mkfifo(directory / "model.safetensors")
    with wording.of(ResolveError):
        resolve_base(str(directory))


def test_a_base_that_is_gone_by_now(tmp_path: Path, wording: Wording) -> None:
    with wording.of(ResolveError):
        base_weight_files(str(tmp_path / "base"))


def test_settings_are_what_transformers_reads_beside_the_weights(tmp_path: Path) -> None:
    """Code may lie further down; a link to nowhere is nothing that it reads."""
    beside = {"config.json": b"{}", "generation_config.json": b"{}", "modeling_x.py": b"", "tokenizer.json": b"{}"}
    directory = make_directory(tmp_path / "base", SHARDS | beside)
    make_directory(directory / "code", {"layers.py": b"", "notes.json": b"{}"})
    (directory / "gone.json").symlink_to("nowhere")
    found = base_setting_files(str(directory))
    assert found == ("code/layers.py", "config.json", "generation_config.json", "modeling_x.py")


@pytest.mark.parametrize(
    "name", ["./out", "../llama", "~/models/x", "C:\\models\\x", "a/b/c", "models/", "/nowhere/llama"]
)
def test_a_path_of_another_machine_is_not_asked_of_the_hub(name: str, wording: Wording) -> None:
    with wording.of(ResolveError):
        resolve_base(name)


# --- digests -------------------------------------------------------------------------------------------------------


def test_the_digest_is_that_of_sha256sum_lines(tmp_path: Path) -> None:
    make_directory(tmp_path / "d", {"b": b"2", "a": b"1"})
    lines = "".join(f"{hashlib.sha256(c).hexdigest()}  {n}\n" for n, c in (("a", b"1"), ("b", b"2")))
    assert digest_directory(str(tmp_path / "d"), ["b", "a"]) == hashlib.sha256(lines.encode()).hexdigest()


def test_a_blob_of_the_cache_is_read_whatever_its_name(tmp_path: Path) -> None:
    """A base whose bytes have changed in the cache must not keep the digest that it had on the Hub."""
    repository = tmp_path / "models--acme--base"
    make_directory(repository / "blobs", {"a" * 64: b"not that"})
    snapshot = make_directory(repository / "snapshots" / "c0ffee", {})
    (snapshot / "w").symlink_to(f"../../blobs/{'a' * 64}")
    make_directory(tmp_path / "plain", {"w": b"not that"})
    assert digest_directory(str(snapshot), ["w"]) == digest_directory(str(tmp_path / "plain"), ["w"])


# --- the Hub -------------------------------------------------------------------------------------------------------


def test_an_adapter_is_pinned_fetched_and_found_again_offline(hub: LoopbackHub, client: Client) -> None:
    commit = hub.add_repo("acme/lora", ADAPTER | {"adapter_model.bin": b"x", "checkpoint-5/adapter_config.json": b"{}"})
    online = client.adapter("acme/lora")
    assert online["commit"] == commit
    assert online["names"] == ["adapter_config.json", "adapter_model.safetensors"]
    assert online["withheld"] == ["README.md", "adapter_model.bin", "checkpoint-5/adapter_config.json"]
    assert "2 files" in online["notes"][0]
    assert not [path for path in hub.paths() if "README" in path or "adapter_model.bin" in path]
    asked = len(hub.requests)
    offline = client.adapter("acme/lora", HF_HUB_OFFLINE="1")
    assert offline == online | {"notes": []} | ({} if KEEPS_LISTING else {"withheld": []})
    assert len(hub.requests) == asked


def test_the_files_next_to_the_weights_are_fetched_to_publish(hub: LoopbackHub, client: Client) -> None:
    more = {"tokenizer.json": b"{}", "LICENSE": b"free", "modeling.py": b"", "tokenizer.model": b"x"}
    hub.add_repo("acme/support", ADAPTER | more)
    hub.add_repo("acme/base", BASE | more)
    adapter, base = (
        answer["names"]
        for answer in client.ask(
            {"kind": "adapter", "id": "acme/support", "tokenizer_files": True},
            {"kind": "base", "id": "acme/base", "tokenizer_files": True},
        )
    )
    published = {"tokenizer.json", "LICENSE", "tokenizer.model"}
    assert {*adapter} == {"adapter_config.json", "adapter_model.safetensors"} | published
    assert {*base} == {*BASE} - {"README.md"} | published


def test_tags_branches_and_commits_are_pinned(hub: LoopbackHub, client: Client) -> None:
    old = hub.add_repo("acme/lora", ADAPTER, refs=("main", "v1"))
    new = hub.add_repo("acme/lora", ADAPTER | {"adapter_config.json": b'{"peft_type": "LORA", "r": 4}'})
    calls = [{"kind": "adapter", "id": "acme/lora", "revision": revision} for revision in (None, "v1", old, new)]
    assert [answer["commit"] for answer in client.ask(*calls)] == [new, old, old, new]
    assert [answer["commit"] for answer in client.ask(*calls, HF_HUB_OFFLINE="1")] == [new, old, old, new]


def test_a_branch_that_moves_meanwhile_changes_nothing(hub: LoopbackHub, client: Client) -> None:
    pinned = hub.add_repo("acme/lora", ADAPTER)
    asked = iter(("first", "second"))

    def move(path: str) -> None:
        if path.startswith("/api/models") and next(asked, None) == "second":
            hub.add_repo("acme/lora", {"adapter_config.json": b"moved"})

    hub.on_request = move
    answer = client.adapter("acme/lora")
    assert answer["commit"] == pinned
    assert answer["names"] == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_branch_with_a_slash(hub: LoopbackHub, client: Client) -> None:
    commit = hub.add_repo("acme/lora", ADAPTER, refs=("main", "refs/pr/7"))
    assert client.adapter("acme/lora", "refs/pr/7")["commit"] == commit
    assert client.adapter("acme/lora", "refs/pr/7", HF_HUB_OFFLINE="1")["commit"] == commit


@pytest.mark.parametrize("revision", ["../../../x", "a b", "v1\n", "", "/etc"])
def test_a_revision_cannot_leave_the_cache(hub: LoopbackHub, client: Client, revision: str, wording: Wording) -> None:
    hub.add_repo("acme/lora", ADAPTER)
    for env in ({}, {"HF_HUB_OFFLINE": "1"}):
        wording(client.adapter("acme/lora", revision, **env)["error"])


def test_a_pickle_is_left_on_the_hub_unless_allowed(hub: LoopbackHub, client: Client, wording: Wording) -> None:
    hub.add_repo("acme/pickled", {"adapter_config.json": CONFIG, "adapter_model.bin": b"PK\x03\x04"})
    call = {"kind": "adapter", "id": "acme/pickled"}
    refused = client.ask(call)[0]
    assert refused["withheld"] == ["adapter_model.bin"]
    assert refused["names"] == ["adapter_config.json"]
    again = client.ask(call, HF_HUB_OFFLINE="1")[0]
    if not KEEPS_LISTING:
        wording(again["error"])
        return
    assert again["withheld"] == ["adapter_model.bin"]
    asked = client.ask(call | {"allow_pickle": True}, HF_HUB_OFFLINE="1")[0]
    wording(asked["error"])
    assert client.ask(call | {"allow_pickle": True})[0]["names"] == ["adapter_config.json", "adapter_model.bin"]


@pytest.mark.parametrize("why", ["huggingface_hub 1", "its list is gone"])
def test_a_cache_that_does_not_know_what_the_repository_holds(hub, client, why, wording) -> None:
    """What is not there may be missing in the repository or in the cache; what is there is enough."""
    hub.add_repo("acme/lora", ADAPTER)
    hub.add_repo("acme/pickled", {"adapter_config.json": CONFIG, "adapter_model.bin": b"PK\x03\x04"})
    whole, pickled = ({"kind": "adapter", "id": f"acme/{name}"} for name in ("lora", "pickled"))
    client.ask(whole, pickled)
    if why == "its list is gone":
        for lists in list(client.home.rglob("trees")):
            shutil.rmtree(lists)
    asked = [call | {"keeps_no_listing": why == "huggingface_hub 1"} for call in (whole, pickled)]
    found, half = client.ask(*asked, HF_HUB_OFFLINE="1")
    assert (found["names"], found["withheld"]) == (sorted(CHOSEN), [])
    wording(half["error"])


HUB_BASE = BASE | {
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "modeling_x.py": b"raise SystemExit",
    "consolidated.00.safetensors": TENSORS,
    "pytorch_model.bin": b"PK",
    "onnx/config.json": b"{}",
    "onnx/model.safetensors": TENSORS,
    "original/consolidated.00.safetensors": TENSORS,
}


def test_a_base_brings_only_what_is_needed(hub: LoopbackHub, client: Client) -> None:
    commit = hub.add_repo("acme/base", HUB_BASE)
    online = client.ask({"kind": "base", "id": "acme/base"})[0]
    assert online["commit"] == commit
    assert online["names"] == ["config.json", "generation_config.json", "model.safetensors"]
    offline = client.ask({"kind": "base", "id": "acme/base"}, HF_HUB_OFFLINE="1")[0]
    assert offline == online | {"notes": []} | ({} if KEEPS_LISTING else {"withheld": []})
    with_code = client.ask({"kind": "base", "id": "acme/base", "trust_remote_code": True})[0]
    assert set(with_code["names"]) - set(online["names"]) == {"modeling_x.py"}


def test_a_pickled_base_needs_leave(hub: LoopbackHub, client: Client, wording: Wording) -> None:
    hub.add_repo("acme/base", PICKLED_BASE)
    wording(client.ask({"kind": "base", "id": "acme/base"})[0]["error"])
    assert not hub.paths("HEAD")
    allowed = client.ask({"kind": "base", "id": "acme/base", "allow_pickle": True})[0]
    assert "pytorch_model.bin" in allowed["names"]


@pytest.mark.parametrize(
    "names",
    [
        ("model.safetensors-00001-of-00002.safetensors", "model.safetensors-00002-of-00002.safetensors"),
        ("weights/a.safetensors", "weights/b.safetensors"),
    ],
)
def test_the_index_says_which_shards_are_fetched(hub: LoopbackHub, client: Client, names: tuple[str, str]) -> None:
    listed = {"metadata": {}, "weight_map": dict(zip("ab", names, strict=True))}
    files = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(listed).encode()}
    shards = dict.fromkeys(names, TENSORS)
    hub.add_repo(
        "acme/base", files | shards | {"model-00001-of-00001.safetensors": TENSORS, "x/y.safetensors": TENSORS}
    )
    online = client.ask({"kind": "base", "id": "acme/base"})[0]
    assert set(online["names"]) == {*files, *names}
    Path(online["directory"], names[1]).unlink()
    offline = client.ask({"kind": "base", "id": "acme/base"}, HF_HUB_OFFLINE="1")[0]
    assert names[1] in offline["error"]
    assert "network" in offline["hint"]


@pytest.mark.parametrize("shard", ["../../x.safetensors", "/etc/x.safetensors", "gone.safetensors"])
def test_an_index_that_names_no_file_of_the_repository(hub: LoopbackHub, client: Client, shard: str) -> None:
    listed = {"metadata": {}, "weight_map": {"a": shard}}
    hub.add_repo("acme/base", {"config.json": b"{}", "model.safetensors.index.json": json.dumps(listed).encode()})
    answer = client.ask({"kind": "base", "id": "acme/base"})[0]
    assert shard in answer["error"]
    assert not [path for path in hub.paths("GET") if path.endswith(shard)]


# --- what the Hub refuses ------------------------------------------------------------------------------------------


def test_not_found_private_and_gated(hub: LoopbackHub, client: Client, wording: Wording) -> None:
    hub.add_repo("acme/private", ADAPTER, private=True, token=SECRET)
    hub.add_repo("acme/gated", ADAPTER, gated=True, token=SECRET)
    absent, private, gated = client.ask(
        *({"kind": "adapter", "id": name} for name in ("acme/absent", "acme/private", "acme/gated"))
    )
    wording(absent["error"])
    assert "private" in private["error"]
    assert "HF_TOKEN" in private["hint"]
    wording(gated["error"])
    assert "terms" in gated["hint"]


def test_the_token_comes_from_the_usual_places(hub: LoopbackHub, client: Client) -> None:
    hub.add_repo("acme/private", ADAPTER, private=True, token=SECRET)
    hub.add_repo("acme/gated", ADAPTER, gated=True, token=SECRET)
    assert "names" in client.adapter("acme/private", HF_TOKEN=SECRET)
    client.home.mkdir(exist_ok=True)
    (client.home / "token").write_text(SECRET)
    assert "names" in client.adapter("acme/gated")
    assert {request.token for request in hub.requests if "acme" in request.path and "cdn" not in request.path} == {
        SECRET
    }
    assert {request.token for request in hub.requests if "cdn" in request.path} == {None}


REFUSALS: dict[str, tuple[Callable[[LoopbackHub], object], dict[str, Any], dict[str, str], int]] = {
    **{f"the id {name}": (lambda _: None, {"id": name}, {}, 0) for name in ("not an id", "a/b/c", "-x/y", "a--b/c..d")},
    "a token that is not the right one": (lambda _: None, {"id": "acme/private"}, {"HF_TOKEN": SECRET}, 0),
    "an unknown revision": (lambda _: None, {"revision": "v9"}, {}, 0),
    "no network": (lambda _: None, {}, {"HF_ENDPOINT": "http://127.0.0.1:9"}, len(PAUSES_S)),
    "offline, and not in the cache": (lambda _: None, {}, {"HF_HUB_OFFLINE": "1"}, 0),
    "a failure during the download": (lambda hub: hub.fail("/cdn/", 404), {}, {}, 1),
    "a refusal": (lambda hub: hub.fail("/api/models", 403), {}, {}, 0),
    "a server that is no Hub": (lambda hub: hub.fail("/api/models", 200), {}, {}, 0),
    "a server that says nothing": (
        lambda hub: hub.damage("/api/models", "silence"), {"timeout_s": 0.3}, {}, len(PAUSES_S),
    ),
    "a mirror that names no commit": (lambda hub: vars(hub).update(unsaid={"sha"}), {}, {}, 0),
    "a cache that cannot be written": (lambda _: None, {}, {"HF_HOME": "file"}, 0),
}  # fmt: skip
"""What happens to the Hub, the call, the environment, and how often it is said that the call is made again."""


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_hub_or_the_network_refuses(hub: LoopbackHub, client: Client, case: str, wording: Wording) -> None:
    """A path that is mistyped reads as a Hub id, so that offline the directory is named."""
    happens, call, env, notes = REFUSALS[case]
    hub.add_repo("acme/lora", ADAPTER)
    hub.add_repo("acme/private", ADAPTER, private=True, token="hf_other")
    happens(hub)
    (client.home.parent / "file").touch()
    (answer,) = client.ask({"kind": "adapter", "id": "acme/lora"} | call, **env)
    wording(answer["error"], answer["hint"])
    assert len(answer["notes"]) == notes


@pytest.mark.attempt("M12", "huggingface_hub asks for a list of coding agents", "only the repository is asked for")
def test_a_refusal_is_not_tried_again(hub: LoopbackHub, client: Client) -> None:
    hub.add_repo("acme/lora", ADAPTER)
    hub.fail("/api/models", 403)
    client.adapter("acme/lora")
    assert hub.paths() == ["/api/models/acme/lora"]


@pytest.mark.attempt("S11", "a password in HF_ENDPOINT, and an error", "it is not shown")
def test_credentials_in_the_endpoint_are_not_shown(hub: LoopbackHub, client: Client, wording: Wording) -> None:
    url = hub.url.replace("http://", f"http://user:{SECRET}@")
    wording(client.adapter("acme/absent", HF_ENDPOINT=url)["error"])


def test_offline_with_half_of_the_files(hub: LoopbackHub, client: Client, wording: Wording) -> None:
    hub.add_repo("acme/lora", ADAPTER)
    online = client.adapter("acme/lora")
    (client.home / online["directory"] / "adapter_model.safetensors").unlink()
    wording(client.adapter("acme/lora", HF_HUB_OFFLINE="1")["error"])


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_failures_are_tried_again(hub: LoopbackHub, client: Client, status: int, wording: Wording) -> None:
    commit = hub.add_repo("acme/lora", ADAPTER)
    hub.fail("/api/models", status, times=2)
    answer = client.adapter("acme/lora")
    assert answer["commit"] == commit
    wording(answer["notes"][0])
    hub.fail("/api/models", status)
    wording(client.adapter("acme/lora")["error"])


def content_of(answer: dict[str, Any]) -> dict[str, bytes]:
    directory = Path(answer["directory"])
    return {name: (directory / name).read_bytes() for name in answer["names"]}


CHUNK_BYTES = huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE
"""What huggingface_hub writes at once: less than that leaves nothing to go on from."""

CHOSEN = {"adapter_config.json": CONFIG, "adapter_model.safetensors": TENSORS}
LARGE = CHOSEN | {"adapter_model.safetensors": TENSORS + bytes(2 * CHUNK_BYTES)}


@pytest.mark.parametrize(("kind", "resumes"), [("cut", True), ("stall", True), ("short", False)])
def test_a_download_that_breaks_off_is_completed(hub: LoopbackHub, client: Client, kind: str, resumes: bool) -> None:
    hub.add_repo("acme/lora", LARGE)
    hub.damage("/cdn/", kind, times=1)
    answer = client.adapter("acme/lora", HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert content_of(answer) == LARGE
    assert hub.ranges == ([f"bytes={CHUNK_BYTES}-"] if resumes else [])


@pytest.mark.parametrize("kind", ["cut", pytest.param("stall", marks=pytest.mark.slow), "short"])
def test_a_download_that_always_breaks_off_is_a_sentence(hub, client, kind, wording) -> None:
    hub.add_repo("acme/lora", ADAPTER)
    hub.damage("/cdn/", kind)
    wording(client.adapter("acme/lora", HF_HUB_DOWNLOAD_TIMEOUT="1")["error"])
    wording(client.adapter("acme/lora", HF_HUB_OFFLINE="1")["error"])


@pytest.mark.parametrize(("name", "kind"), [("adapter_model.safetensors", "SHA-256"), ("adapter_config.json", "git")])
@pytest.mark.attempt("S01j", "a download with other bytes than the Hub lists", "error, and the file leaves the cache")
def test_other_bytes_than_those_that_are_listed_leave_the_cache(hub, client, name, kind, wording) -> None:
    hub.add_repo("acme/lora", ADAPTER)
    hub.damage(f"(cdn|resolve).*{name}", "other", times=1)
    error = client.adapter("acme/lora")["error"]
    assert f"{name}' of 'acme/lora'" in error
    wording(error)
    assert kind in error
    wording(client.adapter("acme/lora", HF_HUB_OFFLINE="1")["error"])
    assert content_of(client.adapter("acme/lora")) == CHOSEN


def test_a_network_that_is_dead_is_told_within_a_minute() -> None:
    """A request is made three times; huggingface_hub makes one for a file six times, a second apart."""
    assert 3 * _REQUEST_TIMEOUT_S + sum(PAUSES_S) < 60
    assert 6 * (_DOWNLOAD_TIMEOUT_S + 1) < 60


def test_half_a_download_of_a_killed_run_is_not_used(hub: LoopbackHub, client: Client, wording: Wording) -> None:
    hub.add_repo("acme/lora", LARGE)
    hub.damage("/cdn/", "stall", times=1)
    call = json.dumps([{"kind": "adapter", "id": "acme/lora", "revision": None}])
    command = [sys.executable, "-P", "-c", CLIENT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=client.env, cwd=client.home.parent) as run:
        run.stdin.write(call.encode())
        run.stdin.close()

        def is_half_done() -> bool:
            """The settings are there, and a part of the weights."""
            parts = [path.stat().st_size for path in client.home.rglob("*.incomplete")]
            return any(parts) and any(client.home.rglob("snapshots/*/adapter_config.json"))

        wait_until(is_half_done, run)
        run.kill()
    wording(client.adapter("acme/lora", HF_HUB_OFFLINE="1")["error"])
    assert content_of(client.adapter("acme/lora")) == LARGE


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EROFS, "Read-only file system"),
        ssl.SSLEOFError(1, "EOF occurred in violation of protocol"),
        TimeoutError(),
        ConnectionResetError(),
        OSError("Consistency check failed: file should be of size 2 but has size 1"),
    ],
)
def test_errors_that_no_loopback_server_can_cause(error: OSError, wording: Wording) -> None:
    wrapped = RuntimeError("somewhere deep in a thread pool")
    wrapped.__cause__ = error
    translated = translate(wrapped, "'acme/lora':")
    assert "acme/lora" in translated.message
    wording(translated)


def test_a_certificate_without_authority_is_not_the_disks_fault(wording: Wording) -> None:
    """Although the error of ssl has the number of "operation not permitted"."""
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_message = "self-signed certificate in certificate chain"
    translated = translate(error, "'acme/lora':")
    wording(translated.message)
    assert "SSL_CERT_FILE" in translated.hint


def test_a_defect_is_not_hidden_as_a_network_problem() -> None:
    assert translate(ZeroDivisionError(), "'acme/lora'") is None
    repository = Repository(repo_id="acme/lora", revision=None, notify=pytest.fail)
    with pytest.raises(ZeroDivisionError):
        repository._ask(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("said", "are_off", "timeout_s"),
    [
        ({}, True, _DOWNLOAD_TIMEOUT_S),
        ({"HF_HUB_DISABLE_PROGRESS_BARS": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "77"}, False, 77),
    ],
    ids=["unset", "set"],
)
def test_what_a_variable_says_of_the_library_stays(client, said, are_off, timeout_s) -> None:
    code = (
        "from merge_gate.files import hub; from huggingface_hub import utils;"
        "hub._set_up_library(); print(utils.are_progress_bars_disabled(), hub.constants.HF_HUB_DOWNLOAD_TIMEOUT)"
    )
    run = [sys.executable, "-P", "-c", code]
    answer = subprocess.run(run, env=client.env | said, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == [str(are_off), str(timeout_s)]


def test_a_mirror_that_lists_no_digests_is_taken_at_its_word(hub: LoopbackHub, client: Client) -> None:
    commit = hub.add_repo("acme/lora", ADAPTER)
    hub.unsaid = {"blobId", "lfs"}
    answer = client.adapter("acme/lora")
    assert (answer["commit"], content_of(answer)) == (commit, CHOSEN)
