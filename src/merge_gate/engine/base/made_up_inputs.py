"""Inputs for a forward pass, made from a model's configuration and the signature of its forward alone.

In: a model of transformers. Out: `candidates`, dictionaries of arguments, the fullest first. The same model always
gets the same values. Knows no adapter, no tokenizer and no processor.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import random
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree

from merge_gate.engine.tensors.module_copies import fake_copy

POSITIONS = 16
"""Tokens of a text. With 4, 16 and 64, SmolLM2-135M has the same largest activation."""

FEW_POSITIONS = 4
"""Tokens for a model with fewer positions than `POSITIONS`."""

SAMPLES, FRAMES, EDGE, CHANNELS, MEL_BINS = 4_000, 100, 32, 3, 80
"""Sizes of sounds and pictures if the configuration names none."""

MERGED_PATCHES = 2
"""Height and width of a picture for a model that takes pictures of any size, in patches as its text model gets them."""

MOST_VALUES = 1 << 23
"""An input with more values is left out: anyone can write a configuration. A picture of 1,600 pixels has fewer."""

MOST_PLACES = 4_096
"""A text has at most so many tokens for a picture or a sound. A picture of 1,024 pixels takes 4,096 of Pixtral's."""

TEXT = ("input_ids", "decoder_input_ids", "bbox")
VISION = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
AUDIO = ("input_features", "input_features_mask", "input_values")

_DATA = re.compile(
    r"(^|_)(input_(ids|features|values|points|boxes)|pixel_values|patches|codes|image|bbox)(_videos|_local)?$"
)
"""The names of inputs that have data, and no setting, mask or size."""

Inputs = dict[str, Any]


def candidates(model: Any, tokens: Collection[int] = ()) -> Iterator[tuple[str, Inputs]]:
    """Pairs of a name and the arguments of a forward, to be tried in this order.

    Args:
        model: a model of transformers. Of its tensors, only the shape, dtype, and device of some are read.
        tokens: ids that should be among the tokens, such as those that an adapter trains. At most `POSITIONS` - 1 are.
    """
    parameters = inspect.signature(type(model).forward).parameters
    every = _known_inputs(model, parameters, tokens)
    variants = [("all inputs", _with_placeholders(model, parameters, every))]
    for what, kind in (("text", TEXT), ("vision", VISION), ("audio", AUDIO)):
        others = {name for names in (TEXT, VISION, AUDIO) if names is not kind for name in names}
        variants.append((what, {name: value for name, value in every.items() if name not in others}))
    variants += _other_shapes(model.config, every)
    for what, inputs in list(variants):
        few = {name: value[:, :FEW_POSITIONS] if name in TEXT else value for name, value in inputs.items()}
        variants.append((f"{what}, {FEW_POSITIONS} tokens", few))
    like = _like(model)
    tried: list[dict[str, torch.Size]] = [{}]
    for what, inputs in variants:
        shapes = {name: value.shape for name, value in inputs.items()}
        if shapes not in tried:
            tried.append(shapes)
            arguments = {
                name: value.to(like.device, like.dtype if value.is_floating_point() else None)
                for name, value in inputs.items()
            }
            yield what, arguments | ({"use_cache": False} if "use_cache" in parameters else {})


def missing_inputs(module: Any, made: Collection[str]) -> list[str]:
    """The names of texts, pictures and sounds that a module's forward takes and that `made` lacks."""
    parameters = inspect.signature(type(module).forward).parameters
    return [name for name in parameters if _DATA.search(name) and name not in made]


def _like(model: Any) -> torch.Tensor:
    """A tensor that has the dtype and the device of the inputs."""
    return next((tensor for tensor in model.parameters() if tensor.is_floating_point()), torch.empty(0))


