"""What is written for publishing makes the model that PEFT's own merge makes, tensor by tensor and bit by bit."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from merge_gate._internal.errors import EngineError
from merge_gate.engine.adapter_evidence import MergeRequest, merge_together
from merge_gate.engine.base.model_class import model_class_for
from merge_gate.engine.base.skeleton import skeleton_of
from merge_gate.engine.base.stored_spans import SharedReads
from merge_gate.engine.base.tensor_map import DTYPES
from merge_gate.features.export.kept_merges import KeptMerges
from merge_gate.features.publish import consumer
from merge_gate.features.publish.calls import PublicationWritten
from merge_gate.features.publish.one_publication import Publication, publishing
from merge_gate.features.publish.planned_files import PlannedFiles
from merge_gate.features.publish.stored_layout import StoredLayout
from merge_gate.features.publish.weight_files import base_layout
from merge_gate.files.feed import LocalFeed
from merge_gate.files.preflight import preflight
from merge_gate.records.config import PublishSpec
from merge_gate.records.files import StoredTensor
from merge_gate.records.refusals import NotJudged
from merge_gate.records.terms import Quantization
from merge_gate.worker.protocol import Event, Group, Job, Merged
from tests.support import bases, methods
from tests.support.call_ends import Ends
from tests.support.engine import publish_layouts
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.fed_bases import CountingFeed, source
from tests.support.engine.jobs import events_as_they_come, events_of, group_of
from tests.support.engine.plain_merge import peft_merge
from tests.support.engine.published import (
    Sent,
    configured,
    dequantized_merge,
    different,
    in_dtype,
    sent_by,
    stored,
    write_model,
)
from tests.support.faults import configure
from tests.support.gating import one_thread
from tests.support.models import VARIANTS, Shelf, load_for_training, read_config
from tests.tools import publish_layouts as tool

VARIANTS_PUBLISHED = (
    "rslora", "patterns", "bias-all", "modules-to-save", "token-rows", "tied-tokens", "tied-base", "dora-all-linear",
    "lora-bias", "saved-embedding", "resized-tied", "resized-target", "conv1d", "conv1d-saved", "fused-experts",
    "per-expert", "sharded-base", "embedding", "classifier", "opt",
)  # fmt: skip
IN_ALL_DTYPES = ("every-projection", "dora", "conv1d", "fused-experts")
METHODS = ("loha-linear", "oft-linear", "ia3-linear", "lora-experts-qwen", "lora-tied-tokens", "ln-norm")


def published(base: Path, adapter: Path, directory: Path, **options: Any) -> dict[str, torch.Tensor]:
    """The state of the published model as transformers loads it."""
    sent = sent_by(base, adapter, **options)
    assert sent.refusal is None, sent.refusal
    assert {one.name for one in sent.planned} == {one.name for one in sent.tensors}
    assert set(sent.tensors) <= set(sent.planned)
    write_model(base, directory, sent)
    if adapter.name.startswith("resized"):
        configured(directory, vocab_size=VARIANTS[adapter.name].save["rows"])
    with methods.quiet():
        return load_for_training(directory, read_config(adapter).get("task_type")).state_dict()


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        *((variant, "bfloat16") for variant in VARIANTS_PUBLISHED),
        *((variant, dtype) for variant in IN_ALL_DTYPES for dtype in ("float32", "bfloat16", "float16")),
    ],
)
def test_a_published_model_is_pefts_merge(variant: str, dtype: str, shelf: Shelf, tmp_path: Path) -> None:
    base, adapter = in_dtype(shelf.base(VARIANTS[variant].base), tmp_path / "base", dtype), shelf.adapter(variant)
    theirs = peft_merge(base, adapter, "auto")[1]
    assert different(published(base, adapter, tmp_path / "published"), theirs) == []


@pytest.mark.parametrize("variant", ["every-projection", "modules-to-save", "token-rows", "fused-experts", "embedding"])
def test_a_base_that_is_filled_from_a_feed_publishes_the_same(variant: str, shelf: Shelf, tmp_path: Path) -> None:
    base, adapter = shelf.base(VARIANTS[variant].base), shelf.adapter(variant)
    ours, theirs = sent_by(base, adapter, lazy=True), sent_by(base, adapter)
    assert ours.refusal is theirs.refusal is None
    assert different(ours.values(), theirs.values()) == []
    assert set(ours.tensors) == set(theirs.tensors) != set()


@pytest.mark.parametrize("name", METHODS)
def test_other_methods_are_published_as_peft_merges_them(name: str, tmp_path: Path) -> None:
    case, base, adapter = methods.find(name), tmp_path / "base", tmp_path / "adapter"
    methods.save_base(case.base, base)
    methods.save_adapter(case, methods.load_base(case.base, base), adapter, base_directory=base)
    with methods.quiet():
        theirs = methods.load_adapter(methods.load_base(case.base, base), adapter).merge_and_unload(safe_merge=True)
    sent = sent_by(base, adapter)
    assert sent.refusal is None
    assert len(sent.tensors) > 0
    ours = methods.load_base(case.base, write_model(base, tmp_path / "published", sent))
    assert different(ours.state_dict(), theirs.state_dict()) == []


# --- tensors that transformers does not load ------------------------------------------------------------------------


def qwen3_5(directory: Path, head: torch.Tensor) -> tuple[Path, Path]:
    """A base with a head of multi-token prediction, in shards as Qwen3.5 names them, and an adapter of it."""
    draft = bases.qwen3_5().plus({"mtp.fc.weight": head})
    draft.sharded(2, "model.safetensors-{number:05d}-of-{count:05d}.safetensors").write(directory / "base")
    bases.ADAPTERS["second-layer"](directory / "adapter")
    return directory / "base", directory / "adapter"


def test_a_head_of_multi_token_prediction_stays(tmp_path: Path) -> None:
    base, adapter = qwen3_5(tmp_path, torch.ones(32, 64, dtype=torch.bfloat16))
    theirs = peft_merge(base, adapter, "auto")[1]
    assert different(published(base, adapter, tmp_path / "published"), theirs) == []
    before, after = stored(base), stored(tmp_path / "published")
    assert different(before, after) == ["model.layers.1.self_attn.v_proj.weight"]


FRACTIONS = tuple(name for name in DTYPES.values() if getattr(torch, name).is_floating_point or name == "complex64")
COMPLEX = [("complex64", torch.inf, "preserve"), ("complex64", torch.nan, "float32"), ("complex64", 1.0, "float32")]


@pytest.mark.attempt("P17", "NaN or Inf in a tensor that transformers does not load, in every dtype", "not published")
@pytest.mark.parametrize(
    ("dtype", "value", "publish"),
    [*((name, torch.nan, "preserve") for name in FRACTIONS), *COMPLEX, ("bfloat16", 1e6, "float16")],
)
def test_no_dtype_hides_a_broken_tensor_that_is_not_loaded(
    dtype: str, value: float, publish: str, tmp_path: Path
) -> None:
    head = torch.ones(2, 4, dtype=torch.complex64 if dtype == "complex64" else torch.float32)
    head[1, 2] = complex(1.0, value) if head.is_complex() else value  # the real part alone is finite
    base, adapter = qwen3_5(tmp_path, head.to(getattr(torch, dtype)))
    sent = sent_by(base, adapter, publish=publish, dtype="auto" if publish == "preserve" else publish)
    assert (sent.refusal is not None) == (value != 1.0), sent.refusal
    if sent.refusal is not None:
        assert "mtp.fc.weight" in sent.refusal.message
        assert sent.tensors == ()


# --- a base that the parent cannot copy from --------------------------------------------------------------------------


class Parent:
    """A connection to the models of two tasks. Nothing can be copied from their base."""

    def __init__(self, base: Path, place: Path) -> None:
        spec, layout = PublishSpec(directory="", label=""), base_layout(str(base))
        self.models = [Publication(place / name, spec, layout, "absent", is_streamed=True) for name in ("one", "two")]

    def plan(self, task: int, tensors: Sequence[StoredTensor]) -> PlannedFiles:
        return PlannedFiles(self.models[task].plan(tensors))

    def finish(self, task: int, checksums: Mapping[str, int], settings: str, refusal: NotJudged | None) -> None:
        checksum = tuple(checksums.items())
        self.models[task].written(PublicationWritten(task=task, checksums=checksum, settings=settings, refusal=refusal))


@pytest.mark.parametrize("is_measured", [False, True])
def test_every_tensor_of_a_fed_base_is_read_once_if_possible(is_measured: bool, tmp_path: Path) -> None:
    """In a second pass, the base is measured, so that only what the adapters touch is read before the end."""
    base, adapter = qwen3_5(tmp_path, torch.ones(32, 64, dtype=torch.bfloat16))
    files, headers = preflight(str(adapter), allow_pickle=False), stored_tensors(base)
    counting = CountingFeed(str(base))
    feed = SharedReads(counting)
    model_class = model_class_for(str(base), files, headers)
    parent = Parent(base, tmp_path)
    connection: Any = parent
    with methods.quiet():
        loaded = skeleton_of(source(base), model_class, headers, feed)
        shared = consumer.PublicationBase(
            base=loaded, model_class=model_class, stored=headers, feed=feed, connection=connection, is_fed=True
        )
        if is_measured:
            merge_together([MergeRequest(base=loaded, members=(files,), no_forward="not here")] * 2)
            counting.reads.clear()
        requests = [
            MergeRequest(
                base=loaded, members=(files,), consumers=(shared.consumer(task, "preserve"),), no_forward="not here"
            )
            for task in (0, 1)
        ]
        for request, evidence in zip(requests, merge_together(requests), strict=True):
            assert evidence is not None
            request.consumers[0].finish(evidence)
    twice = {(one.file, one.start) for one in counting.reads if counting.reads.count(one) > 1}
    again = {place.name for place in shared._places.values() if (place.span.file, place.span.start) in twice}
    assert again <= {"model.layers.1.self_attn.v_proj.weight", "mtp.fc.weight"}
    expected = stored(base) | sent_by(base, adapter).values()
    for model in parent.models:
        model.complete()
        assert different(stored(tmp_path / f".{model.directory.name}.partial" / "model"), expected) == []
        model.discard()
    assert feed.takers == []


# --- other names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["tied-tokens", "resized-tied"])
def test_a_tied_tensor_that_is_stored_twice_is_written_twice(variant: str, shelf: Shelf, tmp_path: Path) -> None:
    base, adapter = shutil.copytree(shelf.base("llama-tied"), tmp_path / "base"), shelf.adapter(variant)
    tensors = stored(base)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, base / bases.WEIGHTS)
    theirs = peft_merge(base, adapter, "auto")[1]
    assert different(published(base, adapter, tmp_path / "published"), theirs) == []
    after = stored(tmp_path / "published")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_a_body_keeps_the_prefix_and_the_head_of_its_files(shelf: Shelf, tmp_path: Path) -> None:
    base, adapter = shelf.base("bert-classifier"), shelf.adapter("feature-extraction")
    sent = sent_by(base, adapter)
    assert sent.refusal is None
    assert len(sent.tensors) == 4
    assert all(one.name.startswith("bert.encoder.layer.") for one in sent.tensors)
    assert stored(base).keys() >= sent.values().keys()


# --- in another dtype -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("variant", ["every-projection", "modules-to-save", "fused-experts", "tied-tokens"])
def test_every_floating_tensor_is_cast(variant: str, lazy: bool, shelf: Shelf, tmp_path: Path) -> None:
    base, adapter = shelf.base(VARIANTS[variant].base), shelf.adapter(variant)
    theirs = peft_merge(base, adapter, "bfloat16")[1]
    sent = sent_by(base, adapter, publish="bfloat16", dtype="bfloat16", lazy=lazy)
    assert sent.refusal is None
    assert {one.name for one in sent.tensors} == stored(base).keys()
    assert {one.dtype for one in sent.tensors} == {"BF16"}
    configured(write_model(base, tmp_path / "published", sent), dtype="bfloat16")
    with methods.quiet():
        ours = load_for_training(tmp_path / "published", "CAUSAL_LM").state_dict()
    assert different(ours, theirs) == []


def test_what_transformers_keeps_in_float32_is_cast_later(tmp_path: Path) -> None:
    case = methods.make_case("kept", "t5", "LoraConfig", r=2, target_modules=["q", "wo"])
    base, adapter = methods.save_base("t5", tmp_path / "base"), tmp_path / "adapter"
    methods.save_adapter(case, methods.load_base("t5", base), adapter, base_directory=base)
    with methods.quiet():
        model = transformers.T5ForConditionalGeneration.from_pretrained(base, dtype=torch.float16)
        theirs = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True).state_dict()
    assert {tensor.dtype for tensor in theirs.values()} == {torch.float16, torch.float32}
    ours = sent_by(base, adapter, publish="float16", dtype="float16").values()
    assert ours.keys() == stored(base).keys()
    assert different(ours, {name: theirs[name].half() for name in ours}) == []


def test_a_tensor_that_is_not_loaded_is_cast_too(tmp_path: Path) -> None:
    base, adapter = qwen3_5(tmp_path, torch.full((32, 64), 0.7, dtype=torch.bfloat16))
    sent = sent_by(base, adapter, publish="float32", dtype="float32")
    assert sent.refusal is None
    before = {name: tensor.float() for name, tensor in stored(base).items()}
    assert different(sent.values(), before) == ["model.layers.1.self_attn.v_proj.weight"]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "options", "names"),
    [
        ("bfloat16-base", {"dtype": "float32"}, ("q_proj.weight", "bfloat16", "float32")),
        ("plain", {"publish": "bfloat16"}, ("float32", "bfloat16")),
        ("plain", {"quantization": Quantization.BNB_8BIT}, ("bnb-8bit",)),
    ],
)
def test_what_cannot_be_published_is_refused(
    variant: str, options: dict[str, Any], names: tuple[str, ...], shelf: Shelf
) -> None:
    sent = sent_by(shelf.base(VARIANTS[variant].base), shelf.adapter(variant), **options)
    assert sent.refusal.hint
    assert [name for name in names if name not in sent.refusal.message] == []
    assert sent.planned == ()
    assert sent.evidence.refusal is None  # the merge itself is judged


class Broken(Sent):
    """A connection that fails in the middle of a merge."""

    def write(self, name: str, offset: int, content: memoryview) -> None:
        if len(self.data) == 3:
            raise self.error
        super().write(name, offset, content)

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


@pytest.mark.parametrize(
    "error",
    [EngineError("the disk is full"), OSError(28, "No space left on device"), RuntimeError("odd")],
    ids=["known", "disk", "unknown"],
)
def test_an_error_while_a_model_is_written_costs_only_the_model(error: Exception, shelf: Shelf) -> None:
    base, adapter = shelf.base("llama"), shelf.adapter("every-projection")
    broken = sent_by(base, adapter, sent=Broken(error))
    assert str(error.args[-1]) in broken.refusal.message
    expected = sent_by(base, adapter).evidence
    assert expected is not None
    assert broken.evidence is not None
    assert replace(broken.evidence, seconds=0.0) == replace(expected, seconds=0.0)


# --- in the worker ---------------------------------------------------------------------------------------------------


class Kept(KeptMerges):
    """Gets the merges of jobs in this process, and the order of their ends and of events."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.sent: dict[int, PublicationWritten] = {}
        self.order: list[tuple[str, int]] = []

    def written(self, message: PublicationWritten) -> None:
        super().written(message)
        self.sent[message.task] = message
        self.order.append(("sent", message.task))

    def values(self, task: int) -> dict[str, torch.Tensor]:
        """The tensors that count."""
        tensors = load_file(self.folder / f"{task}.safetensors")
        return {name: tensors[name] for name, _ in self.sent[task].checksums}

    def events_of(self, group: Group) -> list[Event]:
        """Judge a group in this process, which is connected with this one."""
        events, ends = [], Ends(self.service(Job(groups=(group,), device="cpu")))
        for event in events_as_they_come(group, client=ends.client):
            events.append(event)
            if isinstance(event, Merged):
                self.order.append(("merged", event.task))
        ends.close()
        return events


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path / "kept")


