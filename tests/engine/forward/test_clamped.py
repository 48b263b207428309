"""Models that clamp, in float16, what a layer returns: judged by their outputs, next to those in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from merge_gate.engine.base.loaded_base import ModelClass
from merge_gate.engine.base.made_up_inputs import candidates
from merge_gate.files.preflight import preflight
from merge_gate.judging.all_checks import judge_merge
from merge_gate.records.measured import Forward
from merge_gate.records.terms import Origin, Severity
from tests.support import methods
from tests.support.engine.local_bases import load_local
from tests.support.engine.merges import merge_adapter
from tests.support.gating import SPEC

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
LAYERS = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
MODELS: dict[str, Any] = {
    "WhisperForConditionalGeneration": lambda: transformers.WhisperConfig(
        vocab_size=64, num_mel_bins=8, max_source_positions=12, max_target_positions=24, **LAYERS, **IDS
    ),
    "T5ForConditionalGeneration": lambda: transformers.T5Config(**T5, **IDS),
    "UMT5ForConditionalGeneration": lambda: transformers.UMT5Config(**T5, **IDS),
    "BartForConditionalGeneration": lambda: transformers.BartConfig(
        vocab_size=64, max_position_embeddings=32, **LAYERS, **(IDS | {"forced_eos_token_id": None})
    ),
}
FC2, OUTPUT = "encoder.layers.0.fc2", "encoder.block.0.layer.0.SelfAttention.o"


def judged(
    name: str, root: Path, *, factor: torch.Tensor | None = None, changes_logits: bool = False
) -> tuple[Forward, dict[str, Severity]]:
    """A base that reaches 46,000 in one channel of a layer, and an adapter that exceeds float16 there.

    `factor` is what the adapter does to each channel; by default it changes only this one much. With `changes_logits`,
    the adapter also changes the logits, by far more, and they do not depend on the clamped layer.
    """
    torch.manual_seed(0)
    factor = torch.tensor([60.0] + [0.01] * 31) if factor is None else factor
    model: Any = getattr(transformers, name)(MODELS[name]()).eval()
    place = OUTPUT if "T5" in name else FC2
    ((path, layer),) = ((path, one) for path, one in model.named_modules() if path.endswith(place))
    with torch.no_grad(), methods.quiet():
        if layer.bias is not None:
            model.get_submodule(path.replace("fc2", "fc1")).bias.fill_(30.0)
        layer.weight[0].normal_()
        returned: list[torch.Tensor] = []
        hook = layer.register_forward_hook(lambda _module, _inputs, output: returned.append(output))
        model(**next(candidates(model))[1])
        hook.remove()
        layer.weight[0] *= 46_000 / returned[0][..., 0].abs().max()
        if changes_logits:
            model.get_decoder().layer_norm.weight.fill_(1_000.0)
            for decoder_layer in model.get_decoder().layers:
                decoder_layer.encoder_attn.out_proj.weight.zero_()
        targets = f".*({place}|decoder.layers.1.fc2)" if changes_logits else f".*{place}"
        model.half().save_pretrained(root / "base")
        adapted: Any = get_peft_model(model.float(), LoraConfig(r=1, lora_alpha=1, target_modules=targets))
        for path_of_factor, parameter in adapted.named_parameters():
            if "lora_B" in path_of_factor:
                parameter.normal_(0, 100)
        adapter = adapted.get_submodule(f"base_model.model.{path}")
        adapter.lora_A["default"].weight[:] = layer.weight[:1] * 0.01
        adapter.lora_B["default"].weight[:, 0] = factor
        adapted.save_pretrained(root / "adapter")
    base = load_local(str(root / "base"), label="base", model_class=ModelClass(class_name=name))
    files = preflight(str(root / "adapter"), allow_pickle=False)
    evidence = merge_adapter(base, files)
    return evidence.forward, {one.check: one.severity for one in judge_merge(SPEC, files, evidence)}


WHISPER = "WhisperForConditionalGeneration"
CLAMPED = ("activation-nonfinite", Severity.WARNING)
SPREAD = torch.randn(32, generator=torch.Generator().manual_seed(1)).pow(5) * 60.0


@pytest.mark.parametrize("name", [WHISPER, "T5ForConditionalGeneration", "UMT5ForConditionalGeneration"])
def test_a_model_that_clamps_passes_with_a_warning(name: str, tmp_path: Path) -> None:
    forward, found = judged(name, tmp_path)
    assert forward.nonfinite_origin is Origin.ADAPTER
    assert forward.output_error < 1
    assert CLAMPED in found.items()
    assert Severity.ERROR not in found.values()


def test_a_model_whose_logits_are_nan_fails(tmp_path: Path) -> None:
    """BART clamps, too, but after a norm that has made NaN of it."""
    forward, found = judged("BartForConditionalGeneration", tmp_path)
    assert (forward.output_error, found) == (None, {"activation-nonfinite": Severity.ERROR})


@pytest.mark.parametrize("changes_logits", [False, True])
def test_a_model_that_clamps_and_returns_other_values_fails(changes_logits: bool, tmp_path: Path) -> None:
    """Every channel is clamped, so that only the signs of a layer's values are left.

    A large effect on the logits, which are right then, does not hide it: the encoder's states are returned, too.
    """
    forward, found = judged(WHISPER, tmp_path, factor=SPREAD, changes_logits=changes_logits)
    assert forward.output_error > 1
    assert found["activation-nonfinite"] is Severity.ERROR
