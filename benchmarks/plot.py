"""Draw time and memory against the number of adapters, for the gate, (a) and (b).

In: results.json. Out: time-and-memory.svg, text kept as text. Needs matplotlib, which nothing else in the project does.
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent
NAMES = {
    "a": "(a) load, merge, check per adapter",
    "b": "(b) base once, deep copy per adapter",
    "gate": "merge-gate",
}
COLOURS = {"a": "#b35806", "b": "#998ec3", "gate": "#1b7837"}
PANELS = {"wall_s": "seconds, whole process", "peak_anon_mib": "peak anonymous memory, GiB"}


def main() -> None:
    try:
        import matplotlib as mpl  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        print("no plot drawn: matplotlib is not installed (pip install matplotlib, then python benchmarks/plot.py)")
        return
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    if "scaling" not in results:
        print("no plot drawn: results.json has no `scaling` yet")
        return
    scaling = results["scaling"]
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "merge-gate", "font.size": 9})
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for name, label in ((name, label) for name, label in NAMES.items() if name in scaling):
            counts = sorted(int(count) for count in scaling[name])
            factor = 1 / 1024 if key == "peak_anon_mib" else 1
            values = [scaling[name][str(count)][key] * factor for count in counts]
            axes.plot(counts, values, marker="o", markersize=4, color=COLOURS[name], label=label)
        axes.set(xlabel="adapters", xticks=counts, title=title, ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[1].legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.4))
    figure.savefig(HERE / "time-and-memory.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
