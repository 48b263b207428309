"""Run the benchmarks and write results.json, the tables of README.md and the plot.

In: options; `--size tiny` for a smoke run that leaves README.md alone. Out: figures, each from whole processes run in
turn on this machine. results.json is written after every part, so that a stopped run keeps what it has; `--only` runs
some parts and keeps the others' figures, `--resume` runs those that have none.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

from inputs import GATE, HERE, PYTHON, Inputs, Job
from measure import alternate, measure
from rows import METHODS, ROWS, save_method

from merge_gate.engine.tensors.threads import threads

GIB = 1 << 30
SEVEN_B_LIMIT_BYTES = 8 * GIB
HUB_OFF = {"HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much to run."""

    work: Path
    size: str
    counts: tuple[int, ...]
    many: tuple[int, ...]
    checked: int
    repeat: int
    method_size: str


def machine() -> dict[str, object]:
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?")
    memory_kib = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "cpu": cpu,
        "cores": threads(),
        "memory_gib": round(memory_kib / (1 << 20), 1),
        "kernel": platform.release(),
        "load_before": os.getloadavg()[0],
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "merge-gate")},
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def scaling(plan: Plan) -> dict[str, object]:
    """Whole runs of the gate, (a) and (b), for a growing number of adapters."""
    inputs = Inputs(plan.work, plan.size)
    found: dict[str, dict[str, dict]] = {}
    for count in plan.counts:
        job = Job(count=count)
        commands = {
            "gate": inputs.gate(job),
            "a": inputs.script("baseline_a", job),
            "b": inputs.script("baseline_b", job),
        }
        for name, figures in alternate(commands, repeat=plan.repeat, env=HUB_OFF).items():
            found.setdefault(name, {})[str(count)] = figures
    return {"size": plan.size, "idle_anon_mib": idle_anon_mib(), **found}


def idle_anon_mib() -> float:
    return measure([PYTHON, "-c", "import time; time.sleep(0.5)"]).peak_anon_mib


def row(plan: Plan, name: str) -> dict[str, object]:
    """One kind of work, by the gate and by the script."""
    inputs, wanted = Inputs(plan.work, plan.size), ROWS[name]
    commands = {
        "gate": inputs.gate(wanted.job),
        "script": inputs.script("baseline_a", wanted.job),
        **{beside: inputs.gate(job) for beside, job in wanted.beside.items()},
    }
    found = alternate(commands, repeat=plan.repeat, env=HUB_OFF)
    return {"size": plan.size, "idle_anon_mib": idle_anon_mib(), **found}


def method(plan: Plan, name: str) -> dict[str, object]:
    """One adapter of a method, by the gate and by the script."""
    inputs = Inputs(plan.work, plan.method_size)
    adapter = save_method(name, inputs.base, plan.work / f"methods-{plan.method_size}" / name)
    config = plan.work / f"{plan.method_size}-method-{name}.yml"
    config.write_text(json.dumps({"version": 1, "base": {"model": str(inputs.base)}, "adapters": [str(adapter)]}))
    commands = {
        "gate": [GATE, "run", str(config), "--output", str(plan.work / f"report-method-{name}")],
        "script": [PYTHON, str(HERE / "baseline_a.py"), str(inputs.base), str(adapter)],
    }
    return {"size": plan.method_size, **alternate(commands, repeat=plan.repeat, env=HUB_OFF)}


def startup(plan: Plan) -> dict[str, object]:
    """What passes before the first merge, against what importing the libraries and loading the base cost alone."""
    inputs = Inputs(plan.work, plan.size)
    commands = {
        "help": [GATE, "--help"],
        "imports": [PYTHON, str(HERE / "imports.py")],
        "imports_and_base": [PYTHON, str(HERE / "imports.py"), str(inputs.base)],
    }
    seconds: dict[str, list[float]] = {}
    for _ in range(plan.repeat):
        for name, figures in alternate(commands, repeat=1, env=HUB_OFF).items():
            seconds.setdefault(name, []).append(figures["wall_s"])
        seconds.setdefault("gate_before_first_merge", []).append(until_loaded(inputs.gate(Job())))
    found = {name: round(statistics.median(those), 3) for name, those in seconds.items()}
    return {**found, "ratio": round(found["gate_before_first_merge"] / found["imports_and_base"], 3)}


