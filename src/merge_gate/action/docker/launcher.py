"""Runs the gate in a container, with GPUs if requested, and takes the report out of it.

A `ContainerRun` goes in. The exit code of the gate inside comes out; its log and other messages are passed on as they
come.

1. Find the engine, and remove the containers of killed launchers             docker_api, leftovers
2. Pull the image by its digest if it is missing                              docker_api
3. Request GPUs in the form that the engine takes                             gpus
4. Move the report of an earlier run to `previous/`. Make the
   directories: the cache, and a temporary one for the output;
   plant canaries in them, which the container looks for                      handover
5. Run as the caller, without capabilities; pass the token; pass on the log;
   stop on SIGINT, SIGTERM, or at the time limit                              container, handover
6. In any case: remove the container, copy the report out of the directory
   that it wrote to, file by file, and remove the directories                 leftovers, collect

The removal of each thing is registered before the thing is made, so step 6 undoes everything in reverse order.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate._internal.earlier_reports import locked_for_run
from merge_gate._internal.errors import ExitCode, LauncherError, UsageError
from merge_gate._internal.interrupts import Interrupted, deferred_signals
from merge_gate.action.docker import collect, container, docker_api, handover, leftovers, released_image
from merge_gate.action.docker.container import ContainerRun, PreparedContainer
from merge_gate.action.docker.gpus import requested_gpus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_RESERVED = ("/bin", "/dev", "/etc", "/lib", "/lib64", "/opt/merge-gate", "/proc", "/sbin", "/sys", "/usr")


def run_in_container(
    run: ContainerRun, log: Callable[[bytes], None], tell: Callable[[str, str], None] | None = None
) -> int:
    """Run the gate in a container and return its exit code. Must be called in the main thread, which gets the signals.

    Args:
        run: the run.
        log: receives the gate's output as it comes.
        tell: receives other messages, each with its kind: `image` (the image that runs), `warning`, or `refused` (a
            report file that was not copied). Without it, they go to `log`.

    Raises:
        UsageError: a wrong path or option.
        LauncherError: the engine, image, a mount, or a GPU is missing, or the container was lost.
    """
    _check_paths(run)
    gpus = requested_gpus(run.gpus, run.device, run.environ)
    run = replace(run, gpus=gpus, image=run.image or _released(gpus))
    tell = tell or partial(_tell_in_log, log)
    with deferred_signals(run.timeout_s) as signals, contextlib.ExitStack() as clearing:
        try:
            with signals.interruptible():
                client = docker_api.connect(run.environ)
                clearing.callback(client.close)
                prepared = _prepare(run, client, clearing, log, tell)  # 1 to 4
            # 5. An interrupted request would leave podman with half a container, so signals have to wait here.
            created = container.create(run, prepared)
            signals.check()
            return container.supervise(run, created, signals, log)
        except Interrupted as interruption:
            log(f"merge-gate: {interruption}\n".encode())
            return int(ExitCode.ERROR)


def _tell_in_log(log: Callable[[bytes], None], kind: str, message: str) -> None:
    if kind != "image":
        log(f"merge-gate: {message}\n".encode())


def local_run(
    config: str,
    *,
    output: str,
    device: str = "auto",
    arguments: Sequence[str] = (),
    image: str = "",
    gpus: str = "auto",
    cache: str | None = None,
    publish: str | None = None,
    environ: Mapping[str, str],
    begins: Callable[[], object] = lambda: None,
) -> ContainerRun:
    """Return the run for `merge-gate run --container CONFIG` on a user's own machine.

    `arguments` are more arguments of `merge-gate run`. The workspace is the current directory, or the configuration's
    directory if that is elsewhere. The Hub's cache is the user's own, so that nothing is downloaded twice.
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
        cache=Path(cache).resolve() if cache else None,
        publish=Path(publish).resolve() if publish else None,
        environ=environ,
        begins=begins,
    )


def _released(gpus: str) -> str:
    image = released_image.CUDA if gpus else released_image.CPU
    if not image:
        raise UsageError(
            "image: this commit of merge-gate is not a release, so it names no image",
            hint="use a released version, or name an image that you built (`image: merge-gate:cpu`, or --image)",
        )
    return image


# --- paths ---------------------------------------------------------------------------------------------------------


def _check_paths(run: ContainerRun) -> None:
    visible = (run.workspace, *run.mounts)
    _check_subject(run, visible)
    _check_target("output", run.output)
    if run.publish is not None:
        _check_target("publish", run.publish)
    for name, target in (("publish", run.publish), ("cache", run.cache)):
        if target is not None and any(target == place or target in place.parents for place in visible):
            raise UsageError(
                f"{name}: {target} holds the workspace, which the container may not write to",
                hint="name a directory of its own",
            )
    for path in run.mounts:
        if not path.exists():
            raise UsageError(f"mounts: {path} does not exist", hint="name directories of the runner by absolute paths")
    for path in (*visible, run.output, *filter(None, (run.hf_cache, run.cache, run.publish))):
        if str(path) == "/" or any(f"{path}/".startswith(f"{name}/") for name in _RESERVED):
            raise UsageError(f"{path} cannot be mounted into the container: it would hide files of the image")


