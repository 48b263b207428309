"""Write the tables of README.md from results.json.

In: results.json, and README.md with a pair of marks. Out: README.md with new tables between the marks; the prose
around them is people's work.
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent
NAMES = ("gate", "exhaustive", "a", "b")
BEGIN, END = "<!-- tables: written by tables.py -->", "<!-- end of tables -->"


def table(head: list[str], rows: list[list[object]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def marginal_s(runs: dict[str, dict]) -> float:
    """Seconds that one more adapter costs, between the fewest and the most adapters measured."""
    least, most = (function(int(count) for count in runs) for function in (min, max))
    return (runs[str(most)]["wall_s"] - runs[str(least)]["wall_s"]) / max(most - least, 1)


def machine_line(part: dict) -> str:
    m = part["machine"]
    return (
        f"{m['date']}, {m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB, Linux {m['kernel']},"
        f" Python {m['python']}, torch {m['torch']}, transformers {m['transformers']}, PEFT {m['peft']},"
        f" merge-gate {m['merge-gate']};"
        f" load average before the run {m['load_before']:.2f}."
    )


def scaling(part: dict, kernel: dict | None) -> str:
    counts = sorted(part["gate"], key=int)
    idle = part["idle_anon_mib"]
    rows = []
    for count in counts:
        gate, exhaustive, a, b = runs = [part[name][count] for name in NAMES]
        rows.append(
            [
                count,
                *(f"{run['wall_s']:.1f}" for run in runs),
                f"{a['wall_s'] / gate['wall_s']:.1f}",
                f"{a['wall_s'] / exhaustive['wall_s']:.1f}",
                f"{b['wall_s'] / gate['wall_s']:.1f}",
                *(f"{run['peak_anon_mib'] - idle:,.0f}" for run in runs),
            ]
        )
    costs = {name: marginal_s(part[name]) for name in NAMES}
    rows.append(
        ["one more", *(f"{cost:.2f}" for cost in costs.values())]
        + [f"{costs[one] / costs[other]:.1f}" for one, other in (("a", "gate"), ("a", "exhaustive"), ("b", "gate"))]
        + [""] * len(NAMES)
    )
    labels = ["gate", "`--exhaustive`", "(a)", "(b)"]
    ratios = ["(a) ÷ gate", "(a) ÷ `--exhaustive`", "(b) ÷ gate"]
    head = ["adapters", *(f"{label}, s" for label in labels), *ratios, *(f"{label}, MiB" for label in labels)]
    text = table(head, rows)
    if kernel and kernel.get("touched_parameters"):
        ratios = [costs[name] / kernel["floor_s"] for name in ("gate", "exhaustive")]
        text += (
            f"\n\nOne more adapter costs {ratios[0]:.1f} times the floor of merging all of it "
            f"({kernel['floor_s']:.2f} s, see the next table), and {ratios[1]:.1f} times with `--exhaustive`."
        )
    return f"### Whole runs on the {part['size'].upper()} base\n\n{machine_line(part)}\n\n{text}"


def kernel(part: dict) -> str:
    rows = [
        [name, f"{part[key]:.2f}", f"{part[key] / part['floor_s']:.1f}"]
        for name, key in (
            ("gate: bound and sample", "bound_s"),
            ("one read of the touched weights plus the low-rank product (the floor of merging all)", "floor_s"),
            ("gate, `--exhaustive`: every element, in blocks", "blocks_s"),
            ("PEFT's `merge(safe_merge=True)` and `isfinite().all()`", "peft_s"),
        )
    ]
    title = f"### The merge alone: {part['modules']} modules, {part['touched_parameters'] / 1e6:,.0f} M parameters"
    return f"{title}\n\n{machine_line(part)}\n\n" + table(["", "s per adapter", "÷ floor"], rows)


def startup(part: dict) -> str:
    rows = [
        ["`merge-gate --help`", part["help"]],
        ["import torch, transformers, peft", part["imports"]],
        ["the same and `from_pretrained`", part["imports_and_base"]],
        ["gate, before its first merge", part["gate_before_first_merge"]],
    ]
    return (
        f"### Start-up\n\n{machine_line(part)}\n\n"
        + table(["", "s"], [[name, f"{value:.2f}"] for name, value in rows])
        + f"\n\nThe gate needs {part['ratio']:.2f} times what the libraries and the base cost alone."
    )


def many(part: dict, check: dict | None) -> str:
    counts = sorted((count for count in part if count.isdecimal()), key=int)
    rows = [[n, f"{part[n]['wall_s']:.1f}", f"{part[n]['peak_anon_mib']:,.0f}"] for n in counts]
    text = f"### Many small adapters\n\n{machine_line(part)}\n\n" + table(["adapters", "gate, s", "MiB"], rows)
    if check:
        text += f"\n\n`merge-gate check` on {check['adapters']:,} adapters: {check['wall_s']:.1f} s"
        text += f", {check['peak_anon_mib']:,.0f} MiB."
    return text


def seven_b(part: dict) -> str:
    def say(run: dict) -> list[str]:
        outcome = "ended: over the limit" if run["over_limit"] else f"exit code {run['exit_code']}"
        return [f"{run['wall_s']:.0f}", f"{run['peak_anon_mib']:,.0f}", outcome]

    rows = [["gate, 4 adapters", *say(part["gate"])], ["(a), 1 adapter", *say(part["a"])]]
    title = f"### 7 B base, process tree limited to {part['limit_gib']:.0f} GiB of anonymous memory"
    return f"{title}\n\n{machine_line(part)}\n\n" + table(["", "s", "peak MiB", "outcome"], rows)


def tables(results: dict) -> str:
    parts = []
    if "scaling" in results:
        parts.append(scaling(results["scaling"], results.get("kernel")))
    if "kernel" in results:
        parts.append(kernel(results["kernel"]))
    if "startup" in results:
        parts.append(startup(results["startup"]))
    if "many" in results:
        parts.append(many(results["many"], results.get("check")))
    if "seven_b" in results:
        parts.append(seven_b(results["seven_b"]))
    return "\n\n".join(parts)


def main() -> None:
    readme = HERE / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    readme.write_text(f"{before}{BEGIN}\n\n{tables(results)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
