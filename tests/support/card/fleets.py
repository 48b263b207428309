"""Fleets of adapters that a CPU and a card judge, written to disk.

In: a directory, and which cases to take. Out: `FLEETS`; `Fleet.write` returns the configuration of each run. The cases
are those of the CPU's own tests.

1. Every method, in each dtype.                                    `methods-DTYPE`
2. Every fault, and what looks like one.                           `faults`
3. Every combination, and adapters of many kinds of layers.        `combinations`
4. Bases quantized on loading, in 8 and 4 bits.                    `quantized`
5. Every stored format of a base.                                  `bases`
"""

import functools
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.support import methods

Chosen = Callable[[str], bool]
"""Whether a case of this name takes part."""

SAMPLED = 5
"""`every_fifth` takes one case in so many."""


def every_case(_: str) -> bool:
    return True


def every_fifth(name: str) -> bool:
    """A sample that depends on the names only: a case stays in it, whatever other cases come."""
    return hashlib.sha256(name.encode()).digest()[0] % SAMPLED == 0


SAMPLES: Mapping[str, Chosen] = {"all": every_case, "fifth": every_fifth}


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Adapters of one kind. `write` puts them into a directory, and returns the configuration of each run there."""

    name: str
    write: Callable[[Path, Chosen], list[Path]]
    publishes: bool = False


class Workshop:
    """Bases and adapters of tests/support/methods.py in a directory, each made on first use."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def base(self, name: str, dtype: str) -> Path:
        directory = self.root / "bases" / dtype / name
        if not directory.exists():
            directory.parent.mkdir(parents=True, exist_ok=True)
            methods.save_base(name, directory, dtype)
        return directory

    def entry(self, case: methods.Case, dtype: str, **asked: str) -> dict[str, Any]:
        """The adapter of a case as an entry of a configuration."""
        base = self.base(case.base, dtype)
        directory = self.root / "adapters" / dtype / case.base / case.name
        if not directory.exists():
            methods.save_adapter(case, methods.load_base(case.base, base), directory, base_directory=base)
        return {"path": str(directory), "base": {"model": str(base), "dtype": dtype} | asked}


def _config(directory: Path, entries: Iterable[dict[str, Any]], **top: Any) -> list[Path]:
    """A configuration of these entries; none if there is no entry."""
    listed = list(entries)
    if not listed:
        return []
    path = directory / f"gate-{len([*directory.glob('gate-*.yml')])}.yml"
    path.write_text(json.dumps({"version": 1, "adapters": listed} | top, indent=1))
    return [path]


def write_methods(dtype: str, directory: Path, chosen: Chosen) -> list[Path]:
    workshop = Workshop(directory)
    names = {case.name: f"{case.name}-{dtype}" for case in methods.CASES}
    cases = [case for case in methods.CASES if chosen(names[case.name])]
    return _config(directory, ({"name": names[case.name]} | workshop.entry(case, dtype) for case in cases))


def write_faults(directory: Path, chosen: Chosen) -> list[Path]:
    """Cases with the same settings at the top of their configuration share a run."""
    from tests.support import cases  # noqa: PLC0415 - the lists of faults import the tests of each check
    from tests.support.all_faults import FAULTS, HEALTHY  # noqa: PLC0415
    from tests.support.models import Shelf  # noqa: PLC0415

    shelf = Shelf(directory / "shelf")
    taken = sorted((case for case in (*FAULTS, *HEALTHY) if chosen(case.name)), key=cases.top_settings)
    for case in taken:
        cases.lay_out(case, shelf, directory / case.name)
    return [
        cases.write_config_file(shelf, directory, number, dict(top), list(members))
        for number, (top, members) in enumerate(itertools.groupby(taken, key=cases.top_settings))
    ]


