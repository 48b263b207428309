"""Checks the action's inputs, and reports all problems in one error.

The arguments that entrypoint.py makes of the inputs, and the environment, go in; `ActionInputs` comes out. It only
checks that files exist. An empty input has its default, as in action.yml.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate.action.docker.container import ContainerRun, Limits
from merge_gate.errors import UsageError
from merge_gate.interrupts import TIME_LIMIT_S

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_RETENTION_LIMIT_DAYS = 400
RESERVED_OPTIONS = (
    "--output", "--device", "--container", "--image", "--gpus", "--shard", "--cache", "--report", "--publish",
)  # fmt: skip
"""Options of `merge-gate run` that the action sets itself, mostly from an input."""
_OF_RUNS = ("config", "cache", "publish", "shard")
"""Inputs that `verify` does not go with."""
_SIZE = r"([1-9]\d*[bkmgBKMG]?)?"

_Rule = tuple[str, str, str]  # the input, the pattern of its value, and what the value must be
RULES: tuple[_Rule, ...] = (
    ("config", r"[^\0\r\n]*", "the path of the gate's YAML file"),
    ("runtime", r"auto|docker|native", "auto, docker or native"),
    ("gpus", r"auto|none|all|[A-Za-z0-9][A-Za-z0-9:_,-]*", "auto, none, all, or a list such as 0,1"),
    ("device", r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N"),
    ("image", r"[A-Za-z0-9][A-Za-z0-9._/:@-]*|", "the name of an image"),
    ("pull", r"missing|always|never", "missing, always or never"),
    ("hf-cache", r"[^\0\r\n]*", "a directory"),
    ("cache", r"[^\0\r\n]*", "a directory"),
    ("publish", r"[^\0\r\n]*", "a directory"),
    ("verify", r"[^\0\r\n]*", "a directory"),
    ("mounts", r"[^\0]*", "directories, one on each line"),
    ("memory", _SIZE, "a size such as 16g"),
    ("shm-size", _SIZE, "a size such as 1g"),
    ("cpus", r"(\d+(\.\d+)?)?", "a number such as 2 or 1.5"),
    ("timeout-minutes", r"((?=.*[1-9])\d{1,5}(\.\d+)?)?", "a number of minutes above 0"),
    ("working-directory", r"[^\0\r\n]*", "a directory"),
    ("fail-on", r"broken|never", "broken or never"),
    ("upload-report", r"true|false", "true or false"),
    ("artifact-name", r'[^"<>|*?\r\n\\/:\0]*', 'a name without " : < > | * ? \\ / and line breaks'),
    ("retention-days", r"\d{1,3}", f"0 to {_RETENTION_LIMIT_DAYS} days (0: the repository's default)"),
    ("output", r"[^\0\r\n]*", "a directory"),
    ("shard", r"([1-9]\d{0,4}/[1-9]\d{0,4})?", "a part such as 2/4, counted from 1"),
)
DEFAULTS = {
    "runtime": "auto", "gpus": "auto", "device": "auto", "pull": "missing", "fail-on": "broken",
    "upload-report": "true", "retention-days": "0",
}  # fmt: skip


@dataclass(frozen=True)
class ActionInputs:
    """The checked inputs: the run that they ask for, without its environment, and where and how it runs."""

    run: ContainerRun
    runtime: str
    upload_report: bool
    artifact_name: str
    retention_days: int


def read_inputs(words: Sequence[str], environ: Mapping[str, str]) -> ActionInputs:
    """Check all inputs and return them. Raises one `UsageError` with every problem."""
    given = {**dict.fromkeys((name for name, _, _ in RULES), ""), "args": ""}
    given.update(word[2:].partition("=")[::2] for word in words)
    given = {name: value or DEFAULTS.get(name, "") for name, value in given.items()}
    problems = [problem for rule in RULES if (problem := _problem(given, *rule))]
    places = _Places(environ, given["working-directory"])
    config = places.place(given["verify"] or given["config"])
    if not places.problem and not any(problem.startswith(("config: ", "verify: ")) for problem in problems):
        problems += _problems_of_subject(given, config)
    output = places.place(given["output"]) if given["output"] else _new_output(environ)
    if output.exists() and not output.is_dir():
        problems.append(f"output: got {given['output']!r}, expected a directory, but {output} is a file")
    cache = places.place(given["cache"]).resolve() if given["cache"] else None
    publish = places.place(given["publish"]) if given["publish"] else None
    arguments, args_problem = _arguments(given["args"])
    all_problems = [problem for problem in (*problems, args_problem, places.problem) if problem]
    if all_problems:
        raise UsageError("\n".join(all_problems), hint="correct the inputs; docs/reference/action.md describes them")
    run = ContainerRun(
        config=config,
        output=output,
        workspace=workspace_of(environ),
        image=given["image"],
        pull=given["pull"],
        device="cpu" if given["verify"] else given["device"],
        gpus="none" if given["verify"] else given["gpus"],
        arguments=(
            *(["--shard", given["shard"]] if given["shard"] else []),
            *(["--cache", str(cache)] if cache else []),
            *(["--publish", str(publish)] if publish else []),
            *arguments,
        ),
        hf_cache=places.place(given["hf-cache"]).resolve() if given["hf-cache"] else None,
        cache=cache,
        publish=publish,
        mounts=tuple(places.place(line.strip()) for line in given["mounts"].splitlines() if line.strip()),
        limits=Limits(given["memory"], given["shm-size"], given["cpus"]),
        verifies=bool(given["verify"]),
        time_limit_s=float(given["timeout-minutes"]) * 60 if given["timeout-minutes"] else TIME_LIMIT_S,
    )
    return ActionInputs(
        run=run,
        runtime=given["runtime"],
        upload_report=given["upload-report"] == "true",
        artifact_name=given["artifact-name"] or _artifact_name(environ, given["shard"]),
        retention_days=int(given["retention-days"]),
    )


def _problems_of_subject(given: Mapping[str, str], path: Path) -> list[str]:
    """What is wrong with the configuration, or with the model to verify. `path` is the one of them that is given."""
    if given["verify"]:
        clashes = [name for name in _OF_RUNS if given[name]]
        problems = [f"{name}: got {given[name]!r}, expected nothing, because `verify` is set" for name in clashes]
        if not path.is_dir():
            problems.append(f"verify: got {given['verify']!r}, expected a directory, but {path} is not one")
        return problems
    if not given["config"]:
        return ["config: got '', expected the path of the gate's YAML file (required, unless `verify` is set)"]
    if path.is_file():
        return []
    missing = "is a directory" if path.is_dir() else "does not exist (run actions/checkout before this step)"
    return [f"config: got {given['config']!r}, expected a file, but {path} {missing}"]


def workspace_of(environ: Mapping[str, str]) -> Path:
    """The job's checkout, with links resolved, so that each mounted directory has a single name."""
    return Path(environ.get("GITHUB_WORKSPACE") or Path.cwd()).resolve()


