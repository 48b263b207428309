"""When expectation-failed fires, and what it says: its messages are in expectation-failed.txt."""

import dataclasses
from typing import Any

import pytest

from merge_gate.records.config import Expect
from merge_gate.records.files import AdapterConfig
from tests.support.judging.cases import DIGEST, Given, evidence, files, judge, spec
from tests.support.judging.every_check import EveryCheck


class TestExpectationFailed(EveryCheck):
    FIRES = (
        Given(spec=spec(expect=Expect(r=8))),
        Given(spec=spec(expect=Expect(lora_alpha=64.0))),
        Given(spec=spec(expect=Expect(peft_type="LOHA"))),
        Given(spec=spec(expect=Expect(base="acme/x"))),
        Given(spec=spec(expect=Expect(sha256=(("adapter_model.safetensors", "0" * 64),)))),
        Given(spec=spec(expect=Expect(sha256=(("gone.bin", DIGEST),)))),
    )
    SITUATIONS = {
        "a value that differs in its last digit": Given(
            files=files(config={"lora_alpha": 1_000_000}), spec=spec(expect=Expect(lora_alpha=1_000_001.0))
        ),
        "a config that is none": Given(
            files=dataclasses.replace(files(), config=AdapterConfig()), spec=spec(expect=Expect(r=8))
        ),
    }
    QUIET = (
        Given(spec=spec(expect=Expect(r=16, lora_alpha=32.0, peft_type="LORA"))),
        Given(spec=spec(expect=Expect(sha256=(("adapter_model.safetensors", DIGEST.upper()),)))),
    )


@pytest.mark.parametrize("key", [one.name for one in dataclasses.fields(Expect) if one.name != "sha256"])
def test_whatever_can_be_expected_is_compared(key: str) -> None:
    (finding,) = judge(spec(expect=Expect(**{key: "another"})), files(), evidence())
    assert (finding.check, f"expect.{key}" in finding.message) == ("expectation-failed", True)


@pytest.mark.parametrize("value", [None, [], {}, "16", 16.5, 1 << 80])
def test_odd_values_in_an_adapter_config_are_no_crash(value: Any) -> None:
    config = {"r": value, "lora_alpha": value, "peft_type": value, "init_lora_weights": value}
    findings = judge(spec(expect=Expect(r=8)), files(config=config), evidence())
    assert [finding.check for finding in findings] == ["expectation-failed"]
