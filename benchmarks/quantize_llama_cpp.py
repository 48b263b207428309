"""Quantizes a GGUF file by libllama; quantized.py starts this in an environment with llama-cpp-py-sync.

In: input, output, the number of a `llama_ftype`, and a file of importances (.npz, by tensor), if there is one. Imports
neither merge-gate nor torch.
"""

from __future__ import annotations

import sys

import numpy as np
from llama_cpp_py_sync import _cffi_bindings


def main() -> None:
    ffi, lib = _cffi_bindings.get_ffi(), _cffi_bindings.get_lib()
    source, target, kind, *importances = sys.argv[1:]
    lib.llama_backend_init()
    settings = lib.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = int(kind), 2
    kept = []
    for name, values in np.load(importances[0]).items() if importances else ():
        row = np.ascontiguousarray(values, np.float32)
        kept.append((ffi.new("char[]", name.encode()), ffi.from_buffer("float[]", row), row.size))
    if kept:
        rows = ffi.new("struct llama_model_imatrix_data[]", len(kept) + 1)
        for place, (name, values, size) in enumerate(kept):
            rows[place].name, rows[place].data, rows[place].size = name, values, size
        settings.imatrix = rows
    if lib.llama_model_quantize(source.encode(), target.encode(), ffi.new("llama_model_quantize_params *", settings)):
        raise SystemExit(f"libllama does not quantize {source}")


if __name__ == "__main__":
    main()
