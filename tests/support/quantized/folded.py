"""Blocks of a small model, their merges, and releases of them with scales that AWQ or SmoothQuant has moved."""

from __future__ import annotations

import torch

from tests.support.quantized.checkpoints import Tensors

HIDDEN, INNER, HEAD = 128, 192, 16
BLOCK = "model.layers.0."
CONFIG = {"hidden_size": HIDDEN, "num_attention_heads": HIDDEN // HEAD}
SETTINGS = {"quant_method": "compressed-tensors", "format": "int-quantized"}
INPUT, AFTER = "input_layernorm", "post_attention_layernorm"


def base(kv_heads: int = 8) -> Tensors:
    random = torch.Generator().manual_seed(0)
    key_values = kv_heads * HEAD
    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (key_values, HIDDEN),
              "self_attn.v_proj": (key_values, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
              "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
              INPUT: (HIDDEN,), AFTER: (HIDDEN,)}  # fmt: skip
    tensors = {name: torch.randn(shape, generator=random) * 0.02 for name, shape in shapes.items()}
    tensors |= {name: 1 + 10 * tensors[name] for name in (INPUT, AFTER)}
    tensors["self_attn.v_proj.bias"] = torch.randn(key_values, generator=random)
    return {f"{BLOCK}{name.removesuffix('.bias')}.{'bias' if 'bias' in name else 'weight'}": tensor.bfloat16()
            for name, tensor in tensors.items()}  # fmt: skip


def delta(kind: str, name: str, weight: torch.Tensor, size: float) -> torch.Tensor:
    """A LoRA of rank 4 on each layer, or the factors of IA3 on k, v, and down. `size` is its share of the weight."""
    random, (rows, columns) = torch.Generator().manual_seed(len(name)), weight.shape
    if kind == "lora":
        product = torch.randn(rows, 4, generator=random) @ torch.randn(4, columns, generator=random)
    else:
        factors = torch.randn(columns if "down_proj" in name else rows, generator=random)
        is_target = any(target in name for target in ("k_proj", "v_proj", "down_proj"))
        product = weight * (factors if "down_proj" in name else factors[:, None]) * is_target
    return product * (size * weight.norm() / product.norm().clamp(min=1e-9))


def folded(tensors: Tensors, *, spread: float = 0.5, is_gemma: bool = False, pairs: bool = True) -> Tensors:
    """Move scales as AWQ does: out of norms and layers, and into the layers after them."""
    random, moved = torch.Generator().manual_seed(1), {name: tensor.float() for name, tensor in tensors.items()}

    def scales(count: int) -> torch.Tensor:
        return (spread * torch.randn(count, generator=random)).exp()

    for norm, layers in ((INPUT, ("q", "k", "v")), (AFTER, ("gate", "up"))):
        own = scales(HIDDEN)
        moved[f"{BLOCK}{norm}.weight"] = (moved[f"{BLOCK}{norm}.weight"] + int(is_gemma)) / own - int(is_gemma)
        for name in (name for name in moved if name.endswith(tuple(f".{layer}_proj.weight" for layer in layers))):
            moved[name] *= own
    for first, second in (("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj")) if pairs else ():
        count = len(moved[f"{BLOCK}{first}.weight"])
        own = scales(count)
        moved[f"{BLOCK}{first}.weight"] /= own[:, None]
        if f"{BLOCK}{first}.bias" in moved:
            moved[f"{BLOCK}{first}.bias"] /= own
        columns = moved[f"{BLOCK}{second}.weight"].shape[1]
        moved[f"{BLOCK}{second}.weight"] *= own.view(-1, 1, HEAD).expand(-1, columns // count, -1).flatten()
    return moved


def quantized(tensors: Tensors, bits: int) -> Tensors:
    """Layers in codes with groups of 32, as compressed-tensors stores them, and the rest in bfloat16."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 1:
            made[name] = tensor.bfloat16()
            continue
        groups = tensor.view(len(tensor), -1, 32)
        scales = groups.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 0.5)
        codes = (groups / scales).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        made[name], made[f"{name}_scale"] = codes.to(torch.int8).view(tensor.shape), scales[..., 0].bfloat16()
    return made
