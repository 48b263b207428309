"""Check tensor map and skeleton of every model type against a real load, and write the result: `make tensor-maps`.

Each type is saved as a tiny random model. Its map is recorded on headers alone and filled with the stored values, which
must give every parameter that `from_pretrained` gives, bit for bit. So must its skeleton, in two dtypes.
"""

import datetime as dt
import sys
import textwrap

import peft
import torch
import transformers

from tests.support.engine import architectures, tensor_maps
from tests.support.engine.tensor_maps import Checked
from tests.support.sweeps import sweep, table, write


def document(found: list[Checked]) -> str:
    mapped = [one for one in found if not one.skipped]
    wrong = [one for one in mapped if one.wrong]
    loaded = [one for one in mapped if one.loaded]
    computed = ", ".join(f"`{name}`" for name in tensor_maps.COMPUTED)
    tested = (
        f"{dt.datetime.now(dt.UTC).date()}, transformers {transformers.__version__}, PEFT {peft.__version__}, torch "
        f"{torch.__version__}. For {computed}, only names are compared: transformers computes values after the load."
    )
    counts = [
        ("tried", len(found)),
        ("a tiny model has a map", len(mapped)),
        ("the map gives every parameter of `from_pretrained`", len(mapped) - len(wrong)),
        ("the skeleton has the bits of `from_pretrained`, in bfloat16 and float16", len(mapped) - len(loaded)),
        ("with conversions", sum(bool(one.conversions) for one in mapped)),
    ]
    lines = [textwrap.fill(tested, 120), "", *table(("model types", "number"), counts), ""]
    if wrong:
        lines += [*table(("wrong", "what"), [(f"`{one.model_type}`", "; ".join(one.wrong[:3])) for one in wrong]), ""]
    if loaded:
        lines += [*table(("loaded as usual", "why"), [(f"`{one.model_type}`", one.loaded) for one in loaded]), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(
        write(
            __doc__,
            "tensor maps",
            lambda types: sweep(tensor_maps.check, Checked, types or architectures.model_types(), "right"),
            document,
        )
    )