def _check_subject(run: ContainerRun, visible: Sequence[Path]) -> None:
    """Check that the container sees the configuration or the model to verify, the adapters, and the base."""
    if run.config is not None:
        name = "verify" if run.verifies else "config"
        if not run.verifies and not run.config.is_file():
            raise UsageError(f"config: {run.config} is not a file", hint="name the gate's YAML file")
        _check_visible(name, run.config, run.workspace, visible)
    for name, word in (*(("adapters", word) for word in run.adapters), ("base", run.base)):
        path = run.workspace / word
        if word and path.is_dir():
            _check_visible(name, Path(os.path.normpath(path)), run.workspace, visible)


def _check_visible(name: str, path: Path, workspace: Path, visible: Sequence[Path]) -> None:
    if not _is_in(path, visible):
        raise UsageError(
            f"{name}: {path} is outside of the workspace {workspace}, so the container cannot see it",
            hint="move it inside, or start from a directory that contains it"
            if name in {"config", "verify"}
            else "move it inside, or add its directory to `mounts`",
        )
    if not _is_in(path.resolve(), visible):
        raise UsageError(
            f"{name}: {path} is a symbolic link to {path.resolve()}, which is outside of the workspace {workspace} and "
            "does not exist inside the container",
            hint="put the file itself in the workspace, or add its directory to `mounts`",
        )


def _check_target(name: str, path: Path) -> None:
    if path.resolve() != path:
        raise UsageError(
            f"{name}: {path} leads through a symbolic link to {path.resolve()}, expected no link",
            hint="name the directory itself",
        )
    if path.exists() and not path.is_dir():
        raise UsageError(f"{name}: {path} is a file, expected a directory", hint="remove it, or name another directory")


def _is_in(path: Path, directories: Sequence[Path]) -> bool:
    return any(directory in (path, *path.parents) for directory in directories)


# --- preparation ---------------------------------------------------------------------------------------------------


def _prepare(
    run: ContainerRun,
    client: Any,
    clearing: contextlib.ExitStack,
    log: Callable[[bytes], None],
    tell: Callable[[str, str], None],
) -> PreparedContainer:
    """Steps 1 to 4, for a run with known GPUs and image.

    Each removal is registered in `clearing` before the thing is made.
    """
    facts = docker_api.describe(client)
    leftovers.remove_orphans(client, partial(tell, "warning"))
    tell("image", docker_api.ensure_image(client, run.image, log, run.pull))
    cache, written, canaries = _directories(run, clearing, partial(tell, "refused"))
    name = f"merge-gate-{secrets.token_hex(8)}"
    clearing.callback(leftovers.remove, client, name, partial(tell, "warning"))
    return PreparedContainer(client, facts, name, cache, written, canaries)


def _directories(
    run: ContainerRun, clearing: contextlib.ExitStack, refuse: Callable[[str], None]
) -> tuple[Path, Path, dict[Path, Path]]:
    """Make the directories that the container writes to, and plant a file in each.

    Return the cache, the directory for the report, and the files: their paths inside, and outside.
    """
    try:
        clearing.enter_context(locked_for_run(run.output, run.begins, chosen_by="`output`"))
        written = _scratch(run.environ, "report", clearing)
        clearing.callback(_take, written, run.output, refuse)
        cache = run.hf_cache or _scratch(run.environ, "hf", clearing)
        same_inside = (path for path in (cache, run.cache, run.publish) if path)
        canaries: dict[Path, Path] = {}
        for inside, outside in ((run.output, written), *((path, path) for path in same_inside)):
            outside.mkdir(parents=True, exist_ok=True)
            canary = handover.plant(outside)
            clearing.callback(_unlink, canary)
            canaries[inside / canary.name] = canary
    except OSError as error:
        place = error.filename or "a temporary directory"
        raise LauncherError(f"cannot prepare {place}: {error.strerror or error}") from error
    return cache, written, canaries


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):  # code inside may have removed or replaced it
        path.unlink()


def _scratch(environ: Mapping[str, str], purpose: str, clearing: contextlib.ExitStack) -> Path:
    parent = environ.get("RUNNER_TEMP") or tempfile.gettempdir()
    folder = Path(parent).resolve() / f"merge-gate-{purpose}-{secrets.token_hex(8)}"
    clearing.callback(collect.remove_tree, folder)
    folder.mkdir(mode=0o700)
    return folder


def _take(written: Path, output: Path, refuse: Callable[[str], None]) -> None:
    try:
        refused = collect.take(written, output)
    except OSError as error:
        refused = [f"the report cannot be copied from {written}: {error.strerror}"]
    for sentence in refused:
        refuse(sentence)