def four_adapters(shelf: Shelf, place: Path, publish: str, *, one_pass: bool) -> Group:
    """Two adapters to be published, one that is refused, and one that is not to be published."""
    refused = shutil.copytree(shelf.adapter("plain"), place / "refused")
    configure(target_modules=["absent"])(refused)
    adapters = (shelf.adapter("every-projection"), shelf.adapter("modules-to-save"), refused, shelf.adapter("plain"))
    dtype, consumers = "auto" if publish == "preserve" else publish, (publishing(publish),)
    group = group_of(shelf.base("llama"), *adapters, dtype=dtype, consumers=consumers, one_pass=one_pass)
    return replace(group, tasks=(*group.tasks[:3], replace(group.tasks[3], consumers=())))


@pytest.mark.parametrize("publish", ["preserve", "bfloat16"])
@pytest.mark.parametrize("one_pass", [False, True])
def test_the_worker_writes_each_model_before_its_evidence(
    one_pass: bool, publish: str, kept: Kept, shelf: Shelf, tmp_path: Path
) -> None:
    group = four_adapters(shelf, tmp_path, publish, one_pass=one_pass)
    kept.events_of(group)
    for task in (0, 1, 2):
        assert kept.order.index(("sent", task)) < kept.order.index(("merged", task))
    assert ("sent", 3) not in kept.order
    assert kept.sent[2].refusal is not None
    for task in (0, 1):
        adapter = Path(group.tasks[task].files[0].directory)
        alone = sent_by(shelf.base("llama"), adapter, publish=publish, dtype=group.base.dtype)
        assert kept.sent[task].refusal is None
        assert different(kept.values(task), alone.values()) == []


