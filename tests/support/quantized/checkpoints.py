"""Releases as directories of safetensors files, and what the worker reads of them. The worker's part runs here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from merge_gate.features.quantized.checkpoint import Checkpoint, open_checkpoint
from merge_gate.features.quantized.release import Release
from merge_gate.features.verify.finished_model import Files
from merge_gate.files.feed import LocalFeed
from merge_gate.files.headers import open_regular, parse_file

WRITTEN = Path(__file__).parents[2] / "features" / "quantized" / "written"
WEIGHTS = "model.safetensors"

Tensors = dict[str, torch.Tensor]


def saved(directory: Path, tensors: Tensors, config: dict[str, Any] | None = None) -> Files:
    """A directory with these tensors and this config.json, as the worker gets it."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS)
    (directory / "config.json").write_text(json.dumps(config or {}), encoding="utf-8")
    with open_regular(str(directory / WEIGHTS)) as file:
        stored = tuple(replace(tensor, file=WEIGHTS) for tensor in parse_file(file))
    return Files(directory=str(directory), stored=stored, feed=LocalFeed(str(directory)))


def opened(path: Path, release: Tensors, base: Tensors, settings: dict[str, Any], **config: Any) -> Checkpoint:
    """A release with these settings of a quantization, and its base."""
    files = saved(path / "release", release, {**config, "quantization_config": settings})
    return open_checkpoint(files, saved(path / "base", base), "release")


def read(release: Release, name: str) -> torch.Tensor:
    """All values of a tensor."""
    return release.open(name).read(slice(None))


def requantized(release: Release, name: str, values: torch.Tensor) -> torch.Tensor | None:
    """All values of a tensor, quantized as the release is."""
    return release.open(name).requantized(values, slice(None))


def written(name: str) -> tuple[Tensors, torch.Tensor, dict[str, Any]]:
    """What a tool wrote (tests/tools/write_quantized.py): the parts of `layer.weight`, its values, and the settings."""
    with safe_open(WRITTEN / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
        settings = json.loads(file.metadata()["settings"])
    values = tensors.pop("expected")
    return tensors, values, settings


def moved(name: str) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """A release of llm-compressor with scales that were moved, its base, and its settings."""
    with safe_open(WRITTEN.with_name("folded") / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
        settings = json.loads(file.metadata()["settings"])
    release, base = (
        {key.removeprefix(part): tensor for key, tensor in tensors.items() if key.startswith(part)}
        for part in ("release.", "base.")
    )
    return release, base, settings
