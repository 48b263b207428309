"""Which architectures of the installed transformers read a layer's weight without calling the layer.

    python benchmarks/unread.py [TYPE ...]       # all, half an hour on one core; goes on where it was
    python benchmarks/unread.py --write          # prints the whole table

In: model types. Out: a line of JSON for each in the work directory. Each type has a process of its own, in which

1. a small random model is built (tests/support/engine/architectures.py);
2. one forward pass of tensors without data shows what is read apart (engine/base/direct_reads.py);
3. PEFT is the judge of each kind of layer that was found, and of two that were not: a LoRA with a random B is put on
   that layer alone, and the model's outputs are compared before and after PEFT's merge.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import multiprocessing
import re
import resource
import sys
import tempfile
import time
from collections import Counter, defaultdict
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import peft
import torch
import transformers
from torch import nn

from merge_gate.engine.base import direct_reads
from merge_gate.engine.base.made_up_inputs import candidates
from tests.support import methods
from tests.support.engine import architectures
from tests.support.engine.forward_trials import floating

TIMEOUT_S = 45
LIMIT_BYTES = 6 << 30
ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)
CONTROLS = 2


def child(model_type: str, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
    with tempfile.TemporaryDirectory() as work:
        try:
            architecture = architectures.build(model_type, Path(work), torch.float32)
            model = architectures.load(architecture, Path(work))
        except Exception as error:  # noqa: BLE001 - constructors fail in any way
            sender.send({"type": model_type, "built": False, "reason": f"{type(error).__name__}: {error}"[:200]})
            return
    line = in_process(traced, model) | {"type": model_type, "built": True, "class": architecture.model_class.__name__}
    sender.send(line)
    if "apart" in line:
        sender.send(line | {"off": judged(model, frozenset(line["apart"]))})


def traced(model: Any, sender: Connection) -> None:
    """In a process of its own as well: some models keep what they have computed, and this has no data."""
    started = time.perf_counter()
    found = direct_reads.trace(model)
    sender.send(
        {
            "complete": found.complete,
            "apart": {path: type(model.get_submodule(path)).__name__ for path in sorted(found.modules)},
            "in_logits": sorted(found.in_logits),
            "attention": sum(type(module).forward is nn.MultiheadAttention.forward for module in model.modules()),
            "seconds": round(time.perf_counter() - started, 2),
        }
    )


def judged(model: Any, apart: frozenset[str]) -> dict[str, float | str]:
    """How far PEFT's merge of a random LoRA on a layer alone moves the outputs, by layer."""
    named = dict(model.named_modules())
    leaves = {path.rpartition(".")[2]: path for path in sorted(apart, reverse=True)}
    held = Counter(id(one) for module in model.modules() for one in module.parameters(recurse=False))
    alone = [path for path, module in named.items() if type(module) is nn.Linear and held[id(module.weight)] == 1]
    controls = [path for path in alone if path not in apart][:CONTROLS]
    found: dict[str, float | str] = {}
    for path in (*leaves.values(), *controls):
        if isinstance(named[path], ADAPTABLE):
            try:
                found[path] = off(model, path)
            except Exception as error:  # noqa: BLE001 - inputs that do not fit, layers that LoRA refuses
                found[path] = f"{type(error).__name__}: {error}"[:100]
    return found


def off(model: Any, path: str) -> float:
    config = peft.LoraConfig(r=1, target_modules=re.escape(path), init_lora_weights=False)
    torch.manual_seed(0)
    with methods.quiet(), torch.no_grad():
        adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
        unmerged = outputs(adapted.base_model.model)
        merged = outputs(adapted.merge_and_unload().eval())
    return float((merged - unmerged).norm() / unmerged.norm())


def outputs(model: Any) -> torch.Tensor:
    """What the model returns for the first inputs that it accepts."""
    for _, inputs in candidates(model):
        torch.manual_seed(1)
        with contextlib.suppress(Exception):
            return torch.cat([tensor.float().flatten() for tensor in floating(model(**inputs))])
    raise ValueError("no inputs fit")


def in_process(target: Any, value: Any, timeout_s: int = TIMEOUT_S) -> dict[str, Any]:
    """The last that a process of its own has sent in time."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(value, sender))
    process.start()
    sender.close()
    line: dict[str, Any] = {"type": str(value)[:40], "built": False, "reason": f"not done in {timeout_s} s"}
    end = time.monotonic() + timeout_s
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            line = receiver.recv()
    except EOFError:
        pass
    finally:
        process.kill()
        process.join()
    return line


# --- the table -----------------------------------------------------------------------------------------------------


def table(results: Path) -> str:
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    built = [line for line in lines if "apart" in line]
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in built:
        for kind in {(path.rpartition(".")[2], name) for path, name in line["apart"].items()}:
            kinds[kind].append(line)
    rows = ["| layer | class | model types | PEFT's outputs, merged against unmerged |", "|---|---|---|---|"]
    for (leaf, name), of_kind in sorted(kinds.items(), key=lambda one: (-len(one[1]), one[0])):
        values = [
            value
            for line in of_kind
            for path, value in line.get("off", {}).items()
            if path in line["apart"] and path.rpartition(".")[2] == leaf and isinstance(value, float)
        ]
        told = f"{min(values):.1e} to {max(values):.1e} off, {len(values)} tried" if values else "not tried"
        types = ", ".join(f"`{line['type']}`" for line in of_kind)
        rows.append(f"| `{leaf}` | `{name}` | {len(of_kind)}: {types} | {told} |")
    controls = [
        value
        for line in built
        for path, value in line.get("off", {}).items()
        if path not in line["apart"] and isinstance(value, float)
    ]
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "torch"))
    head = (
        f"{versions}. Of {len(lines)} model types {len(built)} were built small; {sum(x['complete'] for x in built)} "
        f"ran whole without data, {sum(bool(x['apart']) for x in built)} read a weight apart, "
        f"{sum(bool(x['attention']) for x in built)} have `nn.MultiheadAttention`. Of {len(controls)} other linear "
        f"layers {sum(value > 1e-4 for value in controls)} were off by more than 1e-4 (largest {max(controls):.1e})."
    )
    return "\n".join([head, "", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="these model types only")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "merge-gate-unread.jsonl")
    parser.add_argument("--write", action="store_true", help="print the table, and run nothing")
    arguments = parser.parse_args()
    if arguments.write:
        print(table(arguments.results))
        return
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    done = set()
    if arguments.results.exists():
        done = {json.loads(line)["type"] for line in arguments.results.read_text(encoding="utf-8").splitlines()}
    for model_type in arguments.types or architectures.model_types():
        if model_type not in done:
            line = in_process(child, model_type)
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
