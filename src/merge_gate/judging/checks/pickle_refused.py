"""There are only pickled weights (.bin), and allow-pickle is false.

**Fires when** the only weights are `adapter_model.bin`, and `allow-pickle` is false.

```text
the only weights are adapter_model.bin, a Python pickle, which can run code when it is loaded; expected
adapter_model.safetensors
```

**Why it matters.** A pickle is a program, and an adapter comes from outside.

**What to do.** Save the adapter as safetensors, which is PEFT's default. If you trust the author, `allow-pickle: true`
reads the file with torch's restricted unpickler (`weights_only`), in the worker process. `merge-gate check` imports no
torch, so it only says that the file is a pickle. If both files exist, PEFT and the gate read only the
safetensors file. [Five lines](../guides/trainers.md#bin-files) convert a pickled
adapter.

**It happened.**

- [run-llama/llama_index#21465](https://github.com/run-llama/llama_index/issues/21465): an adapter's `.bin` was loaded
  without `weights_only`, so its author could run code.
- [peft#1993](https://github.com/huggingface/peft/pull/1993): PEFT itself loads only weights since August 2024.
"""

from __future__ import annotations

from merge_gate.judging.checks.check import ERROR, Check, Symptom
from merge_gate.records.terms import FailureKind, Origin

PICKLE_REFUSED = Check(
    "pickle-refused", ERROR, Origin.FILE, Symptom.BAD_FILE, blame=70, page=__doc__, failure=FailureKind.REFUSED
)
