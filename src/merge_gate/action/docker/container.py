"""Creates one container, starts it, and waits for its end.

A `ContainerRun` and the launcher's `PreparedContainer` go in. The exit code of the gate inside comes out, and its log
is passed on as it comes. The launcher removes the container.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate._internal.errors import ExitCode, LauncherError
from merge_gate._internal.interrupts import STOP_GRACE_S, TIMEOUT_S, Interrupted, Signals
from merge_gate.action.docker import docker_api, handover, leftovers
from merge_gate.action.docker.gpus import device_requests

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_FORWARDED = (
    "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DOWNLOAD_TIMEOUT", "NO_PROXY", "no_proxy", "NO_COLOR", "FORCE_COLOR",
    "MERGE_GATE_DEBUG", "MERGE_GATE_PLACE", "MERGE_GATE_COMMIT",
)  # fmt: skip
"""Variables of the caller that the container gets in its environment."""
_HANDED_OVER = ("HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "MERGE_GATE_CACHE_KEY")
"""Variables of the caller that may hold a secret. The container gets them through standard input."""
_AUTHORITIES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
"""Variables that name a file of certificate authorities, in the order of preference."""
AUTHORITIES_INSIDE = "/opt/merge-gate-authorities.pem"

SIGNALS_EVERY_S = 0.5
"""How often signals are handled while the container runs."""


@dataclass(frozen=True)
class ContainerRun:
    """A run of the gate. Paths are absolute, and the same inside the container.

    Attributes:
        config: the gate's YAML file, inside `workspace` or `mounts`; or the directory of a model, if the run verifies;
            or None, if `adapters` are gated without a file.
        output: the directory of the report.
        workspace: the directory with everything that the configuration names outside of `mounts`; read-only inside.
        adapters: paths relative to `workspace` or absolute, or Hub ids.
        base: their base, named in the same way; empty if they name it themselves, or if the configuration does.
        image: the image; empty for the one released with this version.
        pull: when the image is fetched: `missing`, `always` or `never`.
        device: the device that merges.
        gpus: `auto`, `none`, `all`, or a list of indices, UUIDs or CDI names; empty for none once the launcher has
            resolved it.
        arguments: more arguments of `merge-gate run`.
        hf_cache: the Hub's cache; None for a cache of this run only.
        cache: the directory of cached verdicts, writable inside.
        publish: the directory of published models, writable inside.
        mounts: more directories, read-only inside.
        memory, shm_size, cpus: limits of the container, in the engine's notation; empty for the engine's default.
        verifies: whether `merge-gate verify` runs, on the model in `config`, and not `merge-gate run`.
        environ: the caller's environment.
        begins: called when no usage error of this machine can follow, before the report of an earlier run is moved.
        timeout_s: seconds until the run is stopped.
    """

    config: Path | None
    output: Path
    workspace: Path
    adapters: tuple[str, ...] = ()
    base: str = ""
    image: str = ""
    pull: str = "missing"
    device: str = "auto"
    gpus: str = "auto"
    arguments: tuple[str, ...] = ()
    hf_cache: Path | None = None
    cache: Path | None = None
    publish: Path | None = None
    mounts: tuple[Path, ...] = ()
    memory: str = ""
    shm_size: str = ""
    cpus: str = ""
    verifies: bool = False
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    begins: Callable[[], object] = lambda: None
    timeout_s: float = TIMEOUT_S


@dataclass(frozen=True)
class PreparedContainer:
    """Everything that the launcher prepares before it creates the container.

    `written` becomes the output directory inside. `canaries` maps paths inside to files outside.
    """

    client: Any
    engine: docker_api.Engine
    name: str
    cache: Path
    written: Path
    canaries: Mapping[Path, Path]


def command(run: ContainerRun) -> list[str]:
    """Return the arguments of the entrypoint. If GPUs were requested, the run must not fall back to the CPU."""
    return gate_words(run, "cuda" if run.gpus and run.device == "auto" else run.device)


def gate_words(run: ContainerRun, device: str) -> list[str]:
    """Return the words of the command line after `merge-gate`. A model is verified on the CPU."""
    base = ["--base", run.base] if run.base else []
    if run.verifies:
        adapters = [word for adapter in run.adapters for word in ("--adapter", adapter)]
        return ["verify", config_word(run), "--output", str(run.output), *base, *adapters, *run.arguments]
    subject = list(run.adapters) or [config_word(run)]
    written = (("--cache", run.cache), ("--publish", run.publish))
    places = [word for option, path in written if path for word in (option, str(path))]
    return ["run", *subject, "--output", str(run.output), "--device", device, *base, *places, *run.arguments]


def config_word(run: ContainerRun) -> str:
    """The configuration's path relative to the workspace; empty if there is none.

    A leading dash gets `./` before it: it is not an option.
    """
    if run.config is None:
        return ""
    word = os.path.relpath(run.config, run.workspace)
    return os.path.join(os.curdir, word) if word.startswith("-") else word  # noqa: PTH118 # Path drops the dot


def environment(run: ContainerRun, prepared: PreparedContainer) -> dict[str, str]:
    """Return the variables that inspecting the container shows: no token and no password."""
    forwarded = {name: run.environ[name] for name in _FORWARDED if run.environ.get(name)}
    debug = {"MERGE_GATE_DEBUG": "1"} if run.environ.get("RUNNER_DEBUG") == "1" else {}
    expected = handover.expectations({**_file_of_workspace(run), **prepared.canaries}, run.gpus)
    promised = {handover.MARKER: "1"} if handed_over(run) else {}
    authorities = dict.fromkeys(_AUTHORITIES, AUTHORITIES_INSIDE) if authorities_file(run.environ) else {}
    # If NVIDIA's runtime is the default, it reads this variable, and the image sets `all`. It must not add GPUs: with
    # CDI or without GPUs none, else none but the requested ones, because newer releases of Docker do not set it.
    by_runtime = any(request["Driver"] != "cdi" for request in device_requests(run.gpus, prepared.engine))
    no_more_gpus = {"NVIDIA_VISIBLE_DEVICES": run.gpus if by_runtime else "void"}
    return {
        **forwarded, **debug, **expected, **promised, **authorities, "HF_HOME": str(prepared.cache), **no_more_gpus,
    }  # fmt: skip


def _file_of_workspace(run: ContainerRun) -> dict[Path, Path]:
    """A file that the container must see: the configuration, or that of the first adapter in the workspace."""
    if run.config is not None:
        return {} if run.verifies else {run.config: run.config}
    files = (run.workspace / adapter / "adapter_config.json" for adapter in run.adapters)
    file = next((path for path in files if path.is_file() and path.resolve() == path), None)
    return {file: file} if file else {}


def handed_over(run: ContainerRun) -> dict[str, str]:
    """Return the variables that inspecting the container must not show."""
    return {name: run.environ[name] for name in _HANDED_OVER if run.environ.get(name)}


def authorities_file(environ: Mapping[str, str]) -> str:
    """Return the caller's file of certificate authorities; empty if no variable names an existing file."""
    paths = (environ.get(name, "") for name in _AUTHORITIES)
    return next((os.path.realpath(path) for path in paths if path and Path(path).is_file()), "")


