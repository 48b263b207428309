"""When expectation-failed fires, and what it says: its messages are in expectation-failed.txt."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from merge_gate.records.config import Expect
from merge_gate.records.files import AdapterConfig
from merge_gate.records.terms import Origin
from tests.support.judging.cases import DIGEST, Fire, evidence, files, judge, spec
from tests.support.judging.every_check import EveryCheck


class TestExpectationFailed(EveryCheck):
    FIRES = (
        Fire(("expect.r", "8", "16"), Origin.CONFIG, spec=spec(expect=Expect(r=8))),
        Fire(("expect.lora_alpha", "64", "32"), Origin.CONFIG, spec=spec(expect=Expect(lora_alpha=64.0))),
        Fire(("expect.peft_type", "'LOHA'", "'LORA'"), Origin.CONFIG, spec=spec(expect=Expect(peft_type="LOHA"))),
        Fire(("expect.base", "'acme/x'"), Origin.CONFIG, spec=spec(expect=Expect(base="acme/x"))),
        Fire(
            ("adapter_model.safetensors", "0" * 64, DIGEST),
            Origin.CONFIG,
            spec=spec(expect=Expect(sha256=(("adapter_model.safetensors", "0" * 64),))),
        ),
        Fire(("gone.bin",), Origin.CONFIG, spec=spec(expect=Expect(sha256=(("gone.bin", DIGEST),)))),
    )
    QUIET = (
        (evidence(), files(), spec(expect=Expect(r=16, lora_alpha=32.0, peft_type="LORA"))),
        (evidence(), files(), spec(expect=Expect(sha256=(("adapter_model.safetensors", DIGEST.upper()),)))),
    )


def test_expected_and_found_values_differ_to_the_last_digit() -> None:
    config = files(config={"lora_alpha": 1_000_000})
    (finding,) = judge(spec(expect=Expect(lora_alpha=1_000_001.0)), config, evidence())
    assert {"expect.lora_alpha", "1000001.0,", "1e+06"} <= set(finding.message.split())


def test_an_adapter_config_that_is_none_is_no_crash() -> None:
    judge(spec(expect=Expect(r=8)), dataclasses.replace(files(), config=AdapterConfig()), evidence())


@pytest.mark.parametrize("key", [one.name for one in dataclasses.fields(Expect) if one.name != "sha256"])
def test_whatever_can_be_expected_is_compared(key: str) -> None:
    (finding,) = judge(spec(expect=Expect(**{key: "another"})), files(), evidence())
    assert (finding.check, f"expect.{key}" in finding.message) == ("expectation-failed", True)


@pytest.mark.parametrize("value", [None, [], {}, "16", 16.5, 1 << 80])
def test_odd_values_in_an_adapter_config_are_no_crash(value: Any) -> None:
    config = {"r": value, "lora_alpha": value, "peft_type": value, "init_lora_weights": value}
    findings = judge(spec(expect=Expect(r=8)), files(config=config), evidence())
    assert [finding.check for finding in findings] == ["expectation-failed"]
