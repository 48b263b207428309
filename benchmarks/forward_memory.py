"""A base and its adapters run together, and the base is read from its files: what is read, how often, and the memory.

    python benchmarks/forward_memory.py [SIZE] [--adapters N] [--work DIR]

In: a size of make_base.py. Out: a line of JSON: CPU seconds, the bytes that were read and those of the files, the most
often that a byte was read, and the peak of anonymous memory of the whole process. The base and the adapters are made
in DIR, 14 GB for `7b`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from make_adapters import make_adapters
from make_base import SIZES, make_base
from measure import MIB, _Sampler, anon_bytes

from merge_gate.engine.adapter.load_adapter import load_adapter
from merge_gate.engine.adapter.peft_config import read_weights
from merge_gate.engine.base.loaded_base import ModelClass
from merge_gate.engine.base.skeleton import skeleton_of
from merge_gate.engine.forward.run import run_adapters
from merge_gate.engine.merge.private_copies import map_factors
from merge_gate.files.preflight import preflight
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.fed_bases import CountingFeed, source


def forward(base_directory: Path, adapters: list[Path]) -> dict[str, object]:
    """Run the base and its adapters once, in this process."""
    logging.disable()
    torch.set_num_threads(1)
    feed = CountingFeed(str(base_directory))
    stored = stored_tensors(base_directory)
    base = skeleton_of(source(base_directory), ModelClass(class_name="LlamaForCausalLM"), stored, feed)
    files = [preflight(str(adapter), allow_pickle=False) for adapter in adapters]
    loaded = []
    for weights, one in ((read_weights(one), one) for one in files):
        loaded.append(load_adapter(base, one, weights))
        map_factors(loaded[-1].model, loaded[-1].arrivals[0], weights)  # as the gate does
    before, started, anon = len(feed.reads), time.process_time(), anon_bytes(os.getpid())
    sampler = _Sampler(os.getpid(), None)
    sampler.start()
    found = run_adapters(base, [one.model.get_base_model() for one in loaded])
    sampler.stop()
    reads = Counter(feed.reads[before:])
    return {
        "ran": [one.ran or one.why_not for one in found],
        "cpu_s": round(time.process_time() - started, 1),
        "read_bytes": sum((span.end - span.start) * count for span, count in reads.items()),
        "file_bytes": sum(path.stat().st_size for path in base_directory.glob("*.safetensors")),
        "most_reads_of_a_tensor": max(reads.values()),
        "anon_before_mib": round(anon / MIB),
        "peak_anon_mib": round(sampler.peak_bytes / MIB),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", nargs="?", choices=SIZES, default="7b")
    parser.add_argument("--adapters", type=int, default=4, metavar="N")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "merge-gate-bench")
    arguments = parser.parse_args()
    base = make_base(arguments.size, arguments.work / arguments.size)
    adapters = make_adapters(arguments.size, base, arguments.work / f"{arguments.size}-adapters", arguments.adapters)
    print(json.dumps({"size": arguments.size, "adapters": len(adapters), **forward(base, adapters)}))


if __name__ == "__main__":
    main()