def mounts(run: ContainerRun, prepared: PreparedContainer) -> list[dict[str, Any]]:
    """Bind mounts. Everything has its own path inside, except the report: it is written to a scratch directory."""
    authorities = authorities_file(run.environ)
    listed: list[tuple[Path, Path, bool]] = [
        (run.workspace, run.workspace, True),
        *((path, path, True) for path in run.mounts),
        (prepared.written, run.output, False),
        (prepared.cache, prepared.cache, False),
        *((path, path, False) for path in (run.cache, run.publish) if path),
        *([(Path(authorities), Path(AUTHORITIES_INSIDE), True)] if authorities else []),
    ]
    return [
        {"Type": "bind", "Source": str(source), "Target": str(target), "ReadOnly": read_only}
        for source, target, read_only in listed
    ]


def create(run: ContainerRun, prepared: PreparedContainer) -> Any:
    """Create the container. Raises `LauncherError`."""
    facts = prepared.engine
    offline = run.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    with docker_api.translated("the container cannot be created", gpus=run.gpus):
        return prepared.client.containers.create(
            run.image,
            command(run),
            name=prepared.name,
            working_dir=str(run.workspace),
            environment=environment(run, prepared),
            stdin_open=bool(handed_over(run)),
            mounts=mounts(run, prepared),
            tmpfs={"/tmp": "mode=1777,exec"},  # noqa: S108 # the container's own
            read_only=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges", *(["label=disable"] if facts.selinux else [])],
            device_requests=device_requests(run.gpus, facts),
            network_mode="none" if offline else None,
            labels=leftovers.labels(run.timeout_s),
            userns_mode="host" if facts.remapped else None,
            **_caller(facts),
            **_limits(run),
        )


