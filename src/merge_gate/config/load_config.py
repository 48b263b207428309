"""YAML file → Config, strict; every problem keeps its line and column.

In: the path of a YAML file. Out: a `Config`, or a `ConfigError` with all problems in the order of the file; the JSON
Schema of the file. Looks at names of directories, never into them, and knows neither the network nor torch. It imports
pydantic, which takes as long as the rest of the command line together: the commands import it where they need it.

The stages, in order:

1. bytes → text (size, encoding)                                    here
2. text → values with places; YAML's own problems                   `positions`
3. values → types, unknown keys, ranges                             `model`, `problems`
4. what types cannot say: names, directories, globs, defaults       `build`, `paths`

A baseline that the file names goes the same way (`baseline`).

Problems of stage 3 do not stop stage 4: the parts that are right are looked at further, so that all is said at once.
"""

from __future__ import annotations

import gc
import hashlib
import os
from dataclasses import replace
from pathlib import Path

from merge_gate.config.baseline_file import build_baseline
from merge_gate.config.build import build_config
from merge_gate.config.model import config_schema
from merge_gate.config.suggestions import nearest
from merge_gate.config.yaml_document import end_of, read_yaml, refuse
from merge_gate.records.config import Config
from merge_gate.text import listing, quoted

__all__ = ["MAX_BYTES", "config_schema", "load_config"]

MAX_BYTES = 1024 * 1024


def load_config(path: str) -> Config:
    """Read and validate a configuration.

    Args:
        path: the YAML file, as the user named it; relative paths in it are relative to its directory.

    Raises:
        ConfigError: the file cannot be read or is not valid; holds every problem, in the order of the file.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(0)  # looking for garbage while many values are made would be half of the time
    try:
        return _load(path)
    finally:
        gc.set_threshold(*thresholds)


def _load(path: str) -> Config:
    raw = _read_bytes(path)
    document = read_yaml(_text(raw, path), path)
    digest, directory = hashlib.sha256(raw).hexdigest(), Path(path).absolute().parent
    config = build_config(document, digest, path=path, directory=directory)
    if config.baseline_path is None:
        return config
    known = _text(_read_bytes(config.baseline_path), config.baseline_path)
    return replace(config, baseline=build_baseline(read_yaml(known, config.baseline_path)))


def _read_bytes(path: str) -> bytes:
    try:
        if Path(path).is_fifo():  # reading it would wait for somebody to write
            refuse(path, "this is a named pipe, expected a YAML file", "write the configuration to a file")
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        if os.path.islink(path):  # noqa: PTH114 (as below)
            to = quoted(os.readlink(path), 200)  # noqa: PTH115 (as below)
            refuse(path, f"this is a link to {to}, which is not there", "mend the link, or name the file")
        refuse(path, "no such file", _files_near(path))
    except IsADirectoryError:
        refuse(path, "this is a directory, expected a YAML file", _files_near(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        refuse(path, f"the file cannot be read: {reason}", "check its name and permissions")
    if len(raw) > MAX_BYTES:
        refuse(path, f"the file is larger than {MAX_BYTES:,} bytes", "is this the configuration?")
    return raw


def _files_near(path: str) -> str:
    """Name the YAML file that was perhaps meant."""
    is_directory = os.path.isdir(path)  # noqa: PTH112 (False where pathlib raises, such as a name too long)
    directory, asked = (Path(path), "") if is_directory else (Path(path).parent, Path(path).name)
    try:
        names = sorted(file.name for file in directory.iterdir() if file.suffix in {".yml", ".yaml"})
    except PermissionError:
        return f"{quoted(str(directory))} may not be read"
    except OSError:
        return f"there is no directory {quoted(str(directory))}"
    there = listing(map(quoted, names)) or "no YAML file"
    return nearest(asked, names) or f"{quoted(str(directory))} holds {there}"


def _text(raw: bytes, path: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode("utf-8", "replace")
        refuse(path, f"byte 0x{error.object[error.start]:02x} is not UTF-8", "save the file as UTF-8", *end_of(before))
