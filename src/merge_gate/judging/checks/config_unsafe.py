"""adapter_config.json would make PEFT import code.

**Fires when** the config would make PEFT import code: `megatron_config`, an `auto_mapping` outside of the known
libraries, or `trust_remote_code` anywhere in it. The gate finds this before PEFT reads the config.

```text
megatron_config is set in adapter_config.json: PEFT would import the first module on Python's path that is named
'megatron.core'
```

**Why it matters.** A repository with a directory `megatron/core` could run code in the release job.

**What to do.** If it is your own adapter, set the key to null, as the hint says. If it is not, ask its author why the
key is there. Only `trust-remote-code` in the gate's config allows code of a *base*. An adapter can never allow it.

**It happened.**

- [peft#3085](https://github.com/huggingface/peft/issues/3085): PEFT imported every module that `adapter_config.json`
  named. [peft#3090](https://github.com/huggingface/peft/pull/3090) limits them to known libraries and to `megatron.`
- [transformers#46482](https://github.com/huggingface/transformers/pull/46482): a proposal that was closed. It says that
  `from_pretrained` of transformers loads an adapter's config without any trust setting, so the import can reach a file
  of the repository.
"""

from __future__ import annotations

from merge_gate.judging.checks.check import ERROR, Check, Symptom
from merge_gate.records.terms import FailureKind, Origin

CONFIG_UNSAFE = Check(
    "config-unsafe", ERROR, Origin.CONFIG, Symptom.BAD_CONFIG, blame=90, page=__doc__, failure=FailureKind.REFUSED
)
