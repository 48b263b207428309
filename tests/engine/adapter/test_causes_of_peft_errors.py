"""The cause that is named where PEFT raises with words of its own: what is at fault, not where it was noticed."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers

from merge_gate.engine.base.loaded_base import first_line
from merge_gate.records.terms import Origin, Verdict
from tests.support import methods
from tests.support.engine.local_bases import edited_base
from tests.support.faults import configure, drop, edit
from tests.support.gating import Bench, Gate, one_thread


def elsewhere(by: int) -> Callable[[Path], None]:
    """Indices of a larger weight."""
    return edit(lambda tensors: {name: one + by if "indices" in name else one for name, one in tensors.items()})


NO_SUCH = {"target_parameters": ["experts.no_such"]}


@pytest.mark.parametrize(
    ("name", "break_", "cause"),
    [
        ("vera-linear", drop("vera_A", "vera_B"), "keys-missing"),
        ("pvera-linear", drop("pvera_A", "pvera_B"), "keys-missing"),
        ("shira-linear", elsewhere(1000), "shape-mismatch"),
        ("vblora-topk-only", elsewhere(100), "shape-mismatch"),
        ("supertuning-linear", elsewhere(1000), "shape-mismatch"),
        ("lora-tokens", configure(trainable_token_indices=[1, -1]), "shape-mismatch"),
        ("lora-tokens", configure(trainable_token_indices=[5]), "shape-mismatch"),
        ("lora-tokens", configure(trainable_token_indices=["1", 5]), "config-invalid"),
        ("lora-tokens", configure(trainable_token_indices={"embed_tokens": [1.0, 5]}), "config-invalid"),
        ("lora-experts-one", configure(**NO_SUCH), "targets-not-found"),
        ("lora-experts-one", configure(**NO_SUCH, target_modules=None), "targets-not-found"),
        ("lora-linear", configure(lora_dropout=2.0), "config-invalid"),
    ],
)
def test_the_cause_is_what_is_at_fault(name, break_, cause, tmp_path, bench) -> None:
    case = methods.find(name)
    adapter = bench.adapter(case)
    broken = methods.write_variant(adapter, tmp_path, methods.load_file(adapter / methods.WEIGHTS))
    break_(broken)
    with pytest.raises(Exception, match=r"."):
        methods.merge(bench.base(case.base, "float32"), broken, safe=True)
    judgement = bench.gate.judge(broken, bench.base_directory(case.base, "float32"))
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, cause), judgement
    finding = next(one for one in judgement.findings if one.check == cause)
    assert finding.hint


@pytest.mark.parametrize("gathered", [True, False])
def test_osf_has_nothing_to_train_of_a_small_head(gathered: bool, tmp_path: Path, bench: Bench) -> None:
    """Its tensors are empty, and not because nobody has gathered them."""
    case = methods.make_case(
        "osf-head", "bert-classifier", "OSFConfig", effective_rank=4, target_modules=["query", "classifier"]
    )
    adapter = bench.adapter(case)
    state = methods.load_file(adapter / methods.WEIGHTS)
    assert tuple(state["base_model.model.classifier.osf_svd_params.S_low"].shape) == (0,)
    empty = {name: torch.empty(0) for name in state if "query" in name}
    judgement = bench.gate.judge(
        methods.write_variant(adapter, tmp_path, state if gathered else state | empty),
        bench.base_directory(case.base, "float32"),
    )
    verdict = (Verdict.PASSED, None) if gathered else (Verdict.FAILED, "shape-mismatch")
    assert (judgement.verdict, judgement.cause) == verdict, judgement


@pytest.mark.parametrize("name", ["trainable-tokens", "osf-linear"])
def test_a_file_of_zeros_that_changes_the_base_earns_a_warning(name: str, tmp_path: Path, bench: Bench) -> None:
    case = methods.find(name)
    adapter = bench.adapter(case)
    state = {name: torch.zeros_like(tensor) for name, tensor in methods.load_file(adapter / methods.WEIGHTS).items()}
    blank = methods.write_variant(adapter, tmp_path, state)
    base = bench.base(case.base, "float32")
    assert not methods.same(methods.merge(base, blank), methods.values(base))
    judgement = bench.gate.judge(blank, bench.base_directory(case.base, "float32"))
    assert "delta-norm" in judgement.warned, judgement
    assert any((one.check, one.origin) == ("delta-norm", Origin.ADAPTER) for one in judgement.findings)


def test_a_weight_that_peft_cannot_decompose_is_refused(tmp_path: Path, bench: Bench) -> None:
    case = methods.find("osf-linear")
    name = "model.layers.0.self_attn.q_proj.weight"
    base = bench.base_directory(case.base, "float32")
    directory = edited_base(base, tmp_path / "base", lambda tensors: tensors[name][3, 4:5].fill_(torch.nan))
    with pytest.raises(torch.linalg.LinAlgError):
        methods.load_adapter(methods.load_base(case.base, directory), bench.adapter(case))
    judgement = bench.gate.judge(bench.adapter(case), directory)
    assert judgement.verdict == Verdict.FAILED, judgement
    assert "not-mergeable" in {one.check for one in judgement.findings}


def test_frod_in_another_dtype_earns_a_warning(tmp_path: Path, bench: Bench) -> None:
    """PEFT decomposes the base anew, and the file's values do not belong to what it finds there."""
    case = methods.find("frod-linear")
    adapter, base = bench.adapter(case), bench.base("llama", "float32")
    other = methods.load_base("llama", bench.base_directory("llama", "float32")).to(torch.bfloat16)
    name = "model.layers.0.self_attn.q_proj.weight"
    ours, theirs = (
        methods.merge(one, adapter)[name].float() - methods.values(one)[name].float() for one in (base, other)
    )
    assert (ours - theirs).norm() / ours.norm() > 0.5, "PEFT saves all of it now: the warning can go"
    judgement = bench.gate.judge(adapter, bench.base_directory("llama", "float32"), dtype="bfloat16")
    assert "not-reproducible" in judgement.warned, judgement


def test_a_layer_inside_of_another_one_is_left_by_peft(tmp_path: Path) -> None:
    """A parameter of Mamba's mixer, and a linear layer of the mixer: PEFT's merge forgets the inner one."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 8}
    with one_thread(), methods.quiet():
        transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).save_pretrained(tmp_path / "base")
        load = transformers.MambaForCausalLM.from_pretrained
        config = peft.LoraConfig(r=2, target_modules=["x_proj"], target_parameters=["mixer.A_log"])
        peft.get_peft_model(load(tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
        merged = peft.PeftModel.from_pretrained(load(tmp_path / "base"), str(tmp_path / "adapter")).merge_and_unload()
        assert any("x_proj.lora_A" in name for name, _ in merged.named_parameters())
        judgement = Gate().judge(tmp_path / "adapter", tmp_path / "base")
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "not-mergeable"), judgement
    assert str(judgement.findings[0].module).endswith("x_proj")


def test_a_message_points_to_no_report_out_of_sight() -> None:
    """The texts are those of transformers 5.24 (modeling_utils.py, core_model_loading.py)."""
    sizes = "You set `ignore_mismatched_sizes` to `False`, thus raising an error. For details look at the above report!"
    conversion = (
        "We encountered some issues during automatic conversion of the weights. For details look at the `CONVERSION` "
        "entries of the above report!"
    )
    for text in (sizes, conversion):
        assert "report" not in first_line(RuntimeError(text))
        assert first_line(RuntimeError(text)) == text.partition(" For details")[0]
