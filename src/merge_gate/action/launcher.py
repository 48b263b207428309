"""The same command inside a container with a GPU.

In: a `ContainerRun`. Out: the exit code of the gate inside, and its log as it comes. Knows nothing of configurations,
reports or workflows. Keeps to Python 3.9: the action runs it on the runner's own Python.

What it does, in order:
  1. find the engine; have the image, pulled by its digest where it is not there          docker_api
  2. ask for GPUs in the words this engine understands                                     gpus
  3. mount the workspace read-only, the output directory and the cache at their own paths  _directories, _mounts
  4. plant canaries in them, which the container looks for before anything else            canary
  5. run as the caller, with no capabilities, and pass on the log                          _create, _supervise
  6. on SIGINT, SIGTERM or the time limit, stop the container; remove it in every case
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate.action import canary, docker_api, released_image
from merge_gate.action.gpus import device_requests, wanted_gpus
from merge_gate.action.interrupts import STOP_GRACE_S, TIME_LIMIT_S, Interrupted, interruptible
from merge_gate.errors import ExitCode, LauncherError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_PASSED_ON = (
    "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DOWNLOAD_TIMEOUT", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
    "http_proxy", "https_proxy", "no_proxy", "NO_COLOR", "FORCE_COLOR",
)  # fmt: skip
"""Variables of the caller that the gate inside sees; no other reaches it."""

_RESERVED = ("/bin", "/dev", "/etc", "/lib", "/lib64", "/opt/merge-gate", "/proc", "/sbin", "/sys", "/usr")


@dataclass(frozen=True)
class ContainerRun:
    """What to run. Paths are absolute, and the same inside the container.

    `workspace` holds the configuration and whatever it names. `hf_cache` None: a cache for this run only. `image`
    empty: the one released with this version. `arguments` are further words for `merge-gate run`. `gpus` is `auto`,
    `none`, `all` or a list of indices or UUIDs. `environ` is the caller's environment.
    """

    config: Path
    output: Path
    workspace: Path
    image: str = ""
    device: str = "auto"
    gpus: str = "auto"
    arguments: tuple[str, ...] = ()
    hf_cache: Path | None = None
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    time_limit_s: float = TIME_LIMIT_S


@dataclass(frozen=True)
class _Prepared:
    """What was found and made for one run, before the container."""

    client: Any
    engine: docker_api.Engine
    image: str
    gpus: str
    cache: Path
    canaries: tuple[Path, ...]


def run_in_container(run: ContainerRun, log: Callable[[bytes], None]) -> int:
    """Run the gate in a container and return its exit code; `log` receives its output as it comes.

    Raises `UsageError` for what the caller asked wrongly, `LauncherError` for an engine, image, mount or GPU that is
    not there, or a container that was lost. Must be called in the main thread, which receives the signals.
    """
    _check_paths(run)
    gpus = wanted_gpus(run.gpus, run.device, run.environ)
    image = run.image or _released(gpus)
    try:
        with interruptible(run.time_limit_s), contextlib.closing(docker_api.connect(run.environ)) as client:
            facts = docker_api.describe(client)
            docker_api.ensure_image(client, image, log)
            with _directories(run) as (cache, canaries):
                return _run(run, _Prepared(client, facts, image, gpus, cache, canaries), log)
    except Interrupted as interruption:
        log(f"merge-gate: {interruption}\n".encode())
        return int(ExitCode.ERROR)


def for_a_person(
    config: str,
    *,
    output: str,
    device: str = "auto",
    arguments: Sequence[str] = (),
    image: str = "",
    gpus: str = "auto",
    environ: Mapping[str, str],
) -> ContainerRun:
    """Return the run that `merge-gate run --container CONFIG` means on somebody's own machine.

    `arguments` are more words for `merge-gate run`.
    The workspace is the current directory, or the configuration's where it lies elsewhere; the Hub's cache is the
    person's own, so that nothing is downloaded twice.
    """
    here, path = Path.cwd().resolve(), Path(config).resolve()
    home = environ.get("HF_HOME") or str(Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return ContainerRun(
        config=path,
        output=Path(output).resolve(),
        workspace=here if here in path.parents else path.parent,
        image=image,
        device=device,
        gpus=gpus,
        arguments=tuple(arguments),
        hf_cache=Path(home).expanduser().resolve(),
        environ=environ,
    )


def _released(gpus: str) -> str:
    image = released_image.CUDA if gpus else released_image.CPU
    if not image:
        raise UsageError(
            "image: this commit of merge-gate is no release and pins none",
            hint="use a released version, or name an image that you built (`image: merge-gate:cpu`)",
        )
    return image


# --- mounts --------------------------------------------------------------------------------------------------------


def _check_paths(run: ContainerRun) -> None:
    if not run.config.is_file():
        raise UsageError(f"config: {run.config} is not a file", hint="name the gate's YAML file")
    if run.workspace not in run.config.parents:
        raise UsageError(
            f"config: {run.config} lies outside the workspace {run.workspace}, which is all that the container sees",
            hint="move it inside, or start from a directory that holds it",
        )
    if run.output.resolve() != run.output:
        raise UsageError(
            f"output: {run.output} leads through a symbolic link to {run.output.resolve()}, which it must not",
            hint="name the directory itself",
        )
    for path in (run.workspace, run.output, *([run.hf_cache] if run.hf_cache else [])):
        if str(path) == "/" or any(f"{path}/".startswith(f"{name}/") for name in _RESERVED):
            raise UsageError(f"{path} cannot be mounted into the container: it would hide the container's own files")


@contextlib.contextmanager
def _directories(run: ContainerRun) -> Iterator[tuple[Path, tuple[Path, ...]]]:
    """Make the writable directories; yield the cache and the canaries. What was made for this run alone goes."""
    scratch = None
    canaries: list[Path] = []
    try:
        run.output.mkdir(parents=True, exist_ok=True)
        if run.hf_cache:
            run.hf_cache.mkdir(parents=True, exist_ok=True)
            cache = run.hf_cache
        else:
            cache = scratch = Path(tempfile.mkdtemp(prefix="merge-gate-hf-", dir=run.environ.get("RUNNER_TEMP")))
        canaries += [canary.plant(directory) for directory in (run.output, cache)]
        yield cache, tuple(canaries)
    except OSError as error:
        raise LauncherError(f"cannot prepare {error.filename}: {error.strerror}") from error
    finally:
        for path in canaries:
            path.unlink(missing_ok=True)
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)


def _mounts(run: ContainerRun, cache: Path) -> list[dict[str, Any]]:
    """Bind mounts by path; unlike with a volume, a missing source is an error and not a new directory of root's."""
    return [
        {"Type": "bind", "Source": str(path), "Target": str(path), "ReadOnly": read_only}
        for path, read_only in ((run.workspace, True), (run.output, False), (cache, False))
    ]


