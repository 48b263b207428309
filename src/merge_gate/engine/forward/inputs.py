"""Inputs for a forward pass, made from a model's configuration and the signature of its forward alone.

In: a model of transformers. Out: `candidates`, dictionaries of arguments, the fullest first. The same model always
gets the same values. Knows no adapter, no tokenizer and no processor.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Collection, Iterator
from typing import Any

import torch

POSITIONS = 16
"""Tokens of a text. With 4, 16 and 64, SmolLM2-135M has the same largest activation."""

FEW_POSITIONS = 4
"""Tokens for a model with fewer positions than `POSITIONS`."""

SAMPLES, FRAMES, EDGE, CHANNELS, MEL_BINS = 4_000, 100, 32, 3, 80
"""Sizes of sounds and pictures if the configuration names none."""

TEXT = ("input_ids", "decoder_input_ids", "bbox")
VISION = ("pixel_values", "pixel_values_videos")
AUDIO = ("input_features", "input_values")

Inputs = dict[str, Any]


def candidates(model: Any, tokens: Collection[int] = ()) -> Iterator[tuple[str, Inputs]]:
    """Pairs of a name and the arguments of a forward, to be tried in this order.

    Args:
        model: a model of transformers. Only its configuration, its signature and its dtype are read.
        tokens: ids that should be among the tokens, such as those that an adapter trains. At most `POSITIONS` - 1 are.
    """
    every = _known_inputs(model, tokens)
    if not every:
        return
    variants = [("all inputs", every)]
    for what, kind in (("text", TEXT), ("vision", VISION), ("audio", AUDIO)):
        others = {name for names in (TEXT, VISION, AUDIO) if names is not kind for name in names}
        part = {name: value for name, value in every.items() if name not in others}
        if len(part) < len(every) and any(name in part for name in kind):
            variants.append((what, part))
    variants += _other_shapes(model.config, every)
    yield from variants
    for what, inputs in variants:
        few = {name: value[:, :FEW_POSITIONS] if name in TEXT else value for name, value in inputs.items()}
        if any(name in few for name in TEXT):
            yield f"{what}, {FEW_POSITIONS} tokens", few


def _known_inputs(model: Any, tokens: Collection[int]) -> Inputs:
    """A value for each parameter of the forward whose name is known here."""
    config = model.config
    dtype = next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), torch.float32)
    bins = _setting(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", near="audio")
    channels = _setting(config, "num_channels", "in_chans", "in_channels", near="vision")
    frames = _setting(config, "max_source_positions", near="audio")
    shapes = {
        "pixel_values": (1, channels or CHANNELS, *_image_size(config)),
        "input_features": (1, bins or MEL_BINS, 2 * (frames or FRAMES // 2)),
        "input_values": (1, SAMPLES),
    }
    inputs: Inputs = {}
    for name, parameter in inspect.signature(type(model).forward).parameters.items():
        if name in {"input_ids", "decoder_input_ids"}:
            inputs[name] = torch.tensor([_token_ids(model, tokens)])
        elif name == "bbox":
            inputs[name] = torch.tensor([[[1, 2, 3, 4]] * POSITIONS])
        elif name in shapes:
            inputs[name] = _wave(*shapes[name]).to(dtype)
        elif name == "hidden_states" and parameter.default is inspect.Parameter.empty:
            inputs[name] = _wave(1, POSITIONS, _setting(config, "hidden_size", "d_model") or EDGE).to(dtype)
        elif name == "use_cache":
            inputs[name] = False
    return inputs


def _other_shapes(config: Any, inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    """The layouts that some models want for inputs of the same names."""
    pixels, features, sound = (inputs.get(name) for name in ("pixel_values", "input_features", "input_values"))
    count = _setting(config, "num_frames", "frames")
    if pixels is not None and isinstance(count, int):
        yield "video", inputs | {"pixel_values": _wave(1, count, *pixels.shape[1:]).to(pixels.dtype)}
    if features is not None:
        without_pictures = {name: value for name, value in inputs.items() if name not in VISION}
        yield "frames first", without_pictures | {"input_features": features.transpose(1, 2).contiguous()}
    if sound is not None:
        yield "one channel", inputs | {"input_values": sound[:, None]}
        bins = _setting(config, "num_mel_bins")
        if isinstance(bins, int):
            frames = _setting(config, "max_length") or FRAMES
            yield "spectrogram", inputs | {"input_values": _wave(1, frames, bins).to(sound.dtype)}


def _token_ids(model: Any, tokens: Collection[int]) -> list[int]:
    """A first token, `tokens`, and ids spread over the vocabulary, without placeholders of other inputs."""
    rows = max(2, _rows(model))
    first = _setting(model.config, "bos_token_id", "decoder_start_token_id", "cls_token_id")
    first = first if isinstance(first, int) and 0 <= first < rows else 1
    special = {
        value
        for config in _configs(model.config)
        for name, value in vars(config).items()
        if isinstance(value, int) and name.endswith(("_id", "_token_index")) and not name.startswith(("bos", "eos"))
    }
    wanted = [token for token in tokens if 0 <= token < rows][: POSITIONS - 1]
    spread = random.Random(0).sample(range(rows), min(rows, len(special) + 2 * POSITIONS))  # noqa: S311 - no secret
    ids = [*wanted, *(token for token in spread if token not in special and token != first and token not in wanted)]
    return [first, *(ids * POSITIONS or [first] * POSITIONS)[: POSITIONS - 1]]


def _rows(model: Any) -> int:
    """The number of tokens that the model has an embedding for."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except Exception:  # not every model has one, and some raise errors of their own
        return int(_setting(model.config, "vocab_size") or 2)


def _wave(*shape: int) -> torch.Tensor:
    """Fixed values in [-1, 1], float32."""
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.7 * steps + 0.01 * steps**1.3).float().view(shape)


def _image_size(config: Any) -> tuple[int, int]:
    size = _setting(config, "image_size", "img_size", "input_size", near="vision") or EDGE
    if isinstance(size, dict):
        size = (size.get("height", EDGE), size.get("width", EDGE))
    return (int(size[0]), int(size[-1])) if isinstance(size, (list, tuple)) else (int(size), int(size))


def _setting(config: Any, *names: str, near: str = "") -> Any:
    """The first of these settings in a configuration or those inside of it. Parts called `near` are asked first."""
    configs = sorted(_configs(config), key=lambda part: near not in type(part).__name__.lower())
    values = (getattr(part, name, None) for part in configs for name in names)
    return next((value for value in values if value is not None), None)


def _configs(config: Any, depth: int = 3) -> Iterator[Any]:
    yield config
    for part in vars(config).values() if depth else ():
        if hasattr(part, "model_type") and hasattr(part, "to_dict"):
            yield from _configs(part, depth - 1)
