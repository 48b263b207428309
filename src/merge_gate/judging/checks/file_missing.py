"""There is no adapter_config.json, or no weights file.

**Fires when** the directory or Hub repository has no `adapter_config.json` at its top level, or no weights
(`adapter_model.safetensors` or `adapter_model.bin`). A symbolic link to a missing file counts as missing.

```text
there are no weights (adapter_model.safetensors): the directory contains 'README.md', 'adapter_config.json'
```

**Why it matters.** PEFT then looks for the file on the Hub, and fails with a message about repository ids.

**What to do.** Name the directory that `save_pretrained` of the PEFT model wrote. The hint says if the directory looks
like a checkpoint in a subdirectory, a full model, or a sharded adapter.

If you switch this check off or lower it to a warning, the adapter is still not loaded, and its verdict is `error`. The
same is true for `file-lfs-pointer`, `file-corrupt`, `pickle-refused`, and `config-unsafe`.

**It happened.**

- [peft#806](https://github.com/huggingface/peft/issues/806): PEFT took a local directory for the id of a Hub
  repository, and its message was only about repository ids.
- [lm-sys/FastChat#2304](https://github.com/lm-sys/FastChat/issues/2304): there was no `adapter_config.json`, and the
  user asked whether to rename another file.
- [VectorSpaceLab/OmniGen#178](https://github.com/VectorSpaceLab/OmniGen/issues/178): a training checkpoint in its own
  layout was passed as an adapter.
"""

from __future__ import annotations

from merge_gate.judging.checks.check import ERROR, Check, Symptom
from merge_gate.records.terms import Origin

FILE_MISSING = Check("file-missing", ERROR, Origin.FILE, Symptom.BAD_FILE, blame=40, page=__doc__)
