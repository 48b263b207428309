"""Ranges of a file on a Hub on the loopback interface, spoken to by the real huggingface_hub, with faults."""

import random
from contextlib import nullcontext

import pytest

from merge_gate._internal.errors import SourceError
from merge_gate.features.stream import hub_file
from merge_gate.features.stream.hub_file import MOST_TRIES, HubFile, refuse_private
from tests.support.hub import LoopbackHub
from tests.support.tried import tried

CONTENT = random.Random(0).randbytes(100_000)
REPOSITORY, NAME, TOKEN = "acme/base", "model.safetensors", "hf_loopback"


@pytest.fixture
def hub(server: LoopbackHub, variables) -> LoopbackHub:
    variables["HF_TOKEN"] = TOKEN
    return server


@pytest.fixture
def commit(hub: LoopbackHub) -> str:
    return hub.add_repo(REPOSITORY, {NAME: CONTENT, "config.json": b"{}"}, gated=True, token=TOKEN)


def read(file: HubFile, start: int, size_bytes: int) -> bytes:
    buffer = bytearray(size_bytes)
    file.read_into(start, memoryview(buffer))
    return bytes(buffer)


def opened(commit: str, name: str = NAME) -> HubFile:
    return HubFile(REPOSITORY, commit, name)


def test_any_range_has_the_bytes_of_the_file(commit: str) -> None:
    file = opened(commit)
    assert file.size_bytes == len(CONTENT)
    assert file.sha256 is not None
    for start, size_bytes in ((0, 1), (0, len(CONTENT)), (99_999, 1), (12_345, 54_321)):
        assert read(file, start, size_bytes) == CONTENT[start : start + size_bytes]


def test_the_resolver_is_asked_once_and_the_hub_has_the_token(hub: LoopbackHub, commit: str) -> None:
    file = opened(commit)
    for start in range(0, 50_000, 10_000):
        read(file, start, 10_000)
    resolved = [request for request in hub.requests if "/resolve/" in request.path]
    served = [request for request in hub.requests if request.path.startswith("/cdn/")]
    assert [request.token for request in resolved] == [TOKEN]
    assert [request.token for request in served] == [None] * 5


def test_a_file_that_the_hub_serves_itself_needs_the_token(hub: LoopbackHub, commit: str) -> None:
    assert read(opened(commit, "config.json"), 0, 2) == b"{}"
    assert {request.token for request in hub.requests} == {TOKEN}


@pytest.mark.parametrize("kind", tried("S01r", "a streamed range", "read to its end", ("cut", "short")))
def test_a_read_that_breaks_off_goes_on_where_it_stopped(kind: str, hub: LoopbackHub, commit: str) -> None:
    file = opened(commit)
    hub.damage("/cdn/", kind, times=3)
    assert read(file, 1_000, 80_000) == CONTENT[1_000:81_000]
    starts = [int(asked.removeprefix("bytes=").partition("-")[0]) for asked in hub.ranges]
    assert starts == sorted(starts)
    assert len(set(starts)) == 4


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_failure_is_retried_after_the_servers_pause(
    status: int, hub: LoopbackHub, commit: str, pauses: list[float]
) -> None:
    file = opened(commit)
    hub.fail("/cdn/", status, times=2, Retry_After="7")
    assert read(file, 0, 10) == CONTENT[:10]
    assert pauses == [7.0, 7.0]
    hub.fail("/cdn/", status, times=2)
    assert read(file, 0, 10) == CONTENT[:10]
    assert pauses[2:] == [2.0, 4.0]


@pytest.mark.parametrize("status", [429, 503])
def test_a_failure_that_lasts_is_an_error(status: int, hub: LoopbackHub, commit: str) -> None:
    file = opened(commit)
    hub.fail("/cdn/", status)
    with pytest.raises(SourceError) as raised:
        read(file, 0, 10)
    assert str(status) in raised.value.message
    assert len([path for path in hub.paths("GET") if path.startswith("/cdn/")]) == MOST_TRIES


def test_an_address_that_has_expired_is_asked_for_again(hub: LoopbackHub, commit: str) -> None:
    file = opened(commit)
    hub.fail("/cdn/", 403, times=1)
    assert read(file, 0, 10) == CONTENT[:10]
    assert len([path for path in hub.paths("HEAD") if "/resolve/" in path]) == 2


@pytest.mark.parametrize("kind", tried("S01s", "a streamed range", "error", ("whole", "shifted", "excess", "packed")))
def test_bytes_that_were_not_asked_for_are_refused(kind: str, hub: LoopbackHub, commit: str) -> None:
    file = opened(commit)
    hub.damage("/cdn/", kind)
    with pytest.raises(SourceError):
        read(file, 10, 10)
    tries = [path for path in hub.paths("GET") if path.startswith("/cdn/")]
    assert len(tries) == 1, "no second try of what cannot become right"


