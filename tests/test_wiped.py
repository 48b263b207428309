"""A merge that turns weight matrices into zeros fails, unless the adapter's entry allows it."""

from pathlib import Path

import pytest
import torch
import yaml
from peft import IA3Config

from tests.support.command import entries, merge_gate
from tests.support.models import Shelf, read_tensors, save_adapter, write_tensors

ZEROS = {"dora": "lora_magnitude_vector", "ia3": "ia3_l"}


@pytest.fixture(scope="module")
def place(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wiped")
    dora = read_tensors(shelf.adapter("dora"))
    ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    save_adapter(shelf.base("llama"), place / "ia3", ia3)
    (place / "dora").mkdir()
    (place / "dora" / "adapter_config.json").write_bytes((shelf.adapter("dora") / "adapter_config.json").read_bytes())
    for name, tensors in (("dora", dora), ("ia3", read_tensors(place / "ia3"))):
        zeros = {key: torch.zeros_like(own) if ZEROS[name] in key else own for key, own in tensors.items()}
        write_tensors(place / name, zeros)
    return place


@pytest.mark.parametrize("policy", [(), ("--policy", "release")])
def test_a_merge_of_zeros_fails(policy: tuple[str, ...], place: Path, shelf: Shelf) -> None:
    base = shelf.base("llama")
    dtypes = "float32,bfloat16,float16"
    answer = merge_gate("run", "dora", "ia3", "--base", base, *policy, "--dtype", dtypes, cwd=place)
    assert answer.code == 1, answer.said
    for entry in entries(place / "merge-gate-report"):
        (finding,) = [one for one in entry["findings"] if one["severity"] == "error"]
        assert (entry["cause"], finding["check"]) == ("delta-norm", "delta-norm")
        assert finding["message"].startswith("the merge wipes out 4 tensors of the base: ")
        assert "wiped: warning" in finding["hint"]


def test_its_entry_can_allow_it(place: Path, shelf: Shelf) -> None:
    allowed = {"path": "./dora", "checks": {"delta-norm": {"wiped": "warning"}}}
    config = {"version": 1, "base": str(shelf.base("llama")), "adapters": [allowed, "./ia3"]}
    (place / "merge-gate.yml").write_text(yaml.safe_dump(config))
    answer = merge_gate("run", "--output", "allowed", cwd=place)
    assert answer.code == 1, answer.said
    assert [entry["verdict"] for entry in entries(place / "allowed")] == ["passed", "failed"]
