"""Checks the action's inputs, and reports all problems in one error.

The environment goes in; `ActionInputs` comes out. Files only have to exist. An empty input has its default, as in
action.yml.
"""

from __future__ import annotations

import glob
import os
import re
import secrets
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate._internal.errors import UsageError
from merge_gate._internal.interrupts import TIMEOUT_S
from merge_gate._internal.text import MOST_FOREIGN, foreign, quoted, unusable
from merge_gate.action import caches
from merge_gate.action.docker.container import ContainerRun

if TYPE_CHECKING:
    from collections.abc import Mapping

_MAX_RETENTION_DAYS = 400
DEFAULT_CONFIG = "merge-gate.yml"
RESERVED_OPTIONS = (
    "--output", "--device", "--container", "--image", "--gpus", "--shard", "--cache", "--report", "--publish",
)  # fmt: skip
"""Options of `merge-gate run` that the action sets itself, mostly from an input."""
_OF_RUNS = ("dtype", "cache", "cache-dir", "publish", "shard")
"""Inputs that `verify` does not go with."""
_PLACES = (
    "config", "adapters", "base", "verify", "mounts", "hf-cache-dir", "cache-dir", "publish", "output",
    "working-directory",
)  # fmt: skip
"""Inputs that are names, one on each line."""
_CORRECT = "correct the inputs; docs/reference/action.md describes them"
_SIZE = r"([1-9]\d*[bkmgBKMG]?)?"
_LINE = r"[^\0\r\n]*"
_SWITCH = ("true|false", "true or false")
_DTYPE = "(auto|float32|bfloat16|float16)"
_HUB_ID = re.compile(r"hub:\S+|[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
"""The gate itself checks what follows `hub:`."""

_Rule = tuple[str, str, str]  # the input, the pattern of its value, and what the value must be
RULES: tuple[_Rule, ...] = (
    ("config", _LINE, "the path of the gate's YAML file"),
    ("adapters", r"[^\0]*", "directories or Hub ids, one on each line"),
    ("base", _LINE, "a directory or a Hub id"),
    (
        "dtype",
        rf"({_DTYPE}(\s*,\s*{_DTYPE})*)?",
        "auto, float32, bfloat16 or float16, or a list such as bfloat16,float16",
    ),
    ("runtime", r"auto|docker|native", "auto, docker or native"),
    ("device", r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N"),
    ("gpus", r"auto|none|all|[A-Za-z0-9][A-Za-z0-9:_,./=-]*", "auto, none, all, or a list such as 0,1"),
    ("image", r"[A-Za-z0-9][A-Za-z0-9._/:@-]*|", "the name of an image"),
    ("pull", r"missing|always|never", "missing, always or never"),
    ("mounts", r"[^\0]*", "directories, one on each line"),
    ("memory", _SIZE, "a size such as 16g"),
    ("cpus", r"(\d+(\.\d+)?)?", "a number such as 2 or 1.5"),
    ("shm-size", _SIZE, "a size such as 1g"),
    ("hf-cache", *_SWITCH),
    ("hf-cache-dir", _LINE, "a directory"),
    ("cache", *_SWITCH),
    ("cache-dir", _LINE, "a directory"),
    ("publish", _LINE, "a directory"),
    ("verify", _LINE, "a directory"),
    ("fail-on", r"failed|warning|never", "failed, warning or never"),
    ("fail-on-not-judged", *_SWITCH),
    ("upload-report", *_SWITCH),
    ("artifact-name", r'[^"<>|*?\r\n\\/:\0]*', 'a name without " : < > | * ? \\ / and line breaks'),
    ("retention-days", r"\d{1,3}", f"0 to {_MAX_RETENTION_DAYS} days (0: the repository's default)"),
    ("upload-sarif", *_SWITCH),
    ("comment", *_SWITCH),
    ("shard", r"([1-9]\d{0,4}/[1-9]\d{0,4})?", "a part such as 2/4, counted from 1"),
    ("output", _LINE, "a directory"),
    ("working-directory", _LINE, "a directory"),
    ("timeout-minutes", r"((?=.*[1-9])\d{1,5}(\.\d+)?)?", "a number of minutes above 0"),
)
DEFAULTS = {
    "config": DEFAULT_CONFIG, "runtime": "auto", "gpus": "auto", "device": "auto", "pull": "missing",
    "hf-cache": "false", "cache": "false", "fail-on": "failed", "fail-on-not-judged": "true", "upload-report": "true",
    "retention-days": "0", "upload-sarif": "false", "comment": "false",
}  # fmt: skip


@dataclass(frozen=True)
class ActionInputs:
    """The checked inputs: the run that they ask for, without its environment, and where and how it runs.

    `fail_on` is `failed`, `warning` or `never`. `upload_sarif` and `comment` are the requests; an event may rule
    it out.
    """

    run: ContainerRun
    runtime: str
    fail_on: str
    fail_on_not_judged: bool
    upload_report: bool
    artifact_name: str
    retention_days: int
    upload_sarif: bool
    comment: bool


def read_inputs(environ: Mapping[str, str]) -> ActionInputs:
    """Check all inputs and return them. Raises one `UsageError` with every problem."""
    names = (*(name for name, _, _ in RULES), "args")
    given = {name: caches.written(environ, name) or DEFAULTS.get(name, "") for name in names}
    tokens = caches.tokens(environ)
    if misplaced := [name for name, value in given.items() if any(token in value for token in tokens)]:
        raise UsageError(
            f"{', '.join(misplaced)}: got the token of the Hub, which must be in no other input",
            hint="give it to `hf-token` alone; if it was in a log, replace it at the Hub",
        )
    if unusable_names := [
        f"{name}: {problem}" for name in _PLACES for line in _lines(given[name]) if (problem := unusable(line))
    ]:
        raise UsageError("\n".join(unusable_names), hint=_CORRECT)
    problems = [problem for rule in RULES if (problem := _problem(given, *rule))]
    problems += _clashes(given)
    places = _Places(environ, given["working-directory"])
    absent: list[str] = []
    config, adapters, base = _subject(given, places, absent)
    if not places.problem:
        wrong = {problem.partition(":")[0] for problem in problems}
        problems += [problem for problem in absent if problem.partition(":")[0] not in wrong]
    output = places.place(given["output"]) if given["output"] else _new_output(environ)
    if output.exists() and not output.is_dir():
        problems.append(f"output: got {foreign(given['output'])}, expected a directory, but {_path(output)} is a file")
    arguments, args_problem = _arguments(given["args"])
    all_problems = [problem for problem in (*problems, args_problem, places.problem) if problem]
    if all_problems:
        raise UsageError("\n".join(all_problems), hint=_CORRECT)
    cache = _cache_directory(given, places, environ)
    publish = places.place(given["publish"]) if given["publish"] else None
    run = ContainerRun(
        config=config,
        adapters=adapters,
        base=base,
        output=output,
        workspace=workspace_of(environ),
        image=given["image"],
        pull=given["pull"],
        device="cpu" if given["verify"] else given["device"],
        gpus="none" if given["verify"] else given["gpus"],
        arguments=(
            *(["--dtype", re.sub(r"\s", "", given["dtype"])] if given["dtype"] else []),
            *(["--shard", given["shard"]] if given["shard"] else []),
            *arguments,
        ),
        hf_cache=places.place(given["hf-cache-dir"]).resolve() if given["hf-cache-dir"] else caches.hub_home(environ),
        cache=cache,
        publish=publish,
        mounts=tuple(places.place(line) for line in _lines(given["mounts"])),
        memory=given["memory"],
        shm_size=given["shm-size"],
        cpus=given["cpus"],
        verifies=bool(given["verify"]),
        timeout_s=float(given["timeout-minutes"]) * 60 if given["timeout-minutes"] else TIMEOUT_S,
    )
    return ActionInputs(
        run=run,
        runtime=given["runtime"],
        fail_on=given["fail-on"],
        fail_on_not_judged=given["fail-on-not-judged"] == "true",
        upload_report=given["upload-report"] == "true",
        artifact_name=given["artifact-name"] or _artifact_name(environ, given["shard"]),
        retention_days=int(given["retention-days"]),
        upload_sarif=given["upload-sarif"] == "true",
        comment=given["comment"] == "true",
    )


def _cache_directory(given: Mapping[str, str], places: _Places, environ: Mapping[str, str]) -> Path | None:
    if given["cache-dir"]:
        return places.place(given["cache-dir"]).resolve()
    planned = caches.verdicts(environ)
    return planned.directory if planned else None


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _path(path: Path) -> str:
    return quoted(str(path), MOST_FOREIGN, "")


def _problem(given: Mapping[str, str], name: str, pattern: str, expected: str) -> str:
    value = given[name]
    if re.fullmatch(pattern, value) and not (name == "retention-days" and int(value) > _MAX_RETENTION_DAYS):
        return ""
    more = ""
    if name in {"cache", "hf-cache"}:
        more = f"; a directory goes into `{name}-dir`"
    if (name, value) == ("fail-on", "broken"):
        more = "; use `fail-on: failed` instead of `broken`"
    return f"{name}: got {foreign(value)}, expected {expected}{more}"


def _clashes(given: Mapping[str, str]) -> list[str]:
    """Inputs that contradict each other."""
    problems = [
        f"{name}-dir: got {foreign(given[f'{name}-dir'])}, expected nothing, because `{name}` is true: GitHub's cache "
        "has a directory of its own; remove one of the two inputs"
        for name in ("hf-cache", "cache")
        if given[name] == "true" and given[f"{name}-dir"]
    ]
    by = "verify" if given["verify"] else "adapters" if given["adapters"] else ""
    if by and given["config"] != DEFAULT_CONFIG:
        problems.append(f"config: got {foreign(given['config'])}, expected nothing, because `{by}` is set")
    if by == "verify":
        problems += [
            f"{name}: got {foreign(given[name])}, expected nothing, because `verify` is set"
            for name in _OF_RUNS
            if given[name] not in {"", "false"}
        ]
        if len(_lines(given["adapters"])) > 1:
            problems.append(f"adapters: got {len(_lines(given['adapters']))} lines, expected one with `verify`")
    if not by:
        problems += [
            f"{name}: got {foreign(given[name])}, expected nothing without `adapters`: the configuration names it"
            for name in ("base", "dtype")
            if given[name]
        ]
    return problems


def _subject(
    given: Mapping[str, str], places: _Places, problems: list[str]
) -> tuple[Path | None, tuple[str, ...], str]:
    """Resolve what is gated: a configuration, or adapters and their base, or a model to verify.

    A local path becomes relative to the workspace, where the gate starts. `problems` gets everything that is missing.
    """
    listed = _lines(given["adapters"])
    adapters = tuple(word for line in listed for word in _words("adapters", line, places, problems))
    base = next(iter(_words("base", given["base"], places, problems)), "") if given["base"] else ""
    if given["verify"]:
        model = places.place(given["verify"])
        if not model.is_dir():
            problems.append(
                f"verify: got {foreign(given['verify'])}, expected a directory, but {_path(model)} is not one"
            )
        return model, adapters, base
    if listed:
        return None, adapters, base
    config = places.place(given["config"])
    if not config.is_file():
        other = "; or set `config` or `adapters`" if given["config"] == DEFAULT_CONFIG else ""
        missing = f"does not exist (run actions/checkout before this step{other})"
        state = "is a directory" if config.is_dir() else missing
        problems.append(f"config: got {foreign(given['config'])}, expected a file, but {_path(config)} {state}")
    return config, adapters, base


def _words(name: str, written: str, places: _Places, problems: list[str]) -> list[str]:
    """The words of the command line for one line of an input: directories, or a Hub id."""
    if re.search(r"[*?\[]", written):
        matches = places.matching(written)
        if not matches:
            problems.append(f"{name}: got {foreign(written)}, expected directories, but none matches the pattern")
        return [places.relative(path) for path in matches]
    path = places.place(written)
    if path.is_dir():
        return [places.relative(path)]
    if _HUB_ID.fullmatch(written) and not path.exists():
        return [written]
    state = "is a file" if path.exists() else "does not exist (run actions/checkout before this step)"
    problems.append(f"{name}: got {foreign(written)}, expected a directory or a Hub id, but {_path(path)} {state}")
    return []


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
        self._workspace = self._start = workspace_of(environ)
        self.problem = ""
        if working_directory:
            self._start = self.place(working_directory)
            if not self._start.is_dir():
                self.problem = (
                    f"working-directory: got {foreign(working_directory)}, expected a directory, but "
                    f"{_path(self._start)} is not one"
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

    def matching(self, pattern: str) -> list[Path]:
        """The directories that match a pattern, sorted. The start of relative paths is no part of the pattern."""
        written = os.path.expanduser(pattern)  # noqa: PTH111 # Path's raises without a home
        whole = written if os.path.isabs(written) else os.path.join(glob.escape(str(self._start)), written)  # noqa: PTH117, PTH118
        return [self.place(name) for name in sorted(glob.glob(whole)) if os.path.isdir(name)]  # noqa: PTH112, PTH207

    def relative(self, path: Path) -> str:
        """A path for the gate, which starts in the workspace."""
        if self._workspace in path.parents or path == self._workspace:
            return os.path.join(os.curdir, os.path.relpath(path, self._workspace))  # noqa: PTH118 # Path drops the dot
        return str(path)


def _arguments(text: str) -> tuple[tuple[str, ...], str]:
    """Split `args` like a shell. Return the words, and the problem if a word is a reserved option."""
    try:
        split = tuple(shlex.split(text))
    except ValueError as error:
        return (), f"args: got {foreign(text)}, expected words as for a shell ({error})"
    for word in split:
        name = "--output" if re.match("-[qv]*o", word) else word.partition("=")[0]
        reserved = next(
            (option for option in RESERVED_OPTIONS if len(name) > len("--") and option.startswith(name)), ""
        )
        if reserved:
            own = f"the action sets {reserved} itself: remove it, or use the action's inputs"
            return (), f"args: got {foreign(word)}, but {own}"
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