def _known_inputs(
    model: Any, parameters: Mapping[str, inspect.Parameter], tokens: Collection[int]
) -> dict[str, torch.Tensor]:
    """A value for each parameter of the forward whose name is known here."""
    config = model.config
    channels = _size(config, "num_channels", "in_chans", "in_channels", near="vision") or CHANNELS
    bins = _size(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", near="audio") or MEL_BINS
    frames = 2 * (_size(config, "max_source_positions", near="audio") or FRAMES // 2)
    height, width = _sizes(config, "image_size", "img_size", "input_size", near="vision") or (EDGE, EDGE)
    picture: tuple[int, ...] = (1, channels, height, width)
    states = (1, POSITIONS, _size(config, "hidden_size", "d_model") or EDGE)
    grid = next((name for name in ("grid_thw", "image_grid_thw") if name in parameters), None)
    edge = MERGED_PATCHES * (_size(config, "spatial_merge_size", "merge_kernel_size", "merge_size", near="vision") or 1)
    if grid is not None:  # patches of pictures of any size, one after the other
        patch = _size(config, "patch_size", near="vision") or 1
        picture = (edge * edge, channels * (_size(config, "temporal_patch_size", near="vision") or 1) * patch * patch)
    shapes = {
        "pixel_values": picture,
        "input_features": (1, bins, frames),
        "input_values": (1, SAMPLES),
    }
    if "hidden_states" in parameters and parameters["hidden_states"].default is inspect.Parameter.empty:
        shapes["hidden_states"] = picture if grid == "grid_thw" else states
    inputs = {name: _wave(shape) for name, shape in shapes.items() if name in parameters and _fits(shape)}
    inputs |= {name: _token_ids(model, tokens) for name in ("input_ids", "decoder_input_ids") if name in parameters}
    if "bbox" in parameters:
        inputs["bbox"] = torch.tensor([[[1, 2, 3, 4]] * POSITIONS])
    if "input_features_mask" in parameters and "input_features" in inputs:
        inputs["input_features_mask"] = torch.ones(1, frames, dtype=torch.long)
    if grid is not None and _fits(picture):
        inputs[grid] = torch.tensor([[1, edge, edge]])
    return inputs


def _with_placeholders(
    model: Any, parameters: Mapping[str, inspect.Parameter], inputs: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The same, with a text that has a token for each place of the picture and the sound, if their number is known."""
    for kind, names in (("image", VISION), ("audio", AUDIO)) if "input_ids" in inputs else ():
        token = _size(model.config, f"{kind}_token_id", f"{kind}_token_index")
        places = 0 if token is None or token >= _rows(model) else _places(model, f"get_{kind}_features", names, inputs)
        if token is not None and 0 < places <= MOST_PLACES:
            ids = torch.cat([inputs["input_ids"], torch.full((1, places), token)], dim=1)
            types = {"mm_token_type_ids": (ids == token).int()} if "mm_token_type_ids" in parameters else {}
            inputs = inputs | {"input_ids": ids} | types
    return inputs


def _places(model: Any, getter: str, names: Collection[str], inputs: dict[str, torch.Tensor]) -> int:
    """How many tokens the features of these inputs take: what the model computes from tensors without data."""
    if "image_grid_thw" in inputs:  # its values decide
        return MERGED_PATCHES**2
    with contextlib.suppress(Exception), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        dtype = _like(model).dtype
        given = {
            name: tensor.to(dtype) for name, tensor in inputs.items() if name in names and tensor.is_floating_point()
        }
        output = getattr(fake_copy(model), getter)(**given)
        features = _pytree.tree_leaves(getattr(output, "pooler_output", output))
        return sum(feature.numel() // feature.shape[-1] for feature in features)
    return 0


def _other_shapes(config: Any, inputs: dict[str, torch.Tensor]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """The layouts that some models want for inputs of the same names."""
    pixels, features = (inputs[name].shape if name in inputs else (0,) for name in ("pixel_values", "input_features"))
    spectrogram = (_size(config, "max_length") or FRAMES, _size(config, "num_mel_bins") or 0)
    for what, name, shape in (
        ("video", "pixel_values", (1, _size(config, "num_frames", "frames") or 0, *pixels[1:])),
        ("frames first", "input_features", (1, *features[:0:-1])),
        ("frames first, one channel", "input_features", (1, 1, *features[:0:-1])),
        ("one channel", "input_values", (1, 1, SAMPLES)),
        ("spectrogram", "input_values", (1, *spectrogram)),
    ):
        if name in inputs and _fits(shape):
            others = {other: value for other, value in inputs.items() if other not in VISION or name in VISION}
            yield what, others | {name: _wave(shape)}


def _token_ids(model: Any, tokens: Collection[int]) -> torch.Tensor:
    """A first token, `tokens`, and ids spread over the vocabulary, without placeholders of other inputs."""
    rows = _rows(model)
    firsts = _settings(model.config, "bos_token_id", "decoder_start_token_id", "cls_token_id")
    first = next((value for value in firsts if isinstance(value, int) and 0 <= value < rows), 1)
    special = {
        value
        for config in _configs(model.config)
        for name, value in vars(config).items()
        if isinstance(value, int) and name.endswith(("_id", "_token_index")) and not name.startswith(("bos", "eos"))
    }
    wanted = [token for token in tokens if 0 <= token < rows][: POSITIONS - 1]
    spread = random.Random(0).sample(range(rows), min(rows, len(special) + 2 * POSITIONS))  # noqa: S311 - no secret
    ids = [*wanted, *(token for token in spread if token not in special and token != first and token not in wanted)]
    return torch.tensor([[first, *(ids * POSITIONS or [first] * POSITIONS)[: POSITIONS - 1]]])


def _rows(model: Any) -> int:
    """The number of tokens that the model has an embedding for, at least 2."""
    try:
        rows = int(model.get_input_embeddings().weight.shape[0])
    except Exception:  # not every model has one, and some raise errors of their own
        rows = _size(model.config, "vocab_size") or 2
    return min(max(rows, 2), MOST_VALUES)


def _fits(shape: tuple[int, ...]) -> bool:
    return 0 < math.prod(shape) <= MOST_VALUES


def _wave(shape: tuple[int, ...]) -> torch.Tensor:
    """Fixed values in [-1, 1], float32. They repeat after 65,536."""
    count = math.prod(shape)
    steps = torch.arange(min(count, 1 << 16), dtype=torch.float64)
    wave = torch.sin(0.7 * steps + 0.01 * steps**1.3).float()
    return wave.repeat(-(-count // len(wave)))[:count].view(shape)


def _size(config: Any, *names: str, near: str = "") -> int | None:
    """The first of these settings that is a size, or the height if it has two."""
    sizes = _sizes(config, *names, near=near)
    return None if sizes is None else sizes[0]


def _sizes(config: Any, *names: str, near: str = "") -> tuple[int, int] | None:
    """The height and the width that the first of these settings gives. One number is both."""
    for value in _settings(config, *names, near=near):
        listed = [value.get("height"), value.get("width")] if isinstance(value, dict) else value
        first, last = (listed[0], listed[-1]) if isinstance(listed, (list, tuple)) and listed else (listed, listed)
        if type(first) is type(last) is int and first > 0 and last > 0:
            return first, last
    return None


def _settings(config: Any, *names: str, near: str = "") -> Iterator[Any]:
    """These settings of a configuration and of those inside of it. Parts called `near` come first."""
    for part in sorted(_configs(config), key=lambda part: near not in type(part).__name__.lower()):
        for name in names:
            with contextlib.suppress(Exception):  # a property of transformers that other settings do not suit
                yield getattr(part, name, None)


def _configs(config: Any, depth: int = 3) -> Iterator[Any]:
    yield config
    for part in vars(config).values() if depth else ():
        if isinstance(part, transformers.PretrainedConfig):
            yield from _configs(part, depth - 1)
