"""Runs of a base and its adapters: activations that leave the dtype, whose fault they are, and what does not run."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from merge_gate.engine.adapter_evidence import merge, merge_together
from merge_gate.engine.base.loaded_base import Base, ModelClass
from merge_gate.engine.base.made_up_inputs import candidates
from merge_gate.engine.forward.rounding import MergedModel
from merge_gate.engine.forward.run import MOST_NAMED, is_close, run_adapters, run_merged
from merge_gate.files.preflight import preflight
from merge_gate.judging.adapter_report import merged_report
from merge_gate.records.config import ForwardMode
from merge_gate.records.files import Entry
from merge_gate.records.measured import Evidence, Forward
from merge_gate.records.report import AdapterReport
from merge_gate.records.terms import Origin, Quantization, Verdict
from tests.support import methods
from tests.support.engine.local_bases import edited_adapter, load_local
from tests.support.engine.merges import merge_adapter, request_for, runs
from tests.support.engine.published import configured
from tests.support.faults import blow_up
from tests.support.gating import SPEC
from tests.support.judging.cases import files
from tests.support.models import Shelf, make_adapter, read_tensors, save_adapter, write_tensors

LLAMA = ModelClass(class_name="LlamaForCausalLM")
HEAD = "lm_head.weight"
LIMIT = torch.finfo(torch.float16).max


@pytest.fixture(scope="module")
def loud(shelf: Shelf) -> Base:
    """A base in float16 whose logits reach 27,000."""
    return load_local(str(shelf.base("llama-loud")), label="loud", model_class=LLAMA)


def llama(shelf: Shelf, **options: Any) -> Base:
    return load_local(str(shelf.base("llama")), label="base", model_class=LLAMA, **options)


def louder(shelf: Shelf, tmp_path: Path, factor: float) -> Path:
    """An adapter whose own head is so many times the base's."""
    directory = tmp_path / f"louder-{factor}"
    shutil.copytree(shelf.adapter("loud-base"), directory)
    blow_up(HEAD, factor)(directory)
    return directory


def merged(base: Base, values: dict[str, torch.Tensor]) -> MergedModel:
    return MergedModel(model=base.scratch(), values=values)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers for it
def test_the_figures_are_those_of_a_plain_forward(loud: Base, shelf: Shelf, tmp_path: Path) -> None:
    adapter = louder(shelf, tmp_path, 1.5)
    plain: Any = transformers.LlamaForCausalLM.from_pretrained(shelf.base("llama-loud"), dtype=torch.float16)
    _, inputs = next(candidates(plain))
    with torch.no_grad():
        of_base = float(plain(**inputs).logits.abs().max())
        unmerged = float(PeftModel.from_pretrained(plain, adapter).eval()(**inputs).logits.abs().max())
    forward = merge(request_for(loud, adapter)).forward
    assert (forward.ran, forward.why_not, forward.parameters_run) == (True, None, 1.0)
    assert (forward.largest_module, forward.largest_of_base, forward.largest) == ("lm_head", of_base, unmerged)
    assert forward.largest_allowed == LIMIT
    assert forward.nonfinite_module is None


def test_an_adapter_that_leaves_the_dtype_is_to_blame(loud: Base, shelf: Shelf, tmp_path: Path) -> None:
    evidence = merge(request_for(loud, louder(shelf, tmp_path, 3.0)))
    assert all(one.stats.finite for one in evidence.merges)
    assert (evidence.forward.nonfinite_origin, evidence.forward.nonfinite_module) == (Origin.ADAPTER, "lm_head")


def test_a_base_that_leaves_the_dtype_by_itself_is_to_blame(shelf: Shelf, tmp_path: Path) -> None:
    model: Any = transformers.LlamaForCausalLM.from_pretrained(shelf.base("llama-loud"), dtype=torch.float16)
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    model.save_pretrained(tmp_path)
    base = load_local(str(tmp_path), label="louder", model_class=LLAMA)
    forward = merge(request_for(base, shelf.adapter("plain"))).forward
    assert (forward.nonfinite_origin, forward.nonfinite_module) == (Origin.BASE, "lm_head")


def test_only_the_merged_model_can_be_to_blame(loud: Base, shelf: Shelf) -> None:
    forward = merge(request_for(loud, shelf.adapter("loud-base"))).forward
    assert not is_close(forward)
    head = loud.tensors[HEAD].detach()
    assert run_merged(loud, merged(loud, {HEAD: head * 3}), forward, ()).nonfinite_origin is Origin.MERGE
    finite = run_merged(loud, merged(loud, {HEAD: head * 1.5}), forward, ())
    assert (finite.nonfinite_origin, finite.largest_module) == (None, "lm_head")


