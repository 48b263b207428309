"""A merged model put together from the stored tensors that a merge writes, without the process that makes files.

In: a base's directory, and what a `PublicationConsumer` writes. Out: a directory that transformers loads.
"""

import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge_gate.engine.adapter_evidence import MergeRequest, merge
from merge_gate.engine.base.loaded_base import dequantized_base
from merge_gate.engine.base.model_class import model_class_for
from merge_gate.engine.base.skeleton import skeleton_of
from merge_gate.engine.base.stored_spans import SharedReads
from merge_gate.engine.base.tensor_map import DTYPES
from merge_gate.features.publish.consumer import PublicationBase
from merge_gate.files.feed import LocalFeed
from merge_gate.files.preflight import preflight
from merge_gate.records.files import StoredTensor
from merge_gate.records.measured import Evidence
from merge_gate.records.refusals import NotJudged
from merge_gate.records.terms import PRESERVE
from tests.support import methods
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.fed_bases import source
from tests.support.engine.local_bases import load_local
from tests.support.engine.merges import runs
from tests.support.files.pickles import read_pickle
from tests.support.verify.file_changes import edited


@dataclass
class Sent:
    """What a merge writes: the bytes of stored tensors, and the list of those that count. It is its own open files."""

    planned: tuple[StoredTensor, ...] = ()
    data: dict[str, bytearray] = field(default_factory=dict)
    tensors: tuple[StoredTensor, ...] = ()
    refusal: NotJudged | None = None
    evidence: Evidence | None = None

    def plan(self, task: int, tensors: Sequence[StoredTensor]) -> Self:
        assert task == 0
        self.planned = tuple(tensors)
        self.data.clear()
        return self

    def write(self, name: str, offset: int, content: memoryview) -> None:
        whole = self.data.setdefault(name, bytearray())
        whole[offset:] = content
        assert len(whole) == offset + len(content), "in order"

    @property
    def checksums(self) -> dict[str, int]:
        return {name: zlib.crc32(content) for name, content in self.data.items()}

    def close(self) -> None:
        """There are no files."""

    def finish(self, task: int, checksums: Mapping[str, int], settings: str, refusal: NotJudged | None) -> None:
        assert task == 0
        self.refusal = refusal
        self.tensors = tuple(one for one in self.planned if one.name in checksums)
        assert len(self.tensors) == len(checksums)

    def values(self) -> dict[str, torch.Tensor]:
        """The tensors that count."""
        return {
            one.name: torch.frombuffer(self.data[one.name], dtype=getattr(torch, DTYPES[one.dtype])).view(one.shape)
            for one in self.tensors
        }


def sent_by(
    directory: Path,
    adapter: Path,
    *,
    publish: str = PRESERVE,
    lazy: bool = False,
    dtype: str = "auto",
    dequantized: bool = False,
    sent: Sent | None = None,
    **load: Any,
) -> Sent:
    """Merge an adapter into a base in this process, and publish it."""
    files = preflight(str(adapter), allow_pickle=True, read_pickle=read_pickle)
    model_class = model_class_for(str(directory), files, stored_tensors(directory))
    feed, stored = SharedReads(LocalFeed(str(directory))), stored_tensors(directory)
    with methods.quiet():
        base = (
            skeleton_of(source(directory, dtype), model_class, stored, feed)
            if lazy
            else load_local(str(directory), model_class=model_class, label="base", dtype=dtype, **load)
        )
        if dequantized:
            base = dequantized_base(base, publish)
        sent = sent or Sent()
        connection: Any = sent
        published = PublicationBase(base=base, model_class=model_class, stored=stored, feed=feed, connection=connection)
        consumer = published.consumer(0, publish)
        sent.evidence = merge(MergeRequest(base=base, members=(files,), consumers=(consumer, *runs())))
        consumer.finish(sent.evidence)
        return sent


def write_model(base: Path, directory: Path, sent: Sent) -> Path:
    """The base's files with the tensors that were written in their places."""
    shutil.copytree(base, directory)
    changed = sent.values()
    for file in directory.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        save_file({name: changed.get(name, tensor) for name, tensor in tensors.items()}, file, metadata)
    return directory


def configured(directory: Path, **changes: Any) -> Path:
    """Change config.json."""
    edited("config.json", **changes)(directory)
    return directory


def in_dtype(base: Path, directory: Path, dtype: str) -> Path:
    """The base, stored in another dtype."""
    shutil.copytree(base, directory)
    for file in directory.glob("*.safetensors"):
        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    return configured(directory, dtype=dtype)


# --- what was published, against PEFT --------------------------------------------------------------------------------

_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def dequantized_merge(packed: Any, plain: Any, adapter: Path) -> dict[str, torch.Tensor]:
    """PEFT's merge into a packed model, as transformers recommends it for QLoRA: `dequantize`, and then merge.

    transformers leaves the weights of a Conv1D transposed. `plain` is a model of the base, and gets the right ones.
    """
    values = packed.dequantize(torch.bfloat16).state_dict()
    for name, tensor in plain.state_dict().items():
        tensor.copy_(values[name].T if name.endswith(_TRANSPOSED) else values[name])
    merged: dict[str, torch.Tensor] = (
        PeftModel.from_pretrained(plain, adapter).merge_and_unload(safe_merge=True).state_dict()
    )
    return merged


def different(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of tensors that do not have the same bits in both."""
    return [name for name in left.keys() | right.keys() if not _is_same(left.get(name), right.get(name))]


def _is_same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None or one.dtype is not other.dtype or one.shape != other.shape:
        return False
    ours, theirs = (
        tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()]) for tensor in (one, other)
    )
    return torch.equal(ours, theirs)
