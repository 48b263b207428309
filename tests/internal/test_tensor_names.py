"""The base's module in an adapter's name of a tensor."""

from __future__ import annotations

import pytest

from merge_gate._internal.tensor_names import module_of


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("base_model.model.model.layers.5.self_attn.q_proj.lora_A.weight", "model.layers.5.self_attn.q_proj"),
        ("base_model.model.embed.lora_embedding_A", "embed"),
        ("base_model.model.experts.base_layer.lora_B.weight", "experts"),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", "model.embed_tokens"),
        ("base_model.model.lm_head.modules_to_save.weight", "lm_head"),
        ("base_model.model.model.norm.weight", "model.norm"),
        ("stray", ""),
    ],
)
def test_it_is_what_stands_before_pefts_own_parts(name: str, module: str) -> None:
    assert module_of(name) == module