def test_what_only_the_unmerged_adapter_exceeds_is_no_fault(loud: Base, shelf: Shelf, tmp_path: Path) -> None:
    """The merged model is what is served."""
    forward = merge(request_for(loud, louder(shelf, tmp_path, 3.0))).forward
    assert is_close(forward)
    assert run_merged(loud, merged(loud, {}), forward, ()).nonfinite_origin is None


def test_close_to_the_limit_the_merged_model_counts(loud: Base, shelf: Shelf, tmp_path: Path) -> None:
    forward = merge(request_for(loud, louder(shelf, tmp_path, 2.35))).forward
    assert LIMIT > forward.largest > 0.9 * LIMIT
    assert is_close(forward)
    assert is_close(replace(forward, nonfinite_origin=Origin.ADAPTER, largest=1.0))
    assert not is_close(replace(forward, largest=0.8 * LIMIT))


def test_the_largest_module_that_the_adapter_raises_is_known(loud: Base, shelf: Shelf, tmp_path: Path) -> None:
    """The base's own head returns more."""
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    directory = edited_adapter(shelf.adapter("loud-base"), tmp_path / "raising", lambda one: one[name].mul_(100.0))
    forward = merge(request_for(loud, directory)).forward
    assert (forward.largest_module, forward.raised_module) == ("lm_head", "model.layers.1.self_attn.v_proj")
    assert forward.raised_of_base < forward.raised < forward.largest


@pytest.mark.parametrize(("factor", "count"), [(3.0, 2), (torch.nan, 1)])
def test_a_merged_model_with_a_broken_weight_is_not_run(
    factor: float, count: int, loud: Base, shelf: Shelf, tmp_path: Path
) -> None:
    """The adapter ran, and its activations are not finite either. They are no fault of their own."""
    heard: list[bool] = []
    evidence = merge(request_for(loud, louder(shelf, tmp_path, factor), consumers=runs(on_run=heard.append)))
    assert evidence.forward.nonfinite_origin is Origin.ADAPTER
    assert heard == [True, False] * count


@pytest.mark.parametrize("adapter", ["plain", "modules-to-save", "dora-all-linear", "token-rows"])
def test_a_base_that_is_not_in_memory_runs_alike(shelf: Shelf, adapter: str) -> None:
    lazy = llama(shelf, is_mapped=False)
    expected, found = (merge(request_for(base, shelf.adapter(adapter))) for base in (llama(shelf), lazy))
    assert found.forward == expected.forward
    assert found.forward.ran
    assert not lazy.was_misread()


@pytest.mark.parametrize("is_hollow", [False, True])
def test_the_base_runs_once_for_all_adapters(shelf: Shelf, is_hollow: bool) -> None:
    base, calls = llama(shelf, is_mapped=not is_hollow), list[bool]()
    head = base.model.lm_head
    head.register_forward_hook(lambda module, *_: calls.append(module is head))  # scratch copies have it, too
    first, other, again = (
        merge(request_for(base, shelf.adapter(name), consumers=runs(tries_base=True)))
        for name in ("plain", "modules-to-save", "plain")
    )
    assert first.forward.ran
    assert other.forward.ran
    assert again.forward == first.forward
    assert sum(calls) == 1
    if is_hollow:  # what it returned then counts no more
        float(base.tensors["lm_head.weight"][0, 0])
        assert base.was_misread()
        assert merge(request_for(base, shelf.adapter("plain"))).forward == first.forward
        assert sum(calls) == 2


def test_the_adapters_of_a_pass_run_together(shelf: Shelf) -> None:
    base = llama(shelf)
    names = ("plain", "modules-to-save", "dora-all-linear")
    alone = [merge(request_for(base, shelf.adapter(name))).forward for name in names]
    together = merge_together([request_for(base, shelf.adapter(name)) for name in names])
    assert [_of_the_run(one.forward) for one in together if one is not None] == [*map(_of_the_run, alone)]


def _of_the_run(forward: Forward) -> Forward:
    return replace(forward, layers_compared=0, largest_difference=None)  # other layers are compared in a pass


