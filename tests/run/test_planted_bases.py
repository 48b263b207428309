"""A run over bases of which one brings code that speaks for the worker: it reaches no verdict on another base."""

import json
import shutil
from typing import Any

import pytest

from tests.support.command import merge_gate, strict_json
from tests.support.faults import poison
from tests.support.models import Shelf

BASES = "first", "liar", "intruder", "forger", "senseless", "last"
SPEAKS_FOR = {"liar": (1, 5, 0), "intruder": (5, 0), "forger": (3,), "senseless": (4,)}
"""The adapters that have passed, as the code of these bases says when it is imported."""

PLANTED = """
import os, socket, sys
from transformers import LlamaForCausalLM
from merge_gate.records.measured import BaseFacts, Evidence, FileTensor, TensorMerge, TensorStats
from merge_gate.worker.channel import Channel
from merge_gate.records.refusals import Caught, Refusal
from merge_gate.worker.protocol import BaseLoading, Finished, Merged, MergeStarted, Unjudged

facts = BaseFacts(model=MODEL, revision=None, dtype="float32", quantization="none")
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
for number in NUMBERS:
    for event in (BaseLoading(group=number), MergeStarted(task=number), RESULT):
        parent.send(event)
parent.send(Finished())


class PlantedForCausalLM(LlamaForCausalLM):
    pass
"""


def _planted(name: str, numbers: tuple[int, ...]) -> str:
    """The code of a base. The forger is another one by its own words. The senseless one sends an odd exception."""
    model = "./first" if name == "forger" else f"./{name}"
    result = "Merged(task=number, evidence=evidence)"
    if name == "senseless":
        caught = 'Refusal(kind="worker_raised", fields={"error": Caught(kinds=(), text=""), "in_import": False})'
        result = f"Unjudged(task=number, refusal={caught})"
    return PLANTED.replace("NUMBERS", repr(numbers)).replace("MODEL", repr(model)).replace("RESULT", result)


@pytest.fixture(scope="module")
def report(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A broken adapter on four bases, of which two bring code."""
    place = tmp_path_factory.mktemp("planted")
    shutil.copytree(shelf.adapter("plain"), place / "adapter")
    poison("lora_B")(place / "adapter")
    for name in BASES:
        shutil.copytree(shelf.base("llama"), place / name)
    for name, numbers in SPEAKS_FOR.items():
        config = place / name / "config.json"
        auto_map = {"AutoModelForCausalLM": "modeling_planted.PlantedForCausalLM"}
        config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": auto_map}))
        (place / name / "modeling_planted.py").write_text(_planted(name, numbers))
    entries = [{"name": name, "path": "./adapter", "base": f"./{name}"} for name in BASES]
    (place / "gate.yml").write_text(json.dumps({"version": 1, "adapters": entries, "trust-remote-code": True}))
    merge_gate("run", "gate.yml", "--device", "cpu", cwd=place)
    return strict_json(place / "merge-gate-report" / "report.json")


@pytest.mark.slow
def test_code_of_a_base_changes_no_verdict_on_another_base(report: Any) -> None:
    assert report["complete"]
    verdicts = {one["name"]: (one["verdict"], one["cause"]) for one in report["adapters"]}
    assert verdicts["first"] == verdicts["last"] == ("failed", "adapter-nonfinite")
    assert verdicts["liar"] == ("passed", None), "it can lie about its own base: the evidence is good enough"


@pytest.mark.slow
def test_a_base_cannot_give_itself_the_name_of_another(report: Any) -> None:
    (forger,) = (one for one in report["adapters"] if one["name"] == "forger")
    assert (forger["verdict"], forger["base"]["model"]) == ("error", "./forger")
    (why,) = (one for one in forger["findings"] if one["check"] == "not-judged")
    assert "not the base ./forger" in why["message"]


@pytest.mark.slow
def test_a_reason_without_meaning_costs_its_own_adapter(report: Any) -> None:
    (senseless,) = (one for one in report["adapters"] if one["name"] == "senseless")
    assert senseless["verdict"] == "error"


@pytest.mark.slow
def test_a_worker_that_speaks_for_another_base_is_named(report: Any) -> None:
    (intruder,) = (one for one in report["adapters"] if one["name"] == "intruder")
    assert intruder["verdict"] == "error"
    (why,) = (one for one in intruder["findings"] if one["check"] == "not-judged")
    assert "not an event of the gate (BaseLoading of" in why["message"]
    assert "own code" in why["hint"]
