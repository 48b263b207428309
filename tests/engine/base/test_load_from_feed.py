"""A base that is loaded into memory from a feed is the base that transformers loads from its files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_gate._internal.errors import EngineError, SourceError
from merge_gate.engine.base import load_from_feed as whole
from merge_gate.engine.base import loaded_base as bases
from merge_gate.engine.base import skeleton
from merge_gate.engine.base.load_from_feed import load_from_feed
from merge_gate.engine.base.loaded_base import Base, ModelClass, Source
from merge_gate.engine.base.skeleton import NoSkeletonError
from merge_gate.engine.base.stored_spans import stored_bytes
from merge_gate.engine.tensors.measure import same_bits
from merge_gate.engine.tensors.quantized import is_quantized, scales
from merge_gate.files.feed import LocalFeed
from merge_gate.records.files import BaseFiles
from merge_gate.records.refusals import CannotJudge, NotJudged
from merge_gate.records.terms import Quantization
from merge_gate.worker.protocol import BaseLoaded, Merged, Unjudged
from tests.support import methods
from tests.support.engine.base_headers import base_files, stored_tensors
from tests.support.engine.fed_bases import CountingFeed, EndingFeed
from tests.support.engine.jobs import events_of, group_of
from tests.support.engine.local_bases import load_base
from tests.support.engine.merges import comparable
from tests.support.models import Shelf
from tests.support.wording import Wording

LLAMA = ModelClass(class_name="LlamaForCausalLM")
QUANTIZED = (Quantization.BNB_4BIT, Quantization.BNB_8BIT)


def from_feed(
    directory: Path, feed: LocalFeed, quantization: Quantization, *, dtype: str = "bfloat16", free: int | None = None
) -> Base:
    source = source_for(directory, quantization, dtype)
    with methods.quiet():
        return load_from_feed(source, LLAMA, base_files(directory), feed, free_bytes=free)


def source_for(directory: Path, quantization: Quantization, dtype: str) -> Source:
    return Source(directory=str(directory), label="base", dtype=dtype, quantization=quantization)


def differing(ours: Base, theirs: Base) -> list[str]:
    """The tensors whose bits or scales are others."""
    assert list(ours.tensors) == list(theirs.tensors)
    return [name for name in ours.tensors if not all(map(same_bits, bits(ours, name), bits(theirs, name)))]


def bits(base: Base, name: str) -> list[torch.Tensor]:
    tensor = base.tensors[name]
    module = base.model.get_submodule(name.rpartition(".")[0])
    return [tensor.data, *(scale for _, scale in (scales(module, tensor) if is_quantized(tensor) else ()))]


@pytest.mark.parametrize("dtype", ["auto", "float16"])
@pytest.mark.parametrize("quantization", QUANTIZED)
def test_a_base_is_quantized_as_it_passes(quantization: Quantization, dtype: str, shelf: Shelf) -> None:
    directory = shelf.base("llama")
    feed = CountingFeed(str(directory))
    ours = from_feed(directory, feed, quantization, dtype=dtype)
    theirs = load_base(str(directory), model_class=LLAMA, label="base", dtype=dtype, quantization=quantization)
    assert sum(map(is_quantized, ours.tensors.values())) >= 14
    assert differing(ours, theirs) == []
    assert (ours.stats, ours.facts) == (theirs.stats, theirs.facts)
    stored = {one.name: one for one in stored_tensors(directory)}
    spans = sorted((one.span for one in stored_bytes(str(directory), stored).values()), key=lambda one: one.start)
    assert feed.reads == spans, "each stored tensor is read once, in the order of the file"
    assert feed.expected == [spans]


def test_experts_are_converted_in_the_order_of_transformers(tmp_path: Path) -> None:
    methods.save_base("mixtral", tmp_path)
    mixtral = ModelClass(class_name="MixtralForCausalLM")
    source = source_for(tmp_path, Quantization.BNB_4BIT, "float16")
    feed = CountingFeed(str(tmp_path))
    with methods.quiet():
        ours = load_from_feed(source, mixtral, base_files(tmp_path), feed, free_bytes=None)
        theirs = load_base(
            str(tmp_path), model_class=mixtral, label="base", dtype="float16", quantization=Quantization.BNB_4BIT
        )
    assert differing(ours, theirs) == []
    assert feed.reads == feed.expected[0]


def test_a_class_without_a_skeleton_is_loaded_whole(shelf: Shelf) -> None:
    directory = shelf.base("llama")
    ours = from_feed(directory, LocalFeed(str(directory)), Quantization.NONE, dtype="float32")
    theirs = load_base(str(directory), model_class=LLAMA, label="base", dtype="float32")
    assert differing(ours, theirs) == []
    assert (ours.stats, ours.facts) == (theirs.stats, theirs.facts)


@pytest.mark.parametrize(("quantization", "share"), [(Quantization.NONE, 0.9), (Quantization.BNB_4BIT, 0.5)])
def test_a_base_that_does_not_fit_is_refused_before_it_is_read(
    quantization: Quantization, share: float, shelf: Shelf
) -> None:
    directory = shelf.base("llama")
    feed = CountingFeed(str(directory))
    size_bytes = sum(one.nbytes for one in from_feed(directory, feed, quantization).tensors.values())
    feed.reads.clear()
    with pytest.raises(EngineError, match="LlamaForCausalLM"):
        from_feed(directory, feed, quantization, free=int(size_bytes * share))
    assert feed.reads == []
    from_feed(directory, feed, quantization, free=int(size_bytes * 1.5))


@pytest.mark.parametrize("quantization", [Quantization.NONE, Quantization.BNB_4BIT])
def test_bytes_that_cannot_be_had_are_an_error_and_end_the_load(quantization: Quantization, shelf: Shelf) -> None:
    directory = shelf.base("llama")
    feed = EndingFeed(str(directory))
    with pytest.raises(SourceError, match="gone"):
        from_feed(directory, feed, quantization)
    assert feed.reads == 7


def lacking(*given: Any, load: Any = whole.load_with_info, **named: Any) -> Any:
    model, info = load(*given, **named)
    return model, replace(info, missing=info.missing | {"lm_head.weight"})


def failing(*_: Any, **__: Any) -> Any:
    raise ValueError("odd")


@pytest.mark.parametrize(
    ("load", "error", "words"), [(lacking, NoSkeletonError, "lm_head"), (failing, CannotJudge, "odd")]
)
def test_a_load_that_fails_or_lacks_other_tensors_does_not_count(
    load: Any, error: type[Exception], words: str, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole, "load_with_info", load)
    with pytest.raises(error, match=words):
        from_feed(shelf.base("llama"), LocalFeed(str(shelf.base("llama"))), Quantization.NONE)


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_a_worker_quantizes_a_fed_base(quantization: Quantization, shelf: Shelf) -> None:
    base, adapter = shelf.base("llama"), shelf.adapter("plain")
    evidence = {}
    for fed in (True, False):
        group = group_of(base, adapter, adapter, dtype="float16", quantization=quantization, one_pass=fed, fed=fed)
        events = events_of(group)
        assert [one.measured for one in events if isinstance(one, BaseLoaded)] == [True]
        assert [one for one in events if isinstance(one, Unjudged)] == []
        evidence[fed] = [one.evidence for one in events if isinstance(one, Merged)]
        assert [bool(one.base.no_skeleton) for one in evidence[fed]] == [fed, fed]
    same = [
        [comparable(replace(one, base=replace(one.base, no_skeleton=""))) for one in of_base]
        for of_base in evidence.values()
    ]
    assert same[0] == same[1]


def test_a_class_without_a_skeleton_is_loaded_from_the_feed(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are stubs, so nothing may map them. If the class has a loader of its own, that is an error."""
    monkeypatch.setattr(bases, "load_base", lambda *_, **__: pytest.fail("a stub was loaded"))
    monkeypatch.setattr(skeleton, "MOST_LOADS", 0)
    base = shelf.base("llama")
    files = BaseFiles(directory=str(base), tensors=stored_tensors(base), is_streamed=True)
    group = group_of(base, shelf.adapter("plain"), files=files, one_pass=True, fed=True)
    loaded, merged = (one for one in events_of(group) if isinstance(one, BaseLoaded | Merged))
    assert isinstance(loaded, BaseLoaded)
    assert loaded.measured
    assert "reads or changes too many" in loaded.facts.no_skeleton
    assert isinstance(merged, Merged)
    assert merged.evidence.refusal is None
    monkeypatch.setattr(skeleton, "loads_as_usual", lambda _: False)
    last = events_of(group)[-1]
    assert isinstance(last, Unjudged)
    assert isinstance(last.refusal, NotJudged)
    assert "from_pretrained of its own" in last.refusal.message


def test_no_stub_is_loaded_and_the_error_names_the_class(tmp_path: Path, wording: Wording) -> None:
    source = Source(directory=str(tmp_path), label="acme/base", dtype="auto")
    feed, model_class = LocalFeed(str(tmp_path)), ModelClass(class_name="CsmForConditionalGeneration")
    for is_streamed, expected in ((True, EngineError), (False, NoSkeletonError)):
        files = BaseFiles(directory=str(tmp_path), weight_bytes=3 << 30, is_streamed=is_streamed)
        with pytest.raises(expected) as refused:
            load_from_feed(source, model_class, files, feed, free_bytes=2 << 30)
        if is_streamed:
            wording(refused.value)
