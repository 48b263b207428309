"""The Python interface: `merge_gate.gate`. It gates adapters as `merge-gate run` does, and prints nothing.

In: names, and the options of a run. Out: a `Report`. torch is imported by the worker process only.
"""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from merge_gate._internal.errors import UsageError
from merge_gate._internal.text import quoted, unusable
from merge_gate.config.from_arguments import config_of, names_a_file
from merge_gate.records.features import part
from merge_gate.records.options import RunOptions, is_device
from merge_gate.report.stored.output_directory import refuse_report
from merge_gate.report.stored.report_files import FORMATS
from merge_gate.report.stored.stored_report import stored
from merge_gate.run.flow import run_gate
from merge_gate.worker.supervisor import WorkerSlot

if TYPE_CHECKING:
    from merge_gate import Export
    from merge_gate.records.config import Config
    from merge_gate.records.report import Report

    Name = str | os.PathLike[str]

_IN_CONFIG = ("base", "dtypes", "quantization", "revision", "checks", "expect", "allow_pickle")
"""The options of `gate` that a configuration has too."""
_NOTHING: Mapping[str, object] = MappingProxyType({})


def gate(
    adapters: Name | Sequence[Name],
    *,
    base: Name | None = None,
    dtypes: str | Sequence[str] = (),
    quantization: str | None = None,
    revision: str | None = None,
    checks: Mapping[str, object] = _NOTHING,
    expect: Mapping[str, object] = _NOTHING,
    allow_pickle: bool = False,
    device: str = "auto",
    cache: Name | None = None,
    output: Name | None = None,
) -> Report:
    """Merge each adapter into a scratch copy of its base, and check every parameter of the merged model.

    Args:
        adapters: directories, globs or Hub ids, or one configuration file. Relative names start in the current
            directory.
        base: a directory or a Hub id. If None, each adapter's adapter_config.json names its base.
        dtypes: `auto`, `float32`, `bfloat16`, `float16`, or a list of them. Each adapter has one entry in the report
            for each of them.
        quantization: `none`, `bnb-8bit` or `bnb-4bit`.
        revision: a commit, tag or branch of the adapters, if they are on the Hub.
        checks: severities by the ids of checks, or mappings with `severity` and `limit`, as a configuration has them.
        expect: facts that every adapter must match, as a configuration has them.
        allow_pickle: load pickled weights of adapters, with weights_only.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        cache: a directory for verdicts, which later runs reuse.
        output: a directory for the report. None writes no file.

    Returns:
        The report. `passed` says whether every adapter passed; a broken adapter raises nothing.

    Raises:
        UsageError: an argument or a name is wrong. Nothing was judged.
        ConfigError: the configuration file is wrong. Nothing was judged.
        GateError: the gate cannot go on, such as on a full disk.
    """
    given = _converted(locals())
    names, folder = given["adapters"], given["output"]
    with WorkerSlot() as worker:
        config = _config(names, {name: given[name] for name in _IN_CONFIG}, folder)
        if folder is not None:
            refuse_report(folder, FORMATS, names)
        options = RunOptions(device=device, output=folder, features={"cache": given["cache"]})
        return run_gate(config, options, worker=worker)


def export(
    adapter: Name,
    *,
    output: Name,
    base: Name | None = None,
    revision: str | None = None,
    fill: bool = True,
) -> Export:
    """Gate an adapter, and write it to `output` as a plain LoRA, as `merge-gate export` does.

    Args:
        adapter: a directory or a Hub id.
        output: the directory of the export. It appears only if the adapter and its export pass, and merge alike.
        base: a directory or a Hub id. If None, adapter_config.json names the base.
        revision: a commit, tag or branch of the adapter, if it is on the Hub.
        fill: add pairs of zeros for modules that servers expect next to the adapted ones.

    Returns:
        The report on the export, and its record. The record is None if the adapter or the export did not pass.

    Raises:
        UsageError: an argument or a name is wrong. Nothing was judged.
        GateError: no plain LoRA has the effect of the adapter, or the merges cannot be compared.
    """
    given = _converted({"adapters": adapter, "output": output, "base": base, "device": "auto"})
    (name,) = given["adapters"]
    made: Export = part("export", "api").export(name, given["output"], base=given["base"], revision=revision, fill=fill)
    return made