class _Places:
    """Resolves paths relative to the workspace or `working-directory`, with `~` for the home directory.

    Links of the runner's own directories (`_work` on another disk) are resolved. A link below them comes from the
    checkout, and the launcher refuses it.
    """

    def __init__(self, environ: Mapping[str, str], working_directory: str) -> None:
        names = (environ.get("GITHUB_WORKSPACE"), environ.get("RUNNER_TEMP"))
        self._roots = {name: Path(name).resolve() for name in map(os.path.abspath, filter(None, names))}
        self._start = workspace_of(environ)
        self.problem = ""
        if working_directory:
            self._start = self.place(working_directory)
            if not self._start.is_dir():
                self.problem = (
                    f"working-directory: got {working_directory!r}, expected a directory, but {self._start} is not one"
                )

    def place(self, written: str) -> Path:
        path = os.path.normpath(self._start / os.path.expanduser(written))  # noqa: PTH111 # Path's raises without a home
        for name, resolved in self._roots.items():
            if path == name or path.startswith(f"{name}{os.sep}"):
                return resolved / os.path.relpath(path, name)
        outside = Path(path)
        if self._start in outside.parents:
            return outside
        return outside.parent.resolve() / outside.name


def _problem(given: Mapping[str, str], name: str, pattern: str, expected: str) -> str:
    value = given[name]
    is_valid = re.fullmatch(pattern, value) and not (name == "retention-days" and int(value) > _RETENTION_LIMIT_DAYS)
    return "" if is_valid else f"{name}: got {value!r}, expected {expected}"


def _arguments(text: str) -> tuple[tuple[str, ...], str]:
    """Split `args` like a shell. Return the words, and the problem if a word is a reserved option."""
    try:
        split = tuple(shlex.split(text))
    except ValueError as error:
        return (), f"args: got {text!r}, expected words as for a shell ({error})"
    for word in split:
        name = "--output" if re.match("-[qv]*o", word) else word.partition("=")[0]
        reserved = next(
            (option for option in RESERVED_OPTIONS if len(name) > len("--") and option.startswith(name)), ""
        )
        if reserved:
            return (
                (),
                f"args: got {word!r}, but the action sets {reserved} itself: remove it, or use the action's inputs",
            )
    return split, ""


def _new_output(environ: Mapping[str, str]) -> Path:
    """A new directory for the report. The runner removes it at the end of the job."""
    parent = Path(environ.get("RUNNER_TEMP") or workspace_of(environ)).resolve()
    return parent / f"merge-gate-{secrets.token_hex(4)}" / "report"


def _artifact_name(environ: Mapping[str, str], shard: str) -> str:
    """A unique name: a second artifact of the same name would fail its job.

    The random end is needed because two calls of one reusable workflow look the same to a step.
    """
    leg = "shard-" + shard.replace("/", "-of-") if shard else environ.get("MERGE_GATE_JOB_INDEX", "")
    parts = (environ.get("GITHUB_JOB", ""), leg, secrets.token_hex(3))
    return re.sub(r"[^A-Za-z0-9._-]", "-", "-".join(["merge-gate-report", *(part for part in parts if part)]))
