"""Write the tables of README.md from results.json.

In: results.json, and README.md with a pair of marks. Out: README.md with new tables between the marks; the prose
around them is people's work.
"""

from __future__ import annotations

import json
from pathlib import Path

from rows import METHODS, ROWS

HERE = Path(__file__).parent
LABELS = {"gate": "gate", "a": "(a)", "b": "(b)"}
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


def machine_lines(parts: list[dict]) -> str:
    """One line for parts that were measured one after the other: the first one's, and what has changed since."""
    loads = [part["machine"]["load_before"] for part in parts]
    latest = max(part["machine"]["date"] for part in parts)
    first, _, _ = machine_line(parts[0]).rpartition(";")
    since = f" to {latest}" if latest != parts[0]["machine"]["date"] else ""
    return first.replace(",", f"{since},", 1) + f"; load average before the runs {min(loads):.2f} to {max(loads):.2f}."


def rounds(parts: list[dict]) -> str:
    """Of how many rounds the figures are, as the parts themselves say."""
    counts = sorted({part["gate"]["runs"] for part in parts})
    if counts == [1]:
        return "One run of each."
    return f"Medians of {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} runs of each."


def work(results: dict) -> str:
    """The rows of rows.py that have been measured, against the script."""
    lines, remarks = [], []
    found = {name: results[name] for name in ROWS if name in results}
    for name, part in found.items():
        gate, script = part["gate"], part["script"]
        lines.append(
            [
                ROWS[name].title,
                *(f"{run['wall_s']:.1f}" for run in (gate, script)),
                f"{script['wall_s'] / gate['wall_s']:.1f}",
                ROWS[name].wanted,
                *(f"{run['peak_anon_mib'] - part['idle_anon_mib']:,.0f}" for run in (gate, script)),
            ]
        )
        remarks += [REMARKS[name](part)] if name in REMARKS else []
    head = ["work", "gate, s", "script, s", "script ÷ gate", "wanted", "gate, MiB", "script, MiB"]
    size = next(iter(found.values()))["size"].upper()
    parts = [f"### Whole runs on the {size} base, by kind of work", machine_lines(list(found.values()))]
    return "\n\n".join([*parts, rounds(list(found.values())), table(head, lines), *remarks])


def dtypes(part: dict) -> str:
    second = part["gate"]["wall_s"] - part["one"]["wall_s"]
    adapter = (part["eight"]["wall_s"] - part["one"]["wall_s"]) / 7
    return (
        f"The second dtype costs {second:.2f} s, one more adapter {adapter:.2f} s"
        f" (1 adapter: {part['one']['wall_s']:.1f} s, 8: {part['eight']['wall_s']:.1f} s)."
    )


def head(part: dict) -> str:
    ratio = part["gate"]["wall_s"] / part["one"]["wall_s"]
    return f"The trained `lm_head` makes it {ratio:.2f} times plain LoRA ({part['one']['wall_s']:.1f} s)."


REMARKS = {"dtypes": dtypes, "head": head}


def methods(results: dict) -> str:
    parts = {name: results[f"method-{name}"] for name in METHODS if f"method-{name}" in results}
    lines = [
        [
            name,
            *(f"{part[one]['wall_s']:.1f}" for one in ("gate", "script")),
            f"{part['script']['wall_s'] / part['gate']['wall_s']:.1f}",
            f"{part['gate']['peak_anon_mib']:,.0f}",
        ]
        for name, part in parts.items()
    ]
    size = next(iter(parts.values()))["size"].upper()
    title = f"### Every method of PEFT: one adapter on a {size} base"
    return f"{title}\n\n{machine_lines(list(parts.values()))} {rounds(list(parts.values()))}\n\n" + table(
        ["method", "gate, s", "script, s", "script ÷ gate", "gate, MiB"], lines
    )


def scaling(part: dict, kernel: dict | None) -> str:
    names = [name for name in LABELS if name in part]
    others = [name for name in names if name != "gate"]
    counts = sorted(part["gate"], key=int)
    rows = []
    for count in counts:
        runs = {name: part[name][count] for name in names}
        rows.append(
            [
                count,
                *(f"{run['wall_s']:.1f}" for run in runs.values()),
                *(f"{runs[name]['wall_s'] / runs['gate']['wall_s']:.1f}" for name in others),
                *(f"{run['peak_anon_mib'] - part['idle_anon_mib']:,.0f}" for run in runs.values()),
            ]
        )
    costs = {name: marginal_s(part[name]) for name in names}
    more = [f"{costs[name] / costs['gate']:.1f}" for name in others]
    rows.append(["one more", *(f"{cost:.2f}" for cost in costs.values()), *more, *[""] * len(names)])
    labels = [LABELS[name] for name in names]
    ratios = [f"{LABELS[name]} ÷ gate" for name in others]
    head = ["adapters", *(f"{label}, s" for label in labels), *ratios, *(f"{label}, MiB" for label in labels)]
    text = table(head, rows)
    if kernel and kernel.get("touched_parameters"):
        text += (
            f"\n\nOne more adapter costs {costs['gate'] / kernel['floor_s']:.1f} times the floor of merging all of it "
            f"({kernel['floor_s']:.2f} s, see the next table)."
        )
    return f"### Whole runs on the {part['size'].upper()} base\n\n{machine_line(part)}\n\n{text}"


KERNEL = {
    "floor_s": "one read of the touched weights plus the low-rank product (the floor)",
    "sample_s": "a sample of LoRA for the estimate of rounding",
    "blocks_s": "every element of {}, in blocks",
    "peft_s": "PEFT's `merge(safe_merge=True)` of {}",
}
ROADS = {
    "lora": "LoRA",
    "dora": "DoRA",
    "8bit": "LoRA on bnb-8bit",
    "8bit_dora": "DoRA on bnb-8bit",
    "4bit": "LoRA on bnb-4bit",
    "4bit_dora": "DoRA on bnb-4bit",
}


def kernel_label(key: str) -> str | None:
    """None for what kernel.py does not measure (any more)."""
    road = next((road for road in sorted(ROADS, key=len, reverse=True) if key.startswith(f"{road}_")), "")
    label = KERNEL.get(key.removeprefix(f"{road}_"))
    return label and label.format(ROADS.get(road, "LoRA"))


def kernel(part: dict) -> str:
    named = [(label, value) for key, value in part.items() if (label := kernel_label(key))]
    rows = [
        [name, f"{value:.2f}", f"{value / part['floor_s']:.1f}"]
        for name, value in sorted(named, key=lambda one: one[1])
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
    if any(name in results for name in ROWS):
        parts.append(work(results))
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
    if any(f"method-{name}" in results for name in METHODS):
        parts.append(methods(results))
    return "\n\n".join(parts)


def main() -> None:
    readme = HERE / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    readme.write_text(f"{before}{BEGIN}\n\n{tables(results)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