COMBINATIONS = (
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
KINDS_OF_LAYERS = (
    "lora-dora", "lora-all-linear", "lora-tokens", "lora-lm-head-saved", "lora-embedding", "lora-bias-term",
    "lora-tied-tokens", "lora-experts", "lora-mha", "lora-conv2d", "ia3-linear", "oft-linear", "vera-two",
)  # fmt: skip


def write_combinations(directory: Path, chosen: Chosen) -> list[Path]:
    """All of them have to run, too. Two adapters of one configuration come first, because PEFT's template is reused."""
    entries: list[dict[str, Any]] = []
    for dtype in methods.DTYPES:
        workshop = Workshop(directory)
        first = workshop.entry(methods.find("lora-linear"), dtype)
        second = first | {"path": str(_negated(Path(first["path"])))}
        pair = [f"first-{dtype}", f"second-{dtype}"]
        members = [entry | {"name": name} for name, entry in zip(pair, (first, second), strict=True)]
        combined = [
            {"name": f"{method}-{dtype}", "combine": _combination(method, pair), "base": first["base"]}
            for method in COMBINATIONS
            if chosen(f"{method}-{dtype}")
        ]
        entries += members + combined
        entries += (
            {"name": f"{name}-{dtype}"} | workshop.entry(methods.find(name), dtype)
            for name in KINDS_OF_LAYERS
            if chosen(f"{name}-{dtype}")
        )
    return _config(directory, entries, forward="required")


def _negated(adapter: Path) -> Path:
    """Another adapter of the same configuration."""
    other = adapter.with_name(f"{adapter.name}-negated")
    shutil.copytree(adapter, other)
    tensors = load_file(other / methods.WEIGHTS)
    save_file({name: tensor * -0.7 + 0.01 for name, tensor in tensors.items()}, other / methods.WEIGHTS)
    return other


def _combination(method: str, adapters: list[str]) -> dict[str, Any]:
    combine = {"method": method, "adapters": adapters, "weights": [0.6, 0.4]}
    if any(word in method for word in ("ties", "dare", "magnitude")):
        combine["density"] = 0.5
    return combine | ({"seed": 3} if method.startswith("dare") else {})


ON_QUANTIZED = (
    "lora-linear", "lora-dora", "lora-bias-term", "oft-linear", "ia3-linear", "vera-two", "randlora-linear",
    "road-linear",
)  # fmt: skip


def write_quantized(directory: Path, chosen: Chosen) -> list[Path]:
    """In 4 bits on a wider base: bitsandbytes' CPU kernel reads rows shorter than one of its blocks wrong."""
    workshop = Workshop(directory)
    cases = [methods.find(name) for name in ON_QUANTIZED]
    wide = [replace(case, base="llama-tall") for case in cases if case.name != "lora-bias-term"]  # it has no biases
    named = {f"{case.name}-bnb-8bit": case for case in cases} | {f"{case.name}-bnb-4bit": case for case in wide}
    return _config(
        directory,
        (
            {"name": name} | workshop.entry(case, "bfloat16", quantization=name[-8:])
            for name, case in named.items()
            if chosen(name)
        ),
    )


def write_bases(directory: Path, chosen: Chosen) -> list[Path]:
    from tests.support.bases import ADAPTERS  # noqa: PLC0415 - these import much that the other fleets do not need
    from tests.support.bases_broken import BROKEN  # noqa: PLC0415
    from tests.support.bases_good import GOOD, PACKAGED, UNFIT  # noqa: PLC0415

    for name, write in ADAPTERS.items():
        write(directory / "adapters" / name)

    def entries() -> Iterator[dict[str, Any]]:
        for name, case in (BROKEN | GOOD | UNFIT | PACKAGED).items():
            if chosen(name):
                base = directory / f"models--bases--{name}" / "snapshots" / "0"
                base.mkdir(parents=True)
                case.draft().write(base)
                adapter = str(directory / "adapters" / case.adapter)
                yield {"name": name, "path": adapter, "base": {"model": str(base)} | case.asked}

    return _config(directory, entries())


FLEETS: Mapping[str, Fleet] = {
    fleet.name: fleet
    for fleet in (
        *(
            Fleet(name=f"methods-{dtype}", write=functools.partial(write_methods, dtype), publishes=True)
            for dtype in methods.DTYPES
        ),
        Fleet(name="faults", write=write_faults),
        Fleet(name="combinations", write=write_combinations, publishes=True),
        Fleet(name="quantized", write=write_quantized),
        Fleet(name="bases", write=write_bases),
    )
}
