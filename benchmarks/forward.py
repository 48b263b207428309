"""Every model type of the installed transformers on made-up inputs: which run, and do they run in lockstep.

    python benchmarks/forward.py [TYPE ...]     # all, half an hour on one core; goes on where it was
    python benchmarks/forward.py --write        # forward.json and docs/evidence/truth.md from it

In: model types. Out: a line of JSON for each in the work directory, and with `--write` the data and the document.
Each type has a process of its own, with a limit of time and memory, in which `forward_trials.trial`

1. builds small random models, and takes the first that runs on inputs that its configuration gives;
2. runs it again, and in the two 16-bit dtypes;
3. puts LoRA on all linear layers, and runs base and adapter in lockstep, with NaN in each weight that is not filled;
4. merges with PEFT, and compares the outputs, in float32.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from benchmarks.architectures import LIMIT_BYTES, TIMEOUT_S, command, head_of, rows
from benchmarks.unread import in_process
from merge_gate.engine.base.made_up_inputs import Inputs
from tests.support.engine.forward_trials import outputs, sentence, trial
from tests.support.methods import quiet

LEAST_SHARE, LEAST_ERROR = 0.01, 1e-5
"""A merge differs above this share of the adapter's effect, and of the outputs."""

DATA = Path(__file__).resolve().parent / "forward.json"


