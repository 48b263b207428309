"""Runs a gate on a Ray cluster as shards, and combines their reports. The only module that imports Ray.

In: what `run_gate` gets, and the address of a cluster. Out: the report that one machine would have written. No
dashboard is started, and no statistics are sent.

1. A task is an ordinary run of a shard. It sends the calls of its view.
2. A lost shard is run again, without an adapter that was being merged at two losses.
3. A shard that is always lost is run here, without any adapter: each has the verdict `error`.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Any, cast

from merge_gate._internal.errors import GateError
from merge_gate.features.ray.declared import LOCAL
from merge_gate.features.shards.combined import combined
from merge_gate.files.resolve import digest_file
from merge_gate.records.config import Config
from merge_gate.records.features import FEATURES, part
from merge_gate.records.files import HashedFile
from merge_gate.records.options import RunOptions
from merge_gate.records.report import Report
from merge_gate.records.terms import Access, record
from merge_gate.run.feature import Feature
from merge_gate.run.flow import run_gate
from merge_gate.run.verdict_key import versions_digest

if TYPE_CHECKING:
    from merge_gate.run.flow import Run
    from merge_gate.run.view import View

    Send = Callable[[Any], None]

OBJECT_STORE_BYTES = 80 << 20
"""The object store of a local cluster: slightly above Ray's minimum. It holds only what tasks send."""

_HINT = "start the cluster, or correct ADDRESS; the gate must be able to reach the head node"
_CONNECT_S = 5.0
_HEALTH_S = 45.0

SHARDS_PER_WORKER = 2
WORKERS_PER_NODE = 2
"""Workers on the largest node without GPUs: while one loads a base, the other merges."""

PATIENCE_S = 0.5
MAX_LOSSES, MAX_LOSSES_AT_ADAPTER = 3, 2


def join(run: Run) -> Feature:
    return RayRun(run)


# --- on a node -------------------------------------------------------------------------------------------------------


@record
class Work:
    """What all tasks of a run share. A node must have the same versions and the same seal, and must see `mark`."""

    config: Config
    options: RunOptions
    versions_sha256: str
    seal: str
    mark: str | None


def run_shard(work: Work, shard: tuple[int, int], lost_adapters: tuple[tuple[str, str], ...]) -> Iterator[list[Any]]:
    """Run a shard on this node. None is the last that it sends."""
    sent: queue.SimpleQueue[Any] = queue.SimpleQueue()
    options = replace(work.options, features={**work.options.features, "shard": shard}, lost_adapters=lost_adapters)
    threading.Thread(target=_run, args=(replace(work, options=options), sent.put), daemon=True).start()
    batch: list[Any] = []
    while None not in batch:
        batch = [sent.get()]
        while not sent.empty():
            batch.append(sent.get())
        yield batch


def _run(work: Work, send: Send) -> None:
    try:
        _refuse_node(work)
        run_gate(work.config, work.options, view=calls(send))
    except BaseException as error:  # noqa: BLE001 - the machine of the run raises it
        send(error)
    send(None)


def _refuse_node(work: Work) -> None:
    node = f"node {os.uname().nodename}"
    if versions_digest() != work.versions_sha256:
        problem = f"{node} has other versions of the libraries, or other code of merge-gate"
        raise GateError(problem, hint="install the same versions on every node")
    if work.options.features.get("cache") is not None and _seal() != work.seal:
        problem = f"{node} has another {part('cache', 'declared').SECRET}"
        raise GateError(problem, hint="set the same secret on every node, or on none")
    if work.mark is not None and not Path(work.mark).is_dir():
        problem = f"{node} does not see the directory to publish to, {Path(work.mark).parent}, of this machine"
        raise GateError(problem, hint="publish to a file system that all nodes have at the same path")


def _seal() -> str:
    return str(part("cache", "feature").from_environment(os.environ).of("ray", "", b"")) if "cache" in FEATURES else ""


class _Calls:
    def __init__(self, send: Send) -> None:
        self._send = send

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *given, **named: self._send((name, given, named))


def calls(send: Send) -> View:
    """A view that sends each call, and each report, and shows nothing."""
    return cast("View", _Calls(send))


# --- on the machine of the run ---------------------------------------------------------------------------------------


@dataclass
class _Shard:
    number: tuple[int, int]
    merging: str = ""
    losses_at: Counter[str] = field(default_factory=Counter)
    lost_adapters: tuple[tuple[str, str], ...] = ()
    report: Report | None = None

    @property
    def is_done(self) -> bool:
        return self.report is not None and self.report.complete


