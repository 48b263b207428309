"""One container: what it is told and given, from its creation to its end.

In: a `ContainerRun`, and what the launcher has found and made for it. Out: the exit code of the gate inside, its log
as it comes. Does not find engines, images or directories, and does not remove the container: the launcher does.
"""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate.action.docker import canary, docker_api, handover, leftovers
from merge_gate.action.docker.gpus import device_requests
from merge_gate.errors import ExitCode, LauncherError
from merge_gate.interrupts import STOP_GRACE_S, TIME_LIMIT_S, Interrupted, Signals

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_PASSED_ON = (
    "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DOWNLOAD_TIMEOUT", "NO_PROXY", "no_proxy", "NO_COLOR", "FORCE_COLOR",
    "MERGE_GATE_DEBUG", "MERGE_GATE_PLACE",
)  # fmt: skip
"""Variables of the caller that the gate inside sees; no other reaches it but the next ones."""
_HANDED_OVER = ("HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "MERGE_GATE_CACHE_KEY")
"""Those that may hold a secret travel by standard input."""
_AUTHORITIES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
"""Variables that name a file of certificate authorities, such as a company's own, in the order of preference."""
AUTHORITIES_INSIDE = "/opt/merge-gate-authorities.pem"


@dataclass(frozen=True)
class Limits:
    """What the container may use, in the engine's words; empty: the engine's own default."""

    memory: str = ""
    shm_size: str = ""
    cpus: str = ""


@dataclass(frozen=True)
class ContainerRun:
    """What to run. Paths are absolute, and the same inside the container.

    `workspace` holds the configuration and whatever it names that `mounts` do not hold; both are read-only inside.
    `hf_cache` None: a cache for this run only. `cache` is the directory of verdicts that are kept, which the container
    writes to. `image` empty: the one released with this version; `pull` says when it
    is fetched. `arguments` are further words for `merge-gate run`. `gpus` is `auto`, `none`, `all` or a list of indices
    or UUIDs, and once the launcher has settled it, empty for none. `environ` is the caller's environment.
    """

    config: Path
    output: Path
    workspace: Path
    image: str = ""
    pull: str = "missing"
    device: str = "auto"
    gpus: str = "auto"
    arguments: tuple[str, ...] = ()
    hf_cache: Path | None = None
    cache: Path | None = None
    mounts: tuple[Path, ...] = ()
    limits: Limits = Limits()
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    time_limit_s: float = TIME_LIMIT_S


@dataclass(frozen=True)
class PreparedContainer:
    """What was found and made for one run, before the container.

    `written` becomes the output directory inside. `canaries` are files of the mounts, by their paths inside.
    """

    client: Any
    engine: docker_api.Engine
    name: str
    cache: Path
    written: Path
    canaries: Mapping[Path, Path]


def command(run: ContainerRun) -> list[str]:
    """Return the words for the container's entrypoint. Where GPUs were asked for, a CPU is no answer."""
    device = "cuda" if run.gpus and run.device == "auto" else run.device
    return ["run", config_word(run), "--output", str(run.output), "--device", device, *run.arguments]


def config_word(run: ContainerRun) -> str:
    """The configuration's path for a command line that starts in the workspace; a dash at its head is no option."""
    word = os.path.relpath(run.config, run.workspace)
    return os.path.join(os.curdir, word) if word.startswith("-") else word  # noqa: PTH118 # Path drops the dot


def environment(run: ContainerRun, prepared: PreparedContainer) -> dict[str, str]:
    """Return the variables that whoever may inspect the container sees: no token, nothing with a password."""
    passed_on = {name: run.environ[name] for name in _PASSED_ON if run.environ.get(name)}
    debug = {"MERGE_GATE_DEBUG": "1"} if run.environ.get("RUNNER_DEBUG") == "1" else {}
    expected = canary.expectations({run.config: run.config, **prepared.canaries}, run.gpus)
    promised = {handover.MARKER: "1"} if handed_over(run) else {}
    authorities = dict.fromkeys(_AUTHORITIES, AUTHORITIES_INSIDE) if authorities_file(run.environ) else {}
    # Where NVIDIA's runtime is the default one, it reads this variable, and the image says `all`; devices by CDI, or
    # none at all, leave nothing for it to add.
    no_more_gpus = {} if _nvidia_runtime_decides(run, prepared) else {"NVIDIA_VISIBLE_DEVICES": "void"}
    return {
        **passed_on, **debug, **expected, **promised, **authorities, "HF_HOME": str(prepared.cache), **no_more_gpus,
    }  # fmt: skip


def _nvidia_runtime_decides(run: ContainerRun, prepared: PreparedContainer) -> bool:
    return any(request["Driver"] != "cdi" for request in _device_requests(run, prepared))


def _device_requests(run: ContainerRun, prepared: PreparedContainer) -> list[dict[str, Any]]:
    facts = prepared.engine
    return device_requests(run.gpus, podman=facts.podman, nvidia_runtime=facts.nvidia_runtime, cdi_gpus=facts.cdi_gpus)


def handed_over(run: ContainerRun) -> dict[str, str]:
    """Return the variables that nobody who inspects the container may see."""
    return {name: run.environ[name] for name in _HANDED_OVER if run.environ.get(name)}


def authorities_file(environ: Mapping[str, str]) -> str:
    """Return the caller's file of certificate authorities, an empty string where it names none that is there."""
    named = (environ.get(name, "") for name in _AUTHORITIES)
    return next((os.path.realpath(name) for name in named if name and Path(name).is_file()), "")


def mounts(run: ContainerRun, prepared: PreparedContainer) -> list[dict[str, Any]]:
    """Bind mounts: everything at its own path, except that the container writes its report elsewhere than it thinks."""
    authorities = authorities_file(run.environ)
    listed: list[tuple[Path, Path, bool]] = [
        (run.workspace, run.workspace, True),
        *((path, path, True) for path in run.mounts),
        (prepared.written, run.output, False),
        (prepared.cache, prepared.cache, False),
        *([(run.cache, run.cache, False)] if run.cache else []),
        *([(Path(authorities), Path(AUTHORITIES_INSIDE), True)] if authorities else []),
    ]
    return [
        {"Type": "bind", "Source": str(source), "Target": str(target), "ReadOnly": read_only}
        for source, target, read_only in listed
    ]


def create(run: ContainerRun, prepared: PreparedContainer) -> Any:
    """Make the container. Raises `LauncherError`."""
    facts = prepared.engine
    offline = run.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    with docker_api.translated("the container cannot be made", gpus=run.gpus):
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
            device_requests=_device_requests(run, prepared),
            network_mode="none" if offline else None,
            labels=leftovers.labels(run.time_limit_s),
            userns_mode="host" if facts.remapped else None,
            **_caller(facts),
            **_limits(run.limits),
        )


