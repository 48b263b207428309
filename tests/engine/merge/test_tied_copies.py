"""A tied weight of which one side is trained whole: its copy is a tensor of its own, and the other side is free.

The judge is PEFT's own forward pass before and after the merge, and after the merged model has been saved and loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch

from merge_gate.records.terms import Verdict
from tests.support import methods
from tests.support.gating import Bench, one_thread

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EMBEDDING, HEAD = "embed_tokens", "lm_head"
SHARED = {"llama-tied": (EMBEDDING, HEAD), "t5": ("shared", HEAD)}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with one_thread():
        yield Bench(tmp_path_factory.mktemp("tied-copies"))


def saved(base: str, targets: list[str], whole: list[str], directory: Path, bench: Bench) -> Path:
    model = methods.load_base(base, bench.base_directory(base, "float32"))
    torch.manual_seed(0)
    with methods.quiet():
        config: Any = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=whole)
        wrapped = peft.get_peft_model(model, config)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        wrapped.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("base", "targets", "whole", "sound"),
    [
        ("llama-tied", ["q_proj", HEAD], [EMBEDDING], True),
        ("llama-tied", ["q_proj", EMBEDDING], [HEAD], True),
        ("llama-tied", ["q_proj"], [EMBEDDING, HEAD], True),
        ("llama-tied", ["q_proj", HEAD], ["norm"], False),
        ("t5", ["wo", HEAD], ["shared"], False),  # the embeddings of encoder and decoder share the head's weight still
    ],
)
def test_the_other_side_of_a_trained_copy_is_free(
    base: str, targets: list[str], whole: list[str], sound: bool, tmp_path: Path, bench: Bench
) -> None:
    adapter = saved(base, targets, whole, tmp_path / "adapter", bench)
    inputs = methods.make_input(base)
    model = methods.load_adapter(bench.base(base, "float32"), adapter).eval()
    unmerged = methods.compute(model, inputs)
    with methods.quiet():
        merged: Any = model.merge_and_unload(safe_merge=True).eval()
        merged.save_pretrained(tmp_path / "merged")
    again = methods.load_base(base, tmp_path / "merged")
    for one in (merged, again):
        error = (methods.compute(one, inputs) - unmerged).norm() / unmerged.norm()
        assert (float(error) < 1e-5) is sound, error

    judgement = bench.gate.judge(adapter, bench.base_directory(base, "float32"))
    verdict = (Verdict.PASSED, None) if sound else (Verdict.FAILED, "tied-weights")
    assert (judgement.verdict, judgement.cause) == verdict, judgement


@pytest.mark.parametrize(("target", "whole"), [(HEAD, EMBEDDING), (EMBEDDING, HEAD)])
def test_both_sides_are_measured(target: str, whole: str, tmp_path: Path, bench: Bench) -> None:
    """float16 does not hold the delta of one side; the trained copy of the other is small."""
    adapter = saved("llama-tied", ["q_proj", target], [whole], tmp_path, bench)
    state = methods.load_file(adapter / methods.WEIGHTS)
    large = {name: tensor * 1e4 for name, tensor in state.items() if target in name and "lora_" in name}
    assert large
    methods.write_tensors(adapter, state | large)
    base = bench.base_directory("llama-tied", "float16")
    assert methods.nonfinite(methods.merge(bench.base("llama-tied", "float16"), adapter))
    judgement = bench.gate.judge(adapter, base)
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "merged-nonfinite"), judgement
    reason = next(finding for finding in judgement.findings if finding.check == "merged-nonfinite")
    assert reason.module is not None
    assert reason.module.endswith(target), reason