# --- the container -------------------------------------------------------------------------------------------------


def command(run: ContainerRun, gpus: str) -> list[str]:
    """Return the words for the container's entrypoint. Where GPUs were asked for, a CPU is no answer."""
    device = "cuda" if gpus and run.device == "auto" else run.device
    config = os.path.relpath(run.config, run.workspace)
    return ["run", config, "--output", str(run.output), "--device", device, *run.arguments]


def environment(run: ContainerRun, cache: Path, canaries: Sequence[Path], gpus: str) -> dict[str, str]:
    """Return the container's variables. A token is here and nowhere else: not among the words, not in a file."""
    passed_on = {name: run.environ[name] for name in _PASSED_ON if run.environ.get(name)}
    expected = canary.expectations([run.config, *canaries], gpus)
    # Where NVIDIA's runtime is the default one, it reads this variable, and the image says `all`.
    no_gpu = {} if gpus else {"NVIDIA_VISIBLE_DEVICES": "void"}
    return {**passed_on, **expected, "HF_HOME": str(cache), **no_gpu}


def _run(run: ContainerRun, prepared: _Prepared, log: Callable[[bytes], None]) -> int:
    container = _create(run, prepared)
    try:
        return _supervise(container, prepared.gpus, log)
    finally:
        # One that is gone already, or an engine that is gone, leaves nothing to remove.
        with contextlib.suppress(LauncherError), docker_api.translated("the container cannot be removed"):
            container.remove(force=True)


def _create(run: ContainerRun, prepared: _Prepared) -> Any:
    facts = prepared.engine
    offline = run.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    # A rootless engine maps its root to the caller, and every other uid to one that owns nothing.
    user = "0:0" if facts.rootless else f"{os.getuid()}:{os.getgid()}"
    requests = device_requests(
        prepared.gpus, podman=facts.podman, nvidia_runtime=facts.nvidia_runtime, cdi_gpus=facts.cdi_gpus
    )
    with docker_api.translated("the container cannot be made", gpus=prepared.gpus):
        return prepared.client.containers.create(
            prepared.image,
            command(run, prepared.gpus),
            user=user,
            working_dir=str(run.workspace),
            environment=environment(run, prepared.cache, prepared.canaries, prepared.gpus),
            mounts=_mounts(run, prepared.cache),
            tmpfs={"/tmp": "mode=1777,exec"},  # noqa: S108 # the container's own
            read_only=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges", *(["label=disable"] if facts.selinux else [])],
            device_requests=requests,
            network_mode="none" if offline else None,
            labels={"merge-gate": "run"},
        )


def _supervise(container: Any, gpus: str, log: Callable[[bytes], None]) -> int:
    """Start the container, pass on its log, wait, and return its exit code."""
    with docker_api.translated("the container cannot be started", gpus=gpus):
        container.start()
    reader = threading.Thread(target=docker_api.pass_on_output, args=(container, log), daemon=True)
    reader.start()
    hint = "see the engine's own log; what the report holds is true, but the run did not end"
    with docker_api.translated("the container was lost", hint=hint):
        try:
            status = container.wait(timeout=None)
        except Interrupted as interruption:
            log(f"merge-gate: {interruption}; stopping the container\n".encode())
            container.stop(timeout=STOP_GRACE_S)
            return int(ExitCode.ERROR)
        finally:
            reader.join(STOP_GRACE_S)
        container.reload()
    return _exit_code(int(status["StatusCode"]), bool(container.attrs.get("State", {}).get("OOMKilled")))


def _exit_code(status: int, out_of_memory: bool) -> int:
    if status in set(ExitCode):
        return status
    killed = out_of_memory or status == 128 + signal.SIGKILL
    raise LauncherError(
        f"the container ended with exit code {status}, expected 0 to 3" + (": it was killed" if killed else ""),
        hint="memory ran out, most likely: see the machine's own log" if killed else "see the container's log above",
    )