class RayRun(Feature):
    """One run on a cluster."""

    def __init__(self, run: Run) -> None:
        self._run, self._view, self._writer = run, run.view, run.writer
        self._address: str = run.options.features["ray"]
        self._names = [spec.name for spec in run.specs]
        self._merges, self._judged = sum(len(spec.base.dtypes) for spec in run.specs), 0
        asked = run.options.features
        own = {"cache": _absolute(asked.get("cache")), "ray": None}  # on a node, relative names start elsewhere
        self._options = replace(run.options, output=None, features={**asked, **own})
        self._shards: list[_Shard] = []
        self._notes = set[str]()
        self._ray: Any = None

    def run_elsewhere(self) -> Report:
        """Run all shards, and write the report.

        Raises:
            UsageError: as `run_gate`, on a node.
            GateError: there is no such cluster, a node does not fit, or the report cannot be written.
        """
        publish = self._run.config.publish
        publish = publish and replace(publish, directory=_absolute(publish.directory) or "")
        self._config = replace(self._run.config, publish=publish)
        self._empty = self._run.tally.report()
        with self._writer.guarding(self._report):
            with cluster(self._address) as self._ray, ExitStack() as stack:
                self._view.start(self._config.label, len(self._names), self._merges)
                mark = None
                if publish is not None:
                    mark = stack.enter_context(TemporaryDirectory(prefix=".ray-", dir=publish.directory))
                self._run_shards(mark)
            whole = combined([("Ray", report) for report in self._reports()])
            others = () if self._address == LOCAL else self._other_files()
            problems = (*whole.problems, *others)
            return self._writer.finish(replace(whole, config=self._empty.config, problems=problems))

    def _run_shards(self, mark: str | None) -> None:
        needs = self._needs()
        count = min(SHARDS_PER_WORKER * self._room(needs), len(self._names))
        if not count:
            raise GateError("the Ray cluster has no node with a CPU", hint="add a node to the cluster")
        self._shards = [_Shard((index, count)) for index in range(1, count + 1)]
        device = "cuda" if "GPU" in needs else self._options.device  # Ray shows each worker only its own GPU
        options = replace(self._options, device=device)
        work = self._ray.put(
            Work(config=self._config, options=options, versions_sha256=versions_digest(), seal=_seal(), mark=mark)
        )
        task = self._ray.remote(run_shard).options(
            num_returns="streaming",
            max_retries=0,  # a lost shard is run again without the adapter that is to blame
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU"),
        )
        waiting, running = list(self._shards), dict[Any, _Shard]()
        try:
            while waiting or running:
                running |= {task.remote(work, shard.number, shard.lost_adapters): shard for shard in waiting}
                waiting = []
                ready, _ = self._ray.wait(list(running), timeout=PATIENCE_S, num_returns=1)
                for handle in ready:
                    if self._has_ended(handle, running[handle]):
                        shard = running.pop(handle)
                        waiting += [] if shard.is_done else [shard]
                if not ready and not self._room(needs):
                    for shard in running.values():
                        self._give_up(shard, self._names, "was lost, and the cluster has no other node for it")
                    return
                self._writer.catch_up(self._report)
        finally:
            for handle in running:
                with suppress(Exception):  # the task or the cluster is gone
                    self._ray.cancel(handle, force=True)

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _needs(self) -> dict[str, int]:
        """What a worker asks Ray for: one GPU if there are GPUs to use, and its share of the cores of a node."""
        nodes = self._nodes()
        if gpus := [node for node in nodes if node.get("GPU", 0) >= 1 and self._options.device != "cpu"]:
            return {"CPU": max(int(min(node.get("CPU", 0) // node["GPU"] for node in gpus)), 1), "GPU": 1}
        return {"CPU": max(int(max((node.get("CPU", 0) for node in nodes), default=0)) // WORKERS_PER_NODE, 1)}

    def _room(self, needs: dict[str, int]) -> int:
        """How many workers the nodes have room for."""
        return sum(min(int(node.get(name, 0) // share) for name, share in needs.items()) for node in self._nodes())

    def _has_ended(self, handle: Any, shard: _Shard) -> bool:
        """Take what a task has sent. If it was lost, find out what to run next time."""
        try:
            sent, why = self._ray.get(next(handle)), ""
        except StopIteration:
            sent, why = None, "it ended without a report"
        except self._ray.exceptions.RayError as error:
            sent, why = None, f"{type(error).__name__}: {first_line(error)}"
        for item in sent or ():
            self._take(shard, item)
        if sent is None and not shard.is_done:
            name, shard.merging = shard.merging, ""
            shard.losses_at[name] += 1
            if name in self._names and shard.losses_at[name] == MAX_LOSSES_AT_ADAPTER:
                self._give_up(shard, [name], f"was lost twice while it merged this adapter: {why}")
            elif shard.losses_at[name] == MAX_LOSSES:
                self._give_up(shard, self._names, f"was lost {MAX_LOSSES} times before it reached this adapter: {why}")
        return sent is None

    def _give_up(self, shard: _Shard, names: Iterable[str], reason: str) -> None:
        lost_adapters = dict.fromkeys(names, f"a worker on the Ray cluster {reason}") | dict(shard.lost_adapters)
        shard.lost_adapters = tuple(lost_adapters.items())
        if len(lost_adapters) == len(self._names):
            of_shard = {**self._options.features, "shard": shard.number}
            options = replace(self._options, features=of_shard, lost_adapters=shard.lost_adapters)
            specs = (replace(spec, base=replace(spec.base, access=Access.STREAM)) for spec in self._config.adapters)
            run_gate(replace(self._config, adapters=tuple(specs)), options, view=calls(partial(self._take, shard)))

    def _take(self, shard: _Shard, item: Any) -> None:
        """Take a call of a view, and show it with the numbers of the whole run. Raise an exception."""
        match item:
            case ("report_made", (Report() as report,), _):
                shard.report = report
                self._writer.changed()
            case BaseException():
                raise item
            case ("adapter_started", (str(name), _, _, dtype), _):
                shard.merging = name
                self._view.adapter_started(name, self._judged + 1, self._merges, dtype)
            case ("adapter_done", (adapter,), _):
                shard.merging, self._judged = "", self._judged + 1
                self._view.adapter_done(adapter)
            case ("note", (str(text),), _) if text in self._notes:
                pass
            case (str(call), given, named) if call not in {"start", "finish"}:
                self._notes.update(given if call == "note" else ())
                getattr(self._view, call)(*given, **named)

    # --- the report --------------------------------------------------------------------------------------------------

    def _reports(self) -> list[Report]:
        return [shard.report for shard in self._shards if shard.report is not None]

    def _report(self) -> Report:
        """What there is until now."""
        reports = self._reports()
        whole = combined([("Ray", report) for report in reports]) if reports else self._empty
        return replace(whole, config=self._empty.config, complete=False, problems=())

    def _other_files(self) -> Iterator[str]:
        """A sentence for each file that a node read, and that has other bytes on this machine."""
        digest = cache(digest_file)
        specs = {spec.name: spec for spec in self._config.adapters}
        read: list[tuple[str, list[str | None], tuple[HashedFile, ...]]] = []  # a combination has several directories
        for report in self._reports():
            for adapter in report.adapters:
                combine = specs[adapter.name].combine
                members = combine.adapters if combine else (adapter.name,)
                read.append((adapter.source, [specs[name].path for name in members], adapter.files))
            read += [(base.model, [base.model], base.files) for base in report.bases]
        for name, file, places in ((name, file, places) for name, places, files in read for file in files):
            here = set[str]()
            for place in filter(None, places):
                with suppress(OSError, ValueError, RuntimeError):  # it is not here, or there is no such home directory
                    here.add(digest(Path(self._config.directory, Path(place).expanduser(), file.path)))
            if here and file.sha256 not in here:
                yield f"a node read another {file.path} of {name} than this machine has"


def _absolute(directory: str | None) -> str | None:
    return str(Path(directory).absolute()) if directory is not None else None


# --- the cluster -----------------------------------------------------------------------------------------------------


def first_line(error: Exception) -> str:
    """The message of one of Ray's errors, which may have many lines."""
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def cluster(address: str, *, object_store_bytes: int = OBJECT_STORE_BYTES) -> Iterator[Any]:
    """Connect, and disconnect at the end without leaving anything behind.

    Raises:
        GateError: Ray is not installed, or there is no such cluster (raised within a minute).
    """
    os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"})
    if address not in {LOCAL, "auto"}:
        _reach(address)
    with ExitStack() as stack:
        options: dict[str, Any] = {"address": address}
        if address == LOCAL:
            os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
            place = mkdtemp(prefix="mg-ray-", dir="/tmp")
            stack.callback(shutil.rmtree, place, ignore_errors=True)
            options = {
                "address": "local",
                "_temp_dir": place,
                "include_dashboard": False,
                "object_store_memory": object_store_bytes,
            }
        ray = _imported()
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        stack.callback(ray.shutdown)
        _init(ray, address, options)
        yield ray


def _imported() -> Any:
    try:
        import ray  # noqa: PLC0415 - only if it is used
    except ImportError as error:
        raise GateError(f"--ray: Ray is not installed ({error})", hint="pip install 'ray>=2.60'") from error
    return ray


def _init(ray: Any, address: str, options: dict[str, Any]) -> None:
    """Start or connect to Ray, and restore the run's own signal handlers, which Ray replaces."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(log_to_driver=False, logging_level="CRITICAL", configure_logging=False, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        problem, hint = f"no Ray cluster at {address}", _HINT
        if address == LOCAL:
            problem = "a Ray cluster cannot be started on this machine"
            hint = "free memory and disk space, or give the address of a running cluster"
        raise GateError(f"{problem}: {first_line(error)}", hint=hint) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _reach(address: str) -> None:
    """Check that a cluster answers. Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise GateError(f"no Ray cluster at {address}: {error}", hint=_HINT) from error
    _imported()
    words = [sys.executable, "-P", "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(words, check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=_HEALTH_S)
    except subprocess.TimeoutExpired as error:
        raise GateError(f"the service at {address} did not answer as a Ray cluster", hint=_HINT) from error
    if done.returncode:
        raise GateError(f"the service at {address} is not a healthy Ray cluster", hint=_HINT)
