"""Compiles the simulated card, and makes the environment in which a process has one.

In: the C++ files of this folder, and the system's compiler. Out: a library in build/, made again if torch or a file
changes, and the variables for a subprocess. The variables reach the gate's worker as they are.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
HOOK = HERE / "hook"
BUILT = HERE.parents[2] / "build" / "simulated-card"
SETTINGS = "TORCH_SIMULATED_CARD"
COMPILER_OPTIONS = ("-O1", "-std=c++20", "-fPIC", "-shared", "-w")


class NoCompilerError(Exception):
    """No C++ compiler is installed."""


def library(directory: Path = BUILT) -> Path:
    """The compiled card, for the installed torch. Compiling takes about 40 seconds.

    Raises:
        NoCompilerError: there is no compiler.
    """
    sources = sorted(path for path in HERE.iterdir() if path.suffix in {".cpp", ".h"})
    digest = hashlib.sha256(f"{version('torch')} {COMPILER_OPTIONS}".encode())
    for source in sources:
        digest.update(source.read_bytes())
    made = directory / digest.hexdigest()[:16] / "simulated_card.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        unfinished = made.with_suffix(f".{os.getpid()}")
        subprocess.run(_command(unfinished), check=True)
        unfinished.replace(made)
    return made


def _command(output: Path) -> list[str]:
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        raise NoCompilerError("the simulated card needs a C++ compiler, and there is none: install g++")
    torch = Path(str(find_spec("torch").origin)).parent  # without the import, which takes seconds
    include = torch / "include"
    folders = [include, include / "torch/csrc/api/include", sysconfig.get_paths()["include"]]
    libraries = ("torch", "torch_cpu", "torch_python", "c10")
    return [
        compiler,
        *COMPILER_OPTIONS,
        *(f"-I{folder}" for folder in folders),
        str(HERE / "module.cpp"),
        f"-o{output}",
        f"-L{torch / 'lib'}",
        *(f"-l{name}" for name in libraries),
        f"-Wl,-rpath,{torch / 'lib'}",
    ]


def environment(
    built: Path, *, memory_mib: Sequence[int] = (80 * 1024,), failures: dict[str, str] | None = None
) -> dict[str, str]:
    """The variables of a process that has simulated cards. Its working directory may not be a parent of this folder.

    Args:
        built: what `library` made.
        memory_mib: the memory of each card, at most 8 of them.
        failures: operators that fail, such as `aten::linalg_qr`: with `lost` the context is lost, with `cublas` a
            library reports an error, with `memory` the card is full.
    """
    settings = {"library": str(built), "memory_mib": list(memory_mib), "failures": failures or {}}
    return {"PYTHONPATH": str(HOOK), SETTINGS: json.dumps(settings)}


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{library()}\n")
    except NoCompilerError as error:
        sys.exit(str(error))
