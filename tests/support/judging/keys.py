"""Names of tensors, and an old configuration."""

from __future__ import annotations

BIASES = ("base_model.model.q_proj.base_layer.bias",)
ALWAYS = {"base_model_name_or_path": "acme/base", "inference_mode": True, "task_type": None}
OLD = ALWAYS | {"peft_type": "LORA", "init_lora_weights": True, "layers_to_transform": None, "alpha_pattern": {}}
LORA_0_9 = OLD | {"megatron_core": "", "use_rslora": False, "use_dora": False, "bias": "lora_only"}
LORA_0_12 = LORA_0_9 | {"layer_replication": None}