def _caller(facts: docker_api.Engine) -> dict[str, Any]:
    """The caller, with all groups. A rootless engine maps its root to the caller, and every other id to nobody."""
    if facts.rootless:
        return {"user": "0:0"}
    groups = sorted(set(os.getgroups()) - {os.getgid()})
    return {"user": f"{os.getuid()}:{os.getgid()}", "group_add": [str(group) for group in groups]}


def _limits(limits: Limits) -> dict[str, Any]:
    return {
        **({"mem_limit": limits.memory} if limits.memory else {}),
        **({"shm_size": limits.shm_size} if limits.shm_size else {}),
        **({"nano_cpus": int(float(limits.cpus) * 1e9)} if limits.cpus else {}),
    }


def supervise(
    run: ContainerRun, container: Any, prepared: PreparedContainer, signals: Signals, log: Callable[[bytes], None]
) -> int:
    """Start the container, pass on its log, wait, and return the exit code of the gate inside.

    On a signal or at the time limit the gate inside is asked to stop, so that it leaves a true report.
    """
    secrets = handed_over(run)
    line = handover.written(secrets) if secrets else b""
    with (
        docker_api.standard_input(prepared.client, container.id, line),
        docker_api.translated("the container cannot be started", gpus=run.gpus),
    ):
        container.start()
    reader = threading.Thread(target=docker_api.pass_on_output, args=(container, log), daemon=True)
    reader.start()
    hint = "see the engine's own log; what the report holds is true, but the run did not end"
    with docker_api.translated("the container was lost", hint=hint):
        try:
            with signals.interruptible():
                status = container.wait(timeout=None)
        except Interrupted as interruption:
            log(f"merge-gate: {interruption}; stopping the container\n".encode())
            container.stop(timeout=STOP_GRACE_S)
            return int(ExitCode.ERROR)
        finally:
            reader.join(STOP_GRACE_S)
        container.reload()
        return exit_code(int(status["StatusCode"]), bool(container.attrs.get("State", {}).get("OOMKilled")))


def exit_code(status: int, out_of_memory: bool) -> int:
    """Return the gate's own exit code. Raises `LauncherError` for any other."""
    if status in set(ExitCode):
        return status
    killed = out_of_memory or status == 128 + signal.SIGKILL
    raise LauncherError(
        f"the container ended with exit code {status}, expected 0 to 3" + (": it was killed" if killed else ""),
        hint="memory ran out, most likely: see the machine's own log" if killed else "see the container's log above",
    )
