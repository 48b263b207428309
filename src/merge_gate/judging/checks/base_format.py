"""The base has a format that cannot be judged.

**Fires when** the gate cannot check adapters on a base in this format: transformers cannot load it here, or cannot
restore the weights from it. The check also fires if a base is already quantized and the gate's config requests another
quantization. The verdict is `error` and not `failed`.

```text
the base './models/llama-exl2' cannot be judged: its format is EXL2, by quantization_config in config.json
```

**Why it matters.** A format that transformers does not support is loaded as something else, or not at all.

**What to do.** Check and merge on the unquantized base that the adapter was trained on.

**It happened.**

- [oobabooga/textgen#6002](https://github.com/oobabooga/textgen/issues/6002): an EXL2 model in a loader that does not
  support the format.
- [deepseek-ai/DeepSeek-V3#558](https://github.com/deepseek-ai/DeepSeek-V3/issues/558): FP8 in a release of transformers
  that did not support it.
"""

from __future__ import annotations

from merge_gate._internal.text import foreign, quoted
from merge_gate.judging.checks.check import ERROR, Check, Symptom
from merge_gate.records.config import BaseSpec
from merge_gate.records.files import BaseFiles
from merge_gate.records.terms import Finding, Origin, Quantization

BASE_FORMAT = Check(
    "base-format", ERROR, Origin.BASE, Symptom.BAD_BASE, blame=30, page=__doc__, can_be_off=False, is_of_base=True
)

_STORED_AS = {"bitsandbytes_4bit": Quantization.BNB_4BIT, "bitsandbytes_8bit": Quantization.BNB_8BIT}


def of_request(spec: BaseSpec, files: BaseFiles) -> Finding | None:
    """Transformers keeps the quantization that config.json declares, whatever is asked for. None if they agree."""
    declared, asked = files.quantization, spec.quantization
    if declared is None or not declared.is_read or asked is Quantization.NONE:
        return None
    stored = _STORED_AS.get(declared.method)
    if stored is asked:
        return None
    name = quoted(spec.label or spec.model or files.directory, 200)
    return BASE_FORMAT.finding(
        f"the base {name} is stored in {stored or declared.method} (quantization_config in its config.json), and the "
        f"gate's config asks for {asked}: transformers does not quantize it again",
        f"set quantization: none to gate the base as it is stored, or name the unquantized base to gate it in {asked}",
    )


def quantization_unknown(base: str, method: str, transformers: str) -> Finding:
    """config.json declares a quantization that this release of transformers cannot load."""
    return BASE_FORMAT.finding(
        f"base {base}: its config.json declares quantization by {foreign(method)}, which transformers "
        f"{transformers} cannot load",
        "gate and merge on the unquantized base that the adapter was trained on",
    )


def loaded_otherwise(
    *, base: str, class_name: str, quantization: str, asked_quantization: str, dtype: str, asked_dtype: str
) -> Finding:
    asks = f"ask for dtype: auto or {dtype}"
    if asked_quantization != Quantization.NONE:
        message = f"was loaded with quantization {quantization}, and the config asks for {asked_quantization}"
        hint = "name the unquantized base, or leave quantization out"
    elif quantization != Quantization.NONE:
        message = (
            f"is stored as {quantization}, whose weights are {dtype} when they are dequantized, and the config asks "
            f"for dtype: {asked_dtype}"
        )
        hint = f"{asks}, or name the unquantized base"
    else:
        message = f"was loaded in {dtype}, and the config asks for dtype: {asked_dtype}"
        hint = f"{asks}: {class_name} does not load in another one"
    return BASE_FORMAT.finding(f"base {base} {message}", hint)


REFUSALS = (quantization_unknown, loaded_otherwise)
