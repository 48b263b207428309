"""The weights file is a Git LFS pointer, not the weights.

**Fires when** the config or the weights file is the small text file that Git LFS leaves in place of a large file.

```text
adapter_model.safetensors is a Git LFS pointer of 131 bytes, expected the file of 150,656 bytes that it points to
```

**Why it matters.** The checkout is not complete. The safetensors library reports "header too large" for such a file.

**What to do.** Run `git lfs pull`. In a workflow, set `lfs: true` for `actions/checkout`.

**It happened.**

- [microsoft/OmniParser#34](https://github.com/microsoft/OmniParser/issues/34),
  [codefuse-ai/MFTCoder#20](https://github.com/codefuse-ai/MFTCoder/issues/20): "HeaderTooLarge". In both threads,
  git-lfs was not installed when the repository was cloned.
- [nicolaus-huang/ProcessPainter#4](https://github.com/nicolaus-huang/ProcessPainter/issues/4): `adapter_config.json`
  itself was the pointer, and the error was about JSON.
"""

from __future__ import annotations

from merge_gate.judging.checks.check import ERROR, Check, Symptom
from merge_gate.records.terms import Origin

FILE_LFS_POINTER = Check("file-lfs-pointer", ERROR, Origin.FILE, Symptom.BAD_FILE, blame=50, page=__doc__)
