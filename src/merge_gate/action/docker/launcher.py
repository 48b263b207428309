"""The same command inside a container with a GPU.

In: a `ContainerRun`. Out: the exit code of the gate inside, its log as it comes, and what else is to be told. Knows
nothing of configurations, reports or workflows.

What it does, in order:
  1. find the engine; remove what launchers left that were killed              docker_api, leftovers
  2. have the image, pulled by its digest where it is not there                docker_api
  3. ask for GPUs in the words this engine understands                         gpus
  4. make the directories: the cache, and one to write to in place of the
     output directory; plant canaries in them, which the container looks for   _directories, canary
  5. run as the caller, with no capabilities; hand over the token; pass on
     the log; stop on SIGINT, SIGTERM or at the time limit                     container, handover
  6. whatever happened: remove the container, then take the report out of
     what it wrote, file by file, then remove the directories                  leftovers, collect

What is made is cleared away by the opposite of step 6's order, since each thing's removal is noted before it is made.
"""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate.action.docker import canary, collect, container, docker_api, leftovers, released_image
from merge_gate.action.docker.container import ContainerRun, PreparedContainer
from merge_gate.action.docker.gpus import wanted_gpus
from merge_gate.errors import ExitCode, LauncherError, UsageError
from merge_gate.interrupts import Interrupted, held

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_RESERVED = ("/bin", "/dev", "/etc", "/lib", "/lib64", "/opt/merge-gate", "/proc", "/sbin", "/sys", "/usr")


@dataclass(frozen=True)
class Told:
    """What a run has to say besides its exit code and its log, sentence by sentence, as it happens.

    `image` gets the image that runs, `warning` what the caller should know, `refused` what was not taken of the report.
    """

    image: Callable[[str], None]
    warning: Callable[[str], None]
    refused: Callable[[str], None]


def run_in_container(run: ContainerRun, log: Callable[[bytes], None], told: Told | None = None) -> int:
    """Run the gate in a container and return its exit code; `log` receives its output as it comes.

    Without `told` everything goes to `log`. Raises `UsageError` for what the caller asked wrongly, `LauncherError` for
    an engine, image, mount or GPU that is not there, or a container that was lost. Must be called in the main thread,
    which receives the signals.
    """
    _check_paths(run)
    gpus = wanted_gpus(run.gpus, run.device, run.environ)
    run = replace(run, gpus=gpus, image=run.image or _released(gpus))
    told = told or _by_log(log)
    with held(run.time_limit_s) as signals, contextlib.ExitStack() as clearing:
        try:
            with signals.interruptible():
                client = docker_api.connect(run.environ)
                clearing.callback(client.close)
                prepared = _prepare(run, client, clearing, log, told)
            # A request that is broken off leaves podman with half a container, so this one is waited for.
            made = container.create(run, prepared)
            signals.check()
            return container.supervise(run, made, prepared, signals, log)
        except Interrupted as interruption:
            log(f"merge-gate: {interruption}\n".encode())
            return int(ExitCode.ERROR)


def _by_log(log: Callable[[bytes], None]) -> Told:
    def say(sentence: str) -> None:
        log(f"merge-gate: {sentence}\n".encode())

    return Told(image=lambda _image: None, warning=say, refused=say)


def for_a_person(
    config: str,
    *,
    output: str,
    device: str = "auto",
    arguments: Sequence[str] = (),
    image: str = "",
    gpus: str = "auto",
    cache: str | None = None,
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
        arguments=(*arguments, *(["--cache", str(Path(cache).resolve())] if cache else [])),
        hf_cache=Path(home).expanduser().resolve(),
        cache=Path(cache).resolve() if cache else None,
        environ=environ,
    )


def _released(gpus: str) -> str:
    image = released_image.CUDA if gpus else released_image.CPU
    if not image:
        raise UsageError(
            "image: this commit of merge-gate is no release and pins none",
            hint="use a released version, or name one that you built (`image: merge-gate:cpu`, or --image)",
        )
    return image


# --- paths ---------------------------------------------------------------------------------------------------------