def until_loaded(command: list[str]) -> float:
    """Seconds until the gate says of its base that it is loaded, which is when it begins to merge."""
    began_s = time.perf_counter()
    env = {**os.environ, **HUB_OFF}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as gate:
        assert gate.stdout is not None
        loaded_s = [time.perf_counter() - began_s for line in gate.stdout if line.startswith("base ")]
    print(f"  gate_before_first_merge: {loaded_s}", flush=True)
    return loaded_s[0]


def kernel(plan: Plan) -> dict[str, object]:
    """The merge alone: gate, PEFT, floor."""
    out = plan.work / "kernel.json"
    subprocess.run([PYTHON, str(HERE / "kernel.py"), plan.size, "--out", str(out)], check=True, capture_output=True)
    return json.loads(out.read_text(encoding="utf-8"))


def many(plan: Plan) -> dict[str, object]:
    """Many small adapters on one base: does time grow linearly, does memory stay flat?"""
    inputs = Inputs(plan.work, "pico")
    commands = {str(count): inputs.gate(Job(count=count)) for count in plan.many}
    return alternate(commands, repeat=plan.repeat, env=HUB_OFF)


def check(plan: Plan) -> dict[str, object]:
    """`merge-gate check`, which reads headers and configs only."""
    command = Inputs(plan.work, "pico").check(Job(count=plan.checked))
    return {"adapters": plan.checked, **alternate({"check": command}, repeat=plan.repeat)["check"]}


def seven_b(plan: Plan) -> dict[str, object]:
    """Four adapters on a 7 B base, the process tree ended when it holds more than 8 GiB; (a) under the same limit."""
    inputs = Inputs(plan.work, "7b")
    found = {"limit_gib": SEVEN_B_LIMIT_BYTES / GIB, "adapters": 4}
    for name, command in {"gate": inputs.gate(Job(count=4)), "a": inputs.script("baseline_a", Job())}.items():
        found[name] = asdict(measure(command, max_bytes=SEVEN_B_LIMIT_BYTES, env=HUB_OFF))
        print(f"  {name}: {found[name]}", flush=True)
    return found


PARTS: dict[str, Callable[[Plan], dict[str, object]]] = {
    **{name: partial(row, name=name) for name in ROWS},
    "startup": startup,
    "kernel": kernel,
    "check": check,
    "many": many,
    "scaling": scaling,
    "seven_b": seven_b,
    **{f"method-{name}": partial(method, name=name) for name in METHODS},
}
GROUPS = {"rows": list(ROWS), "methods": [f"method-{name}" for name in METHODS]}
"""Names that stand for several parts."""


def plan_of(arguments: argparse.Namespace) -> Plan:
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if arguments.size == "tiny":
        return Plan(work=work, size="tiny", counts=(1, 2), many=(2, 4), checked=10, repeat=1, method_size="tiny")
    return Plan(
        work=work,
        size=arguments.size,
        counts=tuple(arguments.counts),
        many=(25, 50, 100),
        checked=1000,
        repeat=arguments.repeat,
        method_size="0.1b",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "1.1b"), default="1.1b", help="tiny: a smoke run; README.md stays")
    parser.add_argument("--repeat", type=int, default=3, help="rounds of every measurement (default 3)")
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 4, 8], help="numbers of adapters to run with")
    parser.add_argument(
        "--only", nargs="+", choices=[*GROUPS, *PARTS], metavar="PART", help=f"of {', '.join([*GROUPS, *PARTS])}"
    )
    parser.add_argument("--resume", action="store_true", help="leave out what results.json has already")
    parser.add_argument("--device", default="cpu", help="where the gate and (a) merge; not cpu: README.md stays")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "merge-gate-bench")
    arguments = parser.parse_args()
    plan = plan_of(arguments)
    os.environ["MERGE_GATE_DEVICE"] = arguments.device
    smoke = plan.size == "tiny"
    is_apart = smoke or arguments.device != "cpu"
    results_file = plan.work / "results.json" if is_apart else HERE / "results.json"
    keep = (arguments.only or arguments.resume) and results_file.exists()
    results = json.loads(results_file.read_text(encoding="utf-8")) if keep else {}
    wanted = [part for name in arguments.only or PARTS for part in GROUPS.get(name, [name])]
    for name in wanted:
        if (arguments.resume and name in results) or (smoke and name == "seven_b"):
            continue
        print(name, flush=True)
        results[name] = {**PARTS[name](plan), "machine": machine()}
        results_file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"figures: {results_file}")
    if not is_apart:
        subprocess.run([PYTHON, str(HERE / "tables.py")], check=True)
        subprocess.run([PYTHON, str(HERE / "plot.py")], check=True)


if __name__ == "__main__":
    main()
