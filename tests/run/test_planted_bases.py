"""A run over bases of which one brings code that speaks for the worker: it reaches no verdict on another base."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.command import merge_gate, strict_json
from tests.support.faults import poison

if TYPE_CHECKING:
    from tests.support.models import Shelf

BASES = "first", "planted", "last"

PLANTED = """
import os, socket, sys
from transformers import LlamaForCausalLM
from merge_gate.records.measured import BaseFacts, Evidence, FileTensor, TensorMerge, TensorStats
from merge_gate.worker.channel import Channel
from merge_gate.worker.protocol import BaseLoading, DeviceChosen, Finished, Merged, MergeStarted

facts = BaseFacts(model="./base", revision=None, dtype="float32", quantization="none")
stats = TensorStats(name="w", dtype="float32", shape=(1,), numel=1, minimum=0.0, maximum=1.0)
evidence = Evidence(
    base=facts,
    peft_type="LORA",
    file_tensors=(FileTensor(stats=stats),),
    targeted=("m",),
    merges=(TensorMerge(module="m", stats=stats, dtype_max=1e38, changed=True),),
    parameters_checked=1,
    parameters_total=1,
)
parent = Channel(socket.socket(fileno=os.dup(int(sys.argv[3]))))
for number in (1, 0, 2):
    for event in (BaseLoading(group=number), MergeStarted(task=number), Merged(task=number, evidence=evidence)):
        parent.send(event)
parent.send(Finished())


class PlantedForCausalLM(LlamaForCausalLM):
    pass
"""
"""When the model is imported, all adapters have passed."""


@pytest.fixture(scope="module")
def report(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A broken adapter on three bases. The second one brings code."""
    place = tmp_path_factory.mktemp("planted")
    shutil.copytree(shelf.adapter("plain"), place / "adapter")
    poison("lora_B")(place / "adapter")
    for name in BASES:
        shutil.copytree(shelf.base("llama"), place / name)
    config = place / "planted" / "config.json"
    auto_map = {"AutoModelForCausalLM": "modeling_planted.PlantedForCausalLM"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": auto_map}))
    (place / "planted" / "modeling_planted.py").write_text(PLANTED)
    entries = [{"name": name, "path": "./adapter", "base": f"./{name}"} for name in BASES]
    (place / "gate.yml").write_text(json.dumps({"version": 1, "adapters": entries, "trust-remote-code": True}))
    merge_gate("run", "gate.yml", "--device", "cpu", cwd=place)
    return strict_json(place / "merge-gate-report" / "report.json")


def test_code_of_a_base_changes_no_verdict_on_another_base(report: Any) -> None:
    assert report["complete"]
    verdicts = {one["name"]: (one["verdict"], one["cause"]) for one in report["adapters"]}
    assert verdicts["first"] == verdicts["last"] == ("failed", "adapter-nonfinite")
    assert verdicts["planted"] == ("passed", None), "it can lie about its own base: the evidence is good enough"