def test_every_trained_token_runs_whatever_runs_beside_it(shelf: Shelf, tmp_path: Path) -> None:
    """Of 25 trained tokens, the last one's embedding is too large for float16 behind the next layers."""
    ids = [*range(3, 27), 50]
    for name, tokens in (("many", ids), ("few", [3, 4])):
        make_adapter(shelf.base("llama"), tmp_path / name, trainable_token_indices={"embed_tokens": tokens})
    tensors = read_tensors(tmp_path / "many")
    (key,) = (name for name in tensors if "token" in name)
    tensors[key][-1] = 60_000.0
    write_tensors(tmp_path / "many", tensors)
    base = llama(shelf, dtype="float16")
    alone = [merge(request_for(base, tmp_path / name)).forward for name in ("many", "few")]
    assert [one.nonfinite_origin or (one.largest or 0) > 50_000 for one in alone] == [True, False]
    together = merge_together([request_for(base, tmp_path / name) for name in ("few", "many")])
    assert [_of_the_run(one.forward) for one in together if one is not None] == [*map(_of_the_run, reversed(alone))]


def test_a_run_changes_nothing_of_the_evidence(shelf: Shelf) -> None:
    base = llama(shelf)
    before = {name: tensor.clone() for name, tensor in base.tensors.items()}
    with_it, without = (merge(request_for(base, shelf.adapter("all-linear"), no_forward=why)) for why in ("", "off"))
    assert without.forward.why_not == "off"
    assert _bare(with_it) == _bare(without)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.tensors.items())


def _bare(evidence: Evidence) -> Evidence:
    """Without what a run has found."""
    compared = {name: getattr(evidence.forward, name) for name in ("layers_compared", "largest_difference")}
    return replace(evidence, seconds=0.0, forward=Forward(**compared))


def test_what_a_forward_changes_in_its_model_is_undone(shelf: Shelf) -> None:
    base = llama(shelf)
    model: Any = base.scratch()
    norm, head = model.model.norm, model.lm_head
    norm.register_buffer("calls", torch.zeros(2))
    norm.seen, calls = ["nothing"], norm.calls

    def change(module: nn.Module, _inputs: Any, _output: Any) -> None:
        assert not model.training
        norm.calls.add_(1)
        norm.seen.append("a call")
        norm.added, norm.eps = module, 1.0
        model.config.num_buckets = 8  # as Reformer
        head.weight.data = torch.zeros_like(head.weight)

    norm.register_forward_hook(change)
    before, weight = dict(vars(norm)), head.weight.data_ptr()
    model.train()
    (forward,) = run_adapters(base, [model])
    assert forward.ran
    assert vars(norm) == before | {"training": True}
    assert norm.seen == ["nothing"]
    assert not hasattr(model.config, "num_buckets")
    assert norm.calls is calls
    assert calls.sum() == 0
    assert (head.weight.data_ptr(), model.training) == (weight, True)


def test_a_model_that_writes_to_its_weights_changes_no_adapter(tmp_path: Path) -> None:
    """RWKV divides the weights of later layers before it runs. Here the adapter has all of these."""
    config = transformers.RwkvConfig(
        vocab_size=24, hidden_size=16, attention_hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        context_length=32, rescale_every=1,
    )  # fmt: skip
    transformers.RwkvForCausalLM(config).save_pretrained(tmp_path / "base")
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules=["receptance"], modules_to_save=["output", "value"])
    save_adapter(tmp_path / "base", tmp_path / "adapter", settings)
    base = load_local(str(tmp_path / "base"), label="base", model_class=ModelClass(class_name="RwkvForCausalLM"))
    ran, not_run = (merge(request_for(base, tmp_path / "adapter", no_forward=why)) for why in ("", "not wanted"))
    assert "writes to a weight" in (ran.forward.why_not or "")
    assert ran.different == ()
    assert ran.merges == not_run.merges


def test_an_attention_of_torch_runs(tmp_path: Path) -> None:
    """PEFT exchanges its parameters whenever the modules of the model are listed."""
    directory = methods.save_base("siglip", tmp_path / "base")
    adapter = methods.save_adapter(methods.find("lora-mha"), methods.load_base("siglip", directory), tmp_path / "a")
    base = load_local(str(directory), label="base", model_class=ModelClass(class_name="SiglipVisionModel"))
    ran, not_run = (merge(request_for(base, adapter, no_forward=why)) for why in ("", "not wanted"))
    assert ran.forward.ran, ran.forward
    assert ran.merges == not_run.merges


class _Foreign(nn.Linear):
    """A layer of code that is neither torch's nor transformers'."""


def test_code_that_comes_with_a_base_is_not_run(shelf: Shelf) -> None:
    base = llama(shelf)
    model: Any = base.model
    model.lm_head.__class__ = _Foreign
    (forward,) = run_adapters(base, [base.scratch()])
    assert not forward.ran
    assert "code that comes with a base" in (forward.why_not or "")