def read_report(path: Name) -> Report:
    """Read the report of an earlier run.

    Args:
        path: a report.json, or the output directory that holds it.

    Raises:
        UsageError: the file cannot be read, is no report of this version, or contradicts itself.
    """
    return stored(_converted({"output": path, "device": "auto"})["output"])


def refuse_options(**options: Any) -> None:
    """Refuse the options that `gate` would refuse, before there is an adapter to gate.

    Raises:
        TypeError: `gate` has no such option.
        UsageError: the value of an option is wrong.
    """
    given = inspect.signature(gate).bind(os.curdir, **options)
    given.apply_defaults()
    converted = _converted(given.arguments)
    with tempfile.TemporaryDirectory() as directory:
        _config_of([directory], {name: converted[name] for name in _IN_CONFIG}, None)


def _converted(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as plain data. The configuration checks what these hold.

    Raises:
        UsageError: with the argument and what it expects.
    """
    converted = {}
    for name, value in given.items():
        convert, expected = _KINDS.get(name, (lambda value: value, "plain data"))
        try:
            converted[name] = convert(value)
            json.dumps(converted[name])
        except (TypeError, ValueError, RecursionError):
            raise UsageError(f"{name} is {quoted(repr(value))}, expected {expected}") from None
    if not isinstance(given["device"], str) or not is_device(given["device"]):
        raise UsageError(f"device is {quoted(str(given['device']))}, expected auto, cpu, cuda, or cuda:N")
    return converted


def _name(value: Name) -> str:
    name = os.fspath(value)
    if not isinstance(name, str) or unusable(name):
        raise ValueError
    return name


def _names(value: Name | Sequence[Name]) -> list[str]:
    return [_name(name) for name in ([value] if isinstance(value, str | os.PathLike) else value)]


def _words(value: str | Sequence[str]) -> list[str]:
    return [word.strip() for word in value.split(",")] if isinstance(value, str) else list(value)


_KINDS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "adapters": (_names, "a name or a list of names"),
    **dict.fromkeys(("base", "cache", "output"), (lambda value: None if value is None else _name(value), "a name")),
    "dtypes": (_words, "a dtype or a list of dtypes"),
    **dict.fromkeys(("checks", "expect"), (lambda value: dict(**value), "a mapping of plain data")),
}
"""What makes plain data of an argument, and what it expects."""


def _config_of(names: Sequence[str], named: Mapping[str, Any], output: str | None) -> Config:
    """A configuration of named adapters. Its errors name the arguments of `gate`, and no keys of a file.

    Raises:
        UsageError: with every problem.
    """
    try:
        return config_of(names, **named, output=output)
    except UsageError as error:
        message = error.message
        for name, key in _KEYS.items():
            message = message.replace(f'"{key}"', f'"{name}"')
        wrong = [name for name in ("checks", "expect") if named[name] and _is_wrong(name, named[name])]
        raise UsageError(": ".join([*wrong, message]), hint=error.hint) from None


_KEYS = {"dtypes": "dtype", "allow_pickle": "allow-pickle"}
"""Arguments of `gate` that a file names in another way."""


def _is_wrong(name: str, value: object) -> bool:
    """Whether this option alone is refused."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            config_of([directory], **{name: value})  # type: ignore[arg-type] # `checks` or `expect`
        except UsageError:
            return True
    return False


def _config(names: Sequence[str], named: Mapping[str, Any], output: str | None) -> Config:
    if not names:
        raise UsageError("no adapters are named", hint="name directories, globs, Hub ids, or a configuration file")
    if not names_a_file(names):
        return _config_of(names, named, output)
    given = next((name for name, value in named.items() if value), None)
    if given is not None:
        raise UsageError(f"{given} is for named adapters", hint="write it into the configuration file instead")
    from merge_gate.config.load_config import load_config  # noqa: PLC0415 - imports pydantic

    return load_config(names[0], output=output)
