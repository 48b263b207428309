"""Applies adapters by vLLM's engine on a CPU; servers.py starts this in the servers' environment.

In: a file of JSON with the base, the prompts, and the adapters; no adapter is the base alone. Out: a line of JSON for
each adapter, with the engine's refusal if there is one, and a file of log-probabilities. After an adapter that answers
with NaN, the line also counts NaN in what the base answers then. Imports neither merge-gate nor PEFT.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

REFUSAL_LIMIT = 300


class Engine:
    """An engine with room for one adapter at a time, of ranks up to 128."""

    def __init__(self, base: str, vocabulary: int) -> None:
        self.size = vocabulary
        self.llm = LLM(
            model=base, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, enable_prefix_caching=False,
            enable_lora=True, max_loras=1, max_cpu_loras=2, max_lora_rank=128,
            limit_mm_per_prompt={"image": 0, "video": 0},
            max_model_len=64, max_num_seqs=36, max_num_batched_tokens=512, max_logprobs=vocabulary,
        )  # fmt: skip
        # prompt_logprobs with LoRA ends the engine on CPUs, so each prefix of a prompt is a request
        self.sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=vocabulary, detokenize=False)

    def log_probabilities(self, prompts: list[list[int]], request: LoRARequest | None) -> np.ndarray:
        """Of every position of every prompt; prompts have one length."""
        prefixes = [{"prompt_token_ids": prompt[: end + 1]} for prompt in prompts for end in range(len(prompt))]
        outputs = self.llm.generate(prefixes, self.sampling, lora_request=request, use_tqdm=False)
        rows = np.full((len(outputs), self.size), np.nan, np.float32)
        for row, output in zip(rows, outputs, strict=True):
            for token, entry in output.outputs[0].logprobs[0].items():
                row[token] = entry.logprob
        return rows.reshape(len(prompts), -1, self.size)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    engine = Engine(job["base"], job["vocabulary"])
    with Path(job["answers"]).open("a", encoding="utf-8") as file:
        for number, (name, adapter) in enumerate(job["adapters"].items(), start=1):
            answer = ask(engine, name, number, adapter, job)
            file.write(json.dumps(answer) + "\n")
            file.flush()
            if "ended" in answer or "base_nan" in answer:
                os._exit(0)  # servers.py starts a new engine for the others


def ask(engine: Engine, name: str, number: int, adapter: str, job: dict) -> dict:
    answer = {"name": name, "refused": ""}
    request = LoRARequest(name, number, adapter) if adapter else None
    try:
        if request:
            engine.llm.llm_engine.add_lora(request)  # what /v1/load_lora_adapter does
    except Exception as error:  # noqa: BLE001 - whatever it is, a user sees it as a refusal
        return answer | {"refused": f"{type(error).__name__}: {error}"[:REFUSAL_LIMIT]}
    try:
        values = engine.log_probabilities(job["prompts"], request)
    except Exception as error:  # noqa: BLE001 - it loaded, and the first request ended the engine
        return answer | {"refused": f"{type(error).__name__}: {error}"[:REFUSAL_LIMIT], "ended": True}
    np.save(Path(job["output"]) / f"{name}.npy", values)
    if np.isnan(values).any():
        short = [prompt[:5] for prompt in job["prompts"]]
        answer["base_nan"] = int(np.isnan(engine.log_probabilities(short, None)).any(axis=-1).sum())
    return answer


if __name__ == "__main__":
    main()
