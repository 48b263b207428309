"""Applies adapters by libllama, after llama.cpp's own converter; servers.py starts this in the servers' environment.

In: a file of JSON with the base, the prompts, the adapters, and the directory of llama.cpp's source; no adapter is the
base alone. Out: one line of
JSON for each adapter, which names a file of logits, or has the converter's or the server's refusal. Imports neither
merge-gate nor PEFT.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import numpy as np

REFUSAL_LIMIT = 300


def convert(source: Path, script: str, words: list[str], output: Path) -> str:
    """Run a converter of llama.cpp, unless its output is there; what it says if it fails."""
    partial, log = output.with_suffix(".partial"), output.with_suffix(".log")
    if not output.exists():
        command = [script, *words, "--outtype", "f32", "--outfile", str(partial)]
        process = multiprocessing.get_context("fork").Process(target=_convert, args=(source / script, command, log))
        process.start()  # a fork has the slow imports
        process.join()
        if process.exitcode:
            lines = log.read_text(encoding="utf-8").splitlines() or [f"exit code {process.exitcode}"]
            return next((line for line in lines if line.startswith("ERROR")), lines[-1])[:REFUSAL_LIMIT]
        partial.rename(output)
    return ""


def _convert(script: Path, command: list[str], log: Path) -> None:
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = command
    runpy.run_path(str(script), run_name="__main__")


class Model:
    """A base in libllama, in float32, with a cache in float32."""

    def __init__(self, path: Path) -> None:
        from llama_cpp_py_sync import _cffi_bindings  # noqa: PLC0415 - after the forks: libllama has threads

        self.ffi, self.lib = _cffi_bindings.get_ffi(), _cffi_bindings.get_lib()
        self.log: list[str] = []
        self.callback = self.ffi.callback("void(enum ggml_log_level, char *, void *)")(self.keep)
        self.lib.llama_log_set(self.callback, self.ffi.NULL)
        self.lib.llama_backend_init()
        settings = self.lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), settings)
        if self.model == self.ffi.NULL:
            raise SystemExit(f"libllama does not load {path}: {' '.join(self.log)[-REFUSAL_LIMIT:]}")
        settings = self.lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 64
        settings.n_threads = settings.n_threads_batch = 1
        settings.flash_attn_type = settings.type_k = settings.type_v = 0
        self.context = self.lib.llama_init_from_model(self.model, settings)
        self.size = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))

    def keep(self, level: int, text: object, _: object) -> None:
        if level >= 3:  # warnings and errors
            self.log.append(self.ffi.string(text).decode(errors="replace").strip())

    def logits(self, prompts: list[list[int]]) -> np.ndarray:
        """Of every position of every prompt; prompts have one length."""
        return np.stack([self._of_one(prompt) for prompt in prompts])

    def _of_one(self, prompt: list[int]) -> np.ndarray:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        batch = self.lib.llama_batch_init(len(prompt), 0, 1)
        batch.n_tokens = len(prompt)
        for place, token in enumerate(prompt):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        if self.lib.llama_decode(self.context, batch):
            raise SystemExit("llama_decode failed")
        rows = [self.lib.llama_get_logits_ith(self.context, place) for place in range(len(prompt))]
        values = [np.frombuffer(self.ffi.buffer(row, 4 * self.size), np.float32).copy() for row in rows]
        self.lib.llama_batch_free(batch)
        return np.stack(values)

    def load(self, path: Path) -> str:
        """Apply an adapter instead of an earlier one; libllama's refusal, if it has one."""
        self.log.clear()
        adapter = self.lib.llama_adapter_lora_init(self.model, str(path).encode())
        if adapter == self.ffi.NULL:
            return " ".join(self.log)[-REFUSAL_LIMIT:]
        chosen, scale = self.ffi.new("struct llama_adapter_lora *[]", [adapter]), self.ffi.new("float[]", [1.0])
        self.lib.llama_set_adapters_lora(self.context, chosen, 1, scale)
        return ""


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    source, output = Path(job["source"]), Path(job["output"])
    sys.path[1:1] = [str(source), str(source / "gguf-py")]
    import conversion.base as conversion  # noqa: PLC0415 - with its imports, for all forks
    import transformers  # noqa: F401, PLC0415

    conversion.TextModel.get_vocab_base_pre = lambda *_: "default"  # the tokenizer is ours, and tokens are sent as ids
    if refusal := convert(source, "convert_hf_to_gguf.py", [job["base"]], output / "base.gguf"):
        raise SystemExit(f"no GGUF of the base: {refusal}")
    refusals = {}
    for name, adapter in job["adapters"].items():
        words = ["--base", job["base"], adapter]
        refusals[name] = adapter and convert(source, "convert_lora_to_gguf.py", words, output / f"{name}.gguf")
    model = Model(output / "base.gguf")
    with Path(job["answers"]).open("a", encoding="utf-8") as file:
        for name, refused in refusals.items():
            refusal = refused or (model.load(output / f"{name}.gguf") if job["adapters"][name] else "")
            answer = {"name": name, "refused": refusal}
            if not refusal:
                np.save(output / f"{name}.npy", model.logits(job["prompts"]))
            file.write(json.dumps(answer) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
