"""Configurations as releases of PEFT wrote them."""

from merge_gate.records.files import StoredTensor

ALWAYS = {"base_model_name_or_path": "acme/base", "inference_mode": True, "task_type": None}
LORA_0_6 = ALWAYS | {
    "peft_type": "LORA", "init_lora_weights": True, "layers_to_transform": None, "alpha_pattern": {},
}  # fmt: skip
LORA_0_9 = LORA_0_6 | {"megatron_core": "megatron.core", "use_rslora": False, "use_dora": False}
LOKR = ALWAYS | {"peft_type": "LOKR", "r": 2, "alpha": 4}
DORA = LORA_0_9 | {"layer_replication": None, "use_dora": True}
LORA_0_12 = LORA_0_9 | {"layer_replication": None}
CONVOLUTION = (StoredTensor(name="base_model.model.conv.lora_A.weight", dtype="F32", shape=(2, 4, 3, 3)),)
LINEAR = (StoredTensor(name="base_model.model.fc.lora_A.weight", dtype="F32", shape=(2, 4)),)
EMBEDDING = (StoredTensor(name="base_model.model.embed_tokens.lora_embedding_A", dtype="F32", shape=(2, 4)),)
LORA_0_14 = LORA_0_9 | {"layer_replication": None, "exclude_modules": None, "lora_bias": True, "r": 2, "lora_alpha": 4}
