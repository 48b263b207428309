"""Bases whose configuration or code breaks a forward pass, through the real command: only the measurement is lost."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_gate.engine.base import direct_reads
from merge_gate.engine.forward import lockstep
from merge_gate.records.terms import Verdict
from tests.support.command import Answer, merge_gate, strict_json
from tests.support.engine import architectures
from tests.support.engine.published import configured
from tests.support.gating import Gate

RAN = ""
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a-size-that-is-a-word": ("bert", {"chunk_size_feed_forward": "x"}, "TypeError"),
    "a-size-of-zero": ("reformer", {"lsh_attn_chunk_length": 0}, "ZeroDivisionError"),
    "petabytes": ("longformer", {"attention_window": 10**15}, "can't allocate memory"),
    "more-experts-than-there-are": ("mixtral", {"num_experts_per_tok": 10**9}, "out of range"),
    "tuples": ("llama", {"return_dict": False}, "AttributeError"),
    "other-attention": ("llama", {"_attn_implementation": "flex_attention"}, "flex_attention"),
}
"""By a name: a model type, settings, and a part of the reason why it was not run."""

DEEDS = {
    "own": "code that comes with a base",
    "fork": "PermissionError",
    "leave": "SystemExit",
    "allocate": "MemoryError",
    "print": RAN,
}
"""What the code of a base does in its forward, and the same reason."""

CODE = """
import functools, os, torch
from transformers import LlamaForCausalLM as Changed

forward = Changed.forward

@functools.wraps(forward)
def changed(self, *positional, **named):
    if not isinstance(self.lm_head.weight, torch._subclasses.FakeTensor):
        deed = self.config.deed
        if deed == "fork":
            os.fork()
        elif deed == "leave":
            raise SystemExit(0)
        elif deed == "allocate":
            bytearray(100 << 30)
        elif deed == "print":
            print("::error::printed", flush=True)
            os.write(1, b"::error::written")
    return forward(self, *positional, **named)

Changed.forward = changed

class Own(Changed):
    def forward(self, *positional, **named):
        while True:
            pass
"""


def lay(place: Path, name: str, model_type: str, settings: dict[str, Any]) -> Path:
    """A base of this type with other settings, and an adapter in it."""
    source, base = place / model_type, place / name
    if not source.exists():
        architecture = architectures.build(model_type, source, torch.float32)
        architectures.save_lora(architecture, source, source / "adapter")
    shutil.copytree(source, base)
    return configured(base, **settings)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Answer], dict[str, dict[str, Any]]]]:
    """The answers of the command with these values of `--forward`, and the entries by their names."""
    place = tmp_path_factory.mktemp("bases")
    for name, (kind, settings, _) in CONFIGURATIONS.items():
        lay(place, name, kind, settings)
    for deed in DEEDS:
        own = {"AutoModelForCausalLM": f"modeling_llama_too.{'Own' if deed == 'own' else 'Changed'}"}
        code = lay(place, deed, "llama", {"deed": deed, "auto_map": own}) / "modeling_llama_too.py"
        code.write_text(CODE)
    for file, names in (("settings", CONFIGURATIONS), ("code", DEEDS)):
        adapters = [{"name": name, "path": f"./{name}/adapter", "base": f"./{name}"} for name in names]
        config = {"version": 1, "adapters": adapters, "trust-remote-code": file == "code"}
        (place / f"{file}.yml").write_text(json.dumps(config))
    return {forward: gated(place, forward) for forward in ("auto", "off")}


def gated(place: Path, forward: str) -> tuple[list[Answer], dict[str, dict[str, Any]]]:
    answers, entries = [], {}
    for file in ("settings", "code"):
        output = f"{forward}-{file}"
        answers.append(merge_gate("run", f"{file}.yml", "--forward", forward, "-o", output, cwd=place))
        entries |= {one["name"]: one for one in strict_json(place / output / "report.json")["adapters"]}
    return answers, entries


@pytest.mark.nightly
def test_a_base_that_breaks_the_run_costs_only_the_measurement(runs: Any) -> None:
    (answers, entries), (_, without) = runs["auto"], runs["off"]
    for answer in answers:
        assert answer.code == 0, answer.said
        assert "Traceback" not in answer.said
    for name, entry in entries.items():
        assert entry["verdict"] == "passed", (name, entry)
        for key in ("cause", "findings", "coverage", "files"):
            assert entry[key] == without[name][key], (name, key)


@pytest.mark.nightly
def test_the_reason_is_reported(runs: Any) -> None:
    _, entries = runs["auto"]
    reasons = {name: reason for name, (*_, reason) in CONFIGURATIONS.items()} | DEEDS
    for name, reason in reasons.items():
        forward = entries[name]["forward"]
        assert forward["ran"] is (reason == RAN), (name, forward)
        assert reason in (forward["why_not"] or ""), (name, forward)
        assert "0x" not in (forward["why_not"] or ""), "two runs have the same report"
        assert forward["missing"] is (name in {"petabytes", "allocate"}), (name, forward)


@pytest.mark.nightly
def test_no_output_of_a_base_reaches_the_log(runs: Any) -> None:
    assert all("::error::" not in answer.said for answers, _ in runs.values() for answer in answers)


def test_a_billion_layers_that_share_weights_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ALBERT calls the same layer again and again. Both limits are lowered, for the test to be fast."""
    monkeypatch.setattr(lockstep, "MOST_OPERATIONS", 2_000)
    monkeypatch.setattr(direct_reads, "MOST_CALLS", 1_000)
    base = lay(tmp_path, "many", "albert", {"num_hidden_layers": 10**9})
    judgement = Gate().judge(base / "adapter", base)
    assert judgement.verdict is Verdict.PASSED, judgement
    assert "more than 2000 operations" in (judgement.evidence.forward.why_not or "")
