"""Right and wrong merges of adapters into a small base, before they are quantized, and their verification.

In: a method of PEFT, the size of its delta, and a fault. Out: tensors by the base's names; the findings on a release.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from merge_gate.engine.adapter_evidence import MergeRequest, merge
from merge_gate.engine.base.model_class import model_class_for
from merge_gate.features.quantized.consumer import StrengthConsumer
from merge_gate.features.quantized.measurement import Measurement
from merge_gate.features.quantized.strength_findings import strength_findings
from merge_gate.files.preflight import preflight
from tests.support.engine.base_headers import stored_tensors
from tests.support.gating import Gate
from tests.support.models import ADAPTER_WEIGHTS, Tensors, read_config, write_config

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from merge_gate.features.quantized.release import Release
    from merge_gate.records.terms import Finding

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS, MISSING = 5, 3
ADAPTER = "support"

FAULTS = {
    "right": "applied",
    "base": "not-applied",
    "twice": "applied-twice",
    "minus": "other-strength",
    "other": "other-candidate",
    "part": "applied-in-part",
    "codes": "erased",
    "another": "wrong-base",
}
"""Each fault, and the kind that it is."""


def _model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                torch.randn_like(parameter) * 0.02 if parameter.dim() > 1 else 0.1 * torch.randn_like(parameter)
            )
    return model.bfloat16()


def _peft_config(method: str) -> Any:
    if method == "ia3":
        return IA3Config(task_type="CAUSAL_LM", target_modules=LINEAR[1:], feedforward_modules=["down_proj"])
    return LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR, task_type="CAUSAL_LM", use_dora=method == "dora")


@dataclass
class Bench:
    """A base, its adapters, and their merges, each made once."""

    root: Path
    gate: Gate = field(default_factory=Gate)
    _merged: dict[tuple[str, float, int], Tensors] = field(default_factory=dict)

    def base(self, seed: int = 0) -> Path:
        directory = self.root / f"base-{seed}"
        if not directory.exists():
            _model(seed).save_pretrained(directory)
        return directory

    def tensors(self, seed: int = 0) -> Tensors:
        return {name: tensor.float() for name, tensor in load_file(self.base(seed) / "model.safetensors").items()}

    def adapter(self, method: str, share: float, seed: int = 1) -> Path:
        """An adapter whose deltas have this share of the norm of their weights."""
        directory = self.root / f"{method}-{share:g}-{seed}"
        if directory.exists():
            return directory
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_peft_model(AutoModelForCausalLM.from_pretrained(self.base()), _peft_config(method)).save_pretrained(
                directory
            )
        random, stored = torch.Generator().manual_seed(seed), load_file(directory / ADAPTER_WEIGHTS)
        base = self.tensors()
        for name, tensor in stored.items():
            noise = torch.randn(tensor.shape, generator=random)
            if "ia3" in name:
                stored[name] = 1 + share * noise
            elif "lora_A" in name:
                stored[name] = noise
            elif "lora_B" in name:
                weight = base[name.removeprefix("base_model.model.").replace(".lora_B", "")]
                size = (noise @ stored[name.replace("lora_B", "lora_A")]).norm() * 2  # alpha / r
                stored[name] = noise * (share * weight.norm() / size)
        save_file(stored, directory / ADAPTER_WEIGHTS)
        write_config(directory, read_config(directory) | {"base_model_name_or_path": str(self.base())})
        return directory

    def merged(self, method: str, share: float, seed: int = 1) -> Tensors:
        """PEFT's merge in float32."""
        key = method, share, seed
        if key not in self._merged:
            model = AutoModelForCausalLM.from_pretrained(self.base(), dtype=torch.float32)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peft_model = PeftModel.from_pretrained(model, self.adapter(method, share, seed))
            self._merged = {key: dict(peft_model.merge_and_unload().state_dict())}
        return self._merged[key]

    def faulty(
        self, fault: str, method: str, share: float, roundtrip: Callable[[torch.Tensor], torch.Tensor]
    ) -> Tensors:
        """The tensors of a release before it is quantized. `roundtrip` quantizes and dequantizes a matrix."""
        merged = self.merged(method, share, 2 if fault == "other" else 1)
        another = self.tensors(7) if fault == "another" else {}
        made: Tensors = {}
        for name, weight in self.tensors().items():
            delta = merged[name] - weight
            times = {"base": 0.0, "twice": 2.0, "minus": -1.0}.get(fault, 1.0)
            if fault == "part" and any(f"layers.{layer}." in name for layer in range(MISSING)):
                times = 0.0
            if fault == "codes" and bool(delta.any()):
                made[name] = roundtrip(roundtrip(weight) + delta)
            else:
                start = weight + 0.5 * another[name] if another else weight
                made[name] = (start + times * delta).bfloat16().float()
        return made

    def measured(self, release: Release, adapter: Path) -> Measurement:
        files = preflight(str(adapter), allow_pickle=False)
        base = self.gate.base(self.base(), files, dtype="float32")
        consumer = StrengthConsumer(base, release, torch.bfloat16)
        evidence = merge(MergeRequest(base=base, members=(files,), consumers=(consumer,)))
        assert evidence.refusal is None, evidence.refusal
        measurement = dict(evidence.facts)["quantized"]
        assert isinstance(measurement, Measurement)
        return measurement

    def findings(self, release: Release, method: str, share: float, *, has_candidate: bool = False) -> list[Finding]:
        """What is said of a release. The candidate is the adapter of the fault `other`."""
        adapter = self.adapter(method, share)
        others = {"earlier": self.measured(release, self.adapter(method, share, 2))} if has_candidate else {}
        config = preflight(str(adapter), allow_pickle=False).config
        measurement = self.measured(release, adapter)
        return list(strength_findings(measurement, others, adapter=ADAPTER, config=config))

    def model(self) -> Any:
        """The base's model class on the meta device, as a release's names need it."""
        files = preflight(str(self.adapter("lora", 0.1)), allow_pickle=False)
        assert model_class_for(str(self.base()), files, stored_tensors(self.base()))
        return self.gate.base(self.base(), files, dtype="float32").model