def test_a_quantized_base_is_not_run(shelf: Shelf) -> None:
    base = llama(shelf)
    base.facts = replace(base.facts, quantization=Quantization.BNB_4BIT)
    (forward,) = run_adapters(base, [base.scratch()])
    assert "quantized" in (forward.why_not or "")


def test_a_forward_that_raises_costs_only_the_measurement(shelf: Shelf) -> None:
    base = llama(shelf)
    model: Any = base.model
    model.config.num_attention_heads = model.model.layers[0].self_attn.head_dim = 7  # as a config that lies
    evidence = merge(request_for(base, shelf.adapter("plain")))
    assert evidence.refusal is None
    assert not evidence.forward.ran
    assert "raised" in (evidence.forward.why_not or "")


# --- what a run covers, and what `required` asks -------------------------------------------------------------------

LLAVA, SWITCH = "LlavaForConditionalGeneration", "SwitchTransformersForConditionalGeneration"
VISION = r".*vision_tower.*(v_proj|out_proj|fc2)"


def _llava() -> Any:
    """A model whose values grow in the vision tower."""
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = transformers.LlamaConfig(vocab_size=256, **size)
    vision = transformers.CLIPVisionConfig(image_size=32, patch_size=8, **size)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=5)
    )
    for name, one in model.named_parameters():
        if "vision_tower" in name and any(part in name for part in ("v_proj.weight", "out_proj.weight", "fc1.weight")):
            one.mul_(60)
    return model


def _switch() -> Any:
    config = transformers.SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=16,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=0, decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config)


@torch.no_grad()
def measured(root: Path, model_class: str, targets: str, scale: float, **settings: Any) -> Evidence:
    """An adapter of random factors, merged in float16. `settings` are changes of the base's config.json."""
    torch.manual_seed(0)
    model = {LLAVA: _llava, SWITCH: _switch}[model_class]()
    model.half().save_pretrained(root / "base")
    with methods.quiet():
        adapted: Any = get_peft_model(model.float(), LoraConfig(r=8, target_modules=targets))
    for name, one in adapted.named_parameters():
        if "lora_B" in name:
            one.normal_(0, scale)
    adapted.save_pretrained(root / "adapter")
    path = configured(root / "base", **settings)
    base = load_local(str(path), label="base", model_class=ModelClass(class_name=model_class))
    return merge_adapter(base, preflight(str(root / "adapter"), allow_pickle=False))


def judged(evidence: Evidence, forward: ForwardMode = ForwardMode.AUTO) -> AdapterReport:
    return merged_report(Entry(spec=replace(SPEC, forward=forward), dtype="float16", members=(files(),)), evidence)


def test_a_vision_adapter_that_overflows_fails(tmp_path: Path) -> None:
    """No weight is above 150."""
    evidence = measured(tmp_path, LLAVA, VISION, 140.0)
    assert max(one.stats.max_abs for one in evidence.merges) < 150
    forward, report = evidence.forward, judged(evidence)
    assert (forward.inputs, forward.modules, forward.modules_run) == ("all inputs", 6, 6)
    assert (forward.not_run, forward.why_not) == ((), None)
    assert (report.verdict, report.cause) == (Verdict.FAILED, "activation-nonfinite")


def test_a_model_without_a_picture_is_an_error_only_if_required(tmp_path: Path) -> None:
    """The token of a picture is none of the model's."""
    evidence = measured(tmp_path, LLAVA, VISION, 140.0, image_token_id=300, image_token_index=300)
    forward = evidence.forward
    assert (forward.inputs, forward.modules, forward.modules_run) == ("text", 6, 0)
    assert len(forward.not_run) == 6
    assert "pixel_values" in (forward.why_not or "")
    assert judged(evidence).verdict is Verdict.PASSED
    report = judged(evidence, ForwardMode.REQUIRED)
    assert (report.verdict, report.cause) == (Verdict.ERROR, "not-judged")
    assert all(name in report.findings[0].message for name in forward.not_run)


def test_experts_without_a_token_are_named_and_do_not_count(tmp_path: Path) -> None:
    evidence = measured(tmp_path, SWITCH, r".*experts.*(wi|wo)", 0.01)
    forward = evidence.forward
    assert forward.modules == forward.modules_run
    assert 0 < (forward.modules or 0) < 64
    assert len(forward.not_counted) == MOST_NAMED
    assert all("expert_" in name for name in forward.not_counted)
    assert (forward.not_run, forward.why_not) == ((), None)
    assert judged(evidence, ForwardMode.REQUIRED).verdict is Verdict.PASSED
