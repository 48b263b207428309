"""Estimates how long a run takes, from unit costs that the benchmarks measured (`--plan`).

In: bytes and counts. Out: seconds, and the words for them. An estimate: other machines differ by a factor of two.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from merge_gate.records.terms import Quantization, record

if TYPE_CHECKING:
    from collections.abc import Iterable

    from merge_gate.records.files import AdapterConfig

DISK_RATE, NETWORK_RATE = 1e9, 2e8
"""Bytes per second from a local disk, and from the Hub or a network mount."""

_GIGABYTE = 1e9
_START_S = 2.8
_MAPPED_CPU_S, _FED_CPU_S = 1.1, 2.5
"""Processor seconds for each GB of a base: hashed and mapped, or read in passes and measured."""
_MERGE_CPU_S, _MERGE_IN_PASS_CPU_S = 0.7, 0.4
"""Processor seconds for each GB of a base and each LoRA on all linear layers, in 16 bits."""
_DORA, _BY_PEFT = 1.3, 17.0
"""How much longer another method takes: DoRA, and methods that only PEFT merges."""
_QUANTIZED = {Quantization.NONE: 1.0, Quantization.BNB_8BIT: 3.1, Quantization.BNB_4BIT: 6.7}
_HASH_CPU_S = 1.1
_PUBLISH_S = 4.5
"""Seconds for each GB of a published model: written, read again, and hashed."""
_HIDDEN = 0.75
"""The share of the shorter one of reading and merging that the longer one hides."""

_COARSE = ((5, 1), (60, 5), (600, 30), (3600, 60), (36000, 600))
"""Below the first number of seconds, an estimate is rounded to the second one."""


@record
class BaseWork:
    """What a run does with one base.

    Attributes:
        size_bytes: its weight files.
        in_passes: it is read in passes, and not mapped.
        from_network: it is streamed, downloaded, or on a network mount.
        passes: how often it is read.
        merges: the merges into it, each with the cost of its method; a LoRA has 1.
    """

    size_bytes: int
    in_passes: bool = False
    from_network: bool = False
    passes: int = 1
    merges: float = 0.0

    @property
    def read_bytes(self) -> int:
        """The bytes that are read at most: a later pass reads only the weights that it merges."""
        return self.size_bytes * self.passes

    def seconds(self, cores: int) -> float:
        """How long the reading, the measuring and the merges take, which overlap."""
        base_s, merge_s = (_FED_CPU_S, _MERGE_IN_PASS_CPU_S) if self.in_passes else (_MAPPED_CPU_S, _MERGE_CPU_S)
        work_s = self.size_bytes / _GIGABYTE * (base_s + merge_s * self.merges) / cores
        read_s = self.read_bytes / (NETWORK_RATE if self.from_network else DISK_RATE)
        return max(read_s, work_s) + (1 - _HIDDEN) * min(read_s, work_s)


def cost_of_merge(config: AdapterConfig, quantization: str) -> float:
    """The cost of a merge, in merges of a plain LoRA."""
    method = _BY_PEFT if config.peft_type != "LORA" else _DORA if config.use_dora else 1.0
    return method * _QUANTIZED.get(Quantization(quantization), 1.0)


def estimate_s(bases: Iterable[BaseWork], *, adapter_bytes: int, download_bytes: int, published_bytes: int) -> float:
    """The seconds of a run on the processors of this machine."""
    cores = usable_cores()
    files_s = 2 * adapter_bytes / _GIGABYTE * _HASH_CPU_S / cores + download_bytes / NETWORK_RATE
    published_s = published_bytes / _GIGABYTE * _PUBLISH_S
    return _START_S + files_s + published_s + sum(base.seconds(cores) for base in bases)


def usable_cores() -> int:
    """The processors that this process may use; all of the machine if the system knows no affinity (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def coarse(seconds: float) -> float:
    """Seconds without the digits that an estimate does not have."""
    step = next((step for limit, step in _COARSE if seconds < limit), 3600)
    return max(round(seconds / step), 1) * step
