"""A base that is filled from a feed is what `from_pretrained` gives, and no weight is read to make it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from merge_gate.engine.base import accounting, skeleton, tensor_map
from merge_gate.engine.base.loaded_base import Base, ModelClass
from merge_gate.engine.base.skeleton import NoSkeletonError, skeleton_of
from merge_gate.engine.base.stored_spans import stored_bytes
from merge_gate.engine.base.tensor_map import NoMapError
from merge_gate.engine.tensors.measure import same_bits
from merge_gate.files.feed import LocalFeed
from merge_gate.records.refusals import CannotJudge
from merge_gate.records.terms import Quantization
from tests.support import methods
from tests.support.engine import architectures, tensor_maps
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.fed_bases import CountingFeed, source
from tests.support.engine.local_bases import edited_base, load_base
from tests.support.gating import one_thread
from tests.support.models import Shelf, among_transformers
from tests.support.sampled import sampled

SLICE = ("bert", "chinese_clip", "gpt2", "llama", "marian", "mixtral", "phimoe", "qwen3_moe", "t5", "wav2vec2")
"""Plain types, fused experts, tied biases and embeddings, computed positions, a padding row, weight norms."""

LLAMA = "LlamaForCausalLM"


def made(
    directory: Path,
    class_name: str = LLAMA,
    dtype: str = "auto",
    feed: LocalFeed | None = None,
    *,
    is_mapped: bool = False,
) -> Base:
    feed, model_class = feed or LocalFeed(str(directory)), ModelClass(class_name=class_name)
    with methods.quiet():
        return skeleton_of(source(directory, dtype), model_class, stored_tensors(directory), feed, is_mapped=is_mapped)


def loaded(directory: Path, class_name: str = LLAMA, dtype: str = "auto") -> Base:
    with methods.quiet():
        return load_base(str(directory), model_class=ModelClass(class_name=class_name), label="base", dtype=dtype)


def differing(base: Base, real: Base) -> list[str]:
    assert list(base.tensors) == list(real.tensors)
    wrong = []
    for name, tensor in real.tensors.items():
        with base.filled([name]):
            if not same_bits(base.tensors[name], tensor):
                wrong.append(name)
    return wrong


@pytest.mark.parametrize("is_mapped", [False, True], ids=["fed", "mapped"])
@pytest.mark.parametrize("model_type", sampled(SLICE, [*SLICE][::3]))
def test_it_has_the_bits_of_the_files_in_every_dtype(model_type: str, is_mapped: bool, tmp_path: Path) -> None:
    class_name = architectures.build(model_type, tmp_path).model_class.__name__
    for dtype in ("auto", "float16"):
        base, real = made(tmp_path, class_name, dtype, is_mapped=is_mapped), loaded(tmp_path, class_name, dtype)
        assert differing(base, real) == []
        assert not base.was_misread()
        for name in base.unmeasured():
            assert base.figures(name) == real.stats[name]
        base.complete_facts()
        assert base.facts == real.facts
        assert base.aliases == real.aliases


def test_no_weight_is_read_to_make_it(shelf: Shelf) -> None:
    directory = shelf.base("llama")
    feed = CountingFeed(str(directory))
    base = made(directory, feed=feed)
    assert base.lazy is not None
    assert feed.reads == []
    assert feed.expected == []
    assert set(base.unmeasured()) == set(base.tensors)
    groups = base.lazy.groups(base.tensors)
    for group in groups:
        with base.filled(group.outlines):
            pass
    assert feed.reads == [span for group in groups for span in group.spans]
    assert [span.start for span in feed.reads] == sorted(span.start for span in feed.reads)


def test_experts_that_are_mixed_in_the_files_are_read_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class_name = architectures.build("mixtral", tmp_path).model_class.__name__
    in_order = []
    for most_bytes in (1 << 29, 0):
        monkeypatch.setattr(skeleton, "MOST_BYTES_TOGETHER", most_bytes)
        base = made(tmp_path, class_name)
        starts = [span.start for group in base.lazy.groups(base.tensors) for span in group.spans]
        in_order.append(starts == sorted(starts))
        assert differing(base, loaded(tmp_path, class_name)) == []
    assert in_order == [True, False]


class Scaled(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """A load of this class ends with a step that changes a weight."""

    def tie_weights(self, *positional: Any, **named: Any) -> Any:
        super().tie_weights(*positional, **named)
        self.model.norm.weight.data.mul_(2.0)


class ReadsAll(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """A load of this class reads every weight."""

    def tie_weights(self, *positional: Any, **named: Any) -> Any:
        super().tie_weights(*positional, **named)
        return sum(float(one.sum()) for one in self.parameters() if not one.is_meta)


class Replaces(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """A load of this class ends with another tensor in the place of a weight."""

    def tie_weights(self, *positional: Any, **named: Any) -> Any:
        super().tie_weights(*positional, **named)
        weight = self.model.norm.weight
        self.model.norm.weight = torch.nn.Parameter(torch.ones(weight.shape, dtype=weight.dtype, device=weight.device))


@pytest.mark.parametrize("dtype", ["auto", "float16"])
@pytest.mark.parametrize("is_mapped", [False, True], ids=["fed", "mapped"])
def test_a_weight_that_the_class_changes_is_changed(is_mapped: bool, dtype: str, shelf: Shelf) -> None:
    directory = shelf.base("llama")
    with among_transformers(Scaled) as name:
        base, real = made(directory, name, dtype, is_mapped=is_mapped), loaded(directory, name, dtype)
        assert differing(base, real) == []
    assert "model.norm.weight" not in base.alone, "no figures of a changed tensor are those of its bytes"
    assert (base.lazy is None) == (is_mapped and dtype == "auto")
    assert base.lazy is None or 0 < base.lazy.kept_bytes() < 10_000


@pytest.mark.parametrize(("model_class", "words"), [(ReadsAll, "too many"), (Replaces, "model.norm.weight")])
def test_a_class_that_needs_its_values_is_loaded(model_class, words, shelf, monkeypatch) -> None:
    monkeypatch.setattr(skeleton, "LEAST_KEPT_BYTES", 1 << 12)
    with among_transformers(model_class) as name, pytest.raises(NoSkeletonError, match=words):
        made(shelf.base("llama"), name)


@pytest.mark.parametrize("is_mapped", [False, True], ids=["fed", "mapped"])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_tied_tensors_that_are_both_stored_are_tied_if_equal(factor, is_mapped, shelf, tmp_path) -> None:
    def tie(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"lm_head.weight": tensors["model.embed_tokens.weight"] * factor}

    directory = edited_base(shelf.base("llama"), tmp_path / "base", tie)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    base, real = made(directory, is_mapped=is_mapped), loaded(directory)
    assert ("lm_head.weight" in real.tensors) == (factor != 1)
    assert differing(base, real) == []
    assert base.aliases == real.aliases


def test_an_adapter_in_the_directory_is_refused_as_by_a_load(shelf: Shelf, tmp_path: Path) -> None:
    directory = shutil.copytree(shelf.base("llama"), tmp_path / "base")
    shutil.copytree(shelf.adapter("plain"), directory, dirs_exist_ok=True)
    with pytest.raises(NoSkeletonError, match="an adapter"):
        made(directory)
    with pytest.raises(CannotJudge, match="adapter_next_to_base"):
        loaded(directory)


def test_a_quantized_base_or_another_loader_has_no_skeleton(shelf: Shelf) -> None:
    directory, stored = shelf.base("llama"), stored_tensors(shelf.base("llama"))
    feed = LocalFeed(str(directory))
    quantized = source(directory, quantization=Quantization.BNB_4BIT)
    with pytest.raises(NoSkeletonError, match="quantized"):
        skeleton_of(quantized, ModelClass(class_name=LLAMA), stored, feed)
    with pytest.raises(NoSkeletonError, match="from_pretrained of its own"):
        skeleton_of(source(directory), ModelClass(class_name="AutoModelForCausalLM"), stored, feed)


def test_a_base_unlike_its_class_is_refused_as_by_a_load(shelf: Shelf, tmp_path: Path) -> None:
    directory = shutil.copytree(shelf.base("llama"), tmp_path / "base")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    refusals = []
    for make in (made, loaded):
        with pytest.raises(CannotJudge) as refused:
            make(directory)
        refusals.append(refused.value.refusal)
    clash = refusals[0]
    assert clash == refusals[1]
    assert clash.kind == "base_shape_clash"
    assert "mlp" in clash.fields["name"]
    assert (48, 40) in zip(clash.fields["got"], clash.fields["expected"], strict=True)


def _offsets(change: Callable[[list[int]], None]) -> Callable[[dict[str, Any]], None]:
    def changed(header: dict[str, Any]) -> None:
        change(header["model.norm.weight"]["data_offsets"])

    return changed


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.pop("model.norm.weight"),
        lambda header: header["model.norm.weight"].update(shape=[16, 2]),
        lambda header: header["model.norm.weight"].update(data_offsets="0"),
        _offsets(lambda offsets: offsets.append(1)),
        _offsets(lambda offsets: offsets.__setitem__(0, 0)),
        _offsets(lambda offsets: offsets.__setitem__(slice(None), [-64, 0])),
        _offsets(lambda offsets: offsets.__setitem__(slice(None), [1 << 40, (1 << 40) + 64])),
        _offsets(lambda offsets: offsets.__setitem__(slice(None), [0.0, 64.0])),
    ],
)
def test_a_header_that_changed_is_an_error(change, shelf, tmp_path) -> None:
    directory = shutil.copytree(shelf.base("llama"), tmp_path / "base")
    stored = {one.name: one for one in stored_tensors(directory)}
    assert stored_bytes(str(directory), stored)
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(ValueError, match=r"model\.(norm\.weight|safetensors)"):
        stored_bytes(str(directory), stored)


def test_a_header_longer_than_its_file_is_an_error(shelf: Shelf, tmp_path: Path) -> None:
    directory = shutil.copytree(shelf.base("llama"), tmp_path / "base")
    stored = {one.name: one for one in stored_tensors(directory)}
    path = directory / "model.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(ValueError, match="header"):
        stored_bytes(str(directory), stored)


TYPES = (
    "albert", "bamba", "bart", "bert", "blip", "bloom", "clip", "cohere", "deberta-v2", "deepseek_v3", "distilbert",
    "electra", "falcon", "gemma", "gemma3", "gpt2", "gpt_neox", "gpt_oss", "granite", "jamba", "llama", "llava",
    "mamba", "marian", "mistral", "mixtral", "mpt", "olmo", "opt", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe",
    "qwen2_vl", "qwen3", "qwen3_moe", "qwen3_next", "resnet", "roberta", "siglip", "t5", "vit", "wav2vec2", "whisper",
    "xlm-roberta",
)  # fmt: skip


@pytest.mark.parametrize("model_type", sampled(TYPES, [*TYPES][::4]))
def test_the_map_is_what_transformers_loads(model_type: str, tmp_path: Path) -> None:
    with one_thread():
        checked = tensor_maps.check(model_type, tmp_path)
    assert not checked.skipped
    assert checked.parameters
    assert checked.wrong == ()


def test_a_release_with_another_loader_gives_no_map(shelf, monkeypatch, tmp_path) -> None:
    """The load itself then has to account for the base."""
    monkeypatch.delattr(transformers.core_model_loading, "WeightConverter")
    directory = str(shelf.base("llama"))
    with pytest.raises(NoMapError, match="transformers"), tensor_map.traced():
        pass
    llama = ModelClass(class_name="LlamaForCausalLM")
    assert accounting.account_for(directory, llama, "b", stored_tensors(directory)).map is None


def test_the_loader_is_as_it_was_after_a_recording(shelf: Shelf) -> None:
    loader = transformers.core_model_loading
    before = (loader.rename_source_key, loader.WeightTransform.add_tensor, loader.WeightConverter.convert)
    stored = stored_tensors(shelf.base("llama"))
    tensor_map.tensor_map(transformers.LlamaForCausalLM, str(shelf.base("llama")), stored, dtype=torch.float32)
    assert before == (loader.rename_source_key, loader.WeightTransform.add_tensor, loader.WeightConverter.convert)