@pytest.mark.parametrize("publish", ["preserve", "bfloat16"])
def test_a_pass_that_publishes_reads_what_any_pass_reads(
    publish: str, kept: Kept, shelf: Shelf, variables, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On one core: with more, time decides whether two layers share a small tensor or read it one after another."""
    reads: list[tuple[str, int, int]] = []
    own = LocalFeed.read

    def read(self: LocalFeed, file: str, start: int, into: memoryview) -> None:
        reads.append((file, start, into.nbytes))
        own(self, file, start, into)

    variables["OMP_NUM_THREADS"] = "1"
    monkeypatch.setattr(LocalFeed, "read", read)
    group = four_adapters(shelf, tmp_path, publish, one_pass=True)
    assert kept.events_of(group)
    publishing = sorted(reads)
    reads.clear()
    plain = replace(group, tasks=tuple(replace(task, consumers=()) for task in group.tasks))
    assert events_of(plain)
    assert publishing == sorted(reads)


def test_the_worker_publishes_a_quantized_base_plainly(kept: Kept, shelf: Shelf) -> None:
    directory, adapter = shelf.base("llama"), shelf.adapter("plain")
    consumers = (publishing("bfloat16"),)
    group = group_of(directory, adapter, dtype="bfloat16", quantization="bnb-8bit", consumers=consumers)
    merged = next(event for event in kept.events_of(group) if isinstance(event, Merged))
    assert merged.evidence.base.quantization == "bnb-8bit"
    assert {merge.stats.dtype for merge in merged.evidence.merges} == {"bfloat16"}
    assert kept.sent[0].refusal is None
    assert kept.values(0).keys() == stored(directory).keys()


@pytest.mark.parametrize(
    ("variant", "quantization"),
    [("every-projection", Quantization.BNB_4BIT), ("dora", Quantization.BNB_8BIT), ("conv1d", Quantization.BNB_4BIT)],
)
def test_a_quantized_base_is_published_with_plain_weights(
    variant: str, quantization: Quantization, shelf: Shelf, tmp_path: Path
) -> None:
    """The merge that transformers recommends for QLoRA: `dequantize`, and then PEFT's merge."""
    base, adapter = shelf.base(VARIANTS[variant].base), shelf.adapter(variant)
    in_4bit = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    packing = transformers.BitsAndBytesConfig(**in_4bit if "4" in quantization else {"load_in_8bit": True})
    load = {"dtype": torch.bfloat16, "quantization_config": packing, "device_map": "cpu"}
    with methods.quiet():
        packed = load_for_training(base, "CAUSAL_LM", **load)
        theirs = dequantized_merge(packed, load_for_training(base, "CAUSAL_LM", dtype=torch.bfloat16), adapter)
    options = {"publish": "bfloat16", "dtype": "bfloat16", "quantization": quantization}
    sent = sent_by(base, adapter, dequantized=True, **options)
    assert sent.refusal is None
    assert (sent.evidence.base.quantization, sent.evidence.base.dtype) == (quantization, "bfloat16")
    assert {one.name for one in sent.tensors} == stored(base).keys()
    configured(write_model(base, tmp_path / "published", sent), dtype="bfloat16")
    with methods.quiet():
        ours = load_for_training(tmp_path / "published", "CAUSAL_LM").state_dict()
    assert different(ours, theirs) == []


# --- every model type with converted tensors: a slice of the sweep ---------------------------------------------------

QUICK = ("mixtral", "qwen2_vl")
SLICE = (
    "aria", "deepseek_v3", "gemma3", "gpt_oss", "jamba", "llava", "mllama", "olmoe", "paligemma", "phimoe", "qwen2_moe",
    "qwen3_moe", "swin",
)  # fmt: skip


@pytest.mark.parametrize("model_type", [*QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in SLICE)])
def test_a_published_change_is_what_transformers_loads(model_type: str, tmp_path: Path) -> None:
    with one_thread():
        checked = publish_layouts.check(model_type, tmp_path)
    assert (checked.skipped, checked.refused, checked.wrong) == ("", "", ())
    assert checked.changed


def test_a_way_back_that_is_wrong_is_found(tmp_path: Path) -> None:
    def flipped(layout: StoredLayout, changed: Mapping[str, torch.Tensor], sent: Sent) -> None:
        publish_layouts.publish(layout, {name: -tensor for name, tensor in changed.items()}, sent)

    with one_thread():
        checked = publish_layouts.check("mixtral", tmp_path, flipped)
    assert len(checked.wrong) == checked.changed


def test_the_page_names_every_exception() -> None:
    kinds = ({}, {"skipped": "no tiny model"}, {"refused": "not exact: `x` | y"}, {"wrong": ("a.weight",)})
    page = tool.document([publish_layouts.Checked(model_type=f"type-{n}", **more) for n, more in enumerate(kinds)])  # type: ignore[arg-type]
    assert all(f"| `type-{n}` |" in page for n in (2, 3))
    assert "| model types with a conversion | 4 |" in page
    assert "| it loads exactly the changed tensors | 1 |" in page
    assert "| `not exact: x / y` |" in page