@pytest.mark.attempt("S05d", "a redirect of streamed bytes", "error")
def test_a_redirect_of_the_bytes_is_refused(hub: LoopbackHub, commit: str) -> None:
    file = opened(commit)
    hub.fail("/cdn/", 302, Location=hub.url + "/elsewhere")
    with pytest.raises(SourceError):
        read(file, 0, 10)
    assert "/elsewhere" not in hub.paths()


@pytest.mark.attempt("S01h", "a streamed file that is another one after its address expires", "error")
def test_a_file_that_is_replaced_is_refused(hub: LoopbackHub, commit: str) -> None:
    file = opened(commit)
    read(file, 0, 10)
    hub.repos[REPOSITORY].commits[commit][NAME] = CONTENT[::-1]
    hub.fail("/cdn/", 403, times=1)
    with pytest.raises(SourceError):
        read(file, 0, 10)


@pytest.mark.attempt("S01i", "a resolver that answers for another commit", "error")
def test_another_commit_is_refused(hub: LoopbackHub, commit: str) -> None:
    repo = hub.repos[REPOSITORY]
    repo.refs["0" * 40] = commit
    with pytest.raises(SourceError):
        opened("0" * 40)


@pytest.mark.attempt("S05e", "a redirect of streamed bytes into a private network", "error")
@pytest.mark.parametrize(
    ("url", "endpoint", "refused"),
    [
        ("http://169.254.169.254/latest/meta-data", "https://8.8.8.8", True),
        ("http://[::1]/x", "https://8.8.8.8", True),
        ("http://10.0.0.7/x", "https://8.8.8.8", True),
        ("https://8.8.4.4/x", "https://8.8.8.8", False),
        ("http://10.0.0.7/x", "http://10.0.0.1", False),
        ("https://bytes.invalid/x", "https://8.8.8.8", False),  # a name that only a proxy can resolve
    ],
)
def test_an_address_in_a_private_network_is_for_private_mirrors(url: str, endpoint: str, refused: bool) -> None:
    with pytest.raises(SourceError) if refused else nullcontext():
        refuse_private(url, endpoint)


@pytest.mark.parametrize("kind", ["stall", "silence"])
def test_a_server_that_stops_is_asked_again(
    kind: str, hub: LoopbackHub, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_file, "TIMEOUT_S", 0.2)
    file = opened(commit)
    hub.damage("/cdn/", kind, times=1)
    assert read(file, 0, 1000) == CONTENT[:1000]


@pytest.mark.attempt("S01g", "two ranges of a streamed file with two ETags", "error")
def test_two_files_behind_one_address_are_refused(hub: LoopbackHub, commit: str) -> None:
    file = opened(commit)
    hub.cdn_headers = {"ETag": '"first"'}
    read(file, 0, 10)
    hub.cdn_headers = {"ETag": '"second"'}
    with pytest.raises(SourceError):
        read(file, 10, 10)


@pytest.mark.parametrize("status", [429, 503])
def test_a_resolver_that_fails_for_a_while_is_asked_again(status: int, hub: LoopbackHub, commit: str) -> None:
    hub.fail("/resolve/", status, times=2)
    assert opened(commit).size_bytes == len(CONTENT)


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (503, MOST_TRIES)])
def test_a_resolver_that_refuses_is_an_error(status: int, requests: int, hub: LoopbackHub, commit: str) -> None:
    hub.fail("/resolve/", status)
    with pytest.raises(SourceError):
        opened(commit)
    assert len(hub.paths("HEAD")) == requests


def test_a_resolver_without_a_size_is_an_error(hub: LoopbackHub, commit: str) -> None:
    hub.fail("/resolve/", 302, Location=hub.cdn_url + "/cdn/x", ETag='"x"')
    with pytest.raises(SourceError):
        opened(commit)


@pytest.mark.parametrize("name", ["get_hf_file_metadata", "get_session"])
def test_a_defect_is_not_hidden_as_a_network_problem(name: str, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a file is opened, or while its bytes are read."""
    file = opened(commit)
    monkeypatch.setattr(hub_file, name, lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read(file, 0, 10) if name == "get_session" else opened(commit)


def test_several_threads_renew_an_expired_address_once(hub: LoopbackHub, commit: str) -> None:
    file = opened(commit)
    expired = file._address
    file._renew(expired)
    renewed = file._address
    file._renew(expired)
    assert file._address is renewed
    assert len(hub.paths("HEAD")) == 2