def _check_paths(run: ContainerRun) -> None:
    if not run.config.is_file():
        raise UsageError(f"config: {run.config} is not a file", hint="name the gate's YAML file")
    seen = (run.workspace, *run.mounts)
    if not _lies_in(run.config, seen):
        raise UsageError(
            f"config: {run.config} lies outside the workspace {run.workspace}, which is all that the container sees",
            hint="move it inside, or start from a directory that holds it",
        )
    if not _lies_in(run.config.resolve(), seen):
        raise UsageError(
            f"config: {run.config} is a symbolic link to {run.config.resolve()}, which lies outside the workspace "
            f"{run.workspace} and is not there inside the container",
            hint="put the file itself in the workspace, or add its directory to `mounts`",
        )
    if run.output.resolve() != run.output:
        raise UsageError(
            f"output: {run.output} leads through a symbolic link to {run.output.resolve()}, which it must not",
            hint="name the directory itself",
        )
    if run.output.exists() and not run.output.is_dir():
        raise UsageError(f"output: {run.output} is a file, expected a directory", hint="remove it, or name another one")
    for path in run.mounts:
        if not path.exists():
            raise UsageError(f"mounts: {path} is not there", hint="name directories of the runner by absolute paths")
    for path in (*seen, run.output, *filter(None, (run.hf_cache, run.cache))):
        if str(path) == "/" or any(f"{path}/".startswith(f"{name}/") for name in _RESERVED):
            raise UsageError(f"{path} cannot be mounted into the container: it would hide the container's own files")


def _lies_in(path: Path, directories: Sequence[Path]) -> bool:
    return any(directory in path.parents for directory in directories)


# --- preparation ---------------------------------------------------------------------------------------------------


def _prepare(
    run: ContainerRun, client: Any, clearing: contextlib.ExitStack, log: Callable[[bytes], None], told: Told
) -> PreparedContainer:
    """Steps 1 to 4, for a run whose GPUs and image are settled.

    What has to be cleared away is noted in `clearing` before it is made.
    """
    facts = docker_api.describe(client)
    leftovers.remove_orphans(client, told.warning)
    told.image(docker_api.ensure_image(client, run.image, log, run.pull))
    cache, written = _directories(run, clearing, told)
    kept = {run.cache: run.cache} if run.cache else {}
    canaries = _canaries({run.output: written, cache: cache, **kept}, clearing)
    name = f"merge-gate-{secrets.token_hex(8)}"
    clearing.callback(leftovers.remove, client, name, told.warning)
    return PreparedContainer(client, facts, name, cache, written, canaries)


def _directories(run: ContainerRun, clearing: contextlib.ExitStack, told: Told) -> tuple[Path, Path]:
    """Make the directories that the container writes to; return the cache, and the one for the report."""
    with _prepared():
        clearing.enter_context(collect.claimed(run.output))
        written = _scratch(run.environ, "report", clearing)
        clearing.callback(_take, written, run.output, told)
        cache = run.hf_cache or _scratch(run.environ, "hf", clearing)
        for one in filter(None, (cache, run.cache)):
            one.mkdir(parents=True, exist_ok=True)
        return cache, written


def _canaries(directories: Mapping[Path, Path], clearing: contextlib.ExitStack) -> dict[Path, Path]:
    """Plant a file in each of the directories, given by their paths inside; return the files likewise."""
    planted = {}
    with _prepared():
        for inside, outside in directories.items():
            path = canary.plant(outside)
            clearing.callback(_unlink, path)
            planted[inside / path.name] = path
    return planted


@contextlib.contextmanager
def _prepared() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = error.filename or "a temporary directory"
        raise LauncherError(f"cannot prepare {what}: {error.strerror or error}") from error


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):  # code inside may have removed it, or put something in its place
        path.unlink()


def _scratch(environ: Mapping[str, str], purpose: str, clearing: contextlib.ExitStack) -> Path:
    parent = environ.get("RUNNER_TEMP") or tempfile.gettempdir()
    folder = Path(parent).resolve() / f"merge-gate-{purpose}-{secrets.token_hex(8)}"
    clearing.callback(collect.remove_tree, folder)
    folder.mkdir(mode=0o700)
    return folder


def _take(written: Path, output: Path, told: Told) -> None:
    try:
        refused = collect.take(written, output)
    except OSError as error:
        refused = [f"the report cannot be taken from {written}: {error.strerror}"]
    for sentence in refused:
        told.refused(sentence)