def _caller(facts: docker_api.Engine) -> dict[str, Any]:
    """The caller, with all groups. A rootless engine maps its root to the caller, and any other id to `nobody`."""
    if facts.rootless:
        return {"user": "0:0"}
    groups = sorted(set(os.getgroups()) - {os.getgid()})
    return {"user": f"{os.getuid()}:{os.getgid()}", "group_add": [str(group) for group in groups]}


def _limits(run: ContainerRun) -> dict[str, Any]:
    return {
        **({"mem_limit": run.memory} if run.memory else {}),
        **({"shm_size": run.shm_size} if run.shm_size else {}),
        **({"nano_cpus": int(float(run.cpus) * 1e9)} if run.cpus else {}),
    }


def supervise(run: ContainerRun, container: Any, signals: Signals, log: Callable[[bytes], None]) -> int:
    """Start the container, pass on its log, wait, and return the exit code of the gate inside.

    On a signal or at the time limit, the gate inside is asked to stop, so that it leaves a valid report.
    """
    secrets = handed_over(run)
    line = handover.written(secrets) if secrets else b""
    with (
        docker_api.standard_input(container, line),
        docker_api.translated("the container cannot be started", gpus=run.gpus),
    ):
        container.start()
    reader = threading.Thread(target=docker_api.pass_on_output, args=(container, log), daemon=True)
    reader.start()
    hint = "check the engine's log; the report is valid, but incomplete"
    with docker_api.translated("the container was lost", hint=hint):
        try:
            with signals.interruptible():
                status = _waited_for(container)
        except Interrupted as interruption:
            log(f"merge-gate: {interruption}; stopping the container\n".encode())
            container.stop(timeout=STOP_GRACE_S)
            return int(ExitCode.ERROR)
        finally:
            reader.join(STOP_GRACE_S)
        container.reload()
        return exit_code(int(status["StatusCode"]), bool(container.attrs.get("State", {}).get("OOMKilled")))


def _waited_for(container: Any) -> dict[str, Any]:
    """What the engine says when the container has ended.

    A thread waits for it. A signal that arrives just before a blocking read is not handled until the read returns, and
    this read may take hours.
    """
    outcome: queue.SimpleQueue[dict[str, Any] | Exception] = queue.SimpleQueue()

    def wait() -> None:
        try:
            outcome.put(container.wait(timeout=None))
        except Exception as error:  # noqa: BLE001 - the main thread raises it again
            outcome.put(error)

    threading.Thread(target=wait, daemon=True).start()
    while True:
        with contextlib.suppress(queue.Empty):
            ended = outcome.get(timeout=SIGNALS_EVERY_S)
            if isinstance(ended, Exception):
                raise ended
            return ended


def exit_code(status: int, out_of_memory: bool) -> int:
    """Return the gate's own exit code. Raises `LauncherError` for any other."""
    if status in set(ExitCode):
        return status
    killed = out_of_memory or status == 128 + signal.SIGKILL
    raise LauncherError(
        f"the container ended with exit code {status}, expected 0 to 3" + (": it was killed" if killed else ""),
        hint="check the machine's log: it probably ran out of memory" if killed else "check the container's log above",
    )
