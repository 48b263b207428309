"""Makes torch's CPU build believe in CUDA cards, while it is imported.

In: the variable TORCH_SIMULATED_CARD (build.py writes it). Out: `torch.cuda` with the cards of the C++ library.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

NAME = "Simulated card"
CAPABILITY = (9, 0)


def import_torch(execute: Callable[[ModuleType], None], torch: ModuleType) -> None:
    """Import torch with cards. It makes its CUDA hooks once, while it is imported: the library comes before."""
    settings = json.loads(os.environ["TORCH_SIMULATED_CARD"])
    ctypes.CDLL(settings["library"], ctypes.RTLD_GLOBAL)
    execute(torch)
    spec = importlib.util.spec_from_file_location("simulated_card", settings["library"])
    card = importlib.util.module_from_spec(spec)
    sys.modules[card.__name__] = card
    spec.loader.exec_module(card)
    memory_bytes = [mib << 20 for mib in settings["memory_mib"]]
    card.begin(memory_bytes, list(_unchecked(torch)), settings["failures"])
    _replace_cuda(torch, card, len(memory_bytes))
    _replace_storage_copies(torch)
    _replace_histc(torch)


def import_bitsandbytes(execute: Callable[[ModuleType], None], bitsandbytes: ModuleType) -> None:
    """Import bitsandbytes with its kernels in plain torch: its CUDA kernels need a card."""
    import torch  # noqa: PLC0415 - imported by now

    is_available = torch.cuda.is_available
    torch.cuda.is_available = lambda: False
    try:
        execute(bitsandbytes)
    finally:
        torch.cuda.is_available = is_available


def _unchecked(torch: ModuleType) -> Iterator[str]:
    """Operators whose CUDA wrapper compares no devices, because TensorIterator does (native_functions.yaml)."""
    path = Path(torch.__file__).parent.parent / "torchgen/packaged/ATen/native/native_functions.yaml"
    unchecked: set[str] = set()
    delegates: dict[str, str] = {}
    name = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, value = line.strip().removeprefix("- ").partition(": ")
        if key == "func":
            name = "aten::" + value.partition("(")[0].strip()
        elif key == "device_check" and value.startswith("NoCheck"):
            unchecked.add(name)
        elif key == "structured_delegate":
            delegates[name] = "aten::" + value.strip()
    yield from unchecked
    yield from (name for name, out in delegates.items() if out in unchecked)


def _replace_cuda(torch: Any, card: Any, cards: int) -> None:
    """Replace what asks the driver. Random numbers, streams of text, and flags stay torch's own."""
    cuda = torch.cuda

    def index(device: Any = None) -> int:
        if isinstance(device, int):
            return device if device >= 0 else card.current()
        given = None if device is None else torch.device(device).index
        return card.current() if given is None else given

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        card.check_context()
        used, _, total = card.usage(index(device))
        return total - used, total

    def exchange_device(to: int) -> int:
        before = card.current()
        if to >= 0:
            card.set_current(to)
        return before

    class Properties:
        name, major, minor = NAME, *CAPABILITY
        total_memory, multi_processor_count, warp_size, is_integrated = card.usage(0)[2], 132, 32, False

    replaced = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: cards,
        "_device_count_nvml": lambda: cards,
        "current_device": card.current,
        "set_device": lambda device: card.set_current(index(device)),
        "_exchange_device": exchange_device,
        "_maybe_exchange_device": exchange_device,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_properties": lambda device=None: Properties(),
        "mem_get_info": mem_get_info,
        "memory_allocated": lambda device=None: card.usage(index(device))[0],
        "memory_reserved": lambda device=None: card.usage(index(device))[0],
        "max_memory_allocated": lambda device=None: card.usage(index(device))[1],
        "reset_peak_memory_stats": lambda device=None: card.reset_peak(index(device)),
        "synchronize": lambda device=None: card.check_context(),
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "default_generators": tuple(card.default_generator(number) for number in range(cards)),
    }
    for name, value in replaced.items():
        for module in (cuda, cuda.memory, cuda.random):
            if hasattr(module, name):
                setattr(module, name, value)
    torch.version.cuda = "12.8"


def _replace_storage_copies(torch: Any) -> None:
    """Copy a card's storage through a tensor: torch's CPU build makes no storage for a card."""
    clone = torch.storage._StorageBase.clone

    def clone_storage(self: Any) -> Any:
        if self.device.type != "cuda":
            return clone(self)
        stored = torch.empty(0, dtype=torch.uint8, device=self.device).set_(self, 0, (self.nbytes(),), (1,))
        return stored.clone().untyped_storage()

    torch.storage._StorageBase.clone = clone_storage


def _replace_histc(torch: Any) -> None:
    """CUDA's `histc` takes integers, and the CPU's does not."""

    def histc(values: Any, bins: int = 100, min: float = 0, max: float = 0) -> Any:  # noqa: A002 - torch's names
        return torch.histc(values.cpu().float(), bins, min, max).to(values.device, values.dtype)

    torch._simulated_operators = torch.library.Library("aten", "IMPL")
    torch._simulated_operators.impl("histc", histc, "CUDA")
