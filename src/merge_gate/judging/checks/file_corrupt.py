"""A file is empty, truncated, or not in the format that it claims.

**Fires when** a weights file is empty, truncated, or not in the format of its name. This includes:

- a safetensors header with repeated names or unknown fields. The gate is stricter here than the library;
- with `allow-pickle: true`, a pickle with anything other than tensors in it. torch's restricted unpickler runs nothing
  in it. If the pickle would import a function, the message names it (`torch refuses "posix.system" in them`);
- a tensor that torch cannot turn into numbers: values of 4 or 6 bits, quantized values, or no values at all (meta
  device).

```text
adapter_model.safetensors is truncated: its header describes 3,584 bytes of tensor data, the file holds 2,201
```

**Why it matters.** The upload or the copy was cut off, or an error page was saved in place of the file.

**What to do.** Compare size and digest with the original file, and copy or download it again. If the original is the
same, save the adapter again. Do not load a pickle that would call a function. Ask its author about it.

**It happened.**

- [replicate/cog-comfyui#329](https://github.com/replicate/cog-comfyui/issues/329): some LoRA files of about 500 MB
  always arrived truncated, although their training had succeeded.
- [lyogavin/airllm#137](https://github.com/lyogavin/airllm/issues/137): "MetadataIncompleteBuffer" was a download that
  had not finished.
"""

from __future__ import annotations

from merge_gate._internal.text import quoted
from merge_gate.judging.checks.check import ERROR, Check, Symptom
from merge_gate.records.terms import Finding, Origin

FILE_CORRUPT = Check("file-corrupt", ERROR, Origin.FILE, Symptom.BAD_FILE, blame=60, page=__doc__)


def tensor_unreadable(name: str | None = None, is_meta: bool = False, dtype: str = "", text: str = "") -> Finding:
    """It is on the meta device, has such a dtype, or `text` is torch's reason, which may not say which tensor it is."""
    why = "it is without values (meta device)" if is_meta else f"it is of {dtype}" if dtype else text
    return FILE_CORRUPT.finding(
        f"{name or 'a tensor'} in the adapter's file cannot be read as numbers by torch, or loaded by PEFT: {why}",
        "save the adapter with its values, as float32, bfloat16 or float16",
        tensor=name,
    )


def pickle_unreadable(error: str, names: str | None = None) -> Finding:
    """The restricted unpickler of torch refuses the weights; `names` is what they would import, if it says so."""
    what = f"torch refuses {quoted(names)} in them" if names else error
    again = (
        "copy or download the file again and compare its size; if that is right, have the adapter saved as safetensors"
    )
    return FILE_CORRUPT.finding(
        f"the pickled weights are damaged, or hold something other than tensors ({what})",
        "do not load this file; ask who made it, and have the adapter saved as safetensors" if names else again,
    )


REFUSALS = (tensor_unreadable, pickle_unreadable)