def child(model_type: str, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    try:
        sender.send({"type": model_type, **asdict(trial(model_type, more))})
    except Exception as error:  # noqa: BLE001 - nothing could be built, or a mistake of the trial: its type shows it
        sender.send({"type": model_type, "reason": sentence(error)})


def more(
    model: Any, adapted: Any, inputs: Inputs, of_base: list[torch.Tensor], of_adapter: list[torch.Tensor]
) -> dict[str, Any]:
    facts = {"unlike": tuple(_unlike(model, inputs))}
    return facts if adapted is None else facts | _merged(adapted, inputs, of_base, of_adapter)


def _unlike(model: nn.Module, inputs: Inputs) -> Iterator[str]:
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        given = {
            key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for key, value in inputs.items()
        }
        try:
            found = outputs(copy.deepcopy(model).to(dtype), given)
        except Exception as error:  # noqa: BLE001 - a model's own
            yield f"{name}: {sentence(error)}"
        else:
            if not all(bool(torch.isfinite(one).all()) for one in found):
                yield f"{name}: not finite"


def _merged(
    adapted: Any, inputs: Inputs, of_base: list[torch.Tensor], of_adapter: list[torch.Tensor]
) -> dict[str, Any]:
    layers = {path: one for path, one in adapted.named_modules() if isinstance(one, LoraLayer)}
    called: set[int] = set()
    hooks = [one.register_forward_hook(lambda module, *_: called.add(id(module))) for one in layers.values()]
    outputs(adapted.get_base_model(), inputs)
    for hook in hooks:
        hook.remove()
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for path, one in layers.items():
        how = _how(adapted, one, id(one) in called)
        kinds.setdefault((path.rpartition(".")[2], type(one.get_base_layer()).__name__, how), []).append(path)
    error = _error(adapted, list(layers), inputs, of_base, of_adapter)
    if isinstance(error, str):
        return {"differs": (error,)}
    differs = []
    for (leaf, name, how), paths in kinds.items() if error > LEAST_SHARE else ():
        of_kind = _error(adapted, paths, inputs, of_base, of_adapter)
        if isinstance(of_kind, str) or of_kind > LEAST_SHARE:
            differs.append(f"{leaf} ({name}) {how}")
    return {
        "error": float(f"{error:.1e}"),
        "differs": tuple(differs or (["all together"] if error > LEAST_SHARE else ())),
    }


def _error(
    adapted: Any, paths: list[str], inputs: Inputs, of_base: list[torch.Tensor], of_adapter: list[torch.Tensor]
) -> float | str:
    """How far the outputs are from the unmerged ones once these layers are merged, as a share of the effect."""
    merged = copy.deepcopy(adapted)
    try:
        with quiet():
            for path in paths:
                merged.get_submodule(path).merge()
            found = outputs(merged.get_base_model(), inputs)
    except Exception as error:  # noqa: BLE001 - PEFT's own
        return sentence(error)
    distance = _norm(found, of_adapter)
    is_far = distance > LEAST_ERROR * _norm(of_adapter, [torch.zeros_like(one) for one in of_adapter])
    return distance / max(_norm(of_adapter, of_base), 1e-30) if is_far else 0.0


def _norm(tensors: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    if [one.shape for one in tensors] != [one.shape for one in others]:
        return float("inf")
    return (
        sum(float((one.double() - other.double()).norm()) ** 2 for one, other in zip(tensors, others, strict=True))
        ** 0.5
    )


def _how(adapted: nn.Module, layer: Any, is_called: bool) -> str:
    """What is special about a layer."""
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    holders = [one for one in adapted.modules() if any(weight is tensor for tensor in one.parameters(recurse=False))]
    if len(holders) > 1:
        return "shares its weight"
    if not is_called:
        return "is not called"
    return "has a forward of its own" if not type(base).__module__.startswith("torch.") else "is called"


def run(model_types: list[str], results: Path) -> None:
    """Try each type that has no line yet."""
    done = read(results)
    for number, model_type in enumerate(model_types, start=1):
        if model_type not in done:
            line = in_process(child, model_type, TIMEOUT_S)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{number}/{len(model_types)} {model_type}: {line.get('inputs') or line.get('reason')}", flush=True)


def read(results: Path) -> dict[str, dict[str, Any]]:
    """The answers by model type, without what is empty. The last line of each type counts."""
    lines = (json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()[1:])
    return {line.pop("type"): {key: value for key, value in line.items() if value} for line in lines}


# --- benchmarks/forward.json and docs/evidence/truth.md -------------------------------------------------------------

TEXT = """{date}, transformers {transformers}, PEFT {peft}, torch {torch}, merge-gate {merge-gate}.

| model types | number | of |
|---|---:|---:|
{counts}"""


def data(results: Path) -> dict[str, Any]:
    """What benchmarks/forward.json stores: the date, the versions, and the answers by model type."""
    head = head_of(results)
    date = head.pop("date")
    return {"date": date, "versions": head, "types": dict(sorted(read(results).items()))}


def document(answers: dict[str, Any]) -> str:
    """The block of the page, from what benchmarks/forward.json stores."""
    types: dict[str, dict[str, Any]] = answers["types"]
    built = {name: facts for name, facts in types.items() if "model_class" in facts}
    ran = {name: facts for name, facts in built.items() if "inputs" in facts}
    adapted = [facts for facts in ran.values() if "adapter" not in facts]
    causal = [facts for facts in built.values() if "is_causal" in facts]
    counts = [
        ["built small", len(built), len(types)],
        ["run whole", len(ran), len(built)],
        ["causal LMs that run whole", sum("inputs" in facts for facts in causal), len(causal)],
        ["same bits in a second run", sum("repeats" in facts for facts in ran.values()), len(ran)],
        ["finite", sum("finite" in facts for facts in ran.values()), len(ran)],
        ["run in bfloat16 and float16 too, finite", sum("unlike" not in facts for facts in ran.values()), len(ran)],
        ["lockstep gives the bits of base and adapter", sum("lockstep" not in one for one in ran.values()), len(ran)],
        ["each untied weight is filled once", sum("twice" not in facts for facts in ran.values()), len(ran)],
        [
            "at least 99 % of the parameters are read",
            sum(one.get("share", 0) >= 0.99 for one in ran.values()),
            len(ran),
        ],
        ["PEFT's merge computes what the adapter computes", sum("differs" not in one for one in adapted), len(adapted)],
    ]
    return TEXT.format(date=answers["date"], **answers["versions"], counts=rows(counts))


def main() -> None:
    command(__doc__, "forward", DATA, read=data, write=document, sweep=run)


if __name__ == "__main__":
    main()
